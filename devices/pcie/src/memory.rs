//! Memory behind BARs and host memory, and the views of it that a DMA hands out.

use std::fs::File;
use std::io;

/// The memory of a BAR: a memfd, or a file that outlives the lab, mapped shared.
#[derive(Debug)]
pub struct BarMemory {}

impl BarMemory {
    /// Volatile memory of `size` bytes, zeroed (a memfd).
    ///
    /// # Errors
    /// The host's, when it has no memory to give.
    pub fn anonymous(name: &str, size: u64) -> io::Result<Self> {
        let _ = (name, size);
        unimplemented!()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        unimplemented!()
    }

    /// The memory at `ranges` of (offset, length), in order; `None` where one leaves the memory.
    pub fn buffers(&self, ranges: &[(u64, u64)]) -> Option<DmaBuffers<'_>> {
        let _ = ranges;
        unimplemented!()
    }

    /// Copies from `offset` into `data`; `false`, and nothing copied, where the range leaves the memory.
    #[must_use]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let _ = (offset, data);
        unimplemented!()
    }

    /// Copies `data` to `offset`; `false`, and nothing copied, where the range leaves the memory.
    #[must_use]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let _ = (offset, data);
        unimplemented!()
    }

    /// The file that backs the memory, for a transport that maps it into a guest.
    pub fn file(&self) -> &File {
        unimplemented!()
    }
}

/// A list of memory ranges that a DMA moves bytes to or from, in order. Guests and peers may change the
/// memory at any time: there are no references to it, only copies in and out.
#[derive(Debug)]
pub struct DmaBuffers<'a> {
    _slices: &'a [u8],
}

impl DmaBuffers<'_> {
    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        unimplemented!()
    }

    /// Whether there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills all of the memory from `file` at `offset`, straight into it.
    ///
    /// # Errors
    /// The file's; [`io::ErrorKind::UnexpectedEof`] where it ends too early.
    pub fn fill_from_file(&self, file: &File, offset: u64) -> io::Result<()> {
        let _ = (file, offset);
        unimplemented!()
    }

    /// Writes all of the memory to `file` at `offset`, straight from it.
    ///
    /// # Errors
    /// The file's; [`io::ErrorKind::WriteZero`] where it takes no more.
    pub fn drain_to_file(&self, file: &File, offset: u64) -> io::Result<()> {
        let _ = (file, offset);
        unimplemented!()
    }

    /// Fills the memory from `data`, which must be [`len`](Self::len) long.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the lengths differ.
    pub fn fill_from_slice(&self, data: &[u8]) -> io::Result<()> {
        let _ = data;
        unimplemented!()
    }

    /// Copies the memory into `data`, which must be [`len`](Self::len) long.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the lengths differ.
    pub fn drain_to_slice(&self, data: &mut [u8]) -> io::Result<()> {
        let _ = data;
        unimplemented!()
    }
}
