//! What a user chooses about a controller, and the sentences that refuse a bad choice.

use std::path::PathBuf;

use p2plab_pcie::CpuAccess;

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
    /// Controller Memory Buffer, if any.
    pub cmb: Option<CmbConfig>,
    /// Whether the function has MSI-X; it always has INTx.
    pub msix: bool,
    /// Largest data transfer of a command in bytes: a power of two, 4 KiB to 128 MiB.
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
            cmb: None,
            msix: true,
            max_transfer: 4 << 20,
        }
    }
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

/// A Controller Memory Buffer, in BAR 4.
#[derive(Clone, Copy, Debug)]
pub struct CmbConfig {
    /// Size in bytes: a power of two, 4 KiB or more. Linux ignores one that is not a multiple of 2 MiB.
    pub size: u64,
    /// How the guest's CPU reaches it.
    pub cpu_access: CpuAccess,
    /// Whether submission queues may lie in it (CMBSZ.SQS).
    pub sqs: bool,
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
        "NVMe controller `{serial}`: largest transfer {given} bytes; use a power of two from 4096 to \
         134217728"
    )]
    BadMaxTransfer {
        /// Controller.
        serial: String,
        /// What was given.
        given: u64,
    },
    /// CMB size.
    #[error(
        "NVMe controller `{serial}`: CMB of {given} bytes; use a power of two from 4096 to 1 TiB, and for \
         Linux a multiple of 2 MiB"
    )]
    BadCmbSize {
        /// Controller.
        serial: String,
        /// What was given.
        given: u64,
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
