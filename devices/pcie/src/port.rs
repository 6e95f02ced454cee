//! A [`Port`]: an endpoint's only way out, to host memory, to its peers and to the interrupt controller.

use std::sync::{Arc, Weak};

use vm_memory::VolatileSlice;

use crate::counters::{HostParty, Movement, Party, PortError};
use crate::fabric::Core;
use crate::function::Function;
use crate::host_memory::{HostLookup, HostMemory, HostTable};
use crate::memory::DmaBuffers;
use crate::msix::Delivery;
use crate::posted::Posted;
use crate::refusal::{Refusal, Stopped};
use crate::route::{Decoder, Member, RouteTable};
use crate::tlp::{self, ENDPOINT_READ_COMPLETION_BOUNDARY, LinkSettings, TlpKind};
use crate::tree::Station;

/// A contiguous range of PCI bus addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// First bus address.
    pub address: u64,
    /// Length in bytes; zero-length ranges move nothing.
    pub length: u64,
}

/// Why a DMA did not happen. Nothing of it has moved, but for [`Medium`](DmaError::Medium), where the endpoint
/// may have moved a part of it before it failed; that part is not counted.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// Bus Master Enable is off, or the function is not in D0.
    #[error("bus mastering is disabled")]
    BusMasterDisabled,
    /// Nothing decodes the address, or what does refuses the access: Unsupported Request
    /// (PCI Express Base 6.0, section 2.3.1).
    #[error("unsupported request at bus address {address:#x}")]
    UnsupportedRequest {
        /// First address that could not be reached.
        address: u64,
    },
    /// The endpoint is not plugged in, or its transport has no guest.
    #[error("the link is down")]
    LinkDown,
    /// The endpoint's own side of the transfer (its file) failed.
    #[error("medium: {0}")]
    Medium(#[from] std::io::Error),
}

/// An endpoint's way out. Cheap to clone; all clones are one port.
#[derive(Clone)]
pub struct Port {
    pub(crate) inner: Arc<PortInner>,
}

pub(crate) struct PortInner {
    pub name: String,
    /// Number of the endpoint in its fabric.
    pub endpoint: usize,
    /// Where it is plugged in.
    pub slot: usize,
    /// The fabric outlives its endpoints' ports or is gone, and then the link is down.
    pub core: Weak<Core>,
    pub host: Arc<HostMemory>,
    pub function: std::sync::OnceLock<Weak<Function>>,
}

/// Direction of a DMA, as the endpoint sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dma {
    Read,
    Write,
}

/// A run of bytes that travels to or from one completer.
struct Hop {
    party: Party,
    station: Station,
    address: u64,
    length: u64,
    /// Packet sizes of the completions of a read.
    payload: u32,
    boundary: u32,
}

/// Bytes on their way to or from registers, which no slice of memory stands for.
struct RegisterAccess {
    owner: Arc<PortInner>,
    bar: u8,
    offset: u64,
    bytes: Vec<u8>,
}

/// Where the bytes of one piece of a DMA lie.
enum Place<'a> {
    Memory(VolatileSlice<'a>),
    /// Index into the list of register accesses.
    Registers(usize),
}

/// A DMA resolved to memory, and what it will count.
#[derive(Default)]
struct Resolved<'a> {
    places: Vec<Place<'a>>,
    registers: Vec<RegisterAccess>,
    hops: Vec<Hop>,
    /// Peers that were asked whether the CPU has posted something to them,
    asked: Vec<usize>,
    /// and what is still on its way: nobody is waited for twice.
    undelivered: Vec<Arc<dyn Posted>>,
}

impl Port {
    /// Name of the endpoint in its topology.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Memory Read: fills `data` from bus address `address`.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let range = DmaRange {
            address,
            length: data.len() as u64,
        };
        self.read_ranges(&[range], |buffers| buffers.drain_to_slice(data))
    }

    /// Memory Write: posts `data` to bus address `address`.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let range = DmaRange {
            address,
            length: data.len() as u64,
        };
        self.write_ranges(&[range], |buffers| buffers.fill_from_slice(data))
    }

    /// Memory Reads of `ranges`, in place: `sink` gets the memory that lies there, in order, and takes the
    /// bytes from it. The memory stays mapped while `sink` runs, and no longer; `sink` must not use the port.
    ///
    /// # Errors
    /// See [`DmaError`]; an error of `sink` is [`DmaError::Medium`].
    pub fn read_ranges(
        &self,
        ranges: &[DmaRange],
        sink: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), DmaError> {
        self.transfer(Dma::Read, ranges, sink)
    }

    /// Memory Writes to `ranges`, in place: `source` gets the memory that lies there, in order, and puts the
    /// bytes into it. The same conditions as for [`read_ranges`](Port::read_ranges).
    ///
    /// # Errors
    /// See [`DmaError`]; an error of `source` is [`DmaError::Medium`].
    pub fn write_ranges(
        &self,
        ranges: &[DmaRange],
        source: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), DmaError> {
        self.transfer(Dma::Write, ranges, source)
    }

    /// Moves bytes from the ranges `from` to the ranges `to`, which are as long together: a Memory Read and
    /// a Memory Write, with one copy between. Overlapping ranges give undefined bytes, as on hardware.
    ///
    /// # Errors
    /// See [`DmaError`]; different lengths are [`DmaError::Medium`].
    pub fn move_between(&self, from: &[DmaRange], to: &[DmaRange]) -> Result<(), DmaError> {
        let core = self.core()?;
        self.attempt_move(&core, from, to, false)
            .map_err(|stopped| self.report(&core, stopped))
    }

    fn attempt_move(
        &self,
        core: &Core,
        from: &[DmaRange],
        to: &[DmaRange],
        waited: bool,
    ) -> Result<(), Stopped> {
        let fetched = self.fetch_registers(core, from)?;
        let (routes, host) = (core.routes(), self.inner.host.read());
        let member = self.requester(core, &routes)?;
        let mut source = self.resolve(Dma::Read, from, &routes, &host, member)?;
        let undelivered = std::mem::take(&mut source.undelivered);
        if !undelivered.is_empty() && !waited {
            drop(source);
            drop((host, routes));
            undelivered.iter().for_each(|posted| posted.wait());
            return self.attempt_move(core, from, to, true);
        }
        source.install(fetched)?;
        let mut target = self.resolve(Dma::Write, to, &routes, &host, member)?;
        buffers_of(&source.places, &mut source.registers)
            .copy_to(&buffers_of(&target.places, &mut target.registers))?;
        self.count(Dma::Read, core, member, &source.hops);
        self.count(Dma::Write, core, member, &target.hops);
        let registers = target.registers;
        drop((host, routes));
        deliver_registers(&registers);
        Ok(())
    }

    /// Sends MSI-X vector `vector` if the guest has MSI-X enabled; otherwise does nothing. A masked vector
    /// becomes pending.
    pub fn msix(&self, vector: u16) {
        let Some(function) = self.inner.function() else {
            return;
        };
        if function.send_msix(vector) == Delivery::Sent {
            self.inner.count_msi();
        }
    }

    /// Whether the guest has enabled MSI-X; if not, the endpoint uses [`set_intx`](Port::set_intx).
    pub fn msix_enabled(&self) -> bool {
        self.inner
            .function()
            .is_some_and(|function| function.decode_state().msix_enabled)
    }

    /// Sets the level of the INTx pin.
    pub fn set_intx(&self, asserted: bool) {
        if let Some(function) = self.inner.function() {
            function.set_intx_level(asserted);
        }
    }

    /// Bus address that the guest programmed into BAR `bar`, if memory decoding is on.
    pub fn bar_address(&self, bar: u8) -> Option<u64> {
        let state = self.inner.function()?.decode_state();
        if state.decodes() {
            state.bar_address(bar)
        } else {
            None
        }
    }

    /// Returns when every DMA of the fabric that is under way now has ended: an endpoint that has closed its memory
    /// learns so that no peer is in it any more. Not to be called from [`Endpoint::bar_write`](crate::Endpoint) or
    /// within a DMA.
    pub fn settle(&self) {
        if let Ok(core) = self.core() {
            drop(core.routes_mut());
        }
    }

    fn core(&self) -> Result<Arc<Core>, DmaError> {
        self.inner.core.upgrade().ok_or(DmaError::LinkDown)
    }

    /// The requester's entry in the address map, if its requests may pass.
    fn requester<'a>(&self, core: &Core, routes: &'a RouteTable) -> Result<&'a Member, DmaError> {
        let member = routes
            .member(self.inner.endpoint)
            .filter(|member| member.link_up && Arc::ptr_eq(&member.owner, &self.inner));
        let member = member.ok_or(DmaError::LinkDown)?;
        if member.may_request {
            return Ok(member);
        }
        core.ledger
            .record_endpoint_error(self.inner.endpoint, PortError::Blocked);
        Err(DmaError::BusMasterDisabled)
    }

    fn transfer(
        &self,
        dma: Dma,
        ranges: &[DmaRange],
        body: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), DmaError> {
        let core = self.core()?;
        self.attempt(&core, dma, ranges, None, false, body)
            .map_err(|stopped| self.report(&core, stopped))
    }

    fn attempt(
        &self,
        core: &Core,
        dma: Dma,
        ranges: &[DmaRange],
        fetched: Option<Vec<RegisterAccess>>,
        waited: bool,
        body: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), Stopped> {
        // Both guards are held while bytes move: when a config write or an unmap has returned, no DMA by
        // the old addresses is under way.
        let (routes, host) = (core.routes(), self.inner.host.read());
        let member = self.requester(core, &routes)?;
        let mut resolved = self.resolve(dma, ranges, &routes, &host, member)?;
        if !resolved.undelivered.is_empty() && !waited {
            let undelivered = std::mem::take(&mut resolved.undelivered);
            drop(resolved);
            drop((host, routes));
            undelivered.iter().for_each(|posted| posted.wait());
            return self.attempt(core, dma, ranges, fetched, true, body);
        }
        if dma == Dma::Read && !resolved.registers.is_empty() && fetched.is_none() {
            drop(resolved);
            drop((host, routes));
            let fetched = self.fetch_registers(core, ranges)?;
            return self.attempt(core, dma, ranges, Some(fetched), waited, body);
        }
        if let Some(fetched) = fetched {
            resolved.install(fetched)?;
        }
        body(&buffers_of(&resolved.places, &mut resolved.registers))?;
        self.count(dma, core, member, &resolved.hops);
        let registers = resolved.registers;
        drop((host, routes));
        if dma == Dma::Write {
            deliver_registers(&registers);
        }
        Ok(())
    }

    /// Reads what registers of peers lie in `ranges`. A peer's register read may take the peer's own locks,
    /// so it must not run while the address map is held; the caller resolves once more afterwards.
    fn fetch_registers(
        &self,
        core: &Core,
        ranges: &[DmaRange],
    ) -> Result<Vec<RegisterAccess>, Stopped> {
        let mut accesses = {
            let (routes, host) = (core.routes(), self.inner.host.read());
            let member = self.requester(core, &routes)?;
            self.resolve(Dma::Read, ranges, &routes, &host, member)?
                .registers
        };
        for access in &mut accesses {
            match access.owner.function() {
                Some(function) => function.peer_read(access.bar, access.offset, &mut access.bytes),
                None => access.bytes.fill(0xff),
            }
        }
        Ok(accesses)
    }

    /// Finds the memory behind all of `ranges`, or why it cannot be reached.
    fn resolve<'a>(
        &self,
        dma: Dma,
        ranges: &[DmaRange],
        routes: &'a RouteTable,
        host: &'a HostTable,
        member: &Member,
    ) -> Result<Resolved<'a>, Stopped> {
        let mut resolved = Resolved::default();
        for range in ranges {
            let mut address = range.address;
            let mut left = range.length;
            while left > 0 {
                let length = self.step(dma, address, left, routes, host, member, &mut resolved)?;
                left -= length;
                // Nothing that answers reaches the top of the address space, so this never wraps.
                address = address.saturating_add(length);
            }
        }
        Ok(resolved)
    }

    /// Resolves the first bytes of `[address, address + left)` and returns how many.
    #[allow(clippy::too_many_arguments)]
    fn step<'a>(
        &self,
        dma: Dma,
        address: u64,
        left: u64,
        routes: &'a RouteTable,
        host: &'a HostTable,
        member: &Member,
        resolved: &mut Resolved<'a>,
    ) -> Result<u64, Stopped> {
        let write = dma == Dma::Write;
        let found = routes.lookup(address);
        let peer = found.filter(|(decoder, _)| decoder.endpoint != self.inner.endpoint);
        let refusal = || {
            let decoder = peer.map(|(decoder, _)| decoder);
            Stopped::Refused(Refusal::new(dma, address, left, member, decoder, routes))
        };
        if let Some((peer, answers)) = peer.filter(|(decoder, _)| decoder.enabled) {
            if dma == Dma::Read && peer.trapped {
                resolved.ask(peer);
            }
            let offset = address - peer.start;
            let length = left.min(answers);
            let place = match &peer.memory {
                Some(memory) => Place::Memory(memory.slice(offset, length).ok_or_else(refusal)?),
                None => {
                    let bytes = vec![0; usize::try_from(length).map_err(|_| refusal())?];
                    resolved.registers.push(RegisterAccess {
                        owner: peer.owner.clone(),
                        bar: peer.bar,
                        offset,
                        bytes,
                    });
                    Place::Registers(resolved.registers.len() - 1)
                }
            };
            let completer = routes.member(peer.endpoint).ok_or_else(refusal)?;
            resolved.places.push(place);
            resolved.add_hop(Hop {
                party: Party::endpoint(peer.endpoint),
                station: Station::Slot(completer.slot),
                address,
                length,
                payload: completer.settings.max_payload_size,
                boundary: ENDPOINT_READ_COMPLETION_BOUNDARY,
            });
            return Ok(length);
        }
        // A range of host memory may run into a peer's BAR; peers come first.
        let until_peer = routes
            .next_start(address)
            .map_or(left, |next| left.min(next - address));
        if let HostLookup::Memory(slice) = host.lookup(address, until_peer, write) {
            let length = slice.len() as u64;
            resolved.places.push(Place::Memory(slice));
            resolved.add_hop(Hop {
                party: HostParty::Memory.into(),
                station: Station::RootComplex,
                address,
                length,
                // The root complex completes with the payload size that software gave the whole hierarchy.
                payload: member.settings.max_payload_size,
                boundary: member.settings.read_completion_boundary,
            });
            return Ok(length);
        }
        Err(refusal())
    }

    fn count(&self, dma: Dma, core: &Core, member: &Member, hops: &[Hop]) {
        let me = Party::endpoint(self.inner.endpoint);
        let mine = Station::Slot(member.slot);
        let LinkSettings {
            max_payload_size,
            max_read_request_size,
            ..
        } = member.settings;
        let mut movements = Vec::with_capacity(hops.len() * 2);
        for hop in hops {
            let there = core.paths.between(mine, hop.station);
            let mut movement = |from, to, kind, tally, path| {
                movements.push(Movement {
                    from,
                    to,
                    kind,
                    tally,
                    path,
                });
            };
            match dma {
                Dma::Write => {
                    let tally = tlp::memory_writes(hop.address, hop.length, max_payload_size);
                    movement(me, hop.party, TlpKind::MWr, tally, there);
                }
                Dma::Read => {
                    let requests =
                        tlp::memory_reads(hop.address, hop.length, max_read_request_size);
                    movement(me, hop.party, TlpKind::MRd, requests, there);
                    let completions = tlp::read_completions(
                        hop.address,
                        hop.length,
                        max_read_request_size,
                        hop.payload,
                        hop.boundary,
                    );
                    let back = core.paths.between(hop.station, mine);
                    movement(hop.party, me, TlpKind::CplD, completions, back);
                }
            }
        }
        core.ledger.record(&movements);
    }
}

impl PortInner {
    pub(crate) fn function(&self) -> Option<Arc<Function>> {
        self.function.get()?.upgrade()
    }

    /// One MSI-X message: a 4-byte Memory Write to the interrupt controller.
    pub(crate) fn count_msi(&self) {
        let Some(core) = self.core.upgrade() else {
            return;
        };
        let path = core
            .paths
            .between(Station::Slot(self.slot), Station::RootComplex);
        core.ledger.record(&[Movement {
            from: Party::endpoint(self.endpoint),
            to: HostParty::Interrupts.into(),
            kind: TlpKind::MWr,
            tally: tlp::memory_writes(0xfee0_0000, 4, 128),
            path,
        }]);
    }
}

impl Resolved<'_> {
    /// Puts in what was read from registers before. A guest that moved the BARs meanwhile gets an error.
    fn install(&mut self, fetched: Vec<RegisterAccess>) -> Result<(), DmaError> {
        let same = |(now, before): (&RegisterAccess, &RegisterAccess)| {
            Arc::ptr_eq(&now.owner, &before.owner)
                && (now.bar, now.offset) == (before.bar, before.offset)
                && now.bytes.len() == before.bytes.len()
        };
        if self.registers.len() != fetched.len() || !self.registers.iter().zip(&fetched).all(same) {
            return Err(DmaError::LinkDown);
        }
        self.registers = fetched;
        Ok(())
    }

    /// Asks what the CPU has posted to `peer`, once.
    fn ask(&mut self, peer: &Decoder) {
        if !self.asked.contains(&peer.endpoint) {
            self.asked.push(peer.endpoint);
            let function = peer.owner.function();
            self.undelivered
                .extend(function.and_then(|function| function.undelivered()));
        }
    }

    /// Adds a hop, joined to the last one where it goes on from it: neighbouring mappings of host memory are
    /// one range to the requester.
    fn add_hop(&mut self, hop: Hop) {
        if let Some(last) = self.hops.last_mut()
            && last.party == hop.party
            && last.address.checked_add(last.length) == Some(hop.address)
        {
            last.length += hop.length;
        } else {
            self.hops.push(hop);
        }
    }
}

fn buffers_of<'a>(places: &[Place<'a>], registers: &'a mut [RegisterAccess]) -> DmaBuffers<'a> {
    let mut buffers = DmaBuffers::default();
    let mut bounces: Vec<Option<VolatileSlice<'a>>> = registers
        .iter_mut()
        .map(|access| Some(VolatileSlice::from(access.bytes.as_mut_slice())))
        .collect();
    for place in places {
        match place {
            Place::Memory(slice) => buffers.push(*slice),
            Place::Registers(index) => {
                if let Some(slice) = bounces.get_mut(*index).and_then(Option::take) {
                    buffers.push(slice);
                }
            }
        }
    }
    buffers
}

fn deliver_registers(registers: &[RegisterAccess]) {
    for access in registers {
        if let Some(function) = access.owner.function() {
            function.peer_write(access.bar, access.offset, &access.bytes);
        }
    }
}
