//! The kinds of device a slot can hold, with their options.

mod nvram;

pub use nvram::{Nvram, NvramOptions};

use std::path::PathBuf;
use std::time::Duration;

use p2plab_nvme::{CmbScheme, Fault, Metadata, WriteCacheConfig};
use p2plab_pcie::CpuAccess;

/// A device with its options. RDMA NICs will be a further variant.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceOptions {
    /// An NVMe SSD.
    Nvme(NvmeOptions),
    /// An NVRAM card.
    Nvram(NvramOptions),
}

impl DeviceOptions {
    /// The word in the `device` field of a topology file: `nvme`, `nvram`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Nvme(_) => "nvme",
            Self::Nvram(_) => "nvram",
        }
    }
}

/// Where the bytes of a namespace are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// In memory of this process; gone with the lab.
    Memory,
    /// In a file.
    File {
        /// The file; absolute when it came from a topology file.
        path: PathBuf,
        /// Create it, sparse and of the namespace's size, where it does not exist.
        create: bool,
    },
    /// Nowhere: a namespace that reads as zeros and drops what is written, for benchmarks. A PMR cannot have it.
    Null,
}

/// How an endpoint interrupts the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interrupts {
    /// By MSI-X, with a vector for each queue.
    #[default]
    MsiX,
    /// By the INTx pin alone: the function shows no MSI-X capability.
    IntX,
}

impl Interrupts {
    /// The word in the `interrupts` field of a topology file.
    pub fn word(self) -> &'static str {
        match self {
            Self::MsiX => "msix",
            Self::IntX => "intx",
        }
    }
}

/// Short name for scenarios: `Nvme::memory(GIB).cmb(64 * MIB)`.
pub type Nvme = NvmeOptions;

/// An NVMe SSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeOptions {
    /// Its namespaces; the first is NSID 1.
    pub namespaces: Vec<NamespaceOptions>,
    /// Bytes for namespaces that the guest creates. They are in sparse memory, and gone with the lab.
    pub unallocated: u64,
    /// A write cache that loses what it holds with the power, if any; without one a power cut keeps every write.
    pub write_cache: Option<WriteCacheConfig>,
    /// Controller Memory Buffer, if any.
    pub cmb: Option<CmbOptions>,
    /// Persistent Memory Region, if any.
    pub pmr: Option<PmrOptions>,
    /// Faults that its commands meet from the start.
    pub faults: Vec<Fault>,
    /// Pairs of I/O queues that the controller offers, 1 to 64.
    pub io_queues: u16,
    /// How it interrupts the guest. QEMU 11.1 survives the hot-unplug of an endpoint with INTx only.
    pub interrupts: Interrupts,
    /// Serial number, 1 to 20 printable ASCII characters; without one, the endpoint's name is used.
    pub serial: Option<String>,
}

/// A namespace of an NVMe SSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceOptions {
    /// Size in bytes, a multiple of `block_size`.
    pub size: u64,
    /// Where its bytes are.
    pub backing: Backing,
    /// It refuses writes.
    pub read_only: bool,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// What each block carries besides its data: nothing, 8 bytes, or 8 bytes of protection information of type 1. With
    /// a file it is in a second one beside it, `FILE.meta`.
    pub metadata: Metadata,
}

impl NamespaceOptions {
    /// A namespace of `size` bytes in memory.
    pub fn memory(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memory,
            read_only: false,
            block_size: 512,
            metadata: Metadata::None,
        }
    }

    /// A namespace of `size` bytes that keeps nothing.
    pub fn null(size: u64) -> Self {
        Self {
            backing: Backing::Null,
            ..Self::memory(size)
        }
    }

    /// A namespace of `size` bytes on an existing file of at least that size.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: Backing::File {
                path: path.into(),
                create: false,
            },
            ..Self::memory(size)
        }
    }
}

/// A Controller Memory Buffer (NVMe Base 2.0, section 8.5), in a BAR of its own. What is switched off is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmbOptions {
    /// Size in bytes: a power of two, at least 2 MiB (Linux ignores a smaller one).
    pub size: u64,
    /// Where it starts in its BAR (CMBLOC.OFST): a multiple of 2 MiB.
    pub offset: u64,
    /// How the guest's CPU reaches it. Mapped is fast, but CPU accesses are not counted.
    pub cpu_access: CpuAccess,
    /// How the guest finds and addresses it: as of NVMe 1.4, or as before.
    pub scheme: CmbScheme,
    /// The controller accepts submission queues in it (CMBSZ.SQS).
    pub submission_queues: bool,
    /// The controller accepts completion queues in it (CMBSZ.CQS).
    pub completion_queues: bool,
    /// The controller accepts PRP lists and SGL segments in it (CMBSZ.LISTS).
    pub lists: bool,
    /// The controller puts data into it (CMBSZ.RDS).
    pub read_data: bool,
    /// The controller takes data from it (CMBSZ.WDS).
    pub write_data: bool,
    /// The lists of one command may lie partly in it (CMBLOC.CDPMLS).
    pub mixed_lists: bool,
    /// Lists may lie in it although their command does not (CMBLOC.CDPCILS).
    pub independent_lists: bool,
}

/// A Persistent Memory Region (NVMe Base 2.0, section 8.14), in a BAR of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmrOptions {
    /// Size in bytes: a power of two, at least 2 MiB.
    pub size: u64,
    /// Where its bytes are. Those of a file outlive the lab.
    pub backing: Backing,
    /// How the guest's CPU reaches it. A mapped one answers the CPU while it is not enabled, too.
    pub cpu_access: CpuAccess,
    /// The controller and peers may put data into it (PMRCAP.RDS).
    pub read_data: bool,
    /// The controller and peers may take data from it (PMRCAP.WDS).
    pub write_data: bool,
    /// Time from PMRCTL.EN until it is ready, at most 120 s.
    pub ready_after: Duration,
    /// PMREBS, the size of its elasticity buffer in bytes; 0 says nothing of it. The model has none: it is what the
    /// guest reads.
    pub elasticity_buffer: u64,
    /// PMRSWTP, its sustained write throughput in bytes a second; 0 says nothing of it. Nothing is slowed down to it.
    pub sustained_throughput: u64,
}

impl PmrOptions {
    /// A trapped region of `size` bytes in memory, ready at once.
    pub fn memory(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memory,
            cpu_access: CpuAccess::Trapped,
            read_data: true,
            write_data: true,
            ready_after: Duration::ZERO,
            elasticity_buffer: 0,
            sustained_throughput: 0,
        }
    }

    /// The same in a file, which is created, sparse, where it does not exist.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: Backing::File {
                path: path.into(),
                create: true,
            },
            ..Self::memory(size)
        }
    }

    /// Maps it into the guest: CPU accesses become fast and uncounted.
    #[must_use]
    pub fn mapped(mut self) -> Self {
        self.cpu_access = CpuAccess::Mapped;
        self
    }

    /// Lets `time` pass from PMRCTL.EN until it is ready.
    #[must_use]
    pub fn ready_after(mut self, time: Duration) -> Self {
        self.ready_after = time;
        self
    }
}

impl NvmeOptions {
    /// An SSD of `size` bytes in memory.
    pub fn memory(size: u64) -> Self {
        Self::new(NamespaceOptions::memory(size))
    }

    /// An SSD of `size` bytes on an existing file of at least that size.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self::new(NamespaceOptions::file(path, size))
    }

    /// An SSD of `size` bytes that keeps nothing: for benchmarks of everything else.
    pub fn null(size: u64) -> Self {
        Self::new(NamespaceOptions::null(size))
    }

    fn new(namespace: NamespaceOptions) -> Self {
        Self {
            namespaces: vec![namespace],
            unallocated: 0,
            write_cache: None,
            cmb: None,
            pmr: None,
            faults: Vec::new(),
            io_queues: 8,
            interrupts: Interrupts::MsiX,
            serial: None,
        }
    }

    /// Adds a namespace behind the others.
    #[must_use]
    pub fn namespace(mut self, namespace: NamespaceOptions) -> Self {
        self.namespaces.push(namespace);
        self
    }

    /// Leaves `bytes` of capacity for namespaces that the guest creates.
    #[must_use]
    pub fn unallocated(mut self, bytes: u64) -> Self {
        self.unallocated = bytes;
        self
    }

    /// Creates the backing file of the last namespace where it does not exist. Without a file this changes nothing.
    #[must_use]
    pub fn create(self) -> Self {
        self.last(|namespace| {
            if let Backing::File { create, .. } = &mut namespace.backing {
                *create = true;
            }
        })
    }

    /// Makes the last namespace refuse writes.
    #[must_use]
    pub fn read_only(self) -> Self {
        self.last(|namespace| namespace.read_only = true)
    }

    /// Sets the logical block size of the last namespace in bytes.
    #[must_use]
    pub fn block_size(self, bytes: u32) -> Self {
        self.last(|namespace| namespace.block_size = bytes)
    }

    /// Lets each block of the last namespace carry metadata.
    #[must_use]
    pub fn metadata(self, metadata: Metadata) -> Self {
        self.last(|namespace| namespace.metadata = metadata)
    }

    /// Adds a write cache of `bytes` that loses all that it holds with the power.
    #[must_use]
    pub fn write_cache(self, bytes: u64) -> Self {
        self.write_cache_with(WriteCacheConfig {
            size: bytes,
            survivors: None,
        })
    }

    /// Adds a write cache with options.
    #[must_use]
    pub fn write_cache_with(mut self, cache: WriteCacheConfig) -> Self {
        self.write_cache = Some(cache);
        self
    }

    fn last(mut self, change: impl FnOnce(&mut NamespaceOptions)) -> Self {
        if let Some(namespace) = self.namespaces.last_mut() {
            change(namespace);
        }
        self
    }

    /// Adds a CMB of `size` bytes for everything; the CPU's accesses are trapped, and so counted.
    #[must_use]
    pub fn cmb(mut self, size: u64) -> Self {
        self.cmb = Some(CmbOptions::new(size));
        self
    }

    /// Adds a CMB with options.
    #[must_use]
    pub fn cmb_with(mut self, cmb: CmbOptions) -> Self {
        self.cmb = Some(cmb);
        self
    }

    /// Adds a Persistent Memory Region.
    #[must_use]
    pub fn pmr(mut self, pmr: PmrOptions) -> Self {
        self.pmr = Some(pmr);
        self
    }

    /// Adds a fault that its commands meet from the start.
    #[must_use]
    pub fn fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }

    /// Sets the number of I/O queue pairs.
    #[must_use]
    pub fn io_queues(mut self, pairs: u16) -> Self {
        self.io_queues = pairs;
        self
    }

    /// Leaves MSI-X out: the SSD interrupts by its INTx pin.
    #[must_use]
    pub fn intx(mut self) -> Self {
        self.interrupts = Interrupts::IntX;
        self
    }

    /// Sets the serial number.
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = Some(serial.into());
        self
    }
}

impl CmbOptions {
    /// A trapped CMB of `size` bytes for everything.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            offset: 0,
            cpu_access: CpuAccess::Trapped,
            scheme: CmbScheme::V1_4,
            submission_queues: true,
            completion_queues: true,
            lists: true,
            read_data: true,
            write_data: true,
            mixed_lists: true,
            independent_lists: true,
        }
    }

    /// Maps it into the guest: CPU accesses become fast and uncounted.
    #[must_use]
    pub fn mapped(mut self) -> Self {
        self.cpu_access = CpuAccess::Mapped;
        self
    }

    /// Offers it for data and its lists only.
    #[must_use]
    pub fn data_only(mut self) -> Self {
        self.submission_queues = false;
        self.completion_queues = false;
        self
    }

    /// Lets the guest find and address it as before NVMe 1.4.
    #[must_use]
    pub fn scheme(mut self, scheme: CmbScheme) -> Self {
        self.scheme = scheme;
        self
    }

    /// Bytes of its BAR.
    pub fn bar(&self) -> u64 {
        let end = self.size.saturating_add(self.offset);
        end.checked_next_power_of_two().unwrap_or(u64::MAX)
    }
}
