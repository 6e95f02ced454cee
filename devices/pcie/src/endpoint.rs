//! What a device model declares and implements: the [`Endpoint`] trait.
//!
//! A device owns its registers and nothing else of PCI Express. Config space, BAR sizing, the MSI-X table,
//! Bus Master Enable and the routing of its transactions belong to this crate; a device declares what it
//! wants of them and never edits config bytes.

use std::sync::Arc;

use crate::memory::BarMemory;
use crate::port::Port;

/// Identity of a function: the read-only fields of its type 0 header
/// (PCI Express Base 6.0, section 7.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Subsystem Vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
    /// Revision ID.
    pub revision_id: u8,
    /// Class Code, 24 bits: base class, sub-class, programming interface (0x010802 is NVM Express).
    pub class_code: u32,
    /// Device Serial Number (section 7.9.3), an EUI-64; no such capability without one.
    pub serial_number: Option<u64>,
}

/// A number that is as good as unique for `text`, to make serial numbers and identifiers of (FNV-1a, then mixed so that
/// all bits depend on all).
pub fn digest(text: &str, salt: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// How the guest's CPU reaches a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuAccess {
    /// Each access is a message to the device model and is counted.
    Trapped,
    /// The BAR's memory is mapped into the guest: fast, and not seen by the switch.
    Mapped,
}

/// What stands behind a BAR.
#[derive(Clone, Debug)]
pub enum BarBacking {
    /// Registers: every access calls [`Endpoint::bar_read`] or [`Endpoint::bar_write`].
    Registers,
    /// Memory: accesses, from the CPU and from peers, go straight to it and never call the endpoint.
    Memory(Arc<BarMemory>),
}

/// One Base Address Register (pair).
#[derive(Clone, Debug)]
pub struct BarDeclaration {
    /// Index of the register, 0 to 5; a 64-bit BAR also takes the next one.
    pub index: u8,
    /// Size in bytes: a power of two, at least 4 KiB; of registers, at most 16 MiB.
    pub size: u64,
    /// 64-bit addressing.
    pub is_64bit: bool,
    /// Prefetchable.
    pub prefetchable: bool,
    /// How the CPU reaches it. [`CpuAccess::Mapped`] needs [`BarBacking::Memory`].
    pub cpu_access: CpuAccess,
    /// What stands behind it.
    pub backing: BarBacking,
}

impl BarDeclaration {
    /// A 64-bit BAR of `size` bytes of registers, which only messages reach.
    pub fn registers(index: u8, size: u64) -> Self {
        Self {
            index,
            size,
            is_64bit: true,
            prefetchable: false,
            cpu_access: CpuAccess::Trapped,
            backing: BarBacking::Registers,
        }
    }

    /// A 64-bit prefetchable BAR of all of `memory`.
    pub fn memory(index: u8, memory: &Arc<BarMemory>, cpu_access: CpuAccess) -> Self {
        Self {
            index,
            size: memory.size(),
            is_64bit: true,
            prefetchable: true,
            cpu_access,
            backing: BarBacking::Memory(Arc::clone(memory)),
        }
    }
}

/// Where the MSI-X table and Pending Bit Array lie (PCI Express Base 6.0, section 7.7.2).
/// This crate serves both; the endpoint sees no access to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixDeclaration {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR that holds both structures.
    pub bar: u8,
    /// Offset of the table in that BAR, 8-byte aligned; 16 bytes a vector.
    pub table_offset: u32,
    /// Offset of the Pending Bit Array in that BAR, 8-byte aligned; one bit a vector.
    pub pba_offset: u32,
}

/// All that an endpoint says of itself to the bus.
#[derive(Clone, Debug)]
pub struct Declaration {
    /// Header identity.
    pub identity: Identity,
    /// Base Address Registers, in any order.
    pub bars: Vec<BarDeclaration>,
    /// MSI-X, if the function has it.
    pub msix: Option<MsixDeclaration>,
    /// Whether the function has an INTx pin (INTA).
    pub intx: bool,
}

/// Why a function is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// Function Level Reset (PCI Express Base 6.0, section 6.6.2).
    FunctionLevel,
    /// Conventional reset: hot reset, or the guest machine was reset.
    Conventional,
    /// The other side of the transport went away (QEMU died or closed the device).
    ConnectionLost,
}

/// A device model: the function behind one port.
///
/// Methods take `&self` and may be called from several threads at once: the transport's, and those of
/// peers that reach into a register BAR. [`bar_write`](Endpoint::bar_write) must not wait for DMA of the
/// endpoint's own (wake a worker instead): a peer may be inside its own DMA when it calls.
pub trait Endpoint: Send + Sync {
    /// What the function shows to the bus. Called once, before [`attach`](Endpoint::attach).
    fn declaration(&self) -> Declaration;

    /// The endpoint is plugged in; `port` is its only way out. Called once.
    fn attach(&self, port: Port);

    /// A read of `data.len()` bytes at `offset` in a register BAR. The range lies inside the BAR and outside
    /// the MSI-X structures; its length and alignment are the guest's choice. Fill `data`; what the device
    /// does not decode reads as zero or ones, as its specification says.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// A write to a register BAR, under the same conditions as [`bar_read`](Endpoint::bar_read).
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// A write of the guest's CPU to a register BAR; peers' come to [`bar_write`](Endpoint::bar_write). Nobody waits
    /// for it but the CPU's next access, so the device may do what the write asks for at once, DMA included, on the
    /// transport's thread: some ten microseconds of work that would cost as much again to hand over.
    fn cpu_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.bar_write(bar, offset, data);
    }

    /// The transport has no message for the device, and looks for work that the guest may have announced in its own
    /// memory: the device does what it finds. Returns whether to call again at once; otherwise the transport sleeps
    /// until there is a message. A transport that polls does so always before it sleeps, and on the thread that
    /// calls [`cpu_write`](Endpoint::cpu_write).
    fn poll(&self) -> bool {
        false
    }

    /// Reset the device's own state. Returns when no DMA of the time before is in flight. Config space is
    /// reset by the caller, afterwards.
    fn reset(&self, kind: ResetKind);

    /// The endpoint is unplugged: stop every thread, drop the port. Called at most once, after
    /// [`reset`](Endpoint::reset). What the transport or peers still try afterwards does not reach the endpoint;
    /// an access that began before may still be under way.
    fn detach(&self);

    /// State for people and tests: a JSON object.
    fn dump(&self) -> serde_json::Value;
}
