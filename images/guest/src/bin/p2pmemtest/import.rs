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

    /// Has the importer be busy with it until it is dropped.
    ///
    /// # Errors
    /// The importer's.
    pub fn busy(&mut self) -> io::Result<()> {
        self.file.write_all(b"busy")
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

/// Exports a page, and keeps nothing but the dma-buf until standard input ends. Says `ready` when it does.
pub fn keep(device: &str) -> Result<(), String> {
    let until_end = || -> io::Result<()> {
        let p2pmem = P2pmem::open(device)?;
        let _dma_buf = p2pmem.export(p2pmem.alloc(PAGE, 0)?.offset, PAGE)?;
        drop(p2pmem);
        println!("ready");
        io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
    };
    until_end().map_err(|error| error.to_string())
}

/// Exports a page, and has an importer that maps it for the device at `address` transfer, or so it says, until standard
/// input ends. Says `ready` when it does.
pub fn busy(device: &str, address: &str) -> Result<(), String> {
    let until_end = || -> io::Result<()> {
        let p2pmem = P2pmem::open(device)?;
        let alloc = p2pmem.alloc(PAGE, 0)?;
        let mut import = Import::map(&p2pmem.export(alloc.offset, PAGE)?, address)?;
        import.busy()?;
        println!("ready");
        io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
    };
    until_end().map_err(|error| error.to_string())
}
