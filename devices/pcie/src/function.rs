//! A [`Function`]: an endpoint with its config space, as a transport (vfio-user, or a unit test) drives it.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::endpoint::{Declaration, ResetKind};

/// The access does not lie inside the BAR or config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the access leaves the region")]
pub struct OutOfBounds;

/// Why host memory cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Empty, or the end of the range overflows.
    #[error("the range is empty or wraps around")]
    BadRange,
    /// Overlaps memory that is already mapped.
    #[error("the range overlaps a mapping")]
    Overlap,
    /// The file is shorter than offset + length.
    #[error("the file is shorter than the mapping")]
    FileTooShort,
    /// Too many mappings.
    #[error("too many mappings")]
    TooMany,
    /// Nothing is mapped there.
    #[error("nothing is mapped there")]
    NotMapped,
    /// The host's mmap failed.
    #[error("mmap: {0}")]
    Os(std::io::Error),
}

/// What the endpoint may do with a range of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// DMA reads are allowed.
    pub read: bool,
    /// DMA writes are allowed.
    pub write: bool,
}

/// An endpoint plugged into a fabric, with all that PCI Express adds to it. Its methods are the
/// transport's side; every access is bounds-checked here, routed, counted and passed on.
pub struct Function {}

impl Function {
    /// Name of the endpoint in its topology.
    pub fn name(&self) -> &str {
        unimplemented!()
    }

    /// What the endpoint declared.
    pub fn declaration(&self) -> &Declaration {
        unimplemented!()
    }

    /// Size of config space in bytes: 4096.
    pub const CONFIG_SPACE_SIZE: u64 = 4096;

    /// Size of BAR `index` in bytes, 0 where there is none.
    pub fn bar_size(&self, index: u8) -> u64 {
        let _ = index;
        unimplemented!()
    }

    /// Config read of `data.len()` bytes at `offset`.
    ///
    /// # Errors
    /// [`OutOfBounds`] past 4096.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let _ = (offset, data);
        unimplemented!()
    }

    /// Config write. May trigger a Function Level Reset, which is complete when this returns.
    ///
    /// # Errors
    /// [`OutOfBounds`] past 4096.
    pub fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        let _ = (offset, data);
        unimplemented!()
    }

    /// The CPU reads a BAR.
    ///
    /// # Errors
    /// [`OutOfBounds`] where the range leaves the BAR, or there is none.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        let _ = (bar, offset, data);
        unimplemented!()
    }

    /// The CPU writes to a BAR.
    ///
    /// # Errors
    /// [`OutOfBounds`] where the range leaves the BAR, or there is none.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        let _ = (bar, offset, data);
        unimplemented!()
    }

    /// The transport has a guest: DMA and interrupts become possible. The link comes up.
    pub fn connect(&self) {
        unimplemented!()
    }

    /// The transport lost its guest: resets the endpoint ([`ResetKind::ConnectionLost`]) and config space,
    /// drops all host memory and interrupts.
    pub fn disconnect(&self) {
        unimplemented!()
    }

    /// Makes `length` bytes of `file`, from `file_offset`, host memory at bus address `address`. Without a
    /// file the range is remembered as not ours to touch (another device's BAR, reached through the fabric).
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map_host_memory(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        let _ = (address, length, access, file, file_offset);
        unimplemented!()
    }

    /// Takes `length` bytes of host memory at `address` away, be it one mapping, a part of one or several.
    /// When this returns no DMA touches them.
    ///
    /// # Errors
    /// [`MapError::BadRange`], or [`MapError::NotMapped`] where nothing of the range was mapped.
    pub fn unmap_host_memory(&self, address: u64, length: u64) -> Result<(), MapError> {
        let _ = (address, length);
        unimplemented!()
    }

    /// Takes all host memory away.
    pub fn unmap_all_host_memory(&self) {
        unimplemented!()
    }

    /// Number of MSI-X vectors.
    pub fn msix_vectors(&self) -> u16 {
        unimplemented!()
    }

    /// Connects MSI-X vector `vector` to an eventfd, or disconnects it. `file` must be non-blocking.
    ///
    /// # Errors
    /// [`OutOfBounds`] where there is no such vector.
    pub fn set_msix_trigger(&self, vector: u16, file: Option<File>) -> Result<(), OutOfBounds> {
        let _ = (vector, file);
        unimplemented!()
    }

    /// Connects INTx to an eventfd, or disconnects it. `file` must be non-blocking.
    pub fn set_intx_trigger(&self, file: Option<File>) {
        let _ = file;
        unimplemented!()
    }

    /// The transport masks INTx, or unmasks it; unmasking an asserted pin triggers it again
    /// (that is how the level is carried by an eventfd).
    pub fn mask_intx(&self, masked: bool) {
        let _ = masked;
        unimplemented!()
    }

    /// Resets the endpoint and its config space.
    pub fn reset(&self, kind: ResetKind) {
        let _ = kind;
        unimplemented!()
    }

    /// The endpoint's state for people and tests.
    pub fn dump(&self) -> serde_json::Value {
        unimplemented!()
    }
}
