//! A mini driver: what a host does with a controller, in the test's own process and without a guest.
//!
//! Host memory is one memfd at bus address 0; both controllers of a [`Rig`] see it. Waits are polls of memory
//! or registers with a deadline.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set up its rig has failed"
)]

mod management;
pub mod nvm;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use p2plab_nvme::spec::command::{
    Command, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, admin, io,
};
use p2plab_nvme::spec::completion::Completion;
use p2plab_nvme::spec::registers::{Cc, CmbMsc, Csts, offset};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{CmbConfig, NamespaceConfig, NvmeConfig, NvmeController};
use p2plab_pcie::{Access, BarMemory, Fabric, FabricBuilder, Function};
use zerocopy::{FromBytes, IntoBytes};

pub const HOST_MEMORY: u64 = 64 << 20;
pub const CMB_SIZE: u64 = 4 << 20;
pub const NAMESPACE_SIZE: u64 = 32 << 20;
const DEADLINE: Duration = Duration::from_secs(10);

/// Calls `condition` until it gives something.
pub fn wait_until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
        std::thread::yield_now();
    }
}

pub fn config(serial: &str) -> NvmeConfig {
    let mut config = NvmeConfig::new(serial);
    config
        .namespaces
        .push(NamespaceConfig::memory(NAMESPACE_SIZE));
    config.cmb = Some(CmbConfig::new(CMB_SIZE));
    config
}

/// A switch with controllers below it, and the host's memory.
pub struct Rig {
    pub fabric: Arc<Fabric>,
    pub memory: Arc<BarMemory>,
    drivers: u64,
}

impl Rig {
    pub fn new() -> Self {
        let mut builder = FabricBuilder::new();
        builder.root_port("rp0").unwrap();
        builder.switch("sw0", "rp0").unwrap();
        builder.downstream_port("sw0", "dp0").unwrap();
        builder.downstream_port("sw0", "dp1").unwrap();
        let memory = Arc::new(BarMemory::anonymous("host", HOST_MEMORY).unwrap());
        Self {
            fabric: builder.build(),
            memory,
            drivers: 0,
        }
    }

    /// Plugs a controller in and connects it; its BARs are programmed and decode.
    pub fn plug(&mut self, config: NvmeConfig) -> Driver {
        self.connect(Arc::new(NvmeController::new(config).unwrap()))
    }

    /// The same for a controller that was unplugged, into the next port.
    pub fn plug_again(&mut self, driver: Driver) -> Driver {
        self.connect(driver.controller)
    }

    fn connect(&mut self, controller: Arc<NvmeController>) -> Driver {
        let number = self.drivers;
        self.drivers += 1;
        let (port, name) = (format!("dp{number}"), format!("nvme{number}"));
        let function = self.fabric.plug(&port, &name, controller.clone()).unwrap();
        function.connect();
        let file: OwnedFd = self.memory.file().try_clone().unwrap().into();
        let access = Access {
            read: true,
            write: true,
        };
        function
            .map_host_memory(0, HOST_MEMORY, access, Some(file), 0)
            .unwrap();
        let cmb_address = 0x20_0000_0000 + number * 0x1_0000_0000;
        let pmr_address = 0x30_0000_0000 + number * 0x1_0000_0000;
        let mut driver = Driver {
            controller,
            function,
            memory: Arc::clone(&self.memory),
            cmb_address,
            pmr_address,
            next_page: 0x1000 + number * HOST_MEMORY / 2,
            next_cid: 0,
            shadow: None,
            rings: 0,
            io_queues: Vec::new(),
            admin: Ring::default(),
        };
        driver.program_config_space(0x10_0000_0000 + number * 0x1_0000);
        driver
    }
}

/// A pair of queues.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    pub id: u16,
    pub sq: u64,
    pub cq: u64,
    pub entries: u16,
    pub tail: u16,
    pub head: u16,
    phase: bool,
}

pub struct Driver {
    pub controller: Arc<NvmeController>,
    pub function: Arc<Function>,
    pub memory: Arc<BarMemory>,
    pub cmb_address: u64,
    pub pmr_address: u64,
    pub admin: Ring,
    pub io_queues: Vec<Ring>,
    /// Shadow Doorbell and EventIdx buffers, where they are in use.
    pub shadow: Option<(u64, u64)>,
    /// Doorbell registers of I/O queues written.
    pub rings: u64,
    next_page: u64,
    next_cid: u16,
}

impl Driver {
    /// Moves a doorbell of queue `id`, the tail's or, `head`, the completion queue's, to `new`. With shadow doorbells
    /// the register is written only if the controller has asked for it, as Linux does it (nvme_dbbuf_need_event).
    fn move_doorbell(&mut self, id: u16, head: bool, new: u16) {
        let index = 2 * u64::from(id) + u64::from(head);
        if let Some((doorbells, events)) = self.shadow.filter(|_| id != 0) {
            let word = |bytes: Vec<u8>| u32::from_le_bytes(bytes.try_into().unwrap()) as u16;
            let old = word(self.load(doorbells + 4 * index, 4));
            self.store(doorbells + 4 * index, &u32::from(new).to_le_bytes());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let event = word(self.load(events + 4 * index, 4));
            if new.wrapping_sub(event).wrapping_sub(1) >= new.wrapping_sub(old) {
                return;
            }
        }
        self.rings += u64::from(id != 0);
        self.write32(offset::DOORBELLS + 4 * index, new.into());
    }

    fn program_config_space(&mut self, registers: u64) {
        let write = |at: u64, value: u32| {
            self.function
                .config_write(at, &value.to_le_bytes())
                .unwrap();
        };
        write(0x10, (registers & 0xffff_ffff) as u32);
        write(0x14, (registers >> 32) as u32);
        write(0x18, (self.pmr_address & 0xffff_ffff) as u32);
        write(0x1c, (self.pmr_address >> 32) as u32);
        write(0x20, (self.cmb_address & 0xffff_ffff) as u32);
        write(0x24, (self.cmb_address >> 32) as u32);
        self.set_command(0x6);
    }

    /// The same host on another thread: it takes I/O queue pair `index` along, as its only one, and `pages` pages.
    pub fn on_a_thread(&mut self, index: usize, pages: u64) -> Driver {
        Driver {
            controller: Arc::clone(&self.controller),
            function: Arc::clone(&self.function),
            memory: Arc::clone(&self.memory),
            io_queues: vec![self.queue(index).clone()],
            admin: Ring::default(),
            next_page: self.pages(pages),
            next_cid: 0,
            ..*self
        }
    }

    /// The Command register: Memory Space Enable 2, Bus Master Enable 4.
    pub fn set_command(&self, value: u16) {
        self.function.config_write(4, &value.to_le_bytes()).unwrap();
    }

    /// Pages of host memory that nobody else has.
    pub fn pages(&mut self, count: u64) -> u64 {
        let address = self.next_page;
        self.next_page += count * 4096;
        assert!(self.next_page <= HOST_MEMORY);
        address
    }

    pub fn read32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, at, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    pub fn write32(&self, at: u64, value: u32) {
        self.function
            .bar_write(0, at, &value.to_le_bytes())
            .unwrap();
    }

    pub fn write64(&self, at: u64, value: u64) {
        self.write32(at + 4, (value >> 32) as u32);
        self.write32(at, (value & 0xffff_ffff) as u32);
    }

    pub fn status(&self) -> Csts {
        Csts::from_bits(self.read32(offset::CSTS))
    }

    pub fn wait_status(&self, what: &str, condition: impl Fn(Csts) -> bool) {
        wait_until(what, || condition(self.status()).then_some(()));
    }

    /// Admin queues and CC.EN, as a driver's probe does it.
    pub fn enable(&mut self) {
        let entries = 32;
        self.admin = self.ring(0, entries, None, None);
        self.io_queues.clear();
        let size = u32::from(entries - 1);
        self.write32(offset::AQA, size | size << 16);
        self.write64(offset::ASQ, self.admin.sq);
        self.write64(offset::ACQ, self.admin.cq);
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        self.write32(offset::CC, cc.into_bits());
        self.wait_status("CSTS.RDY", |csts| csts.rdy());
    }

    pub fn disable(&mut self) {
        self.write32(offset::CC, 0);
        self.wait_status("CSTS.RDY to clear", |csts| !csts.rdy());
    }

    /// Turns the CMB on, as Linux does.
    pub fn enable_cmb(&self) {
        self.write32(offset::CMBMSC, 1);
        assert_ne!(self.read32(offset::CMBSZ), 0);
        let control = CmbMsc::new().with_cre(true).with_cmse(true);
        self.write64(
            offset::CMBMSC,
            control.with_cba(self.cmb_address >> 12).into_bits(),
        );
        assert_eq!(self.read32(offset::CMBSTS), 0);
    }

    fn ring(&mut self, id: u16, entries: u16, sq: Option<u64>, cq: Option<u64>) -> Ring {
        let pages = (u64::from(entries) * 64).div_ceil(4096);
        let sq = sq.unwrap_or_else(|| self.pages(pages));
        let cq = cq.unwrap_or_else(|| self.pages(pages));
        self.store(cq, &vec![0; usize::from(entries) * 16]);
        Ring {
            id,
            sq,
            cq,
            entries,
            tail: 0,
            head: 0,
            phase: true,
        }
    }

    /// Creates I/O queue pair `id`, its submission queue at `sq` or in host memory.
    pub fn create_queues(&mut self, id: u16, entries: u16, sq: Option<u64>) -> Result<(), Status> {
        self.create_queues_at(id, entries, sq, None)
    }

    /// The same with the completion queue at `cq`.
    pub fn create_queues_at(
        &mut self,
        id: u16,
        entries: u16,
        sq: Option<u64>,
        cq: Option<u64>,
    ) -> Result<(), Status> {
        let ring = self.ring(id, entries, sq, cq);
        let size = CreateQueueCdw10::new()
            .with_qid(id)
            .with_qsize_z(entries - 1)
            .into_bits();
        let mut cq = Command {
            opcode: admin::CREATE_IO_CQ,
            ..Command::default()
        };
        cq.prp1 = ring.cq.into();
        cq.cdw10 = size.into();
        cq.cdw11 = CreateCqCdw11::new()
            .with_pc(true)
            .with_ien(true)
            .with_iv(id)
            .into_bits()
            .into();
        self.admin(cq)?;
        let mut sq = Command {
            opcode: admin::CREATE_IO_SQ,
            ..Command::default()
        };
        sq.prp1 = ring.sq.into();
        sq.cdw10 = size.into();
        sq.cdw11 = CreateSqCdw11::new()
            .with_pc(true)
            .with_cqid(id)
            .into_bits()
            .into();
        self.admin(sq)?;
        self.io_queues.push(ring);
        Ok(())
    }

    /// Queue pair `index`: 0 is the admin queues.
    pub fn queue(&mut self, index: usize) -> &mut Ring {
        if index == 0 {
            &mut self.admin
        } else {
            &mut self.io_queues[index - 1]
        }
    }

    /// Puts a command into queue pair `index` without ringing.
    pub fn push(&mut self, index: usize, mut command: Command) -> u16 {
        let cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1);
        command.cid = cid.into();
        let ring = self.queue(index);
        let address = ring.sq + u64::from(ring.tail) * 64;
        ring.tail = (ring.tail + 1) % ring.entries;
        self.store(address, command.as_bytes());
        cid
    }

    pub fn ring_doorbell(&mut self, index: usize) {
        let ring = self.queue(index).clone();
        self.move_doorbell(ring.id, false, ring.tail);
    }

    pub fn submit(&mut self, index: usize, command: Command) -> u16 {
        let cid = self.push(index, command);
        self.ring_doorbell(index);
        cid
    }

    /// The next completion, if it is there.
    pub fn poll(&mut self, index: usize) -> Option<Completion> {
        let ring = self.queue(index);
        let address = ring.cq + u64::from(ring.head) * 16;
        let completion = self.load(address, size_of::<Completion>());
        let completion = Completion::read_from_bytes(&completion).unwrap();
        let ring = self.queue(index);
        if completion.phase() != ring.phase {
            return None;
        }
        ring.head += 1;
        if ring.head == ring.entries {
            (ring.head, ring.phase) = (0, !ring.phase);
        }
        let (id, head) = (ring.id, ring.head);
        self.move_doorbell(id, true, head);
        Some(completion)
    }

    pub fn complete(&mut self, index: usize) -> Completion {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(completion) = self.poll(index) {
                return completion;
            }
            assert!(
                Instant::now() < deadline,
                "no completion: {:#}",
                self.function.dump()
            );
            std::thread::yield_now();
        }
    }

    /// Executes one command: dword 0 of its completion, or its status without flags.
    pub fn execute(&mut self, index: usize, command: Command) -> Result<u32, Status> {
        let cid = self.submit(index, command);
        let completion = self.complete(index);
        assert_eq!(completion.cid.get(), cid);
        match completion.status() {
            status if status.is_success() => Ok(completion.dw0.get()),
            status => Err(Status(status.code())),
        }
    }

    pub fn admin(&mut self, command: Command) -> Result<u32, Status> {
        self.execute(0, command)
    }

    /// The BAR of the CMB or PMR that `address` is in, and where.
    fn bar(&self, address: u64) -> (u8, u64) {
        match address.checked_sub(self.pmr_address) {
            Some(offset) => (2, offset),
            None => (4, address - self.cmb_address),
        }
    }

    /// Host memory or, by the CPU, a CMB or PMR.
    pub fn store(&self, address: u64, data: &[u8]) {
        if address < HOST_MEMORY {
            assert!(self.memory.write(address, data));
        } else {
            let (bar, offset) = self.bar(address);
            self.function.bar_write(bar, offset, data).unwrap();
        }
    }

    pub fn load(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        if address < HOST_MEMORY {
            assert!(self.memory.read(address, &mut data));
        } else {
            let (bar, offset) = self.bar(address);
            self.function.bar_read(bar, offset, &mut data).unwrap();
        }
        data
    }

    /// The PRPs of the pages `pages`; lists go to host memory.
    pub fn prps(&mut self, pages: &[u64]) -> (u64, u64) {
        if pages.len() <= 2 {
            return (pages[0], pages.get(1).copied().unwrap_or(0));
        }
        let mut rest = &pages[1..];
        let first = self.pages(1);
        let mut list = first;
        loop {
            let chained = rest.len() > 512;
            let (here, after) = rest.split_at(if chained { 511 } else { rest.len() });
            let mut entries: Vec<u64> = here.to_vec();
            let next = if chained { self.pages(1) } else { 0 };
            if chained {
                entries.push(next);
            }
            self.store(list, entries.as_bytes());
            if !chained {
                return (pages[0], first);
            }
            (list, rest) = (next, after);
        }
    }

    /// Read or Write of `blocks` blocks of 512 bytes from `slba`, in contiguous memory at `address`.
    pub fn transfer(&mut self, opcode: u8, slba: u64, blocks: u32, address: u64) -> Command {
        let pages: Vec<u64> = (0..(u64::from(blocks) * 512).div_ceil(4096))
            .map(|i| address + i * 4096)
            .collect();
        let (prp1, prp2) = self.prps(&pages);
        Command {
            opcode,
            nsid: 1.into(),
            prp1: prp1.into(),
            prp2: prp2.into(),
            cdw10: ((slba & 0xffff_ffff) as u32).into(),
            cdw11: ((slba >> 32) as u32).into(),
            cdw12: (blocks - 1).into(),
            ..Command::default()
        }
    }

    pub fn read(&mut self, slba: u64, blocks: u32, address: u64) -> Result<u32, Status> {
        let command = self.transfer(io::READ, slba, blocks, address);
        self.execute(1, command)
    }

    pub fn write(&mut self, slba: u64, blocks: u32, address: u64) -> Result<u32, Status> {
        let command = self.transfer(io::WRITE, slba, blocks, address);
        self.execute(1, command)
    }

    /// Enables MSI-X with all vectors unmasked; the eventfd of `vector` is returned.
    pub fn enable_msix(&self, vector: u16) -> File {
        use rustix::event::{EventfdFlags, eventfd};
        let event: File = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .unwrap()
            .into();
        self.function
            .set_msix_trigger(vector, Some(event.try_clone().unwrap()))
            .unwrap();
        for vector in 0..u64::from(self.function.msix_vectors()) {
            self.write32(0x2000 + vector * 16, 0xfee0_0000);
            self.write32(0x2000 + vector * 16 + 12, 0);
        }
        let capability = self.capability(0x11);
        let mut control = [0; 2];
        self.function
            .config_read(capability + 2, &mut control)
            .unwrap();
        let control = u16::from_le_bytes(control) | 1 << 15;
        self.function
            .config_write(capability + 2, &control.to_le_bytes())
            .unwrap();
        event
    }

    pub fn capability(&self, id: u8) -> u64 {
        let byte = |at: u64| {
            let mut data = [0];
            self.function.config_read(at, &mut data).unwrap();
            data[0]
        };
        let mut at = byte(0x34);
        while at != 0 {
            if byte(at.into()) == id {
                return at.into();
            }
            at = byte(u64::from(at) + 1);
        }
        panic!("no capability {id:#x}");
    }

    /// Function Level Reset. It clears config space, too.
    pub fn flr(&mut self) {
        let control = self.capability(0x10) + 8;
        self.function
            .config_write(control, &(1u16 << 15).to_le_bytes())
            .unwrap();
    }

    pub fn restore_config_space(&mut self) {
        self.program_config_space(0x10_0000_0000);
    }

    /// For [`rewind`](Self::rewind).
    pub fn next_free_page(&self) -> u64 {
        self.next_page
    }

    /// Pages from `first` on are free again.
    pub fn rewind(&mut self, first: u64) {
        self.next_page = first;
    }
}

/// The count of an eventfd, and back to 0.
pub fn take_events(event: &File) -> u64 {
    use std::io::Read;
    let mut count = [0; 8];
    match (&*event).read(&mut count) {
        Ok(8) => u64::read_from_bytes(&count).unwrap(),
        _ => 0,
    }
}

/// Bytes that differ from block to block and from seed to seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|i| {
            ((i / 8)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(seed)
                >> (8 * (i % 8))) as u8
        })
        .collect()
}

/// Ends a test's threads however the test ends: a panic must not wait for them forever.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
