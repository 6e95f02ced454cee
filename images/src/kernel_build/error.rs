//! What can go wrong when a kernel module is built, one sentence each with its remedy; the compiler's own lines
//! follow where it is the compiler that complains.

use std::path::PathBuf;

/// Why a kernel module could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The folder with our modules is not there.
    #[error(
        "no module sources in {}: run p2plab from its checkout, or set P2PLAB_GUEST_KERNEL to the folder guest-kernel of \
         one",
        path.display()
    )]
    NoSources {
        /// Where they were looked for.
        path: PathBuf,
    },

    /// No module of that name.
    #[error("there is no module `{name}` in {}; there are: {}", path.display(), names.join(", "))]
    NoSuchModule {
        /// What was asked for.
        name: String,
        /// The folder with our modules.
        path: PathBuf,
        /// What there is.
        names: Vec<String>,
    },

    /// A folder's `build.toml` is wrong.
    #[error("{}: {detail}", path.display())]
    BadRecipe {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },

    /// The host does not let us make the namespaces that a build runs in.
    #[error(
        "this host does not let its users enter a root of their own, in which modules are built ({detail}): allow \
         user namespaces (sysctl user.max_user_namespaces=10000, and where they are there \
         kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0), or build for a kernel \
         tree of yours with --kdir DIR, which needs none"
    )]
    NamespaceRefused {
        /// What unshare or mount said.
        detail: String,
    },

    /// `make`, or another program of the host that a build in a user's own tree needs.
    #[error(
        "{program} was not found: install what the kernel in {} was built with (a compiler, make, binutils, patch)",
        tree.display()
    )]
    ProgramMissing {
        /// The program.
        program: String,
        /// The kernel tree.
        tree: PathBuf,
    },

    /// `--kdir` names no kernel tree in which modules can be built.
    #[error(
        "{} is no kernel tree that modules can be built in: it has no {missing}; give one in which `make` has run, \
         or the folder /lib/modules/RELEASE/build",
        tree.display()
    )]
    NotATree {
        /// The directory given with `--kdir`.
        tree: PathBuf,
        /// The file that is not there.
        missing: &'static str,
    },

    /// A kernel of the user's own, and nothing to build modules for it with.
    #[error(
        "modules for the kernel {release} need its tree: give --kernel TREE/arch/x86/boot/bzImage, or a --modules \
         folder whose link `build` leads to it"
    )]
    NoTree {
        /// The kernel's release.
        release: String,
    },

    /// Headers of one kernel, and another kernel to run.
    #[error(
        "the headers in {headers} are of kernel {found}, and the modules are to run on {wanted}: give the headers of \
         {wanted}, or the kernel {found}"
    )]
    HeadersMismatch {
        /// Where the headers are.
        headers: String,
        /// The release that they are of.
        found: String,
        /// The release of the kernel that the modules are for.
        wanted: String,
    },

    /// What was compiled says that it is for another kernel than its headers do.
    #[error(
        "{module} came out for kernel {found}, but {headers} is of kernel {release} and would not load it: {remedy}"
    )]
    WrongVermagic {
        /// The module.
        module: String,
        /// The release in it.
        found: String,
        /// The headers or the tree.
        headers: String,
        /// The release that they say they are of.
        release: String,
        /// How to mend it.
        remedy: &'static str,
    },

    /// The suites have no longer what belongs to a fetched kernel.
    #[error(
        "the Debian suites have no {package} any more, which belongs to the kernel {release} in the cache ({detail}): \
         run p2plab clean, then p2plab fetch, which takes the newest kernel and what belongs to it"
    )]
    Gone {
        /// The package that was looked for.
        package: String,
        /// The kernel's release.
        release: String,
        /// What apt said.
        detail: String,
    },

    /// A patch does not fit the source.
    #[error(
        "{patch} does not apply to {source_dir} of kernel {release}: {what}; that source has changed since the patch was \
         made, so renew the patch, or build for a kernel that it was made for"
    )]
    Patch {
        /// File name of the patch.
        patch: String,
        /// The directory of the kernel's source.
        source_dir: String,
        /// The kernel's release.
        release: String,
        /// Which hunks of which file.
        what: String,
    },

    /// The source of a driver is not there.
    #[error(
        "the source of kernel {release} has no {source_dir}, which {module} is made of: give --kdir a tree with its \
         source, or, for a fetched kernel, list it under `members` in images/manifest.toml"
    )]
    NoDriver {
        /// The module.
        module: String,
        /// The directory of the kernel's source.
        source_dir: String,
        /// The kernel's release.
        release: String,
    },

    /// A build came to no end of its own.
    #[error(
        "the build of {module} was ended from outside ({status}): run it again, with more memory if the host ran out of it"
    )]
    Interrupted {
        /// The module.
        module: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },

    /// A build that makes nothing.
    #[error("the Kbuild of {module} names no module: give it a line such as `obj-m := {module}.o`")]
    NoModule {
        /// The module.
        module: String,
    },

    /// The compiler, or modpost, refused the source.
    #[error(
        "{module} does not build for kernel {release}; correct what the compiler says:\n{lines}"
    )]
    Compile {
        /// The module.
        module: String,
        /// The kernel's release.
        release: String,
        /// What the compiler wrote.
        lines: String,
    },

    /// checkpatch.pl has complaints.
    #[error("the kernel's checkpatch.pl --strict refuses {file}; correct what it says:\n{lines}")]
    Check {
        /// The file.
        file: String,
        /// What it wrote.
        lines: String,
    },
}
