//! What a lab runs on: what is fetched, what is built for the guest, and where it is kept.
//!
//! [`resolve()`] gives [`Artifacts`] (QEMU, a kernel, programs for the guest), from the [`Cache`] or by fetching
//! what `manifest.toml` lists. [`Initramfs::build`] makes the guest's userland from them. [`HostReport`] says
//! what this machine has, what would be used and what is missing.
//!
//! | module | knows |
//! |---|---|
//! | `manifest`, `mirror`, `apt`, `fetch` | which packages, from where, and how they get into the cache |
//! | `cache` | locks; that what appears in the cache is whole |
//! | `qemu`, `kernel`, `modules` | how to use what was fetched, or what the user brings |
//! | `kernel_build` | kernel modules, built without root: drivers of `guest-kernel/`, and the kernel's own with patches |
//! | `cpio`, `elf`, `initramfs` | the guest's userland |
//! | `system_image` | Debian's own tools for the guest, a read-only disk for topologies that ask for it |
//! | `guest_programs` | the agent and p2pcopy, built by `build.rs` from `guest/` |
//! | `host` | the doctor's questions |
//!
//! Not implemented: guests other than x86-64.

mod apt;
mod cache;
mod child;
pub mod cpio;
mod elf;
mod error;
mod fetch;
mod guest_programs;
mod host;
mod initramfs;
mod kernel;
mod kernel_build;
mod manifest;
mod mirror;
mod modules;
mod progress;
mod qemu;
mod resolve;
mod system_image;

pub use cache::{Cache, clean, touch};
pub use error::ArtifactError;
pub use fetch::{Resolved, ResolvedPackage};
pub use host::{Accelerator, HostReport, accelerator};
pub use initramfs::{Initramfs, InitramfsSpec, MODULE_LIST};
pub use kernel::Kernel;
pub use kernel_build::{
    BuildError, BuildTarget, BuiltModule, ModuleBuilder, ModuleSource, Strictness, module_sources,
};
pub use manifest::{KernelPackages, Manifest, PackageSet, Source};
pub use modules::{Module, ModulesDir};
pub use progress::{Progress, Silent, Terminal};
pub use qemu::Qemu;
pub use resolve::{Artifacts, Overrides, resolve, resolve_with_system};
pub use system_image::SystemImage;
