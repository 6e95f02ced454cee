//! Where a namespace's bytes are: in a file. Memory is a file, too (a memfd), and so is nothing at all (the host's
//! `/dev/zero`), so that there is one data path.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use p2plab_pcie::{DmaBuffers, SparseMemory};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::io::Errno;

use crate::config::{Backing, NamespaceConfig, NvmeError};
use crate::counters::Mistakes;

/// Reads as zeros without end, and forgets what is written to it.
const NOTHING: &str = "/dev/zero";

/// Largest memory that is mapped: namespaces share the process's addresses.
const MOST_MAPPED: u64 = 256 << 30;

/// Where metadata goes. The file of the blocks has none of it: a disk image stays one.
#[derive(Clone, Debug)]
enum Companion {
    /// In memory, as the blocks are.
    Memory,
    /// In a file beside that of the blocks, as durable as they are.
    Beside(PathBuf),
    /// Nowhere, as the blocks.
    Nothing,
    /// A block device has no place beside it.
    Impossible,
}

/// A namespace's file, and what goes with it from format to format.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    pub(crate) file: Arc<File>,
    /// The same as memory, where it is some.
    memory: Option<Arc<SparseMemory>>,
    /// Bytes of it that are the namespace's.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// The file outlives the controller: flushes mean something.
    pub(crate) durable: bool,
    companion: Companion,
    failures: Arc<Failures>,
}

/// What went wrong with a medium's file since it was opened.
#[derive(Debug, Default)]
struct Failures {
    /// A flush failed.
    unflushed: AtomicBool,
    told: Mistakes,
}

impl Medium {
    pub(crate) fn open(nsid: u32, config: &NamespaceConfig) -> Result<Self, NvmeError> {
        let read_only = config.read_only;
        let (file, size, durable, companion) = match &config.backing {
            Backing::Memory { size } => {
                let size = *size;
                let medium = Self::memory(size);
                let medium = medium.map_err(|source| NvmeError::Allocate { nsid, size, source })?;
                return Ok(Self {
                    read_only,
                    ..medium
                });
            }
            Backing::File { path, size, create } => {
                let (file, size) = open_file(nsid, path, *size, *create, read_only)?;
                let regular = file.metadata().is_ok_and(|found| found.is_file());
                let companion = if regular {
                    Companion::Beside(beside(path))
                } else {
                    Companion::Impossible
                };
                (file, size, true, companion)
            }
            Backing::Null { size } => {
                let file = nothing().map_err(|source| NvmeError::Open {
                    nsid,
                    path: NOTHING.into(),
                    source,
                })?;
                (file, *size, false, Companion::Nothing)
            }
        };
        Ok(Self {
            file: Arc::new(file),
            memory: None,
            size,
            read_only,
            durable,
            companion,
            failures: Arc::default(),
        })
    }

    /// Sparse memory of `size` bytes.
    pub(crate) fn memory(size: u64) -> io::Result<Self> {
        let mapped = (size <= MOST_MAPPED).then(|| SparseMemory::new("nvme-namespace", size));
        // Without addresses for so much it is a file like any other.
        let mapped = mapped.and_then(Result::ok);
        let file = match &mapped {
            Some(memory) => memory.file().try_clone()?,
            None => memory(size)?,
        };
        Ok(Self {
            file: Arc::new(file),
            memory: mapped.map(Arc::new),
            size,
            read_only: false,
            durable: false,
            companion: Companion::Memory,
            failures: Arc::default(),
        })
    }

    /// Fills `buffers` from byte `offset` on.
    pub(crate) fn read(&self, buffers: &DmaBuffers<'_>, offset: u64) -> io::Result<()> {
        match &self.memory {
            Some(memory) => memory.read(buffers, offset),
            None => buffers.fill_from_file(&self.file, offset),
        }
    }

    /// Writes `buffers` from byte `offset` on.
    pub(crate) fn write(&self, buffers: &DmaBuffers<'_>, offset: u64) -> io::Result<()> {
        match &self.memory {
            Some(memory) => memory.write(buffers, offset),
            None => buffers.drain_to_file(&self.file, offset),
        }
    }

    /// Makes bytes read as zeros, without storage where that can be.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        zero(&self.file, offset, length)?;
        self.forget(offset, length);
        Ok(())
    }

    /// Gives the storage of bytes back; they read as zeros. `false` where the file cannot.
    pub(crate) fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        let punched = punch(&self.file, offset, length)?;
        self.forget(offset, length);
        Ok(punched)
    }

    fn forget(&self, offset: u64, length: u64) {
        if let Some(memory) = &self.memory {
            memory.forget(offset, length);
        }
    }

    /// Makes all that was written to the blocks and to their `metadata` durable.
    ///
    /// Linux tells of data that it could not write back once for each open file, and forgets them. So one failure is
    /// remembered: until the file is opened again no flush may say that everything is there.
    pub(crate) fn sync(&self, metadata: Option<&File>) -> io::Result<()> {
        let unflushed = &self.failures.unflushed;
        let synced = self.file.sync_data();
        let synced = synced.and_then(|()| metadata.map_or(Ok(()), File::sync_data));
        if synced.is_err() {
            unflushed.store(true, Ordering::SeqCst);
        } else if unflushed.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        synced
    }

    /// The file failed: whether to tell people of it once more.
    pub(crate) fn failure_is_worth_a_line(&self) -> bool {
        self.failures.told.is_worth_a_line()
    }

    /// Whether there is a place for metadata.
    pub(crate) fn takes_metadata(&self) -> bool {
        !matches!(self.companion, Companion::Impossible)
    }

    /// The file of `size` bytes for the metadata: emptied, or with what is in it.
    pub(crate) fn metadata(&self, size: u64, empty: bool) -> io::Result<File> {
        match &self.companion {
            Companion::Memory => memory(size),
            Companion::Nothing => nothing(),
            Companion::Impossible => Err(io::ErrorKind::Unsupported.into()),
            Companion::Beside(path) => {
                let mut options = OpenOptions::new();
                options.read(true);
                if self.read_only {
                    return options.open(path);
                }
                let is_new = !path.exists();
                let file = options
                    .write(true)
                    .create(true)
                    .truncate(empty)
                    .open(path)?;
                file.set_len(size)?;
                if is_new {
                    settle(&file, path)?;
                }
                Ok(file)
            }
        }
    }

    /// The blocks have no metadata any more. What is left in a file of it would not fit what is written from now on.
    pub(crate) fn forget_metadata(&self) -> io::Result<()> {
        let Companion::Beside(path) = &self.companion else {
            return Ok(());
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// There is nothing to make zeros of.
    pub(crate) fn is_nothing(&self) -> bool {
        matches!(self.companion, Companion::Nothing)
    }

    /// Makes all bytes read as zeros.
    pub(crate) fn erase(&self) -> io::Result<()> {
        if self.is_nothing() || self.punch(0, self.size)? {
            return Ok(());
        }
        let found = self.file.metadata()?;
        if found.is_file() && found.len() == self.size {
            // A file system without holes still has files that end and grow.
            self.file.set_len(0)?;
            return self.file.set_len(self.size);
        }
        zero(&self.file, 0, self.size)
    }

    /// The path of the metadata, for messages.
    pub(crate) fn metadata_path(&self) -> PathBuf {
        match &self.companion {
            Companion::Beside(path) => path.clone(),
            _ => PathBuf::new(),
        }
    }
}

/// `FILE.meta` for `FILE`.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".meta");
    name.into()
}

fn memory(size: u64) -> io::Result<File> {
    let file: File = memfd_create("nvme-namespace", MemfdFlags::CLOEXEC)?.into();
    file.set_len(size)?;
    Ok(file)
}

fn nothing() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(NOTHING)
}

/// Makes a file that was just created survive a loss of power: itself, and its name in its folder.
pub(crate) fn settle(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = File::open(folder.unwrap_or(Path::new(".")));
    // Some file systems have no folders to flush, and some folders may not be read: the file is there in any case.
    if let Err(error) = folder.and_then(|folder| folder.sync_all()) {
        tracing::debug!(%error, ?path, "the folder of a new file cannot be flushed");
    }
    Ok(())
}

/// Takes a file for as long as it is open, alone or with other readers: two controllers that write the same file would
/// each destroy what the other has acknowledged.
pub(crate) fn claim(file: &File, with_others: bool) -> io::Result<()> {
    let taken = if with_others {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match taken {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another lab, or another SSD of this one, has it",
        )),
        // Some file systems have no locks, and work without.
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, "a file cannot be locked; see that no other lab uses it");
            Ok(())
        }
    }
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
        let made = file.set_len(size).and_then(|()| settle(&file, path));
        if let Err(source) = made {
            let _ = std::fs::remove_file(path);
            return Err(NvmeError::Allocate { nsid, size, source });
        }
        claim(&file, false).map_err(open)?;
        return Ok((file, size));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(open)?;
    claim(&file, read_only).map_err(open)?;
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

/// Gives storage back; the bytes read as zeros. `false` where the file cannot.
pub(crate) fn punch(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        return match fallocate(file, flags, offset, length) {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        };
    }
}

/// Makes the bytes read as zeros.
pub(crate) fn zero(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 || punch(file, offset, length)? {
        return Ok(());
    }
    const CHUNK: u64 = 64 << 10;
    let zeros = [0u8; CHUNK as usize];
    let mut done = 0;
    while done < length {
        let step = CHUNK.min(length - done);
        let zeros = zeros.get(..step as usize).unwrap_or(&zeros);
        file.write_all_at(zeros, offset + done)?;
        done += step;
    }
    Ok(())
}
