//! What a user chooses about a controller, and the sentences that refuse a bad choice.

use std::path::PathBuf;
use std::time::Duration;

use p2plab_pcie::CpuAccess;
/// Where the bytes of a Persistent Memory Region are.
pub use p2plab_pcie::MemoryBacking as PmrBacking;

use crate::faults::Fault;

/// Most I/O queue pairs: the MSI-X table of that many vectors and one fills its page of BAR 0.
pub const MAX_IO_QUEUES: u16 = 255;

/// A controller.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// Serial number, 1 to 20 printable ASCII characters. The subsystem's name and the namespaces'
    /// identifiers derive from it: Linux wants it unique among the controllers of one guest.
    pub serial: String,
    /// Model number, 1 to 40 printable ASCII characters.
    pub model: String,
    /// Namespaces; the first is NSID 1.
    pub namespaces: Vec<NamespaceConfig>,
    /// Bytes of capacity for namespaces that the host creates (Namespace Management). They are in sparse memory, and
    /// gone with the controller.
    pub unallocated: u64,
    /// Number of I/O queue pairs, 1 to [`MAX_IO_QUEUES`].
    pub io_queues: u16,
    /// A write cache whose content a loss of power takes. Without one a power cut keeps every write.
    pub write_cache: Option<WriteCacheConfig>,
    /// Controller Memory Buffer, if any.
    pub cmb: Option<CmbConfig>,
    /// Persistent Memory Region, if any.
    pub pmr: Option<PmrConfig>,
    /// Faults from the start; [`NvmeController::faults`](crate::NvmeController::faults) adds and removes more.
    pub faults: Vec<Fault>,
    /// Whether the function has MSI-X; it always has INTx.
    pub msix: bool,
    /// Whether the host may keep doorbells in its memory (Doorbell Buffer Config), which only emulated controllers
    /// offer. It needs MSI-X: the level of INTx depends on what the host has consumed at every moment.
    ///
    /// It must be off where the CPU writes into a CMB or PMR, of this controller or a peer, by messages of the
    /// transport: a doorbell in memory overtakes them, which on a bus it cannot (PCI Express Base 6.0, section 2.4.1:
    /// the completion of the controller's read pushes posted writes), and a command would be executed before it, or
    /// its data, has arrived. For its own memory the controller sees to that itself.
    pub shadow_doorbells: bool,
    /// Largest data transfer of a command in bytes: a power of two, 8 KiB to 128 MiB.
    pub max_transfer: u64,
}

impl NvmeConfig {
    /// A controller without namespaces and CMB, with 16 I/O queue pairs and transfers of up to 4 MiB.
    pub fn new(serial: impl Into<String>) -> Self {
        Self {
            serial: serial.into(),
            model: "p2plab NVMe".into(),
            namespaces: Vec::new(),
            unallocated: 0,
            io_queues: 16,
            write_cache: None,
            cmb: None,
            pmr: None,
            faults: Vec::new(),
            msix: true,
            shadow_doorbells: false,
            max_transfer: 4 << 20,
        }
    }
}

impl NvmeConfig {
    pub(crate) fn offers_shadow_doorbells(&self) -> bool {
        let trapped = |access| access == CpuAccess::Trapped;
        let cmb = self.cmb.is_some_and(|cmb| trapped(cmb.cpu_access));
        let pmr = self.pmr.as_ref().is_some_and(|pmr| trapped(pmr.cpu_access));
        self.shadow_doorbells && self.msix && !cmb && !pmr
    }
}

/// Smallest write cache.
pub const MIN_WRITE_CACHE: u64 = 64 << 10;

/// A volatile write cache that forgets: what the host has written since its last flush, with FUA clear and while the
/// feature Volatile Write Cache is on, is lost with the power. To find hosts that should have flushed.
///
/// The power is lost in a power cut, and when the machine around the controller goes away without having shut it down:
/// when the transport's client is gone, or the controller is unplugged. A process that is killed keeps every write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteCacheConfig {
    /// Bytes of blocks that it holds, at least [`MIN_WRITE_CACHE`]: what has been written first goes to the medium when
    /// there are more, and a command on more goes there at once. It takes memory of that size.
    pub size: u64,
    /// Without a seed all that it holds is lost. With one about half of the blocks are, chosen by it: those which a
    /// cache that writes back in an order of its own had not come to.
    pub survivors: Option<u64>,
}

/// A namespace.
#[derive(Clone, Debug)]
pub struct NamespaceConfig {
    /// Where its blocks are.
    pub backing: Backing,
    /// Block size in bytes: 512 or 4096.
    pub block_size: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// What each block carries besides its data.
    pub metadata: Metadata,
}

/// What each block of a namespace carries besides its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Metadata {
    /// Nothing.
    #[default]
    None,
    /// 8 bytes that mean what the host likes.
    Plain,
    /// 8 bytes of protection information of type 1, which the controller checks.
    Protection,
}

impl NamespaceConfig {
    /// A namespace of `size` bytes in memory, zeroed, with blocks of 512 bytes.
    pub fn memory(size: u64) -> Self {
        Self {
            backing: Backing::Memory { size },
            block_size: 512,
            read_only: false,
            metadata: Metadata::None,
        }
    }

    /// A namespace in an existing file or block device, as large as that is, with blocks of 512 bytes.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self {
            backing: Backing::File {
                path: path.into(),
                size: None,
                create: false,
            },
            block_size: 512,
            read_only: false,
            metadata: Metadata::None,
        }
    }
}

/// Where a namespace's blocks are.
#[derive(Clone, Debug)]
pub enum Backing {
    /// In memory that lives as long as the controller. Blocks never written take no memory.
    Memory {
        /// Size in bytes.
        size: u64,
    },
    /// In a file or block device. Metadata, if the format has any, is in a file of its own, `PATH.meta`: the file
    /// itself has the blocks' data and nothing else. A block device has no place for it.
    File {
        /// Its path.
        path: PathBuf,
        /// Size of the namespace in bytes; all of the file without it.
        size: Option<u64>,
        /// Create the file, sparse, if it does not exist (and only then). Needs `size`.
        create: bool,
    },
    /// Nowhere: blocks read as zeros, and what is written is dropped. For benchmarks of everything else.
    Null {
        /// Size in bytes.
        size: u64,
    },
}

/// How a host finds and addresses the CMB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CmbScheme {
    /// NVMe 1.4 and later: CAP.CMBS; CMBLOC and CMBSZ show themselves after CMBMSC.CRE, and commands address the CMB
    /// from CMBMSC.CBA on.
    #[default]
    V1_4,
    /// NVMe 1.2 and 1.3: no CMBMSC; CMBLOC and CMBSZ are always there, and commands address the CMB by its BAR's
    /// bus addresses. The controller then says that it is of version 1.3.
    V1_3,
}

/// A Controller Memory Buffer, in BAR 4. What is switched off is refused: Invalid Use of Controller Memory Buffer.
#[derive(Clone, Copy, Debug)]
pub struct CmbConfig {
    /// Size in bytes: a power of two, 4 KiB or more. Linux ignores one that is not a multiple of 2 MiB.
    pub size: u64,
    /// Where it starts in its BAR (CMBLOC.OFST), in bytes. The BAR is as large as both need, a power of two.
    pub offset: u64,
    /// How the guest's CPU reaches it.
    pub cpu_access: CpuAccess,
    /// How a host finds and addresses it.
    pub scheme: CmbScheme,
    /// Submission queues may lie in it (CMBSZ.SQS).
    pub sqs: bool,
    /// Completion queues may (CMBSZ.CQS). The host's CPU then polls the BAR.
    pub cqs: bool,
    /// PRP lists and SGL segments may (CMBSZ.LISTS).
    pub lists: bool,
    /// Data from the controller may: that of reads (CMBSZ.RDS).
    pub rds: bool,
    /// Data to the controller may: that of writes (CMBSZ.WDS).
    pub wds: bool,
    /// Lists of one command may lie partly in it and partly outside (CMBLOC.CDPMLS). Not before 1.4.
    pub cdpmls: bool,
    /// Lists may lie in it although their command does not (CMBLOC.CDPCILS). Not before 1.4.
    pub cdpcils: bool,
}

impl CmbConfig {
    /// A CMB of `size` bytes for everything, which the CPU reaches by counted accesses.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            offset: 0,
            cpu_access: CpuAccess::Trapped,
            scheme: CmbScheme::V1_4,
            sqs: true,
            cqs: true,
            lists: true,
            rds: true,
            wds: true,
            cdpmls: true,
            cdpcils: true,
        }
    }

    /// CMBLOC.CDPMLS and CMBLOC.CDPCILS as the host sees them.
    pub(crate) fn list_rules(&self) -> (bool, bool) {
        let known = self.scheme == CmbScheme::V1_4;
        (known && self.cdpmls, known && self.cdpcils)
    }
}

/// A Persistent Memory Region, in BAR 2.
#[derive(Clone, Debug)]
pub struct PmrConfig {
    /// Size in bytes: a power of two, 4 KiB or more.
    pub size: u64,
    /// Where its bytes are.
    pub backing: PmrBacking,
    /// How the guest's CPU reaches it. A mapped region answers the CPU while PMRCTL.EN is clear, too.
    pub cpu_access: CpuAccess,
    /// Data from the controller may lie in it (PMRCAP.RDS).
    pub rds: bool,
    /// Data to the controller may lie in it (PMRCAP.WDS).
    pub wds: bool,
    /// Time from PMRCTL.EN to ready (PMRSTS.NRDY), at most 120 s.
    pub ready_after: Duration,
    /// PMREBS, in bytes; 0 says nothing of it.
    pub elasticity_buffer: u64,
    /// PMRSWTP, in bytes a second; 0 says nothing of it.
    pub sustained_throughput: u64,
}

impl PmrConfig {
    /// A region of `size` bytes in memory, ready at once, which the CPU reaches by counted accesses.
    pub fn memory(size: u64) -> Self {
        Self {
            size,
            backing: PmrBacking::Memory,
            cpu_access: CpuAccess::Trapped,
            rds: true,
            wds: true,
            ready_after: Duration::ZERO,
            elasticity_buffer: 0,
            sustained_throughput: 0,
        }
    }

    /// The same in the first `size` bytes of an existing file.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: PmrBacking::File {
                path: path.into(),
                create: false,
            },
            ..Self::memory(size)
        }
    }

    /// Creates the file where there is none. Without a file this changes nothing.
    #[must_use]
    pub fn create(mut self) -> Self {
        if let PmrBacking::File { create, .. } = &mut self.backing {
            *create = true;
        }
        self
    }
}

/// Why a controller cannot be made as configured.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// Serial or model number.
    #[error(
        "NVMe {what} `{value}`: use 1 to {max} printable ASCII characters without spaces at the ends"
    )]
    BadText {
        /// Which text.
        what: &'static str,
        /// What was given.
        value: String,
        /// Longest allowed.
        max: usize,
    },
    /// Number of queues.
    #[error("NVMe controller `{serial}`: {given} I/O queues; use 1 to {MAX_IO_QUEUES}")]
    BadQueueCount {
        /// Controller.
        serial: String,
        /// What was given.
        given: u16,
    },
    /// Largest transfer.
    #[error(
        "NVMe controller `{serial}`: largest transfer {given} bytes; use a power of two from 8192 to \
         134217728"
    )]
    BadMaxTransfer {
        /// Controller.
        serial: String,
        /// What was given.
        given: u64,
    },
    /// Size of the write cache.
    #[error(
        "NVMe controller `{serial}`: write cache of {size} bytes; use at least {MIN_WRITE_CACHE}"
    )]
    BadWriteCache {
        /// Controller.
        serial: String,
        /// What was given.
        size: u64,
    },
    /// CMB size and offset.
    #[error(
        "NVMe controller `{serial}`: CMB of {size} bytes at offset {offset}; use a size that is a power of two from \
         4096 to 1 TiB, for Linux a multiple of 2 MiB, and an offset that is a multiple of 4096 and less than 2^20 \
         times the largest of 4 KiB, 64 KiB, 1 MiB... that divides both"
    )]
    BadCmbSize {
        /// Controller.
        serial: String,
        /// Size asked for.
        size: u64,
        /// Offset asked for.
        offset: u64,
    },
    /// A PMR beside a CMB of a version that has none.
    #[error("NVMe controller `{serial}`: a PMR needs NVMe 1.4, and its CMB has the scheme of 1.3")]
    PmrNeedsNewScheme {
        /// Controller.
        serial: String,
    },
    /// A property of the PMR.
    #[error("NVMe controller `{serial}`: PMR with {what} {value}; use {rule}")]
    BadPmr {
        /// Controller.
        serial: String,
        /// Which.
        what: &'static str,
        /// What was given.
        value: String,
        /// What is possible.
        rule: &'static str,
    },
    /// The memory or file of the PMR.
    #[error("NVMe controller `{serial}`: no PMR of {size} bytes in {place}: {source}")]
    PmrBacking {
        /// Controller.
        serial: String,
        /// Its size.
        size: u64,
        /// Memory, or which file.
        place: String,
        /// The host's reason.
        source: std::io::Error,
    },
    /// Host memory for the CMB.
    #[error("NVMe controller `{serial}`: no memory for a CMB of {size} bytes: {source}")]
    CmbMemory {
        /// Controller.
        serial: String,
        /// Size asked for.
        size: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// Block size.
    #[error("NVMe namespace {nsid}: block size {given}; use 512 or 4096")]
    BadBlockSize {
        /// Namespace.
        nsid: u32,
        /// What was given.
        given: u32,
    },
    /// The place of the metadata.
    #[error("NVMe namespace {nsid}: no place for its metadata `{path}`: {source}")]
    Metadata {
        /// Namespace.
        nsid: u32,
        /// File.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// Namespace size.
    #[error(
        "NVMe namespace {nsid}: its size of {size} bytes must be a multiple of the block size {block_size} \
         and not 0"
    )]
    BadNamespaceSize {
        /// Namespace.
        nsid: u32,
        /// Its size.
        size: u64,
        /// Its block size.
        block_size: u32,
    },
    /// Too many namespaces.
    #[error("NVMe controller `{serial}`: {given} namespaces; use at most 256")]
    TooManyNamespaces {
        /// Controller.
        serial: String,
        /// What was given.
        given: usize,
    },
    /// Creation without size.
    #[error("NVMe namespace {nsid}: to create `{path}` its size must be given")]
    CreateNeedsSize {
        /// Namespace.
        nsid: u32,
        /// File.
        path: PathBuf,
    },
    /// The file is not there or cannot be opened.
    #[error("NVMe namespace {nsid}: cannot open its file `{path}`: {source}")]
    Open {
        /// Namespace.
        nsid: u32,
        /// File.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The file is smaller than the namespace.
    #[error(
        "NVMe namespace {nsid}: file `{path}` has {actual} bytes, the namespace {wanted}; enlarge the file \
         (truncate -s {wanted}) or lower the size"
    )]
    FileTooSmall {
        /// Namespace.
        nsid: u32,
        /// File.
        path: PathBuf,
        /// Size of the file.
        actual: u64,
        /// Size of the namespace.
        wanted: u64,
    },
    /// The host cannot give the file or memory that size.
    #[error("NVMe namespace {nsid}: cannot make room for {size} bytes: {source}")]
    Allocate {
        /// Namespace.
        nsid: u32,
        /// Size.
        size: u64,
        /// The host's reason.
        source: std::io::Error,
    },
}
