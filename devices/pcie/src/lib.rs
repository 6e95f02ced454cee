//! PCI Express for p2plab's endpoints: what every function shares, the switch, and its counters.
//!
//! # Parts
//!
//! - [`endpoint`]: the [`Endpoint`] trait that a device model implements, and what it declares.
//! - [`port`]: the [`Port`], an endpoint's only way out. It routes, moves the bytes once, and counts.
//! - [`fabric`]: the tree of root ports, switches and slots; endpoints are plugged into it.
//! - [`function`]: an endpoint with its config space, as a transport (vfio-user, a unit test) drives it.
//! - [`tlp`]: kinds and sizes of packets, and how transfers are split into them.
//! - [`traffic`]: readings of the counters, differences, the laws they obey, text and JSON.
//! - [`memory`]: memory behind BARs, and the view of memory that a DMA hands out.
//! - [`registers`]: a device's table of registers, and how accesses of a host meet it. [`Mistakes`]: which of a guest's
//!   mistakes are worth a line in the log.
//!
//! Inside: `config` and `msix` (registers), `link` (a function's way into the fabric), `host_memory` (what the
//! transport mapped), `route` (the address map), `refusal` (Unsupported Requests), `tree` (paths), `counters`
//! (the ledger), `sparse` (memory that takes nothing until it is written), `file_io` (the only unsafe code).
//!
//! # The life of a DMA
//!
//! An endpoint asks its port to read or write ranges of bus addresses. The port looks each up: a peer's BAR, or
//! host memory, or nothing. It hands the memory that lies there to the endpoint, which moves the bytes, and
//! then counts the packets at each port on the way, split by the sizes that the guest programmed. A range that
//! cannot be reached stops the whole DMA before anything moves: the first request of that range is counted, the
//! port that answers it counts an Unsupported Request, and the endpoint gets an error.
//!
//! # What it does not model
//!
//! Time, flow-control credits, ordering between DMAs of different threads (each is atomic for the counters; a read of a
//! peer's memory comes after what the CPU had posted to it, see [`Posted`], with a limit to its patience), data
//! link and physical layer, ACS redirection, I/O space, and the bridges' own config space, which is QEMU's:
//! the switch routes by the endpoints' BARs and does not see bus numbers or bridge windows.

pub(crate) mod config;
pub(crate) mod counters;
pub mod endpoint;
pub mod fabric;
mod file_io;
pub mod function;
pub(crate) mod host_memory;
mod link;
pub mod memory;
mod mistakes;
pub(crate) mod msix;
pub mod port;
mod posted;
mod refusal;
pub mod registers;
pub(crate) mod route;
mod sparse;
pub mod tlp;
pub mod traffic;
pub mod tree;

pub use config::initiates_flr;
pub use counters::COUNTING;
pub use endpoint::{
    BarBacking, BarDeclaration, CpuAccess, Declaration, Endpoint, Identity, MsixDeclaration,
    ResetKind, digest,
};
pub use fabric::{Fabric, FabricBuilder, FabricError};
pub use function::{Access, Function, MapError, OutOfBounds};
pub use memory::{BarMemory, DmaBuffers, MemoryBacking, claim_file, keep_new_file};
pub use mistakes::Mistakes;
pub use port::{DmaError, DmaRange, Port};
pub use posted::Posted;
pub use sparse::SparseMemory;
pub use tlp::{Tally, TlpClass, TlpKind};
pub use traffic::{MatrixEntry, PortTraffic, Traffic};
pub use tree::PortKind;
