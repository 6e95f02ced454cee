//! An NVRAM card.

use std::path::PathBuf;

use p2plab_nvram::Fault;
use p2plab_pcie::CpuAccess;

use super::{Backing, Interrupts};

/// Short name for scenarios: `Nvram::memory(64 * MIB)`.
pub type Nvram = NvramOptions;

/// An NVRAM card: memory in BAR 4 that keeps its contents when the power fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvramOptions {
    /// Size in bytes: a power of two from 64 MiB to 8 GiB.
    pub size: u64,
    /// Where its bytes are. Those of a file outlive the lab.
    pub backing: Backing,
    /// How the guest's CPU reaches the memory. Mapped is fast, but CPU accesses are not counted.
    pub cpu_access: CpuAccess,
    /// It is armed after power on: its contents survive a power cut.
    pub armed: bool,
    /// How it interrupts the guest. By its pin, unless asked for MSI-X: QEMU 11.1 survives the hot-unplug of such an
    /// endpoint only, and few drivers want to hear of a card's health.
    pub interrupts: Interrupts,
    /// What is broken from the start.
    pub faults: Vec<Fault>,
}

impl NvramOptions {
    /// An armed card of `size` bytes in memory; the CPU's accesses are trapped, and so counted.
    pub fn memory(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memory,
            cpu_access: CpuAccess::Trapped,
            armed: true,
            interrupts: Interrupts::IntX,
            faults: Vec::new(),
        }
    }

    /// The same in a file, which is created where it does not exist.
    pub fn file(path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: Backing::File {
                path: path.into(),
                create: true,
            },
            ..Self::memory(size)
        }
    }

    /// Maps the memory into the guest: CPU accesses become fast and uncounted.
    #[must_use]
    pub fn mapped(mut self) -> Self {
        self.cpu_access = CpuAccess::Mapped;
        self
    }

    /// Leaves it disarmed after power on: a power cut loses its contents.
    #[must_use]
    pub fn disarmed(mut self) -> Self {
        self.armed = false;
        self
    }

    /// Gives it MSI-X.
    #[must_use]
    pub fn msix(mut self) -> Self {
        self.interrupts = Interrupts::MsiX;
        self
    }

    /// Breaks something from the start.
    #[must_use]
    pub fn fault(mut self, fault: Fault) -> Self {
        self.faults.push(fault);
        self
    }
}
