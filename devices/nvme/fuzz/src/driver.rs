//! A host that keeps queues: it knows which completions are due.
//!
//! As long as it keeps the contract (queues where the controller reaches them and nobody else writes, doorbells that
//! tell the truth) it is [`exact`](Driver::exact): then each command is completed once and in time, and the controller
//! does not fail. What an input does to the contract ends that, until the controller starts over.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use p2plab_nvme::NvmeConfig;
use p2plab_nvme::spec::command::{Command, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, admin};
use p2plab_nvme::spec::completion::Completion;
use p2plab_nvme::spec::registers::{Cc, CmbMsc, Csts, PmrCtl, PmrMsc, offset, shst};
use zerocopy::{FromBytes, IntoBytes};

use crate::input::{FIRST_FREE_PAGE, REGION};
use crate::machine::{CMB_AT, HOST_AT, Machine, PAGE, PMR_AT, REGISTERS_AT, wait_until};

/// Entries of every submission queue.
const SQ_ENTRIES: u16 = 32;
/// Entries of every completion queue: fewer, so that they become full.
const CQ_ENTRIES: u16 = 8;
/// Where in the CMB queues begin.
const QUEUES_IN_CMB: u64 = REGION - 4 * PAGE;
/// Pages of the shadow doorbells and event indices.
pub const SHADOW: [u64; 2] = [host(12), host(13)];

/// How long this host waits for a controller that may have been told something else.
const PATIENCE: Duration = Duration::from_millis(100);

/// A pair of queues.
#[derive(Debug)]
struct Ring {
    id: u16,
    sq: u64,
    cq: u64,
    tail: u16,
    /// How far the controller has fetched, as it last said.
    fetched: u16,
    head: u16,
    phase: bool,
}

/// Page `number` of the host's memory.
const fn host(number: u64) -> u64 {
    HOST_AT + number * PAGE
}

/// A host with a started controller.
pub struct Driver {
    /// Where it is.
    pub machine: Machine,
    /// Whether the contract has been kept.
    pub exact: bool,
    /// Somewhere in memory, or on the medium, is an address that ends the contract for whoever follows it.
    spoilt: bool,
    /// What the controller was made with.
    pub config: NvmeConfig,
    rings: Vec<Ring>,
    /// Queue and CID of commands that must be completed.
    due: BTreeSet<(u16, u16)>,
    /// The same of Asynchronous Event Requests, which may be.
    held: BTreeSet<u16>,
    next_cid: u16,
    shadow: bool,
    queues_in_cmb: bool,
}

impl Driver {
    /// Starts a controller with `pairs` of I/O queues, in its CMB if `in_cmb` and if it may.
    pub fn new(config: NvmeConfig, pairs: u16, in_cmb: bool) -> Self {
        let queues_in_cmb = in_cmb && config.cmb.is_some_and(|cmb| cmb.sqs && cmb.cqs);
        let mut driver = Self {
            machine: Machine::new(config.clone()),
            exact: true,
            spoilt: false,
            config,
            rings: Vec::new(),
            due: BTreeSet::new(),
            held: BTreeSet::new(),
            next_cid: 0,
            shadow: false,
            queues_in_cmb,
        };
        driver.start(pairs);
        driver
    }

    /// Starts the controller over, whatever it was doing.
    pub fn start(&mut self, pairs: u16) {
        self.machine.program();
        self.machine.write32(offset::CC, 0);
        self.rings.clear();
        self.due.clear();
        self.held.clear();
        self.shadow = false;
        self.exact = !self.machine.wild && !self.spoilt;
        self.wait_status("CSTS.RDY to clear", |csts| !csts.rdy());
        if self.config.msix {
            self.machine.enable_msix();
        }
        self.open_windows();
        let (sq, cq) = (host(1), host(2));
        self.add_ring(0, sq, cq);
        // Events' completions are not traced.
        self.machine
            .expect_writes(cq, cq + 16 * u64::from(CQ_ENTRIES));
        let sizes = u32::from(SQ_ENTRIES - 1) | u32::from(CQ_ENTRIES - 1) << 16;
        self.machine.write32(offset::AQA, sizes);
        self.machine.write64(offset::ASQ, sq);
        self.machine.write64(offset::ACQ, cq);
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        self.machine.write32(offset::CC, cc.into_bits());
        self.wait_status("CSTS.RDY", |csts| csts.rdy());
        for id in 1..=pairs {
            self.create_pair(id);
        }
        assert!(
            !self.exact || self.rings.len() == usize::from(pairs) + 1,
            "no queues: {:#}",
            self.machine.function.dump()
        );
    }

    /// Turns CMB and PMR on, where commands find them at the addresses of their BARs.
    fn open_windows(&self) {
        let offset = self.config.cmb.map_or(0, |cmb| cmb.offset);
        let control = CmbMsc::new().with_cre(true).with_cmse(true);
        let control = control.with_cba((CMB_AT + offset) >> 12);
        self.machine.write64(offset::CMBMSC, control.into_bits());
        let control = PmrMsc::new().with_cmse(true).with_cba(PMR_AT >> 12);
        self.machine.write64(offset::PMRMSC, control.into_bits());
        let control = PmrCtl::new().with_en(true);
        self.machine.write32(offset::PMRCTL, control.into_bits());
    }

    /// An address that a command names: where queues and registers are, the contract ends.
    pub fn named(&mut self, address: u64) {
        if self.is_harmful(address) {
            self.exact = false;
        }
        if (REGISTERS_AT..REGISTERS_AT + (16 << 10)).contains(&address) {
            self.machine.wild = true;
            self.exact = false;
        }
    }

    fn is_harmful(&self, address: u64) -> bool {
        // What is contiguous may begin anywhere in the CMB and reach the queues in it.
        let in_cmb = self.queues_in_cmb && (CMB_AT..CMB_AT + 2 * REGION).contains(&address);
        in_cmb || (host(0)..host(FIRST_FREE_PAGE)).contains(&address)
    }

    /// Stores what commands may find and take for a list, in whatever way they read it.
    pub fn store(&mut self, at: u64, bytes: &[u8]) {
        for word in bytes.windows(8) {
            let Ok(word) = word.try_into().map(u64::from_le_bytes) else {
                continue;
            };
            self.spoilt |= self.is_harmful(word);
            self.named(word);
        }
        self.named(at);
        self.machine.store(at, bytes);
    }

    fn add_ring(&mut self, id: u16, sq: u64, cq: u64) {
        self.machine.store(cq, &[0; 16 * CQ_ENTRIES as usize]);
        self.rings.push(Ring {
            id,
            sq,
            cq,
            tail: 0,
            fetched: 0,
            head: 0,
            phase: true,
        });
    }

    /// Creates I/O queue pair `id`, if it is not there.
    pub fn create_pair(&mut self, id: u16) {
        if id == 0 || id > self.config.io_queues || self.rings.iter().any(|ring| ring.id == id) {
            return;
        }
        let pair = u64::from(id - 1);
        let in_cmb = CMB_AT + self.config.cmb.map_or(0, |cmb| cmb.offset) + QUEUES_IN_CMB;
        // In the CMB there is a page for each of three submission queues, and one for a completion queue.
        let (sq, cq) = match (self.queues_in_cmb, pair) {
            (true, 0) => (in_cmb, in_cmb + 3 * PAGE),
            (true, _) => (in_cmb + pair * PAGE, host(4 + 2 * pair)),
            (false, _) => (host(3 + 2 * pair), host(4 + 2 * pair)),
        };
        self.add_ring(id, sq, cq);
        let ring = self.rings.pop();
        let size = |entries: u16| {
            let size = CreateQueueCdw10::new().with_qid(id);
            size.with_qsize_z(entries - 1).into_bits().into()
        };
        let ien = CreateCqCdw11::new().with_pc(true).with_ien(true);
        let mut create = Command {
            opcode: admin::CREATE_IO_CQ,
            prp1: cq.into(),
            cdw10: size(CQ_ENTRIES),
            cdw11: ien.with_iv(id).into_bits().into(),
            ..Command::default()
        };
        if !self.execute(create) {
            return;
        }
        create.opcode = admin::CREATE_IO_SQ;
        create.prp1 = sq.into();
        create.cdw10 = size(SQ_ENTRIES);
        let contiguous = CreateSqCdw11::new().with_pc(true);
        create.cdw11 = contiguous.with_cqid(id).into_bits().into();
        if self.execute(create) {
            self.rings.extend(ring);
        }
    }

    /// Executes an admin command while nothing else is under way; whether it succeeded.
    pub fn execute(&mut self, command: Command) -> bool {
        self.wait();
        let Some(cid) = self.push(0, command) else {
            return false;
        };
        let completions = self.wait();
        let own = |(id, done): &&(u16, Completion)| *id == 0 && done.cid.get() == cid;
        let done = completions.iter().find(own);
        let success = done.is_some_and(|(_, done)| done.status().is_success());
        self.follow(&command, success);
        success
    }

    /// What becomes of the queues by a command of the input.
    fn follow(&mut self, command: &Command, success: bool) {
        if !success {
            return;
        }
        match command.opcode {
            admin::DELETE_IO_SQ => {
                let qid = (command.cdw10.get() & 0xffff) as u16;
                self.rings.retain(|ring| ring.id != qid);
                self.due.retain(|(id, _)| *id != qid);
            }
            admin::DOORBELL_BUFFER_CONFIG => {
                self.shadow = true;
                if [command.prp1.get(), command.prp2.get()] != SHADOW {
                    self.exact = false;
                }
            }
            _ => {}
        }
    }

    /// Number of I/O queue pairs.
    pub fn pairs(&self) -> usize {
        self.rings.len().saturating_sub(1)
    }

    /// Puts a command into the queue of the `index`th pair (0 is the admin queue) without ringing; its CID.
    pub fn push(&mut self, index: usize, mut command: Command) -> Option<u16> {
        let full = |ring: &Ring| (ring.tail + 1) % SQ_ENTRIES == ring.fetched;
        if full(self.rings.get(index)?) {
            self.wait();
        }
        let ring = self.rings.get_mut(index)?;
        if full(ring) {
            return None;
        }
        let cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1);
        command.cid = cid.into();
        let address = ring.sq + u64::from(ring.tail) * 64;
        ring.tail = (ring.tail + 1) % SQ_ENTRIES;
        if ring.id == 0 && command.opcode == admin::ASYNC_EVENT_REQUEST {
            self.held.insert(cid);
        } else {
            self.due.insert((ring.id, cid));
        }
        self.machine.store(address, command.as_bytes());
        Some(cid)
    }

    /// Tells the controller of all that was pushed.
    pub fn ring(&mut self) {
        for index in 0..self.rings.len() {
            let ring = &self.rings[index];
            let (id, tail) = (ring.id, ring.tail);
            self.doorbell(2 * u64::from(id), tail);
        }
    }

    fn doorbell(&mut self, index: u64, value: u16) {
        if self.shadow && index > 1 {
            let at = SHADOW[0] + 4 * index;
            self.machine.store(at, &u32::from(value).to_le_bytes());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        }
        let at = offset::DOORBELLS + 4 * index;
        self.machine.write32(at, value.into());
    }

    /// Rings, and waits for all completions that are due, or, where that cannot be told, takes those that are there.
    pub fn wait(&mut self) -> Vec<(u16, Completion)> {
        self.ring();
        let mut completions = Vec::new();
        if !self.exact {
            self.take(&mut completions);
            return completions;
        }
        let done = wait_until(|| {
            self.take(&mut completions);
            self.due.is_empty().then_some(())
        });
        assert!(
            done.is_some(),
            "commands (queue, CID) {:?} are not completed: {:#}",
            self.due,
            self.machine.function.dump()
        );
        self.check_status();
        completions
    }

    /// Takes the completions that are there.
    fn take(&mut self, completions: &mut Vec<(u16, Completion)>) {
        for index in 0..self.rings.len() {
            let ring = &mut self.rings[index];
            let mut taken = 0;
            while taken < CQ_ENTRIES {
                let entry: [u8; 16] = self.machine.load(ring.cq + u64::from(ring.head) * 16);
                let Ok(completion) = Completion::read_from_bytes(&entry) else {
                    break;
                };
                if completion.phase() != ring.phase {
                    break;
                }
                taken += 1;
                ring.head += 1;
                if ring.head == CQ_ENTRIES {
                    (ring.head, ring.phase) = (0, !ring.phase);
                }
                ring.fetched = completion.sqhd.get() % SQ_ENTRIES;
                let cid = completion.cid.get();
                let known =
                    self.due.remove(&(ring.id, cid)) || (ring.id == 0 && self.held.remove(&cid));
                assert!(
                    !self.exact || (known && completion.sqid.get() == ring.id),
                    "queue {} has a completion of no command: {completion:?}",
                    ring.id
                );
                completions.push((ring.id, completion));
            }
            if taken > 0 {
                let (id, head) = (ring.id, ring.head);
                self.doorbell(2 * u64::from(id) + 1, head);
            }
        }
    }

    /// CSTS.CFS is for a broken contract only.
    pub fn check_status(&self) {
        if self.exact && self.machine.status().cfs() {
            panic!(
                "fatal, and the contract was kept: {:#}",
                self.machine.function.dump()
            );
        }
    }

    fn wait_status(&mut self, what: &str, condition: impl Fn(Csts) -> bool) {
        let wild = self.machine.wild;
        let start = Instant::now();
        let done = wait_until(|| {
            let csts = self.machine.status();
            // A command that names registers may have changed them under this host's hands.
            let hopeless = wild && start.elapsed() > PATIENCE;
            (condition(csts) || (!self.exact && csts.cfs()) || hopeless).then_some(())
        });
        assert!(
            done.is_some(),
            "waited for {what}: {:#}",
            self.machine.function.dump()
        );
    }

    /// Shuts the controller down. Its I/O queues are dead then.
    pub fn shut_down(&mut self) {
        self.wait();
        let cc = self.machine.read32(offset::CC);
        let cc = Cc::from_bits(cc).with_shn(1);
        self.machine.write32(offset::CC, cc.into_bits());
        if self.exact {
            self.wait_status("CSTS.SHST", |csts| csts.shst() == shst::COMPLETE);
        }
        self.exact = false;
    }
}
