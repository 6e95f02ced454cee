//! dma-bufs and who imports them: guest-kernel/dmabuf_importer.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use p2plab_guest::p2pmem::P2pmem;

use crate::works::PAGE;

/// A dma-buf, mapped for a PCI device.
#[derive(Debug)]
pub struct Import {
    file: File,
}

impl Import {
    /// Maps `dma_buf` for the PCI device at `address`.
    ///
    /// # Errors
    /// The importer's, or the exporter's.
    pub fn map(dma_buf: &OwnedFd, address: &str) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/dmabuf_importer")?;
        file.write_all(format!("{} {address}", dma_buf.as_raw_fd()).as_bytes())?;
        Ok(Self { file })
    }

    /// What the importer says of it: its segments, or that it is revoked.
    ///
    /// # Errors
    /// The kernel's.
    pub fn text(&mut self) -> io::Result<String> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(text)
    }
}

/// Exports the second and third page of an allocation of four, and prints at which addresses the device at `address`
/// sees them.
pub fn import(device: &str, address: &str) -> Result<(), String> {
    let text = || -> io::Result<String> {
        let p2pmem = P2pmem::open(device)?;
        let alloc = p2pmem.alloc(4 * PAGE, 0)?;
        let dma_buf = p2pmem.export(alloc.offset + PAGE, 2 * PAGE)?;
        Import::map(&dma_buf, address)?.text()
    };
    print!("{}", text().map_err(|error| error.to_string())?);
    Ok(())
}
