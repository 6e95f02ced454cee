//! An NVM Express controller: NVM Express Base 2.0, NVM Command Set 1.0, PCIe transport.
//!
//! It is what the stock Linux nvme driver needs for a fully working disk, with a Controller Memory Buffer
//! that peers reach over PCI Express.
//!
//! # Parts, in the order in which a command meets them
//!
//! - [`spec`]: wire types, and nothing else; mini drivers and fuzzers use them, too.
//! - `controller`: [`NvmeController`], the `Endpoint`; BAR 0 decoding, doorbells, INTx. `regs`: the registers.
//! - `lifecycle`: the controller's thread: enable, reset, shutdown, admin queue. `admin`, `identify`, `features`,
//!   `logs`, `events`: the admin commands. `health`, `telemetry`: what the controller says of itself.
//!   `firmware`: images and slots, and what makes an image. `self_test`, `sanitize`: what runs in
//!   the `background`. `held`: what Abort can take back. `gate`: where I/O commands come in.
//! - `queue`, `queue_table`: submission and completion queues; a completion slot is reserved before a command
//!   is fetched.
//! - `worker`: a thread for each I/O submission queue. `io`: its commands. `namespaces`, `namespace`: the blocks.
//! - `prp`, `sgl`: from a command to the memory of its data, a `transfer`. `dma`, `cmb`: to that memory, through
//!   the port or inside the controller's own CMB.
//! - `trace`, `counters`: what tests and people read.
//!
//! # How mistakes look to a guest
//!
//! - A register access of a bad shape is ignored (reads give what is there) and logged.
//! - A bad doorbell write is ignored, logged in the Error Information page, and an asynchronous event.
//! - A bad command gets its status and an entry in the Error Information page.
//! - A queue whose memory cannot be reached sets CSTS.CFS; a controller reset recovers.
//!
//! # Not implemented
//!
//! SGLs for metadata or with keys and offsets, metadata and protection information, fused commands, Compare, Copy, Verify, Write Uncorrectable,
//! reservations, Format NVM, namespace management, directives, the Persistent Memory
//! Region, completion queues in the CMB, shadow doorbells, subsystem reset, weighted round robin, discontiguous
//! queues, page sizes other than 4 KiB, interrupt coalescing (stored, not acted on), command sets other than NVM.
//! A worker executes one command at a time.
//!
//! Of the admin commands: crypto erase, and keeping blocks allocated, of Sanitize, which leaves the CMB as it is; boot partitions;
//! Keep Alive, Host Identifier, Persistent Event Log, security, NVMe-MI, virtualization. Abort finds commands that wait
//! to be executed, and none that a host has queued. The parameter of an Error Information entry is unknown. Saved
//! features, firmware and what the logs count live as long as the controller's process, over every reset and loss of
//! power within it.

mod admin;
mod background;
mod cmb;
mod config;
mod controller;
mod counters;
mod dma;
mod events;
mod extents;
mod features;
mod firmware;
mod gate;
mod health;
mod held;
mod identify;
mod io;
mod lifecycle;
mod locks;
mod logs;
mod namespace;
mod namespaces;
mod prp;
mod queue;
mod queue_table;
mod regs;
mod sanitize;
mod self_test;
mod sgl;
pub mod spec;
mod telemetry;
mod trace;
mod transfer;
mod worker;

pub use config::{Backing, CmbConfig, MAX_IO_QUEUES, NamespaceConfig, NvmeConfig, NvmeError};
pub use controller::NvmeController;
pub use trace::{TRACE_CAPACITY, Trace, TraceEntry, TraceLog, TraceRange};
