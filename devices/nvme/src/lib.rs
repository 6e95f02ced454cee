//! An NVM Express controller: NVM Express Base 2.0, NVM Command Set 1.0, PCIe transport.
//!
//! It is what the stock Linux nvme driver needs for a fully working disk, with a Controller Memory Buffer and a
//! Persistent Memory Region that peers reach over PCI Express.
//!
//! # Parts, in the order in which a command meets them
//!
//! - [`spec`]: wire types, and nothing else; mini drivers and fuzzers use them, too.
//! - `controller`: [`NvmeController`], the `Endpoint`; BAR 0 decoding, doorbells, INTx. `regs`: the registers.
//! - `lifecycle`: the controller's thread: enable, reset, shutdown, admin queue. `admin`, `identify`, `features`,
//!   `logs`, `events`: the admin commands. `health`, `telemetry`: what the controller says of itself.
//!   `firmware`: images and slots, and what makes an image. `self_test`, `sanitize`: what runs in the `background`, over
//!   a namespace's `extents`. `held`: what Abort can take back. `gate`: where I/O commands come in.
//! - `queue`, `queue_table`: submission and completion queues; a completion slot is reserved before a command
//!   is fetched. `shadow`: doorbells in the host's memory.
//! - `worker`: executes an I/O queue's commands, on a thread of the queue's or, the short ones, on the transport's, which
//!   `polling` keeps awake for the next; `moderation` says how many completions share an interrupt. `io`: those
//!   commands. `namespaces`, `namespace`: the blocks, their formats, metadata and protection information.
//!   `write_cache`: what a loss of power takes back.
//! - `prp`, `sgl`: from a command to the memory of its data, a `transfer`. `dma`: to that memory, through the
//!   port or, by a `window`, inside the controller's own `cmb` or `pmr`.
//! - `faults`: what a test has ordered to go wrong.
//! - `trace`, `counters`: what tests and people read.
//!
//! # How mistakes look to a guest
//!
//! - A register access of a bad shape is ignored (reads give what is there) and logged.
//! - A bad doorbell write is ignored, logged in the Error Information page, and an asynchronous event.
//! - A bad command gets its status and an entry in the Error Information page.
//! - A queue whose memory cannot be reached sets CSTS.CFS, and all queues stop; a controller reset recovers.
//!
//! # What lasts
//!
//! Blocks in a file last as the file does. Which namespaces there are and how they are formatted is the configuration's
//! to say: what Format NVM and Namespace Management change survives every reset and unplugging, and ends with the
//! process, as do created namespaces and the marks of Write Uncorrectable. A process that is killed between the data and
//! the metadata of a write leaves one without the other, which a guard tells; it was not acknowledged.
//!
//! A power cut keeps every write, unless the configuration has a write cache that forgets ([`WriteCacheConfig`]): then
//! what was neither flushed nor written with FUA is lost.
//!
//! # Arbitration
//!
//! Round robin, which every controller has (Base 3.4.4.1, CAP.AMS = 0). Each queue has a worker, all take turns on the
//! host's processors, and none goes before another: that is what round robin promises, which knows no order between
//! the commands of two queues. Arbitration Burst is a recommendation; the weights, and the priorities with which queues
//! are created, belong to weighted round robin and have no effect. Weighted round robin would need one place that
//! launches the commands of all queues, and workers that wait for it.
//!
//! # Not implemented
//!
//! SGLs for metadata or with keys and offsets, metadata behind each block's data (extended LBAs), metadata of other than
//! 8 bytes, protection information of types 2 and 3 and with guards of other than 16 bits, copies between namespaces,
//! reservations, shared namespaces, directives, data that is partly in the CMB, the loss of the link in an NVM Subsystem
//! Reset, weighted round robin, discontiguous queues, page sizes other than 4 KiB, command sets other than NVM. A worker
//! executes one command at a time.
//!
//! Of the admin commands: cryptographic erase of Format NVM and Sanitize; keeping blocks allocated, of Sanitize, which
//! leaves the CMB and the files of deleted namespaces as they are, and lets the host enable the PMR meanwhile; boot
//! partitions; Host Identifier, Persistent Event Log, security, NVMe-MI, virtualization. Abort finds
//! commands that wait to be executed, and none that a host has queued. The parameter of an Error Information entry is
//! unknown. No Keep Alive (KAS = 0), which the PCIe transport leaves to the controller: a host learns from a register
//! that its controller is there, and the controller from the bus that its host is not. Saved features, firmware and what
//! the logs count live as long as the controller's process, over every reset and loss of power within it.

mod admin;
mod background;
mod cmb;
mod config;
mod controller;
mod counters;
mod dma;
mod events;
mod extents;
mod faults;
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
mod moderation;
mod namespace;
mod namespaces;
mod pmr;
mod polling;
mod prp;
mod queue;
mod queue_table;
mod regs;
mod sanitize;
mod self_test;
mod sgl;
mod shadow;
pub mod spec;
mod telemetry;
mod trace;
mod transfer;
mod window;
mod worker;
mod write_cache;

pub use config::{
    Backing, CmbConfig, CmbScheme, MAX_IO_QUEUES, MIN_WRITE_CACHE, Metadata, NamespaceConfig,
    NvmeConfig, NvmeError, PmrBacking, PmrConfig, WriteCacheConfig,
};
pub use controller::NvmeController;
pub use faults::{Fault, FaultEffect, FaultId, Faults};
pub use pmr::PmrCondition;
pub use trace::{TRACE_CAPACITY, Trace, TraceDoorbell, TraceEntry, TraceLog, TraceRange};
