//! What can go wrong between an empty cache and a bootable lab, one sentence each with its remedy.

use std::io;
use std::path::PathBuf;

/// Why the artifacts of a lab could not be provided.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    /// No home directory and no variable says where the cache belongs.
    #[error(
        "no place for the cache: set P2PLAB_CACHE to a directory, for example P2PLAB_CACHE=$PWD/cache"
    )]
    NoCacheDirectory,

    /// The cache directory cannot be created or written.
    #[error(
        "cannot write the cache {}: {source}; free or repair it, or set P2PLAB_CACHE to a directory of yours",
        path.display()
    )]
    CacheNotWritable {
        /// The cache directory, or the path inside it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The file system of the cache is full.
    #[error(
        "no space for {}: free about {needed_mib} MiB there, or set P2PLAB_CACHE to a directory on a larger disk",
        path.display()
    )]
    NoSpace {
        /// Where the space is missing.
        path: PathBuf,
        /// MiB that a whole fetch needs.
        needed_mib: u64,
    },

    /// Another p2plab uses the cache that should be removed.
    #[error("the cache {} is in use by another p2plab: end it, then clean again", path.display())]
    CacheInUse {
        /// The cache directory.
        path: PathBuf,
    },

    /// apt-get or dpkg-deb is not there.
    #[error(
        "{program} was not found: fetching needs a Debian or Ubuntu with apt; install it, or bring your own with \
         --qemu and --kernel and copy a filled cache (P2PLAB_CACHE) from such a machine"
    )]
    ProgramMissing {
        /// `apt-get`, `apt-cache` or `dpkg-deb`.
        program: String,
    },

    /// No Debian archive key to check signatures with.
    #[error(
        "no Debian archive key to check signatures with: install the package debian-archive-keyring (apt-get \
         install debian-archive-keyring)"
    )]
    NoKeyring,

    /// The machine's apt configuration names no Debian mirror.
    #[error(
        "this machine's apt configuration names no Debian mirror: set P2PLAB_MIRROR to the address of one (what \
         stands before /dists/)"
    )]
    NoMirror,

    /// The package lists could not be fetched.
    #[error(
        "cannot fetch package lists from {mirror} ({detail}): connect this machine to the network, or set \
         P2PLAB_MIRROR to a Debian mirror that it reaches"
    )]
    Update {
        /// Base address of the mirror.
        mirror: String,
        /// apt's own last error line.
        detail: String,
    },

    /// The mirror gave files that do not match its signed lists, several times.
    #[error(
        "the mirror {mirror} gives files that do not match its signed lists (it is probably in the middle of an \
         update): try again in some minutes, or set P2PLAB_MIRROR to another mirror"
    )]
    HashMismatch {
        /// Base address of the mirror.
        mirror: String,
    },

    /// Packages could not be resolved or downloaded.
    #[error(
        "cannot fetch the {set} packages ({detail}): check the network and the mirror, then try again"
    )]
    Fetch {
        /// The set of the manifest.
        set: String,
        /// apt's own last error line.
        detail: String,
    },

    /// A package that the suites do not have.
    #[error(
        "there is no package {package} in {}: correct its name where it is listed, in the topology or in \
         images/manifest.toml",
        suites.join(" or ")
    )]
    NoSuchPackage {
        /// What was asked for.
        package: String,
        /// The suites of the manifest.
        suites: Vec<String>,
    },

    /// No kernel of the suite fits.
    #[error(
        "no kernel {pattern} with {config} in the suite: give one with --kernel BZIMAGE --modules DIR, or update \
         images/manifest.toml"
    )]
    NoKernel {
        /// The pattern in the manifest.
        pattern: String,
        /// The options that it must have.
        config: String,
    },

    /// The manifest in the project is wrong.
    #[error("images/manifest.toml: {0}")]
    Manifest(String),

    /// A program that we started failed.
    #[error(
        "{program} failed ({detail}): run p2plab fetch again, and p2plab clean first if that does not help"
    )]
    ProgramFailed {
        /// The program and what it was to do.
        program: String,
        /// The last line of its standard error, or its exit status.
        detail: String,
    },

    /// The cache lacks something that it should hold.
    #[error("the cache lacks {}: run p2plab clean, then p2plab fetch", path.display())]
    CacheDamaged {
        /// The missing file.
        path: PathBuf,
    },

    /// A file that the user named cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Unreadable {
        /// What it was meant to be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The user's QEMU does not start.
    #[error(
        "QEMU at {} does not start ({detail}): give one that does with --qemu, or leave it out to use the one that \
         p2plab fetches",
        path.display()
    )]
    QemuDoesNotStart {
        /// The program.
        path: PathBuf,
        /// The last line of its standard error.
        detail: String,
    },

    /// The user's QEMU is too old.
    #[error(
        "QEMU at {} is {version}{}: give one of 11.1 or newer{} with --qemu, or leave it out to use the one that \
         p2plab fetches",
        path.display(),
        if *has_vfio_user { "" } else { " and has no vfio-user-pci" },
        if *has_vfio_user { "" } else { ", built with vfio-user-pci," }
    )]
    QemuUnfit {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: String,
        /// Whether it has the device vfio-user-pci.
        has_vfio_user: bool,
    },

    /// The user's kernel is no bzImage.
    #[error(
        "{} is not a bootable x86 kernel image: give arch/x86/boot/bzImage of a built tree, or a distribution's \
         vmlinuz",
        path.display()
    )]
    NotABzImage {
        /// The file given with `--kernel`.
        path: PathBuf,
    },

    /// The user's kernel has no P2PDMA.
    #[error(
        "the kernel {} has no P2PDMA ({} says so): build it with CONFIG_PCI_P2PDMA=y (needs CONFIG_ZONE_DEVICE)",
        kernel.display(),
        config.display()
    )]
    KernelWithoutP2pdma {
        /// The kernel image.
        kernel: PathBuf,
        /// The configuration file that was read.
        config: PathBuf,
    },

    /// `--modules` without `--kernel`.
    #[error("--modules {} without --kernel: modules fit one kernel only; give its bzImage with --kernel", path.display())]
    ModulesWithoutKernel {
        /// The directory given with `--modules`.
        path: PathBuf,
    },

    /// The directory given with `--modules` holds none.
    #[error(
        "{} holds no kernel modules{}: give what `make modules_install INSTALL_MOD_PATH=DIR` filled, DIR or \
         DIR/lib/modules/RELEASE",
        path.display(),
        release.as_ref().map(|r| format!(" for {r}")).unwrap_or_default()
    )]
    NoModules {
        /// The directory.
        path: PathBuf,
        /// The kernel's release, if known.
        release: Option<String>,
    },

    /// A module is needed and is neither there nor built in.
    #[error(
        "the kernel {release} has no module {module}{}: enable it in the kernel's configuration, or give the \
         modules directory with --modules",
        needed_by.as_ref().map(|m| format!(", which {m} needs")).unwrap_or_default()
    )]
    ModuleMissing {
        /// The module's name.
        module: String,
        /// The module that asked for it, if one did.
        needed_by: Option<String>,
        /// The kernel's release.
        release: String,
    },

    /// A module file cannot be understood.
    #[error("{}: {detail}: rebuild or reinstall this module", path.display())]
    BadModule {
        /// The module file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },

    /// A kernel module could not be built.
    #[error(transparent)]
    Build(#[from] crate::kernel_build::BuildError),

    /// A file for the initramfs has a name or size that its format cannot hold.
    #[error("cannot put {name} into the initramfs: {detail}")]
    Initramfs {
        /// The name in the guest.
        name: String,
        /// What is wrong.
        detail: String,
    },
}

impl ArtifactError {
    /// A failed write below the cache: out of space gets a sentence of its own.
    pub(crate) fn writing(path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            Self::NoSpace {
                path,
                needed_mib: crate::fetch::NEEDED_MIB,
            }
        } else {
            Self::CacheNotWritable { path, source }
        }
    }
}
