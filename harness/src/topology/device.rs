//! The kinds of device a slot can hold, with their options.

use std::path::PathBuf;

use p2plab_pcie::CpuAccess;

/// A device with its options. NVRAM cards and RDMA NICs will be further variants.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceOptions {
    /// An NVMe SSD.
    Nvme(NvmeOptions),
}

impl DeviceOptions {
    /// The word in the `device` field of a topology file: `nvme`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Nvme(_) => "nvme",
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

/// An NVMe SSD with one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeOptions {
    /// Size of the namespace in bytes, a multiple of `block_size`.
    pub size: u64,
    /// Where its bytes are.
    pub backing: Backing,
    /// The namespace refuses writes.
    pub read_only: bool,
    /// Logical block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Controller Memory Buffer, if any.
    pub cmb: Option<CmbOptions>,
    /// Pairs of I/O queues that the controller offers, 1 to 64.
    pub io_queues: u16,
    /// How it interrupts the guest. QEMU 11.1 survives the hot-unplug of an endpoint with INTx only.
    pub interrupts: Interrupts,
    /// Serial number, 1 to 20 printable ASCII characters; without one, the endpoint's name is used.
    pub serial: Option<String>,
}

/// A Controller Memory Buffer (NVMe Base 2.0, section 8.5), in a BAR of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmbOptions {
    /// Size in bytes: a power of two, at least 2 MiB (Linux ignores a smaller one).
    pub size: u64,
    /// How the guest's CPU reaches it. Mapped is fast, but CPU accesses are not counted.
    pub cpu_access: CpuAccess,
    /// The controller accepts submission queues in it (CMBSZ.SQS).
    pub submission_queues: bool,
}

impl NvmeOptions {
    /// An SSD of `size` bytes in memory.
    pub fn memory(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memory,
            read_only: false,
            block_size: 512,
            cmb: None,
            io_queues: 8,
            interrupts: Interrupts::MsiX,
            serial: None,
        }
    }

    /// An SSD of `size` bytes on an existing file of at least that size.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: Backing::File {
                path: path.into(),
                create: false,
            },
            ..Self::memory(size)
        }
    }

    /// Creates the backing file where it does not exist. Without a file this changes nothing.
    #[must_use]
    pub fn create(mut self) -> Self {
        if let Backing::File { create, .. } = &mut self.backing {
            *create = true;
        }
        self
    }

    /// Makes the namespace refuse writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Sets the logical block size in bytes.
    #[must_use]
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = bytes;
        self
    }

    /// Adds a CMB of `size` bytes for data and submission queues; the CPU's accesses are trapped, and so
    /// counted.
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
    /// A trapped CMB of `size` bytes for data and submission queues.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cpu_access: CpuAccess::Trapped,
            submission_queues: true,
        }
    }

    /// Maps it into the guest: CPU accesses become fast and uncounted.
    #[must_use]
    pub fn mapped(mut self) -> Self {
        self.cpu_access = CpuAccess::Mapped;
        self
    }

    /// Offers it for data only.
    #[must_use]
    pub fn data_only(mut self) -> Self {
        self.submission_queues = false;
        self
    }
}
