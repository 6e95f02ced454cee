//! What a user chooses about a card, and the sentences that refuse a bad choice.

use std::path::PathBuf;

use p2plab_pcie::{CpuAccess, MemoryBacking};

use crate::regs::Fault;

/// Smallest memory of a card.
pub const MIN_SIZE: u64 = 64 << 20;
/// Largest memory of a card.
pub const MAX_SIZE: u64 = 8 << 30;

/// A card.
#[derive(Clone, Debug)]
pub struct NvramConfig {
    /// Name, of which the serial number is made; errors call the card so.
    pub name: String,
    /// Size of the memory in bytes: a power of two from [`MIN_SIZE`] to [`MAX_SIZE`].
    pub size: u64,
    /// Where its bytes are.
    pub backing: MemoryBacking,
    /// How the guest's CPU reaches the memory.
    pub cpu_access: CpuAccess,
    /// Whether the card is armed after power on.
    pub armed: bool,
    /// Whether the function has MSI-X; it always has INTx.
    pub msix: bool,
    /// What is broken from the start; [`NvramCard::inject`](crate::NvramCard::inject) breaks more.
    pub faults: Vec<Fault>,
}

impl NvramConfig {
    /// An armed card of `size` bytes in memory, which the CPU reaches by counted accesses, without MSI-X.
    pub fn memory(name: impl Into<String>, size: u64) -> Self {
        Self {
            name: name.into(),
            size,
            backing: MemoryBacking::Memory,
            cpu_access: CpuAccess::Trapped,
            armed: true,
            msix: false,
            faults: Vec::new(),
        }
    }

    /// The same in the first `size` bytes of an existing file.
    pub fn file(name: impl Into<String>, path: impl Into<PathBuf>, size: u64) -> Self {
        Self {
            backing: MemoryBacking::File {
                path: path.into(),
                create: false,
            },
            ..Self::memory(name, size)
        }
    }

    /// Creates the file where there is none. Without a file this changes nothing.
    #[must_use]
    pub fn create(mut self) -> Self {
        if let MemoryBacking::File { create, .. } = &mut self.backing {
            *create = true;
        }
        self
    }
}

/// Why a card cannot be made as configured.
#[derive(Debug, thiserror::Error)]
pub enum NvramError {
    /// Its size.
    #[error("NVRAM card `{name}`: {size} bytes; use a power of two from 64 MiB to 8 GiB")]
    BadSize {
        /// Card.
        name: String,
        /// What was given.
        size: u64,
    },
    /// Its file or memory.
    #[error("NVRAM card `{name}`: cannot have {size} bytes in {place}: {source}")]
    Backing {
        /// Card.
        name: String,
        /// Size asked for.
        size: u64,
        /// Where they were to be.
        place: String,
        /// The host's reason.
        source: std::io::Error,
    },
}

impl NvramConfig {
    pub(crate) fn check(&self) -> Result<(), NvramError> {
        if self.size.is_power_of_two() && (MIN_SIZE..=MAX_SIZE).contains(&self.size) {
            return Ok(());
        }
        Err(NvramError::BadSize {
            name: self.name.clone(),
            size: self.size,
        })
    }
}
