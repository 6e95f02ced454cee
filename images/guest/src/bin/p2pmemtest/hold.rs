//! Holding memory in all ways while its device is taken away.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use p2plab_guest::p2pmem::{Address, P2pmem};
use p2plab_guest::{Ended, Mapping, Sharing, in_child, poll_hangup};

use crate::cases::{Cases, Outcome, equal, refused};
use crate::import::Import;
use crate::works::{PAGE, PAGES, direct};

/// Until the scenario takes the device away.
const PATIENCE_MILLISECONDS: i32 = 60_000;

/// See the program's description.
pub fn hold(device: &str, disk: &str, importer: Option<&str>) -> Result<(), String> {
    let mut cases = Cases::default();
    let fail = |error: Box<dyn std::error::Error>| error.to_string();
    let mut held = Held::take(device, disk, importer).map_err(fail)?;
    println!("ready");
    let gone =
        poll_hangup(&held.p2pmem.file, PATIENCE_MILLISECONDS).map_err(|error| error.to_string())?;
    if !gone {
        return Err("the device is still there".to_owned());
    }
    cases.case("mappings give SIGBUS", || held.touched());
    cases.case("transfers give EFAULT", || held.transferred());
    cases.case("mmap and ioctls give ENODEV", || held.asked());
    cases.case("the importer has let go", || held.imported(importer));
    cases.case("what was allocated can be freed", || {
        Ok(held.p2pmem.free(held.offset)?)
    });
    cases.end()
}

/// Memory by ioctl, mapped and exported, and memory of a mapping alone.
struct Held {
    p2pmem: P2pmem,
    offset: u64,
    allocated: Mapping,
    anonymous: Mapping,
    untouched: Mapping,
    dma_buf: OwnedFd,
    /// A name of a dma-buf that is closed: it keeps what is below the file, and not the file.
    _closed: File,
    import: Option<Import>,
    disk: File,
}

impl Held {
    fn take(
        device: &str,
        disk: &str,
        importer: Option<&str>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let p2pmem = P2pmem::open(device)?;
        let offset = p2pmem.alloc(8 * PAGE, 0)?.offset;
        let map = |offset| Mapping::of_file_at(&p2pmem.file, 8 * PAGES, offset, Sharing::Shared);
        let dma_buf = p2pmem.export(offset, 8 * PAGE)?;
        let import = importer
            .map(|address| Import::map(&dma_buf, address))
            .transpose()?;
        let mut held = Self {
            offset,
            allocated: map(offset)?,
            anonymous: map(0)?,
            untouched: map(0)?,
            _closed: name_of_closed(p2pmem.export(offset, PAGE)?)?,
            dma_buf,
            import,
            disk: direct(disk)?,
            p2pmem,
        };
        for mapping in [&mut held.allocated, &mut held.anonymous] {
            for page in mapping.slice_mut().chunks_mut(PAGES) {
                if let Some(byte) = page.first_mut() {
                    *byte = 1;
                }
            }
        }
        held.disk.write_at(held.allocated.slice_mut(), 0)?;
        Ok(held)
    }

    fn touched(&mut self) -> Outcome {
        for mapping in [
            &mut self.allocated,
            &mut self.anonymous,
            &mut self.untouched,
        ] {
            let ended = in_child(|| {
                let byte = mapping.slice_mut().first().copied();
                i32::from(std::hint::black_box(byte).is_some())
            })?;
            equal(ended, Ended::Signalled(libc::SIGBUS))?;
        }
        Ok(())
    }

    fn transferred(&mut self) -> Outcome {
        refused(
            self.disk.write_at(self.allocated.slice_mut(), 0),
            libc::EFAULT,
        )?;
        refused(
            self.disk.read_at(self.untouched.slice_mut(), 0),
            libc::EFAULT,
        )
    }

    fn imported(&mut self, importer: Option<&str>) -> Outcome {
        if let Some(import) = &mut self.import {
            equal(import.text()?.as_str(), "revoked\n")?;
        }
        if let Some(address) = importer {
            refused(Import::map(&self.dma_buf, address), libc::ENODEV)?;
        }
        Ok(())
    }

    fn asked(&self) -> Outcome {
        let map =
            |offset| Mapping::of_file_at(&self.p2pmem.file, 8 * PAGES, offset, Sharing::Shared);
        refused(map(0), libc::ENODEV)?;
        refused(map(self.offset), libc::ENODEV)?;
        refused(self.p2pmem.info(), libc::ENODEV)?;
        refused(self.p2pmem.alloc(PAGE, 0), libc::ENODEV)?;
        refused(self.p2pmem.distance(&[Address::default()], 0), libc::ENODEV)?;
        refused(self.p2pmem.export(self.offset, PAGE), libc::ENODEV)
    }
}

fn name_of_closed(descriptor: OwnedFd) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_PATH);
    options.open(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}
