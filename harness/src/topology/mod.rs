//! What a lab is made of: guest, root ports, switches and endpoints, as plain data.
//!
//! A [`Topology`] comes from a TOML file ([`Topology::from_toml`]) or from Rust ([`Topology::builder`]).
//! Both ways end in the same checks ([`Topology::check`]), so code that is given one may rely on them:
//! names are unique, every port named exists and carries at most one thing, the tree has no loop, and
//! all sizes are within their bounds.
//!
//! ```
//! use p2plab::topology::{GIB, MIB, Nvme, Topology};
//!
//! let topology = Topology::builder("p2p")
//!     .root_port("rp0")
//!     .switch("sw0", "rp0", 4)
//!     .nvme("ssd0", "sw0.0", Nvme::memory(GIB).cmb(64 * MIB))
//!     .nvme("ssd1", "sw0.1", Nvme::memory(GIB))
//!     .build()?;
//! assert_eq!(topology.switches[0].ports.len(), 4);
//! # Ok::<(), p2plab::topology::TopologyError>(())
//! ```
//!
//! The fields of the file form are listed in `harness/topologies/README.md`.

mod builder;
mod check;
mod device;
mod error;
mod host;
mod read;
pub mod sizes;
pub mod times;
mod write;

use std::path::PathBuf;

pub use builder::TopologyBuilder;
pub use device::{
    Backing, CmbOptions, DeviceOptions, Interrupts, NamespaceOptions, Nvme, NvmeOptions, PmrOptions,
};
/// How a guest finds a CMB, and what commands may meet: the NVMe model's own.
pub use p2plab_nvme::{CmbScheme, Fault, FaultEffect};

pub use error::{Place, TopologyError, TopologyFault};
pub use sizes::{GIB, KIB, MIB};

/// A machine with its tree of ports and the endpoints plugged into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// What people call it: 1 to 32 characters of `a-z A-Z 0-9 . _ -`, as all names here.
    pub name: String,
    /// The guest machine.
    pub guest: Guest,
    /// Root ports, in the order of their device numbers.
    pub root_ports: Vec<RootPort>,
    /// Switches, in any order.
    pub switches: Vec<Switch>,
    /// Endpoints, in any order.
    pub endpoints: Vec<EndpointOptions>,
}

/// The guest machine: memory, processors, and what it boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Memory in bytes, a multiple of 2 MiB (default 512 MiB).
    pub memory: u64,
    /// Number of processors (default 2).
    pub cpus: u32,
    /// QEMU's CPU model, with options if need be (default `max`).
    pub cpu: String,
    /// Words added to the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// A kernel of one's own (bzImage) instead of the lab's.
    pub kernel: Option<PathBuf>,
    /// The folder of that kernel's modules (`/lib/modules/VERSION`).
    pub modules: Option<PathBuf>,
    /// Kernel modules to load besides those that the endpoints need, each with its parameters after it
    /// (`nvme use_cmb_sqes=0`). A driver named here with parameters gets them.
    pub load_modules: Vec<String>,
    /// Modules of the project's `guest-kernel/` that are built for the guest's kernel and loaded, each with its
    /// parameters after it: drivers of its own (`p2pmem`), and the kernel's own with patches, in their place (`nvme`).
    pub own_modules: Vec<String>,
    /// The guest has the system image: Debian's nvme-cli, fio, mkfs and more, below `/system`.
    pub system: bool,
    /// Debian packages in the system image beside those that it always has.
    pub packages: Vec<String>,
    /// A `qemu-system-x86_64` of one's own instead of the lab's.
    pub qemu: Option<PathBuf>,
    /// Bytes of 64-bit prefetchable address space behind each slot: a power of two (default 1 GiB).
    /// BARs of all kinds of one endpoint must fit in it.
    pub window: u64,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            memory: 512 * MIB,
            cpus: 2,
            cpu: "max".to_owned(),
            kernel_arguments: Vec::new(),
            kernel: None,
            modules: None,
            load_modules: Vec::new(),
            own_modules: Vec::new(),
            system: false,
            packages: Vec::new(),
            qemu: None,
            window: GIB,
        }
    }
}

/// A port of the root complex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootPort {
    /// Name, unique in the topology.
    pub name: String,
}

/// A switch: one upstream port and its downstream ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Name of the switch and of its upstream port, unique in the topology.
    pub name: String,
    /// The root port or downstream port that its upstream port is connected to.
    pub below: String,
    /// Names of the downstream ports, in the order of their device numbers.
    pub ports: Vec<String>,
}

/// A device in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointOptions {
    /// Name, unique in the topology.
    pub name: String,
    /// The root port or downstream port that it is plugged into.
    pub port: String,
    /// What it is.
    pub device: DeviceOptions,
}

#[cfg(test)]
mod tests;
