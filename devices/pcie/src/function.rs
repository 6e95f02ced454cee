//! A [`Function`]: an endpoint with its config space, as a transport (vfio-user, or a unit test) drives it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::config::{CONFIG_SPACE_SIZE, ConfigSpace, DecodeState, memory_request_header};
use crate::endpoint::{BarBacking, BarDeclaration, Declaration, Endpoint, ResetKind};
use crate::host_memory::{HostMemory, MAX_MAPPINGS};
use crate::mistakes::Mistakes;
use crate::msix::{Delivery, Msix, MsixControl, Structure, signal};
use crate::posted::Posted;

#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;

/// The access does not lie inside the BAR or config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access leaves the region")]
pub struct OutOfBounds;

/// Why host memory cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Empty, or the end of the range overflows.
    #[error("the range is empty or wraps around")]
    BadRange,
    /// Overlaps memory that is already mapped.
    #[error("the range overlaps a mapping")]
    Overlap,
    /// The file is shorter than offset + length.
    #[error("the file is shorter than the mapping")]
    FileTooShort,
    /// Too many mappings.
    #[error("too many mappings")]
    TooMany,
    /// The file could lose its pages while they are mapped.
    #[error(
        "the file is no memfd of ordinary pages that is, or can be, sealed against shrinking (QEMU's \
         memory-backend-memfd makes one)"
    )]
    NotSealed,
    /// Nothing is mapped there.
    #[error("nothing is mapped there")]
    NotMapped,
    /// The host's mmap failed.
    #[error("mmap: {0}")]
    Os(std::io::Error),
}

/// What the endpoint may do with a range of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// DMA reads are allowed.
    pub read: bool,
    /// DMA writes are allowed.
    pub write: bool,
}

/// A function's link into the fabric: what the fabric must count, and must know to route.
pub(crate) trait FunctionLink: Send + Sync {
    /// Configuration requests for `length` bytes.
    fn count_config(&self, write: bool, length: usize);
    /// The CPU read `length` bytes at bus address `address`.
    fn count_cpu_read(&self, address: u64, length: usize);
    /// The CPU wrote `length` bytes at bus address `address`.
    fn count_cpu_write(&self, address: u64, length: usize);
    /// What the function decodes and may send has changed. When this returns no transaction uses the old
    /// state.
    fn decode_changed(&self, state: &DecodeState);
    /// The function refused a request of the CPU for `length` bytes at bus address `address`.
    fn count_cpu_refused(&self, write: bool, address: u64, length: usize);
    /// That many MSI-X messages that had been pending were sent, each a Memory Write of four bytes. Messages
    /// that are sent at once are counted by whoever calls [`Function::send_msix`].
    fn count_delayed_msix(&self, messages: usize);
}

/// Whose write it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Cpu,
    Peer,
}

/// The INTx pin, and the eventfd that carries its level to the transport.
#[derive(Debug, Default)]
struct Intx {
    asserted: bool,
    /// By the transport, or because the level was signalled and not asked for since.
    masked: bool,
    /// By config space: not disabled, no MSI-X in its place, in D0, link up.
    enabled: bool,
    trigger: Option<File>,
    /// Eventfds that did not work.
    mistakes: Mistakes,
}

impl Intx {
    fn is_visible(&self) -> bool {
        self.asserted && self.enabled && !self.masked
    }

    /// An eventfd has edges, the pin has a level. So a visible level is signalled once and masked, as Linux'
    /// vfio-pci does (VFIO_IRQ_INFO_AUTOMASKED); the transport unmasks it when its guest has handled it, and
    /// is told again if the level is still there.
    fn update(&mut self, change: impl FnOnce(&mut Self)) {
        change(self);
        if !self.is_visible() {
            return;
        }
        if let Some(trigger) = &self.trigger {
            self.masked = signal(trigger, &self.mistakes);
        }
    }
}

/// An endpoint plugged into a fabric, with all that PCI Express adds to it. Its methods are the
/// transport's side; every access is bounds-checked here, routed, counted and passed on.
pub struct Function {
    name: String,
    endpoint: Arc<dyn Endpoint>,
    declaration: Declaration,
    host: Arc<HostMemory>,
    link: Arc<dyn FunctionLink>,
    /// Held while config space changes until all that follows from the change has happened, so that two
    /// changes never take effect in the wrong order. Lock order: `transition`, then `intx`, then `config`;
    /// the endpoint and the fabric are called with `transition` at most.
    transition: Mutex<()>,
    config: Mutex<ConfigSpace>,
    /// Held for reading while a peer's access to registers is checked and done.
    peers: RwLock<()>,
    msix: Option<Msix>,
    intx: Mutex<Intx>,
    connected: AtomicBool,
    /// Written under `transition`.
    detached: AtomicBool,
    decode: RwLock<Arc<DecodeState>>,
    /// What the transport has on its way.
    posted: RwLock<Option<Arc<dyn Posted>>>,
}

impl Function {
    /// Puts `endpoint`, which declared `declaration`, behind a config space after power-on. The link is down.
    ///
    /// # Errors
    /// The rule that the declaration breaks.
    pub(crate) fn new(
        name: String,
        endpoint: Arc<dyn Endpoint>,
        declaration: Declaration,
        host: Arc<HostMemory>,
        link: Arc<dyn FunctionLink>,
    ) -> Result<Arc<Self>, String> {
        let config = ConfigSpace::new(&declaration)?;
        let decode = RwLock::new(Arc::new(config.decode_state()));
        Ok(Arc::new(Self {
            name,
            endpoint,
            host,
            link,
            transition: Mutex::default(),
            config: Mutex::new(config),
            peers: RwLock::default(),
            msix: declaration.msix.map(Msix::new),
            intx: Mutex::default(),
            connected: AtomicBool::new(false),
            detached: AtomicBool::new(false),
            decode,
            posted: RwLock::default(),
            declaration,
        }))
    }

    /// Tells peers where the CPU's writes to the function may be on their way; `None` when there is no way any more.
    pub fn set_posted(&self, posted: Option<Arc<dyn Posted>>) {
        *self.posted.write().unwrap_or_else(PoisonError::into_inner) = posted;
    }

    /// The way of the CPU's writes, if there are some on it.
    pub(crate) fn undelivered(&self) -> Option<Arc<dyn Posted>> {
        let posted = self.posted.read().unwrap_or_else(PoisonError::into_inner);
        posted
            .as_ref()
            .filter(|posted| !posted.is_delivered())
            .cloned()
    }

    /// Name of the endpoint in its topology.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the endpoint declared.
    pub fn declaration(&self) -> &Declaration {
        &self.declaration
    }

    /// Most mappings of host memory at once, and parts of mappings between holes.
    pub const MAX_HOST_MAPPINGS: usize = MAX_MAPPINGS;

    /// Size of config space in bytes: 4096.
    pub const CONFIG_SPACE_SIZE: u64 = CONFIG_SPACE_SIZE as u64;

    /// Size of BAR `index` in bytes, 0 where there is none.
    pub fn bar_size(&self, index: u8) -> u64 {
        self.bar(index).map_or(0, |bar| bar.size)
    }

    /// Config read of `data.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfBounds`] past 4096.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let offset = check_range(Self::CONFIG_SPACE_SIZE, offset, data.len())?;
        if data.is_empty() || self.is_detached() {
            data.fill(0xff);
            return Ok(());
        }
        self.link.count_config(false, data.len());
        lock(&self.config).read(offset, data);
        Ok(())
    }

    /// Config write. May trigger a Function Level Reset, which is complete when this returns.
    ///
    /// # Errors
    /// [`OutOfBounds`] past 4096.
    pub fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        let offset = check_range(Self::CONFIG_SPACE_SIZE, offset, data.len())?;
        let _transition = lock(&self.transition);
        if data.is_empty() || self.is_detached() {
            return Ok(());
        }
        self.link.count_config(true, data.len());
        let change = lock(&self.config).write(offset, data);
        if change.state {
            self.publish();
        }
        if change.flr_requested {
            tracing::debug!(function = self.name, "Function Level Reset");
            self.reset_in_transition(ResetKind::FunctionLevel);
        }
        Ok(())
    }

    /// The CPU reads a BAR.
    ///
    /// # Errors
    /// [`OutOfBounds`] where the range leaves the BAR, or there is none.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let declared = self.bar(bar).ok_or(OutOfBounds)?;
        check_range(declared.size, offset, data.len())?;
        if data.is_empty() || self.is_detached() {
            data.fill(0xff);
            return Ok(());
        }
        let state = self.decode_state();
        let address = bus_address(&state, bar, offset);
        if state.decodes() {
            self.link.count_cpu_read(address, data.len());
            self.serve_read(declared, offset, data);
        } else {
            self.refuse(false, address, data.len());
            data.fill(0xff);
        }
        Ok(())
    }

    /// The CPU writes to a BAR.
    ///
    /// # Errors
    /// [`OutOfBounds`] where the range leaves the BAR, or there is none.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        let declared = self.bar(bar).ok_or(OutOfBounds)?;
        check_range(declared.size, offset, data.len())?;
        if data.is_empty() || self.is_detached() {
            return Ok(());
        }
        let state = self.decode_state();
        let address = bus_address(&state, bar, offset);
        if state.decodes() {
            self.link.count_cpu_write(address, data.len());
            self.serve_write(declared, offset, data, Writer::Cpu);
        } else {
            self.refuse(true, address, data.len());
        }
        Ok(())
    }

    /// A peer, whose request the fabric has routed here and counts, reads a BAR. All ones where the range
    /// leaves it, or decoding has been switched off since.
    pub(crate) fn peer_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let _access = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        match self
            .bar(bar)
            .filter(|bar| check_range(bar.size, offset, data.len()).is_ok())
            .filter(|_| self.decode_state().decodes() && !self.is_detached())
        {
            Some(bar) => self.serve_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// A peer, whose request the fabric has routed here and counts, writes to a BAR. Dropped where the range
    /// leaves it, or decoding has been switched off since.
    pub(crate) fn peer_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let _access = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = self
            .bar(bar)
            .filter(|b| check_range(b.size, offset, data.len()).is_ok())
            .filter(|_| self.decode_state().decodes() && !self.is_detached())
        {
            self.serve_write(bar, offset, data, Writer::Peer);
        }
    }

    /// The transport has a guest: DMA and interrupts become possible. The link comes up.
    pub fn connect(&self) {
        let _transition = lock(&self.transition);
        if self.is_detached() {
            return;
        }
        self.connected.store(true, Ordering::Release);
        self.publish();
    }

    /// The transport lost its guest: resets the endpoint ([`ResetKind::ConnectionLost`]) and config space,
    /// drops all host memory and interrupts.
    pub fn disconnect(&self) {
        let _transition = lock(&self.transition);
        self.disconnect_in_transition();
    }

    /// The endpoint is unplugged: the link goes down, the endpoint is reset and its threads end. Nothing
    /// that a transport does afterwards brings the function back into the fabric.
    pub(crate) fn detach(&self) {
        let _transition = lock(&self.transition);
        if self.is_detached() {
            return;
        }
        self.disconnect_in_transition();
        self.detached.store(true, Ordering::Release);
        self.endpoint.detach();
    }

    /// Lets the endpoint look for work before the transport sleeps; returns whether to call again at once. See
    /// [`Endpoint::poll`].
    pub fn poll(&self) -> bool {
        !self.is_detached() && self.endpoint.poll()
    }

    /// Makes `length` bytes of `file`, from `file_offset`, host memory at bus address `address`. Without a
    /// file the range is remembered as not ours to touch (another device's BAR, reached through the fabric).
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map_host_memory(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        self.host.map(address, length, access, file, file_offset)
    }

    /// Takes `length` bytes of host memory at `address` away, be it one mapping, a part of one or several.
    /// When this returns no DMA touches them.
    ///
    /// # Errors
    /// [`MapError::BadRange`]; [`MapError::NotMapped`] where nothing of the range was mapped;
    /// [`MapError::TooMany`] where a hole would make one mapping too many.
    pub fn unmap_host_memory(&self, address: u64, length: u64) -> Result<(), MapError> {
        self.host.unmap(address, length)
    }

    /// Takes all host memory away.
    pub fn unmap_all_host_memory(&self) {
        self.host.unmap_all();
    }

    /// Number of MSI-X vectors.
    pub fn msix_vectors(&self) -> u16 {
        self.msix.as_ref().map_or(0, Msix::vectors)
    }

    /// Connects MSI-X vector `vector` to an eventfd, or disconnects it. `file` must be non-blocking.
    ///
    /// # Errors
    /// [`OutOfBounds`] where there is no such vector.
    pub fn set_msix_trigger(&self, vector: u16, file: Option<File>) -> Result<(), OutOfBounds> {
        let sent = self
            .msix
            .as_ref()
            .ok_or(OutOfBounds)?
            .set_trigger(vector, file)?;
        self.count_delayed(sent);
        Ok(())
    }

    /// Connects INTx to an eventfd, or disconnects it; either way it is unmasked. `file` must be non-blocking.
    pub fn set_intx_trigger(&self, file: Option<File>) {
        lock(&self.intx).update(|intx| {
            intx.trigger = file;
            intx.masked = false;
        });
    }

    /// The transport masks INTx, or unmasks it. A trigger masks it by itself; unmasking an asserted pin
    /// triggers it again (that is how the level is carried by an eventfd).
    pub fn mask_intx(&self, masked: bool) {
        lock(&self.intx).update(|intx| intx.masked = masked);
    }

    /// Resets the endpoint and its config space.
    pub fn reset(&self, kind: ResetKind) {
        let _transition = lock(&self.transition);
        self.reset_in_transition(kind);
    }

    /// State for people and tests: `name`, what config space says (`pcie`), and the endpoint's own
    /// (`endpoint`).
    pub fn dump(&self) -> serde_json::Value {
        let state = self.decode_state();
        let bars: Vec<_> = (0..6).map(|index| state.bar_address(index)).collect();
        let intx = {
            let intx = lock(&self.intx);
            serde_json::json!({ "asserted": intx.asserted, "masked": intx.masked })
        };
        serde_json::json!({
            "name": self.name,
            "pcie": {
                "link_up": state.link_up,
                "memory_space_enabled": state.memory_space_enabled,
                "bus_master_enabled": state.bus_master_enabled,
                "power_state": format!("{:?}", state.power_state),
                "bars": bars,
                "max_payload_size": state.max_payload_size,
                "max_read_request_size": state.max_read_request_size,
                "read_completion_boundary": state.read_completion_boundary,
                "msix": self.msix.as_ref().map(Msix::dump),
                "intx": intx,
            },
            "endpoint": self.endpoint.dump(),
        })
    }

    /// Sends MSI-X vector `vector`, or makes it pending. The caller counts what was [`Delivery::Sent`].
    pub(crate) fn send_msix(&self, vector: u16) -> Delivery {
        self.msix
            .as_ref()
            .map_or(Delivery::Disabled, |msix| msix.fire(vector))
    }

    /// Sets the level of the INTx pin; nothing where the function has none.
    pub(crate) fn set_intx_level(&self, asserted: bool) {
        if !self.declaration.intx {
            return;
        }
        let mut intx = lock(&self.intx);
        if intx.asserted == asserted {
            return;
        }
        // The status bit first: an interrupt handler must find it set.
        lock(&self.config).set_interrupt_status(asserted);
        intx.update(|intx| intx.asserted = asserted);
    }

    /// What the function decodes and may send, without a lock of config space.
    pub(crate) fn decode_state(&self) -> Arc<DecodeState> {
        self.decode
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn disconnect_in_transition(&self) {
        self.connected.store(false, Ordering::Release);
        self.publish();
        self.reset_in_transition(ResetKind::ConnectionLost);
        if let Some(msix) = &self.msix {
            msix.drop_triggers();
        }
        {
            let mut intx = lock(&self.intx);
            intx.trigger = None;
            intx.masked = false;
        }
        self.host.unmap_all();
    }

    /// The caller holds `transition`.
    fn reset_in_transition(&self, kind: ResetKind) {
        self.stop_decoding();
        if !self.is_detached() {
            self.endpoint.reset(kind);
        }
        lock(&self.intx).asserted = false;
        lock(&self.config).reset(kind);
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.publish();
    }

    /// From here to the next [`publish`](Self::publish) no access of a peer's arrives: one that was routed before
    /// must not write into registers that a reset has just cleared. The caller holds `transition`.
    fn stop_decoding(&self) {
        let mut state = lock(&self.config).decode_state();
        state.link_up = self.connected.load(Ordering::Acquire);
        state.memory_space_enabled = false;
        *self.decode.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
        if !self.is_detached() {
            self.link.decode_changed(&state);
        }
        // Waits for those under way, and lets go: two functions that are reset at once may be each other's peers.
        drop(self.peers.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Lets what config space says take effect. The caller holds `transition`.
    fn publish(&self) {
        let mut state = lock(&self.config).decode_state();
        state.link_up = self.connected.load(Ordering::Acquire);
        *self.decode.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
        if !self.is_detached() {
            self.link.decode_changed(&state);
        }
        let active = state.link_up && state.power_state == crate::config::PowerState::D0;
        if let Some(msix) = &self.msix {
            let sent = msix.set_control(MsixControl {
                enabled: state.msix_enabled,
                function_masked: state.msix_function_masked,
                may_send: state.link_up && state.may_send(),
            });
            self.count_delayed(sent);
        }
        lock(&self.intx).update(|intx| {
            intx.enabled = active && !state.intx_disabled && !state.msix_enabled;
        });
    }

    /// Whether the endpoint is gone: nothing answers any more, as in an empty slot.
    fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    fn bar(&self, index: u8) -> Option<&BarDeclaration> {
        self.declaration.bars.iter().find(|bar| bar.index == index)
    }

    /// In which structure `offset` lies, and how many bytes of `length` lie in the same one: never 0.
    fn locate(&self, bar: u8, offset: u64, length: usize) -> (Structure, usize) {
        let msix = self.msix.as_ref();
        msix.map_or((Structure::Device, length), |msix| {
            msix.locate(bar, offset, length)
        })
    }

    /// The range lies inside the BAR.
    fn serve_read(&self, bar: &BarDeclaration, offset: u64, data: &mut [u8]) {
        let (mut offset, mut rest) = (offset, data);
        while !rest.is_empty() {
            let (structure, length) = self.locate(bar.index, offset, rest.len());
            let (run, later) = rest.split_at_mut(length);
            match (structure, &self.msix, &bar.backing) {
                (Structure::Table(at), Some(msix), _) => msix.read_table(at, run),
                (Structure::Pba(at), Some(msix), _) => msix.read_pba(at, run),
                (_, _, BarBacking::Registers) => self.endpoint.bar_read(bar.index, offset, run),
                (_, _, BarBacking::Memory(memory)) => {
                    if !memory.read(offset, run) {
                        run.fill(0xff);
                    }
                }
            }
            (offset, rest) = (offset.saturating_add(length as u64), later);
        }
    }

    /// The range lies inside the BAR.
    fn serve_write(&self, bar: &BarDeclaration, offset: u64, data: &[u8], writer: Writer) {
        let (mut offset, mut rest) = (offset, data);
        while !rest.is_empty() {
            let (structure, length) = self.locate(bar.index, offset, rest.len());
            let (run, later) = rest.split_at(length);
            match (structure, &self.msix, &bar.backing) {
                (Structure::Table(at), Some(msix), _) => {
                    self.count_delayed(msix.write_table(at, run));
                }
                // The Pending Bit Array is read-only.
                (Structure::Pba(_), _, _) => {}
                (_, _, BarBacking::Registers) => match writer {
                    Writer::Cpu => self.endpoint.cpu_write(bar.index, offset, run),
                    Writer::Peer => self.endpoint.bar_write(bar.index, offset, run),
                },
                (_, _, BarBacking::Memory(memory)) => {
                    if !memory.write(offset, run) {
                        tracing::debug!(function = self.name, offset, "a write to closed memory");
                    }
                }
            }
            (offset, rest) = (offset.saturating_add(length as u64), later);
        }
    }

    /// An access that the CPU should not have sent: memory decoding is off.
    fn refuse(&self, posted: bool, address: u64, length: usize) {
        self.link.count_cpu_refused(posted, address, length);
        let header = memory_request_header(posted, address, length);
        self.record_unsupported_request(header, posted);
    }

    /// The function refused a request, which the caller counts. No lock may be held but `transition`.
    pub(crate) fn record_unsupported_request(&self, header: [u32; 4], posted: bool) {
        lock(&self.config).record_unsupported_request(header, posted);
    }

    /// A read of the function's was refused.
    pub(crate) fn record_master_abort(&self) {
        lock(&self.config).record_master_abort();
    }

    fn count_delayed(&self, messages: usize) {
        if messages > 0 {
            self.link.count_delayed_msix(messages);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `length` bytes at `offset` lie in a region of `size` bytes; returns the offset as an index.
fn check_range(size: u64, offset: u64, length: usize) -> Result<usize, OutOfBounds> {
    let end = offset.checked_add(length as u64).ok_or(OutOfBounds)?;
    if end > size {
        return Err(OutOfBounds);
    }
    usize::try_from(offset).map_err(|_| OutOfBounds)
}

fn bus_address(state: &DecodeState, bar: u8, offset: u64) -> u64 {
    state
        .bar_address(bar)
        .unwrap_or_default()
        .saturating_add(offset)
}
