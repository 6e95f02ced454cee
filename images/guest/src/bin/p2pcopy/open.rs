//! Opening what is copied and what it passes through, with the reasons in words when that fails.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use p2plab_guest::Mapping;

use crate::Failure;
use crate::arguments::Arguments;

/// A source or destination.
#[derive(Debug)]
pub struct Place {
    /// As given.
    pub name: String,
    /// Open for what is needed.
    pub file: File,
    /// Bytes that it holds now.
    pub length: u64,
    /// Bytes that transfers must be multiples of.
    pub block: u64,
    /// A regular file grows when written past its end; a device does not.
    pub device: bool,
    /// Whether the page cache is passed by.
    pub direct: bool,
}

/// Opens a source or destination; falls back to the page cache where a file system has no O_DIRECT.
pub fn place(name: &str, read: bool, write: bool, create: bool) -> Result<Place, Failure> {
    let fail = |error: io::Error| Failure::Io(format!("cannot open {name}: {error}"));
    let mut options = OpenOptions::new();
    options
        .read(read)
        .write(write)
        .create(create && !name.starts_with("/dev/"));
    let (file, direct) = match options.clone().custom_flags(libc::O_DIRECT).open(name) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            (options.open(name).map_err(fail)?, false)
        }
        other => (other.map_err(fail)?, true),
    };
    let kind = file.metadata().map_err(fail)?.file_type();
    if !kind.is_block_device() && !kind.is_file() {
        return Err(Failure::Usage(format!(
            "{name} is neither a block device nor a file"
        )));
    }
    let device = kind.is_block_device();
    let length = (&file).seek(SeekFrom::End(0)).map_err(fail)?;
    let block = if device {
        rustix::fs::ioctl_blksszget(&file)
            .map_err(|error| fail(error.into()))?
            .into()
    } else {
        512
    };
    Ok(Place {
        name: name.to_owned(),
        file,
        length,
        block,
        device,
        direct,
    })
}

/// Maps the buffer.
pub fn buffer(arguments: &Arguments, bytes: usize) -> Result<Mapping, Failure> {
    let Some(path) = &arguments.buffer else {
        return Mapping::anonymous(bytes).map_err(|error| {
            Failure::Io(format!("no memory for a buffer of {bytes} bytes: {error}"))
        });
    };
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => {
                ": the device has no p2pmem, or no driver that registers it (a CMB of the nvme driver \
                 must be a multiple of 2 MiB in size and address)"
            }
            _ => "",
        };
        Failure::Io(format!("cannot open the buffer {path}: {error}{hint}"))
    })?;
    Mapping::of_file(&file, bytes).map_err(|error| {
        let beside = |name: &str| {
            let path = Path::new(path).parent()?.join(name);
            Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
        };
        let room = match (beside("size"), beside("available")) {
            (Some(size), Some(available)) => {
                format!(" (size {size}, available {available} bytes, and it must be in one piece)")
            }
            _ => String::new(),
        };
        Failure::Io(format!(
            "cannot map {bytes} bytes (threads x depth x chunk) of {path}: {error}{room}"
        ))
    })
}

/// A transfer's error, with what it is likely to mean.
pub fn explain(error: &io::Error, place: &Place, p2p: bool) -> String {
    let hint = match error.raw_os_error() {
        // Linux 7 answers EINVAL where 6 answered EREMOTEIO.
        Some(libc::EREMOTEIO | libc::EINVAL) if p2p => {
            ": perhaps the kernel does not let this device reach the buffer's device (no common upstream switch, \
             and a host bridge or CPU that it does not trust; dmesg says so), or the chunk or offset is no \
             multiple of what direct I/O needs"
        }
        Some(libc::ENOTBLK | libc::EOPNOTSUPP) if p2p => {
            ": this device or its driver does not take peer-to-peer memory"
        }
        Some(libc::EFAULT) if p2p => ": this file or driver cannot use peer-to-peer memory",
        Some(libc::EINVAL) => ": offset, chunk or buffer does not suit direct I/O here",
        _ => "",
    };
    format!("{} of {}{hint}", error, place.name)
}
