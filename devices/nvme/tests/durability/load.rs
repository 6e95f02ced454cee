//! The process that is killed: a controller on files, and a host that never stops writing to it.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use p2plab_nvme::spec::command::{Command, NSID_ALL, ReadWriteCdw12, admin, feature, io};
use p2plab_nvme::spec::registers::{PmrCap, PmrSts, offset, pmrwbm};
use p2plab_nvme::{NamespaceConfig, NvmeConfig, PmrConfig};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::driver::nvm::{command, identify_controller};
use super::driver::{Driver, Rig, wait_until};
use super::medium;
use super::pattern::{PMR, Random, fill};
use super::report::{BARRIER, FLUSHED, FLUSHING, LASTING, READY, Report, WRITTEN};
use super::{BATCH, NAMESPACES, PMR_FILE, PMR_SIZE, RECORD, RECORDS, REGIONS};

/// Threads that write blocks, each with a queue pair and a part of a namespace of its own.
const WRITERS: u64 = 4;

/// Most commands of a writer at a time; each has a part of the writer's blocks: their order does not matter.
const DEPTH: u64 = 6;

/// Most blocks of a write.
const MOST_BLOCKS: u64 = 32;

/// What a load is told.
pub struct Orders<'a> {
    pub folder: &'a Path,
    /// Counts from 1: writes of later rounds have higher numbers.
    pub round: u64,
    pub seed: u64,
    /// The last record of each PMR region.
    pub last_record: [u64; REGIONS as usize],
}

/// The controller on the files in `folder`.
pub fn config(folder: &Path) -> NvmeConfig {
    let mut config = NvmeConfig::new("durable");
    for ns in &NAMESPACES {
        let mut on_file = NamespaceConfig::file(folder.join(ns.name));
        on_file.block_size = 1 << ns.shift;
        config.namespaces.push(on_file);
    }
    config.pmr = Some(PmrConfig::file(folder.join(PMR_FILE), PMR_SIZE));
    config
}

/// Plugs it in, and checks that it claims what is tested here.
pub fn plug(rig: &mut Rig, folder: &Path, queues: u16) -> Driver {
    let mut d = rig.plug(config(folder));
    d.write32(offset::PMRCTL, 1);
    wait_until("the PMR", || (!pmr_status(&d).nrdy()).then_some(()));
    let cap = PmrCap::from_bits(d.read32(offset::PMRCAP));
    assert_eq!(cap.pmrwbm(), pmrwbm::READ_PMRSTS);
    d.enable();
    // A write cache; and one block is written whole or not at all. Where more is claimed, more is to be tested.
    let id = identify_controller(&mut d);
    assert_eq!(id.vwc & 1, 1);
    assert_eq!((id.awun_z.get(), id.awupf_z.get()), (0, 0));
    for queue in 1..=queues {
        d.create_queues(queue, 64, None).unwrap();
    }
    d
}

pub fn pmr_status(d: &Driver) -> PmrSts {
    PmrSts::from_bits(d.read32(offset::PMRSTS))
}

/// Where `record` of `region` is in the PMR.
pub fn place_of_record(region: u64, record: u64) -> u64 {
    (region * RECORDS + record % RECORDS) * RECORD
}

/// Writes until it is killed. The report's pipe is standard input, of which the test harness wants nothing.
pub fn run(orders: &Orders<'_>) {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    // Where one thread fails the others would go on, and be killed as if nothing had been.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("{panic}");
        std::process::exit(101);
    }));
    let pipe: File = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .unwrap()
        .into();
    medium::watch(orders.folder);
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, orders.folder, WRITERS as u16);
    let load = Load {
        pipe,
        cache: Cache::default(),
        flushes: AtomicU64::new(0),
    };
    load.report(READY, 0, 0, 0, 0);
    let cpu = d.on_a_thread(1, 0);
    std::thread::scope(|scope| {
        for number in 0..WRITERS {
            let mut writer = Writer {
                load: &load,
                d: d.on_a_thread(number as usize + 1, 512),
                number,
                random: Random(orders.seed + number),
                sequence: orders.round << 32 | number << 28,
            };
            scope.spawn(move || {
                loop {
                    writer.batch();
                }
            });
        }
        for (region, last) in (0..REGIONS).zip(orders.last_record) {
            let (load, d) = (&load, &cpu);
            let mut random = Random(orders.seed ^ !region);
            scope.spawn(move || {
                let mut next = last + 1;
                loop {
                    next = load.records(d, region, next, 1 + random.below(BATCH));
                }
            });
        }
        turn_the_cache(&load, &mut d, &mut Random(!orders.seed));
    });
}

/// The write cache, turned off and on by one thread and used by others: even while it may be on.
#[derive(Default)]
struct Cache(AtomicU64);

impl Cache {
    fn epoch(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Whether it has been off ever since `epoch`.
    fn was_off(&self, epoch: u64) -> bool {
        epoch % 2 == 1 && self.epoch() == epoch
    }

    fn turns(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What the threads share.
struct Load {
    pipe: File,
    cache: Cache,
    flushes: AtomicU64,
}

impl Load {
    fn report(&self, kind: u32, target: u32, first: u64, count: u64, sequence: u64) {
        let report = Report {
            kind,
            target,
            first,
            count,
            sequence,
        };
        report.send(&self.pipe);
    }

    /// A flush of `nsid` is about to be submitted; its number.
    fn flushing(&self, nsid: u32) -> u64 {
        let flush = self.flushes.fetch_add(1, Ordering::Relaxed);
        self.report(FLUSHING, nsid, 0, 0, flush);
        flush
    }

    fn flushed(&self, nsid: u32, flush: u64) {
        self.report(FLUSHED, nsid, 0, 0, flush);
    }

    /// The CPU writes `count` records from `next` on into the PMR, and makes them last; the record after them.
    fn records(&self, d: &Driver, region: u64, next: u64, count: u64) -> u64 {
        let mut data = [0; RECORD as usize];
        for record in next..next + count {
            fill(&mut data, PMR, region, record);
            d.store(d.pmr_address + place_of_record(region, record), &data);
        }
        assert_eq!(pmr_status(d).into_bits(), 0, "the barrier failed");
        self.report(BARRIER, region as u32, 0, count, next);
        next + count
    }
}

/// A thread that writes blocks.
struct Writer<'a> {
    load: &'a Load,
    d: Driver,
    number: u64,
    random: Random,
    sequence: u64,
}

/// A command under way.
enum Job {
    Write {
        first: u64,
        count: u64,
        sequence: u64,
        fua: bool,
    },
    Flush {
        nsid: u32,
        number: u64,
    },
}

impl Writer<'_> {
    fn nsid(&self) -> u32 {
        (self.number % NAMESPACES.len() as u64) as u32 + 1
    }

    /// Some commands, submitted together, and all their completions.
    fn batch(&mut self) {
        let first_page = self.d.next_free_page();
        let depth = 1 + self.random.below(DEPTH);
        let epoch = self.load.cache.epoch();
        let mut jobs = HashMap::new();
        for slot in 0..depth {
            let (command, job) = match self.random.below(16) {
                0 => self.flush(),
                kind => self.write(slot, kind < 3),
            };
            jobs.insert(self.d.push(1, command), job);
        }
        self.d.ring_doorbell(1);
        for _ in 0..depth {
            let completion = self.d.complete(1);
            let job = jobs.remove(&completion.cid.get()).unwrap();
            assert!(completion.status().is_success(), "{completion:?}");
            self.completed(job, epoch);
        }
        self.d.rewind(first_page);
    }

    fn completed(&self, job: Job, epoch: u64) {
        match job {
            Job::Flush { nsid, number } => self.load.flushed(nsid, number),
            Job::Write {
                first,
                count,
                sequence,
                fua,
            } => {
                let lasts = fua || self.load.cache.was_off(epoch);
                let kind = if lasts { LASTING } else { WRITTEN };
                self.load.report(kind, self.nsid(), first, count, sequence);
            }
        }
    }

    /// Of this namespace, or of all.
    fn flush(&mut self) -> (Command, Job) {
        let nsid = match self.random.below(4) {
            0 => NSID_ALL,
            _ => self.nsid(),
        };
        let command = Command {
            opcode: io::FLUSH,
            nsid: nsid.into(),
            ..Command::default()
        };
        let number = self.load.flushing(nsid);
        (command, Job::Flush { nsid, number })
    }

    /// In part `slot` of the blocks that are this thread's.
    fn write(&mut self, slot: u64, fua: bool) -> (Command, Job) {
        let nsid = self.nsid();
        let ns = &NAMESPACES[nsid as usize - 1];
        let mine = ns.blocks / WRITERS;
        let part = mine / DEPTH;
        let count = 1 + self.random.below(MOST_BLOCKS);
        let first = self.number * mine + slot * part + self.random.below(part - count + 1);
        self.sequence += 1;
        let sequence = self.sequence;

        let size = 1usize << ns.shift;
        let mut data = vec![0; count as usize * size];
        for (place, block) in (first..).zip(data.chunks_exact_mut(size)) {
            fill(block, nsid, place, sequence);
        }
        let buffer = self.d.pages((data.len() as u64).div_ceil(4096));
        self.d.store(buffer, &data);
        let (blocks, shift) = (count as u32, ns.shift);
        let mut command = command(&mut self.d, io::WRITE, first, blocks, shift, buffer);
        command.nsid = nsid.into();
        let cdw12 = ReadWriteCdw12::new().with_nlb_z(count as u16 - 1);
        command.cdw12 = cdw12.with_fua(fua).into_bits().into();
        let job = Job::Write {
            first,
            count,
            sequence,
            fua,
        };
        (command, job)
    }
}

/// Turns the write cache off and on, for as long as there is a process.
fn turn_the_cache(load: &Load, d: &mut Driver, random: &mut Random) {
    loop {
        std::thread::sleep(Duration::from_micros(random.below(10_000)));
        // What was completed before must last once it is off (NVM 4.1.3.2).
        let flush = load.flushing(NSID_ALL);
        set_cache(d, false);
        load.flushed(NSID_ALL, flush);
        load.cache.turns();
        std::thread::sleep(Duration::from_micros(random.below(10_000)));
        load.cache.turns();
        set_cache(d, true);
    }
}

/// Set Features: Volatile Write Cache.
pub fn set_cache(d: &mut Driver, on: bool) {
    let command = Command {
        opcode: admin::SET_FEATURES,
        cdw10: u32::from(feature::VOLATILE_WRITE_CACHE).into(),
        cdw11: u32::from(on).into(),
        ..Command::default()
    };
    d.admin(command).unwrap();
}
