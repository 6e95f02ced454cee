//! The controller as an [`Endpoint`]: what it declares, its BARs, its resets, and the state that its threads
//! share.
//!
//! Lock order: `Core`, then `registers`, then `queues`; the other locks are leaves. A worker has its turn on a namespace
//! around DMA and leaves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{Builder, JoinHandle};

use p2plab_pcie::{
    BarDeclaration, BarMemory, Declaration, Endpoint, Identity, Mistakes, MsixDeclaration, Port,
    ResetKind,
};
use serde_json::{Value, json};

use crate::cmb::Cmb;
use crate::config::{
    CmbScheme, MAX_IO_QUEUES, MIN_WRITE_CACHE, NvmeConfig, NvmeError, WriteCacheConfig,
};
use crate::counters::{Counters, add};
use crate::dma::Dma;
use crate::events::{AsyncEvents, Event};
use crate::faults::Faults;
use crate::features::Features;
use crate::firmware::Firmware;
use crate::gate::Gate;
use crate::health::Health;
use crate::held::HeldCommands;
use crate::identify::{DEVICE_ID, VENDOR_ID, eui64};
use crate::lifecycle::Core;
use crate::locks::{lock, read};
use crate::logs::ErrorLog;
use crate::namespace::Namespace;
use crate::namespaces::{MAX_NAMESPACES, Namespaces};
use crate::pmr::{Pmr, PmrCondition};
use crate::polling::Polling;
use crate::queue::{CompletionQueue, SubmissionQueue, Wake};
use crate::queue_table::QueueTable;
use crate::regs::Registers;
use crate::sanitize::Sanitize;
use crate::self_test::SelfTest;
use crate::shadow::DoorbellBuffer;
use crate::spec::command::Command;
use crate::spec::registers::offset::{DOORBELLS, PMRSTS};
use crate::spec::status::Status;
use crate::telemetry::Telemetry;
use crate::trace::Trace;
use crate::worker;
use crate::write_cache::WriteCache;

const REGISTERS_BAR: u8 = 0;
const REGISTERS_SIZE: u64 = 16 << 10;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PBA: u32 = 0x3000;

/// Whose write it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Cpu,
    Peer,
}

/// What the threads of a controller share.
pub(crate) struct Shared {
    pub(crate) config: NvmeConfig,
    pub(crate) namespaces: Namespaces,
    write_cache: Option<Arc<WriteCache>>,
    pub(crate) cmb: Option<Arc<Cmb>>,
    pub(crate) pmr: Option<Arc<Pmr>>,
    pub(crate) registers: Mutex<Registers>,
    pub(crate) queues: RwLock<QueueTable>,
    /// Where the host keeps doorbells, if it does.
    pub(crate) doorbell_buffer: Mutex<Option<DoorbellBuffer>>,
    pub(crate) features: Mutex<Features>,
    pub(crate) saved_features: Mutex<Features>,
    pub(crate) events: Mutex<AsyncEvents>,
    pub(crate) errors: Mutex<ErrorLog>,
    pub(crate) health: Health,
    pub(crate) firmware: Mutex<Firmware>,
    pub(crate) self_test: SelfTest,
    pub(crate) sanitize: Sanitize,
    pub(crate) held: HeldCommands,
    pub(crate) gate: Gate,
    pub(crate) telemetry: Mutex<Telemetry>,
    pub(crate) counters: Counters,
    pub(crate) mistakes: Arc<Mistakes>,
    pub(crate) trace: Trace,
    pub(crate) polling: Polling,
    pub(crate) faults: Faults,
    /// Wakes the controller's thread.
    pub(crate) wake: Arc<Wake>,
    /// The controller's thread is to end.
    exit: AtomicBool,
    /// Level of INTx as last set. The lock keeps levels in the order in which they were found.
    intx: Mutex<bool>,
}

impl Shared {
    /// Tells the host that `cq` has completions.
    pub(crate) fn interrupt(&self, dma: &Dma, cq: &CompletionQueue) {
        let Some(vector) = cq.vector else { return };
        if dma.port.msix_enabled() {
            add(&self.counters.interrupts, 1);
            dma.port.msix(vector);
        } else {
            self.update_intx(&dma.port);
        }
    }

    /// Sets INTx as the queues and the mask want it (Base 3.5.1). With MSI-X it is never asserted.
    pub(crate) fn update_intx(&self, port: &Port) {
        let mut asserted = lock(&self.intx);
        let wanted = !port.msix_enabled() && {
            let mask = lock(&self.registers).interrupt_mask;
            read(&self.queues).completions_waiting(mask)
        };
        if wanted != *asserted {
            if wanted {
                add(&self.counters.interrupts, 1);
            }
            port.set_intx(wanted);
            *asserted = wanted;
        }
    }

    /// Gives up until the host resets the controller: CSTS.CFS. To be called without locks but `Core`'s and an
    /// executor's: what it keeps for telemetry looks at everything else.
    pub(crate) fn fatal(&self, why: &str) {
        if self.mistakes.is_worth_a_line() {
            tracing::warn!(why, "controller fatal status");
        }
        // First, so that no queue goes on as if nothing had happened when the host knows.
        read(&self.queues).stop_submissions();
        let already = {
            let mut registers = lock(&self.registers);
            let already = registers.csts.cfs();
            registers.csts.set_cfs(true);
            already
        };
        if !already {
            self.keep_telemetry(why);
        }
    }

    /// The power is gone: what was neither flushed nor confirmed by the PMR's barrier may be lost. To be called when nothing is in flight.
    pub(crate) fn lose_unflushed(&self) {
        if let Some(cache) = &self.write_cache {
            cache.lose(&self.namespaces);
        }
        if let Some(pmr) = &self.pmr {
            pmr.lose_unconfirmed();
        }
    }

    /// Whether what `sq` executes is not to be finished: a reset or the end of the controller waits for it.
    pub(crate) fn is_ending(&self, sq: &SubmissionQueue) -> bool {
        let admin_ends = || {
            let registers = lock(&self.registers);
            let pending = registers.pending;
            let reset = pending.reset || pending.subsystem_reset || pending.power_cut;
            reset || !registers.csts.rdy() || self.exit.load(Ordering::Acquire)
        };
        sq.stop.load(Ordering::Acquire) || (sq.id == 0 && admin_ends())
    }

    /// Counts a command and keeps its error, if any; returns the status to complete it with.
    pub(crate) fn account(&self, qid: u16, command: &Command, error: Option<Status>) -> Status {
        self.counters.command(qid == 0, command.opcode);
        let Some(status) = error else {
            return Status::SUCCESS;
        };
        tracing::debug!(
            qid,
            opcode = command.opcode,
            cid = command.cid.get(),
            ?status,
            "failed"
        );
        add(&self.counters.errors, 1);
        if status.is_media_error() {
            add(&self.counters.media_errors, 1);
        }
        lock(&self.errors).command(qid, command, status);
        status.more()
    }

    /// A doorbell write. For a peer it records and wakes, and waits for nothing; for the CPU it may also do what
    /// the doorbell asks for.
    fn doorbell(&self, port: Option<&Port>, offset: u64, value: u32, writer: Writer) {
        let index = (offset - DOORBELLS) / 4;
        let Ok(qid) = u16::try_from(index / 2) else {
            return;
        };
        let (sq, cq): (Option<Arc<SubmissionQueue>>, Option<Arc<CompletionQueue>>) = {
            let queues = read(&self.queues);
            if index.is_multiple_of(2) {
                (queues.sq(qid), None)
            } else {
                (None, queues.cq(qid))
            }
        };
        let event = match (sq, cq) {
            (Some(sq), _) => match sq.ring(value) {
                Ok(()) if writer == Writer::Cpu && sq.id != 0 => {
                    worker::run_here(self, &sq);
                    None
                }
                Ok(()) => {
                    sq.wake.notify();
                    None
                }
                Err(_) => Some(Event::INVALID_DOORBELL_VALUE),
            },
            (_, Some(cq)) => {
                let refused = cq.ring(value).err().map(|_| Event::INVALID_DOORBELL_VALUE);
                if let Some(port) = port.filter(|port| !port.msix_enabled()) {
                    self.update_intx(port);
                }
                refused
            }
            _ => Some(Event::INVALID_DOORBELL),
        };
        if let Some(event) = event {
            self.bad_doorbell(qid, value, event);
        }
    }

    /// The controller's state, for people, tests and telemetry.
    pub(crate) fn dump(&self) -> Value {
        let mut dump = {
            let registers = lock(&self.registers);
            let fields = crate::regs::REGISTERS.iter().map(|register| {
                let value = format!("{:#x}", registers.value(register.name));
                (
                    format!("{:?}", register.name).to_uppercase(),
                    Value::from(value),
                )
            });
            json!({ "registers": fields.collect::<serde_json::Map<_, _>>() })
        };
        dump["serial"] = self.config.serial.clone().into();
        dump["queues"] = read(&self.queues).dump();
        dump["counters"] = self.counters.dump();
        dump["health"] = self.health.dump();
        dump["firmware"] = lock(&self.firmware).dump();
        dump["self_test"] = self.self_test.dump();
        dump["sanitize"] = self.sanitize.dump();
        dump["faults"] = self.faults.dump();
        if let Some(cache) = &self.write_cache {
            dump["write_cache"] = cache.dump();
        }
        dump["namespaces"] = self
            .namespaces
            .all()
            .iter()
            .map(|ns| json!({ "nsid": ns.nsid, "size": ns.size(), "block_size": 1u64 << ns.block_shift }))
            .collect();
        dump
    }

    /// The host wrote a doorbell that is not there, or what no doorbell can be.
    pub(crate) fn bad_doorbell(&self, qid: u16, value: u32, event: Event) {
        if self.mistakes.is_worth_a_line() {
            tracing::warn!(qid, value, "bad doorbell write");
        }
        lock(&self.errors).doorbell(qid);
        self.event(event);
    }

    /// Lets the windows follow CMBMSC and PMRMSC.
    pub(crate) fn set_windows(&self, registers: &mut Registers) {
        let pmr = self.pmr.as_deref();
        if let Some(cmb) = &self.cmb {
            let valid = cmb.set_window(registers.cmbmsc, pmr.map(|pmr| &pmr.window));
            registers.cmb_base_invalid = !valid;
        }
        if let Some(pmr) = pmr {
            let cmb = self.cmb.as_ref().map(|cmb| &cmb.window);
            registers.pmr_base_invalid = !pmr.set_window(registers.pmrmsc, cmb);
        }
    }

    /// Reads registers. A read that touches PMRSTS is a write barrier, for which nobody else waits.
    fn read_registers(&self, offset: u64, data: &mut [u8]) {
        let end = offset.saturating_add(data.len() as u64);
        if let Some(pmr) = &self.pmr
            && offset < PMRSTS + 4
            && end > PMRSTS
        {
            pmr.barrier();
        }
        lock(&self.registers).read(offset, data);
    }

    fn write_registers(&self, port: Option<&Port>, offset: u64, data: &[u8]) {
        let effect = {
            let mut registers = lock(&self.registers);
            let effect = registers.write(offset, data);
            if effect.windows {
                self.set_windows(&mut registers);
            }
            effect
        };
        if effect.interrupts
            && let Some(port) = port
        {
            self.update_intx(port);
        }
        if effect.wake {
            self.wake.notify();
        }
    }
}

/// An NVMe controller.
pub struct NvmeController {
    shared: Arc<Shared>,
    core: Arc<Mutex<Core>>,
    port: RwLock<Option<Port>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl NvmeController {
    /// Makes a controller: opens its namespaces' files and takes the memory of its CMB.
    ///
    /// # Errors
    /// [`NvmeError`], whose text is for the user who wrote the configuration.
    pub fn new(config: NvmeConfig) -> Result<Self, NvmeError> {
        check(&config)?;
        let open = |(config, nsid)| Namespace::open(nsid, config);
        let namespaces = config
            .namespaces
            .iter()
            .zip(1..)
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let write_cache = config.write_cache.map(WriteCache::new).map(Arc::new);
        let namespaces = Namespaces::new(namespaces, config.unallocated, write_cache.clone());
        let cmb = config.cmb.map(|cmb| Cmb::open(&config.serial, cmb));
        let cmb = cmb.transpose()?.map(Arc::new);
        let pmr = config.pmr.clone().map(|pmr| Pmr::open(&config.serial, pmr));
        let pmr = pmr.transpose()?.map(Arc::new);
        let shared = Shared {
            registers: Mutex::new(Registers::new(config.cmb, pmr.clone())),
            queues: RwLock::new(QueueTable::new(config.io_queues)),
            doorbell_buffer: Mutex::default(),
            features: Mutex::new(Features::new(config.io_queues)),
            saved_features: Mutex::new(Features::new(config.io_queues)),
            events: Mutex::default(),
            errors: Mutex::default(),
            health: Health::new(),
            firmware: Mutex::new(Firmware::new()),
            self_test: SelfTest::default(),
            sanitize: Sanitize::default(),
            held: HeldCommands::default(),
            gate: Gate::new(),
            telemetry: Mutex::default(),
            counters: Counters::new(),
            mistakes: Arc::default(),
            trace: Trace::default(),
            polling: Polling::default(),
            faults: Faults::new(config.faults.clone()),
            wake: Arc::default(),
            exit: AtomicBool::new(false),
            intx: Mutex::new(false),
            namespaces,
            write_cache,
            cmb,
            pmr,
            config,
        };
        let shared = Arc::new(shared);
        shared.faults.belong_to(&shared);
        Ok(Self {
            shared,
            core: Arc::default(),
            port: RwLock::new(None),
            thread: Mutex::new(None),
        })
    }

    /// The record of executed commands, for tests.
    pub fn trace(&self) -> &Trace {
        &self.shared.trace
    }

    /// The memory of the CMB, if there is one.
    pub fn cmb(&self) -> Option<&Arc<BarMemory>> {
        self.shared.cmb.as_ref().map(|cmb| &cmb.memory)
    }

    /// The memory of the PMR, if there is one. It answers while the guest has it enabled.
    pub fn pmr(&self) -> Option<&Arc<BarMemory>> {
        self.shared.pmr.as_ref().map(|pmr| &pmr.memory)
    }

    /// Breaks the PMR, or mends it. What this says of becoming ready holds for the next time that the guest enables it.
    pub fn set_pmr_condition(&self, condition: PmrCondition) {
        if let Some(pmr) = &self.shared.pmr {
            pmr.set_condition(condition);
        }
    }

    /// Lets a loss of power take from the PMR what was written since the guest's last barrier (PMRCAP.PMRWBM), from now
    /// on or no more. By default it keeps all.
    ///
    /// # Errors
    /// The host's, when the region cannot be read.
    pub fn set_pmr_forgets(&self, forgets: bool) -> std::io::Result<()> {
        let pmr = self.shared.pmr.as_ref();
        pmr.map_or(Ok(()), |pmr| pmr.set_forgets(forgets))
    }

    /// The file with the blocks of namespace `nsid` (counted from 1), memory-backed or not: for a host that
    /// fills and compares disks without the guest's help.
    pub fn namespace_file(&self, nsid: u32) -> Option<Arc<std::fs::File>> {
        let namespace = self.shared.namespaces.allocated(nsid).ok()?;
        Some(Arc::clone(&namespace.file))
    }

    /// The faults that its commands meet.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Cuts the power and brings it back, at any moment: nothing more is completed when this returns, and the
    /// controller is as after power on. Flushed data and the PMR's are there, the CMB is empty, and what was written and not
    /// flushed is lost where there is a [`WriteCacheConfig`]. The function's
    /// config space is the bus's to reset (`Function::reset`): a whole machine that loses power does both.
    pub fn power_cut(&self) {
        let port = self.port();
        let prepared = !self.shared.is_unsafe_to_lose_power();
        {
            let mut registers = lock(&self.shared.registers);
            registers.reset_all();
            self.shared.set_windows(&mut registers);
        }
        lock(&self.core).power_cut(&self.shared, port.as_ref(), prepared);
    }

    fn write(&self, bar: u8, offset: u64, data: &[u8], writer: Writer) {
        if bar != REGISTERS_BAR {
            return;
        }
        let port = self.port();
        if offset < DOORBELLS {
            return self.shared.write_registers(port.as_ref(), offset, data);
        }
        if offset >= MSIX_TABLE.into() {
            return;
        }
        match *data {
            [a, b, c, d] if offset.is_multiple_of(4) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                self.shared.doorbell(port.as_ref(), offset, value, writer);
            }
            _ if self.shared.mistakes.is_worth_a_line() => {
                tracing::warn!(offset, length = data.len(), "doorbell write of a bad shape");
            }
            _ => {}
        }
    }

    /// Heats or cools the controller: its composite temperature in kelvin. A threshold that is crossed is an
    /// event for a host that wants to hear of it.
    pub fn set_temperature(&self, kelvin: u16) {
        self.shared.health.set_temperature(kelvin);
        self.shared.check_health();
    }

    /// Wears the controller out, or renews it: the spare that is left, in percent.
    pub fn set_available_spare(&self, percent: u8) {
        self.shared.health.set_spare(percent);
        self.shared.check_health();
    }

    /// Holds self-tests and sanitize operations between two steps, or lets them go on: for tests that want to see
    /// one in progress.
    pub fn hold_background(&self, hold: bool) {
        self.shared.self_test.background.hold(hold);
        self.shared.sanitize.background.hold(hold);
    }

    fn port(&self) -> Option<Port> {
        read(&self.port).clone()
    }

    /// Ends all threads; nothing is in flight afterwards.
    fn stop(&self) {
        self.shared.exit.store(true, Ordering::Release);
        self.shared.wake.notify();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        self.shared
            .health
            .power_off(!self.shared.is_unsafe_to_lose_power());
        lock(&self.core).disable(&self.shared);
        self.shared.self_test.background.end();
        self.shared.sanitize.background.end();
        self.shared.lose_unflushed();
        *crate::locks::write(&self.port) = None;
    }
}

impl Drop for NvmeController {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Endpoint for NvmeController {
    fn declaration(&self) -> Declaration {
        let registers = BarDeclaration::registers(REGISTERS_BAR, REGISTERS_SIZE);
        let cmb = self.shared.cmb.as_ref().map(|cmb| cmb.declaration());
        let pmr = self.shared.pmr.as_ref().map(|pmr| pmr.declaration());
        Declaration {
            identity: Identity {
                vendor_id: VENDOR_ID,
                device_id: DEVICE_ID,
                subsystem_vendor_id: VENDOR_ID,
                subsystem_id: DEVICE_ID,
                revision_id: 1,
                class_code: 0x01_0802,
                serial_number: Some(eui64(&self.shared.config.serial, 0)),
            },
            bars: std::iter::once(registers).chain(pmr).chain(cmb).collect(),
            msix: self.shared.config.msix.then_some(MsixDeclaration {
                vectors: self.shared.config.io_queues + 1,
                bar: REGISTERS_BAR,
                table_offset: MSIX_TABLE,
                pba_offset: MSIX_PBA,
            }),
            intx: true,
        }
    }

    fn attach(&self, port: Port) {
        // Plugged in again after it was detached: `stop` left no thread, and a power cycle lies between.
        self.shared.exit.store(false, Ordering::Release);
        {
            let mut registers = lock(&self.shared.registers);
            registers.reset_all();
            self.shared.set_windows(&mut registers);
        }
        self.shared.health.power_on();
        let dma = Dma {
            port: port.clone(),
            cmb: self.shared.cmb.clone(),
            pmr: self.shared.pmr.clone(),
            commands_inside: false,
            mistakes: Arc::clone(&self.shared.mistakes),
        };
        let (shared, core) = (Arc::clone(&self.shared), Arc::clone(&self.core));
        let thread = Builder::new().name("nvme-admin".into()).spawn(move || {
            loop {
                shared.wake.wait();
                if shared.exit.load(Ordering::Acquire) {
                    return;
                }
                lock(&core).service(&shared, &dma);
            }
        });
        match thread {
            Ok(thread) => *lock(&self.thread) = Some(thread),
            // The guest sees a controller that failed.
            Err(error) => self.shared.fatal(&format!("no thread: {error}")),
        }
        self.shared.self_test.resume(&self.shared);
        self.shared.sanitize.resume(&self.shared);
        *crate::locks::write(&self.port) = Some(port);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == REGISTERS_BAR && offset < DOORBELLS {
            self.shared.read_registers(offset, data);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.write(bar, offset, data, Writer::Peer);
    }

    fn cpu_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.write(bar, offset, data, Writer::Cpu);
    }

    fn poll(&self) -> bool {
        worker::poll(&self.shared)
    }

    fn reset(&self, kind: ResetKind) {
        tracing::debug!(?kind, "reset");
        if kind == ResetKind::ConnectionLost {
            // The machine around the controller is gone, and its power; the next one's comes with CC.EN.
            let prepared = !self.shared.is_unsafe_to_lose_power();
            self.shared.health.power_off(prepared);
        }
        let reset = || {
            let mut registers = lock(&self.shared.registers);
            match kind {
                ResetKind::FunctionLevel => registers.function_reset(),
                ResetKind::Conventional | ResetKind::ConnectionLost => registers.reset_all(),
            }
            self.shared.set_windows(&mut registers);
        };
        // First, so that the controller's thread finds nothing more to start.
        reset();
        let mut core = lock(&self.core);
        core.disable(&self.shared);
        if kind == ResetKind::ConnectionLost {
            self.shared.lose_unflushed();
        }
        drop(core);
        reset();
        if let Some(pmr) = &self.shared.pmr {
            pmr.settle(self.port().as_ref());
        }
        if let Some(port) = self.port() {
            self.shared.update_intx(&port);
        }
    }

    fn detach(&self) {
        self.stop();
    }

    fn dump(&self) -> Value {
        self.shared.dump()
    }
}

/// Refuses a configuration that makes no controller.
fn check(config: &NvmeConfig) -> Result<(), NvmeError> {
    for (what, value, max) in [
        ("serial number", &config.serial, 20),
        ("model number", &config.model, 40),
    ] {
        let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if value.is_empty() || value.len() > max || !printable || value.trim() != value {
            return Err(NvmeError::BadText {
                what,
                value: value.clone(),
                max,
            });
        }
    }
    let serial = || config.serial.clone();
    if !(1..=MAX_IO_QUEUES).contains(&config.io_queues) {
        return Err(NvmeError::BadQueueCount {
            serial: serial(),
            given: config.io_queues,
        });
    }
    // MDTS is a power of two of pages, and 0 is no limit.
    let transfer = config.max_transfer;
    if !transfer.is_power_of_two() || !(8192..=128 << 20).contains(&transfer) {
        return Err(NvmeError::BadMaxTransfer {
            serial: serial(),
            given: transfer,
        });
    }
    if let Some(WriteCacheConfig { size, .. }) = config.write_cache
        && size < MIN_WRITE_CACHE
    {
        let serial = serial();
        return Err(NvmeError::BadWriteCache { serial, size });
    }
    let old = config.cmb.is_some_and(|cmb| cmb.scheme == CmbScheme::V1_3);
    if old && config.pmr.is_some() {
        return Err(NvmeError::PmrNeedsNewScheme { serial: serial() });
    }
    if config.namespaces.len() > MAX_NAMESPACES as usize {
        let given = config.namespaces.len();
        return Err(NvmeError::TooManyNamespaces {
            serial: serial(),
            given,
        });
    }
    Ok(())
}
