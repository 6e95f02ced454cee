//! A machine with one controller, and the laws that hold whatever a guest does to it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, Instant};

use p2plab_nvme::spec::registers::{Csts, NSSR_MAGIC, offset};
use p2plab_nvme::{NvmeConfig, NvmeController, TraceRange};
use p2plab_pcie::{Access, BarMemory, Fabric, FabricBuilder, Function};

/// Where the host's memory is: no length or count that is taken for an address is one of its.
pub const HOST_AT: u64 = 0x40_0000_0000;
/// Host memory that the controller may write to.
pub const HOST: u64 = 48 * PAGE;
/// Host memory behind it that it may only read.
pub const READ_ONLY: u64 = 8 * PAGE;
/// Page size.
pub const PAGE: u64 = 4096;
/// Where BAR 0 is.
pub const REGISTERS_AT: u64 = 0x10_0000_0000;
/// Where the CMB's BAR is, and where CMBMSC puts the CMB.
pub const CMB_AT: u64 = 0x20_0000_0000;
/// Where the PMR's BAR is, and where PMRMSC puts the PMR.
pub const PMR_AT: u64 = 0x30_0000_0000;

/// How long anything may take that must happen.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Content of host memory that nobody has written to.
const FRESH: u8 = 0xa5;

const NAME: &str = "nvme0";

/// The most that the time between two looks counts: a process that is stopped, or starved, has not waited.
const SLICE: Duration = Duration::from_millis(10);

/// Calls `condition` until it gives something; `None` at the deadline.
pub fn wait_until<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let (mut waited, mut last) = (Duration::ZERO, Instant::now());
    for turn in 0u32.. {
        if let Some(value) = condition() {
            return Some(value);
        }
        if waited >= DEADLINE {
            break;
        }
        if turn > 20 {
            // Who sleeps goes first when it wakes; who yields is last on a machine with other work.
            std::thread::sleep(Duration::from_micros(20));
        }
        let now = Instant::now();
        waited += now.duration_since(last).min(SLICE);
        last = now;
    }
    None
}

/// A switch with a controller below it, and the host's memory.
pub struct Machine {
    /// The switch.
    pub fabric: Arc<Fabric>,
    /// The controller.
    pub controller: Arc<NvmeController>,
    /// As the transport sees it.
    pub function: Arc<Function>,
    memory: &'static BarMemory,
    /// What the host itself wrote.
    image: Vec<u8>,
    /// Where the controller has said that it writes: start and end.
    explained: Vec<(u64, u64)>,
    /// An address of its own registers was named: from then on it may do anything that a host may.
    pub wild: bool,
}

impl Machine {
    /// With `config`, which must be a good one. The link is up, BARs and memory are as a driver finds them.
    pub fn new(config: NvmeConfig) -> Self {
        watch();
        let memory = host_memory();
        let image = vec![FRESH; (HOST + READ_ONLY) as usize];
        assert!(memory.write(0, &image));
        let mut builder = FabricBuilder::new();
        let built = builder
            .root_port("rp0")
            .and_then(|()| builder.switch("sw0", "rp0"))
            .and_then(|()| builder.downstream_port("sw0", "dp0"));
        built.expect("a tree of three ports");
        let fabric = builder.build();
        let controller = NvmeController::new(config).expect("a good configuration");
        let controller = Arc::new(controller);
        controller.trace().enable(true);
        let function = plug(&fabric, &controller);
        let machine = Self {
            fabric,
            controller,
            function,
            memory,
            image,
            explained: Vec::new(),
            wild: false,
        };
        machine.connect();
        machine
    }

    /// The transport connects, maps the host's memory, and the firmware programs BARs and Command register.
    pub fn connect(&self) {
        self.function.connect();
        self.map(HOST_AT, HOST, true, 0);
        self.map(HOST_AT + HOST, READ_ONLY, false, HOST);
        self.program();
    }

    /// Maps `length` bytes of host memory from `from` at bus address `address`, or finds that this cannot be.
    pub fn map(&self, address: u64, length: u64, write: bool, from: u64) {
        let access = Access { read: true, write };
        let Ok(file) = self.memory.file().try_clone() else {
            return;
        };
        let file = Some(OwnedFd::from(file));
        let _ = self
            .function
            .map_host_memory(address, length, access, file, from);
    }

    /// Programs the BARs and enables everything in the Command register.
    pub fn program(&self) {
        for (at, address) in [(0x10, REGISTERS_AT), (0x18, PMR_AT), (0x20, CMB_AT)] {
            self.config_write(at, &address.to_le_bytes()[..4]);
            self.config_write(at + 4, &address.to_le_bytes()[4..]);
        }
        self.config_write(4, &6u16.to_le_bytes());
    }

    /// Offset of capability `id` in config space.
    pub fn capability(&self, id: u8) -> Option<u64> {
        let byte = |at: u64| {
            let mut data = [0];
            self.function.config_read(at, &mut data).ok()?;
            Some(data[0])
        };
        let mut at = byte(0x34)?;
        for _ in 0..48 {
            if at == 0 || byte(at.into())? == id {
                break;
            }
            at = byte(u64::from(at) + 1)?;
        }
        (at != 0 && at != 0xff).then_some(at.into())
    }

    /// Writes to config space, which is that large.
    pub fn config_write(&self, at: u64, data: &[u8]) {
        let result = self.function.config_write(at, data);
        assert!(result.is_ok(), "config space ends before {at:#x}");
    }

    /// Initiates a Function Level Reset.
    pub fn function_level_reset(&self) {
        if let Some(express) = self.capability(0x10) {
            self.config_write(express + 8, &(1u16 << 15).to_le_bytes());
        }
    }

    /// Asks for an NVM Subsystem Reset and waits for it: what a host writes meanwhile is reset, too.
    pub fn subsystem_reset(&self) {
        self.write32(offset::CSTS, Csts::new().with_nssro(true).into_bits());
        self.write32(offset::NSSR, NSSR_MAGIC);
        // Without Memory Space Enable all bits read as ones, and there is nothing to wait for.
        let done = wait_until(|| self.status().nssro().then_some(()));
        assert!(
            done.is_some(),
            "no NVM Subsystem Reset: {:#}",
            self.function.dump()
        );
    }

    /// Enables MSI-X with all vectors unmasked.
    pub fn enable_msix(&self) {
        for vector in 0..u64::from(self.function.msix_vectors()) {
            self.write32(0x2000 + vector * 16, 0xfee0_0000);
            self.write32(0x2000 + vector * 16 + 12, 0);
        }
        if let Some(capability) = self.capability(0x11) {
            self.config_write(capability + 2, &(1u16 << 15).to_le_bytes());
        }
    }

    /// Reads a register of BAR 0.
    pub fn read32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        let result = self.function.bar_read(0, at, &mut data);
        assert!(result.is_ok(), "BAR 0 ends before {at:#x}");
        u32::from_le_bytes(data)
    }

    /// Writes a register of BAR 0.
    pub fn write32(&self, at: u64, value: u32) {
        let result = self.function.bar_write(0, at, &value.to_le_bytes());
        assert!(result.is_ok(), "BAR 0 ends before {at:#x}");
    }

    /// Writes a register of BAR 0 in two halves.
    pub fn write64(&self, at: u64, value: u64) {
        self.write32(at, (value & 0xffff_ffff) as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }

    /// CSTS; all ones where nothing decodes.
    pub fn status(&self) -> Csts {
        Csts::from_bits(self.read32(offset::CSTS))
    }

    /// The CPU stores `data`, into the host's memory or a BAR. What lies nowhere is dropped.
    pub fn store(&mut self, address: u64, data: &[u8]) {
        let length = data.len() as u64;
        match address {
            CMB_AT.. if address < PMR_AT => {
                let _ = self.function.bar_write(4, address - CMB_AT, data);
            }
            PMR_AT..HOST_AT => {
                let _ = self.function.bar_write(2, address - PMR_AT, data);
            }
            HOST_AT.. if address.saturating_add(length) <= HOST_AT + HOST + READ_ONLY => {
                let at = address - HOST_AT;
                assert!(self.memory.write(at, data));
                let at = at as usize;
                self.image[at..at + data.len()].copy_from_slice(data);
            }
            _ => {}
        }
    }

    /// The CPU loads from the host's memory or a BAR; zeros where there is nothing.
    pub fn load<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        let _ = match address {
            CMB_AT.. if address < PMR_AT => self
                .function
                .bar_read(4, address - CMB_AT, &mut data)
                .is_ok(),
            PMR_AT..HOST_AT => self
                .function
                .bar_read(2, address - PMR_AT, &mut data)
                .is_ok(),
            HOST_AT.. => self.memory.read(address - HOST_AT, &mut data),
            _ => false,
        };
        data
    }

    /// Completions of Asynchronous Event Requests, which the trace does not have, go to `[start, end)`.
    pub fn expect_writes(&mut self, start: u64, end: u64) {
        self.explained.push((start, end));
    }

    /// Unplugs the controller and plugs it in again.
    pub fn replug(&mut self) {
        self.unplug();
        self.function = plug(&self.fabric, &self.controller);
        self.connect();
    }

    fn unplug(&self) {
        let result = self.fabric.unplug(NAME);
        assert!(result.is_ok(), "the controller was not plugged in");
    }

    /// The end: the controller goes, and leaves counters and memory as they must be.
    pub fn finish(mut self) {
        self.unplug();
        if let Err(violations) = self.fabric.traffic().check() {
            panic!("the switch's counters: {violations:#?}");
        }
        self.explain();
        self.check_memory();
    }

    /// Takes what the trace says of memory that was written.
    fn explain(&mut self) {
        let log = self.controller.trace().take();
        assert_eq!(log.lost, 0, "the trace is full");
        let mut add = |range: &TraceRange| {
            let end = range.address.saturating_add(range.length);
            self.explained.push((range.address, end));
        };
        for entry in &log.entries {
            add(&entry.completion);
            // Bits 1:0 of an opcode: which way its data goes.
            if entry.opcode & 2 != 0 {
                entry.data.iter().chain(&entry.metadata).for_each(&mut add);
            }
        }
        let written = log.doorbells.iter().filter(|access| access.write);
        written.for_each(|access| add(&access.range));
        if self.explained.iter().any(|(start, end)| {
            (REGISTERS_AT..REGISTERS_AT + (16 << 10)).contains(start) || *end > u64::MAX - PAGE
        }) {
            self.wild = true;
        }
    }

    /// Host memory has what the host wrote, but for what the trace explains, and all of it where the controller may
    /// not write.
    fn check_memory(&mut self) {
        let mut found = vec![0; self.image.len()];
        assert!(self.memory.read(0, &mut found));
        let writable = (HOST_AT, HOST_AT + HOST);
        let explained = if self.wild {
            std::slice::from_ref(&writable)
        } else {
            &self.explained
        };
        for (start, end) in explained {
            let end = end.saturating_sub(HOST_AT).min(HOST);
            let range = start.saturating_sub(HOST_AT) as usize..end as usize;
            if let Some(found) = found.get(range.clone()) {
                self.image[range].copy_from_slice(found);
            }
        }
        if found != self.image {
            let pairs = found.iter().zip(&self.image);
            let at = pairs.take_while(|(found, own)| found == own).count();
            panic!(
                "host memory, {at:#x} from its beginning, was {:#04x}, is {:#04x}, and no command named it; named: {:x?}",
                self.image[at], found[at], self.explained
            );
        }
    }
}

/// Kept from input to input: it is a file and a mapping of it.
fn host_memory() -> &'static BarMemory {
    static MEMORY: OnceLock<BarMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        BarMemory::anonymous("host", HOST + READ_ONLY).expect("memory for the host")
    })
}

fn plug(fabric: &Arc<Fabric>, controller: &Arc<NvmeController>) -> Arc<Function> {
    let endpoint = Arc::clone(controller);
    fabric
        .plug("dp0", NAME, endpoint)
        .expect("a free port and a good declaration")
}

/// Half seconds for which the input under way has run; negative between inputs, where libFuzzer takes its time.
static RUNS: AtomicI64 = AtomicI64::new(i64::MIN);

/// Ends the process when an input takes longer than everything in it may: something hangs that nobody waits for
/// with a deadline. libFuzzer keeps the input then.
fn watch() {
    static WATCH: Once = Once::new();
    RUNS.store(0, Ordering::SeqCst);
    WATCH.call_once(|| {
        std::thread::spawn(|| {
            let limit = 3 * DEADLINE.as_secs();
            // Counted, not measured: a process that was stopped has not run.
            while RUNS.fetch_add(1, Ordering::SeqCst) < 2 * limit as i64 {
                std::thread::sleep(Duration::from_millis(500));
            }
            eprintln!("the input takes longer than {limit} s: something hangs");
            std::process::abort();
        });
    });
}

impl Drop for Machine {
    fn drop(&mut self) {
        RUNS.store(i64::MIN, Ordering::SeqCst);
    }
}
