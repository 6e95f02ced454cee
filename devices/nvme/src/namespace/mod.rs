//! Namespaces: blocks in a file. Memory is a file, too (a memfd), so that there is one data path.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::io::Errno;

use crate::config::{Backing, NamespaceConfig, NvmeError};

/// One namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) nsid: u32,
    pub(crate) file: Arc<File>,
    pub(crate) block_shift: u8,
    pub(crate) blocks: u64,
    pub(crate) read_only: bool,
    /// The file outlives the controller: flushes mean something.
    durable: bool,
}

impl Namespace {
    pub(crate) fn open(nsid: u32, config: &NamespaceConfig) -> Result<Self, NvmeError> {
        let block_shift = match config.block_size {
            512 => 9,
            4096 => 12,
            given => return Err(NvmeError::BadBlockSize { nsid, given }),
        };
        let (file, size, durable) = match &config.backing {
            Backing::Memory { size } => (open_memory(nsid, *size)?, *size, false),
            Backing::File { path, size, create } => {
                let (file, size) = open_file(nsid, path, *size, *create, config.read_only)?;
                (file, size, true)
            }
        };
        if size == 0 || size % u64::from(config.block_size) != 0 || i64::try_from(size).is_err() {
            return Err(NvmeError::BadNamespaceSize {
                nsid,
                size,
                block_size: config.block_size,
            });
        }
        let blocks = size >> block_shift;
        Ok(Self {
            nsid,
            file: Arc::new(file),
            block_shift,
            blocks,
            read_only: config.read_only,
            durable,
        })
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.blocks << self.block_shift
    }

    /// Byte offset and length of `count` blocks from `slba`, if they lie in the namespace.
    pub(crate) fn extent(&self, slba: u64, count: u64) -> Option<(u64, u64)> {
        let end = slba.checked_add(count)?;
        (end <= self.blocks).then(|| (slba << self.block_shift, count << self.block_shift))
    }

    /// Makes all writes so far survive a loss of power.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.durable && !self.read_only {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }

    /// Gives the blocks' storage back; they read as zeros. `false` where the file cannot.
    pub(crate) fn deallocate(&self, offset: u64, length: u64) -> io::Result<bool> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(&*self.file, flags, offset, length) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS | Errno::INVAL) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Makes the blocks read as zeros.
    pub(crate) fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.deallocate(offset, length)? {
            return Ok(());
        }
        const CHUNK: u64 = 64 << 10;
        let zeros = [0u8; CHUNK as usize];
        let mut done = 0;
        while done < length {
            let step = CHUNK.min(length - done);
            let zeros = zeros.get(..step as usize).unwrap_or(&zeros);
            self.file.write_all_at(zeros, offset + done)?;
            done += step;
        }
        Ok(())
    }
}

fn open_memory(nsid: u32, size: u64) -> Result<File, NvmeError> {
    let allocate = |source: io::Error| NvmeError::Allocate { nsid, size, source };
    let file: File = memfd_create("nvme-namespace", MemfdFlags::CLOEXEC)
        .map_err(|error| allocate(error.into()))?
        .into();
    file.set_len(size).map_err(allocate)?;
    Ok(file)
}

fn open_file(
    nsid: u32,
    path: &Path,
    size: Option<u64>,
    create: bool,
    read_only: bool,
) -> Result<(File, u64), NvmeError> {
    let open = |source: io::Error| NvmeError::Open {
        nsid,
        path: path.into(),
        source,
    };
    if create && !path.exists() {
        let Some(size) = size else {
            return Err(NvmeError::CreateNeedsSize {
                nsid,
                path: path.into(),
            });
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path);
        let file = file.map_err(open)?;
        if let Err(source) = file.set_len(size) {
            let _ = std::fs::remove_file(path);
            return Err(NvmeError::Allocate { nsid, size, source });
        }
        return Ok((file, size));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(open)?;
    // The end, not the metadata's length: that of a block device is 0.
    let actual = file.seek(SeekFrom::End(0)).map_err(open)?;
    let wanted = size.unwrap_or(actual);
    if actual < wanted {
        return Err(NvmeError::FileTooSmall {
            nsid,
            path: path.into(),
            actual,
            wanted,
        });
    }
    Ok((file, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extent_refuses_what_leaves_the_namespace() {
        let ns = Namespace::open(1, &NamespaceConfig::memory(1 << 20)).unwrap();
        assert_eq!(ns.extent(2047, 1), Some((2047 * 512, 512)));
        assert_eq!(ns.extent(2047, 2), None);
        assert_eq!(ns.extent(u64::MAX, 1), None);
    }

    #[test]
    fn deallocated_and_zeroed_blocks_read_as_zeros() {
        let ns = Namespace::open(1, &NamespaceConfig::memory(1 << 20)).unwrap();
        ns.file.write_all_at(&[7; 8192], 0).unwrap();
        ns.write_zeroes(512, 4096).unwrap();
        let mut data = [0; 8192];
        ns.file.read_exact_at(&mut data, 0).unwrap();
        assert!(data[..512].iter().all(|b| *b == 7));
        assert!(data[512..4608].iter().all(|b| *b == 0));
        assert!(data[4608..].iter().all(|b| *b == 7));
    }

    #[test]
    fn bad_backings_are_refused_in_one_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = Namespace::open(3, &NamespaceConfig::file(&missing)).unwrap_err();
        assert!(
            error.to_string().contains("namespace 3: cannot open"),
            "{error}"
        );

        let small = dir.path().join("small");
        std::fs::write(&small, [0; 1024]).unwrap();
        let mut config = NamespaceConfig::file(&small);
        config.backing = Backing::File {
            path: small.clone(),
            size: Some(4096),
            create: true,
        };
        let error = Namespace::open(1, &config).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("has 1024 bytes, the namespace 4096"),
            "{error}"
        );
        assert_eq!(std::fs::metadata(&small).unwrap().len(), 1024);

        config = NamespaceConfig::memory(1000);
        let error = Namespace::open(1, &config).unwrap_err();
        assert!(
            error.to_string().contains("multiple of the block size 512"),
            "{error}"
        );

        let created = dir.path().join("created");
        config.backing = Backing::File {
            path: created.clone(),
            size: Some(8192),
            create: true,
        };
        assert_eq!(Namespace::open(1, &config).unwrap().blocks, 16);
        assert_eq!(std::fs::metadata(&created).unwrap().len(), 8192);
    }
}
