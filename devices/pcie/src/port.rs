//! A [`Port`]: an endpoint's only way out, to host memory, to its peers and to the interrupt controller.

use crate::memory::DmaBuffers;

/// A contiguous range of PCI bus addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// First bus address.
    pub address: u64,
    /// Length in bytes; zero-length ranges move nothing.
    pub length: u64,
}

/// Why a DMA did not happen. Nothing of it has moved.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// Bus Master Enable is off, or the function is not in D0.
    #[error("bus mastering is disabled")]
    BusMasterDisabled,
    /// Nothing decodes the address, or what does refuses the access: Unsupported Request
    /// (PCI Express Base 6.0, section 2.3.1).
    #[error("unsupported request at bus address {address:#x}")]
    UnsupportedRequest {
        /// First address that could not be reached.
        address: u64,
    },
    /// The endpoint is not plugged in, or its transport has no guest.
    #[error("the link is down")]
    LinkDown,
    /// The endpoint's own side of the transfer (its file) failed.
    #[error("medium: {0}")]
    Medium(#[from] std::io::Error),
}

/// An endpoint's way out. Cheap to clone; all clones are one port.
#[derive(Clone)]
pub struct Port {}

impl Port {
    /// Name of the endpoint in its topology.
    pub fn name(&self) -> &str {
        unimplemented!()
    }

    /// Memory Read: fills `data` from bus address `address`.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), DmaError> {
        let _ = (address, data);
        unimplemented!()
    }

    /// Memory Write: posts `data` to bus address `address`.
    ///
    /// # Errors
    /// See [`DmaError`].
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), DmaError> {
        let _ = (address, data);
        unimplemented!()
    }

    /// Memory Reads of `ranges`, in place: `sink` gets the memory that lies there, in order, and takes the
    /// bytes from it. The memory stays mapped while `sink` runs, and no longer; `sink` must not use the port.
    ///
    /// # Errors
    /// See [`DmaError`]; an error of `sink` is [`DmaError::Medium`].
    pub fn read_ranges(
        &self,
        ranges: &[DmaRange],
        sink: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), DmaError> {
        let _ = (ranges, sink);
        unimplemented!()
    }

    /// Memory Writes to `ranges`, in place: `source` gets the memory that lies there, in order, and puts the
    /// bytes into it. The same conditions as for [`read_ranges`](Port::read_ranges).
    ///
    /// # Errors
    /// See [`DmaError`]; an error of `source` is [`DmaError::Medium`].
    pub fn write_ranges(
        &self,
        ranges: &[DmaRange],
        source: impl FnOnce(&DmaBuffers<'_>) -> std::io::Result<()>,
    ) -> Result<(), DmaError> {
        let _ = (ranges, source);
        unimplemented!()
    }

    /// Sends MSI-X vector `vector` if the guest has MSI-X enabled; otherwise does nothing. A masked vector
    /// becomes pending.
    pub fn msix(&self, vector: u16) {
        let _ = vector;
    }

    /// Whether the guest has enabled MSI-X; if not, the endpoint uses [`set_intx`](Port::set_intx).
    pub fn msix_enabled(&self) -> bool {
        false
    }

    /// Sets the level of the INTx pin.
    pub fn set_intx(&self, asserted: bool) {
        let _ = asserted;
    }

    /// Bus address that the guest programmed into BAR `bar`, if memory decoding is on.
    pub fn bar_address(&self, bar: u8) -> Option<u64> {
        let _ = bar;
        None
    }
}
