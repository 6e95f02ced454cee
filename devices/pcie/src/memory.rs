//! Memory behind BARs, and the view of memory that a DMA hands out.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::file_io;

/// Where the bytes of a BAR's memory are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBacking {
    /// In memory that lives as long as the device.
    Memory,
    /// In a file, which outlives the process.
    File {
        /// Its path.
        path: PathBuf,
        /// Create the file if it does not exist (and only then).
        create: bool,
    },
}

impl std::fmt::Display for MemoryBacking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::File { path, .. } => write!(f, "file `{}`", path.display()),
        }
    }
}

/// The memory of a BAR: a memfd, or a file that outlives the lab, mapped shared.
///
/// It can be closed: then it answers nobody. A peer's request gets Unsupported Request, the CPU reads all ones and
/// its writes are dropped. What a transport has mapped into a guest stays mapped.
#[derive(Debug)]
pub struct BarMemory {
    region: MmapRegion,
    file: File,
    /// [`OPEN`], [`CLOSED`], or nanoseconds after `made` from which on it is open.
    gate: AtomicU64,
    made: Instant,
}

const OPEN: u64 = 0;
const CLOSED: u64 = u64::MAX;

impl BarMemory {
    /// Memory of `size` bytes where `backing` says; `name` is what the host calls a memfd. The file system sets the space
    /// for all of a file aside now: a guest that writes to a mapped file of a full file system would end the lab
    /// (SIGBUS), and what it had written could not be kept.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::InvalidInput`] where the file is shorter.
    pub fn open(name: &str, backing: &MemoryBacking, size: u64) -> io::Result<Self> {
        match backing {
            MemoryBacking::Memory => Self::anonymous(name, size),
            MemoryBacking::File { path, create } => {
                Self::from_file(open_file(path, *create, size)?, size)
            }
        }
    }

    /// Volatile memory of `size` bytes, zeroed (a memfd, sealed against shrinking).
    ///
    /// # Errors
    /// The host's, when it has no memory to give.
    pub fn anonymous(name: &str, size: u64) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, size)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::from_file(File::from(fd), size)
    }

    /// The first `size` bytes of `file`, which keeps what is written when the lab ends.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::InvalidInput`] where the file is shorter.
    pub fn from_file(file: File, size: u64) -> io::Result<Self> {
        if file.metadata()?.len() < size {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the backing file is shorter than the memory",
            ));
        }
        let length = usize::try_from(size)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "size exceeds memory"))?;
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), length)
            .map_err(io::Error::other)?;
        Ok(Self {
            region,
            file,
            gate: AtomicU64::new(OPEN),
            made: Instant::now(),
        })
    }

    /// Answers nobody from now on. A DMA that began before may still be under way: see
    /// [`Port::settle`](crate::Port::settle).
    pub fn close(&self) {
        self.gate.store(CLOSED, Ordering::SeqCst);
    }

    /// Answers again, when `delay` has passed. Nobody needs to wait for that moment.
    pub fn open_after(&self, delay: Duration) {
        let at = match u64::try_from(self.made.elapsed().saturating_add(delay).as_nanos()) {
            _ if delay.is_zero() => OPEN,
            Ok(at) => at.clamp(OPEN + 1, CLOSED - 1),
            Err(_) => CLOSED - 1,
        };
        self.gate.store(at, Ordering::SeqCst);
    }

    /// Whether it answers.
    pub fn is_open(&self) -> bool {
        match self.gate.load(Ordering::Acquire) {
            OPEN => true,
            CLOSED => false,
            at => {
                let passed = self.made.elapsed().as_nanos() >= u128::from(at);
                if passed {
                    // It may have been closed meanwhile, and then stays so.
                    let order = (Ordering::SeqCst, Ordering::Relaxed);
                    let _ = self.gate.compare_exchange(at, OPEN, order.0, order.1);
                }
                passed
            }
        }
    }

    /// Makes all of it read as zeros. A file keeps the space that was set aside for it.
    ///
    /// # Errors
    /// The host's.
    pub fn clear(&self) -> io::Result<()> {
        let zero = |how| {
            let flags = how | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, 0, self.size())
        };
        // Memory's own file system knows holes only.
        match zero(FallocateFlags::ZERO_RANGE) {
            Err(Errno::OPNOTSUPP) => Ok(zero(FallocateFlags::PUNCH_HOLE)?),
            other => Ok(other?),
        }
    }

    /// Overwrites all that was ever written with `byte`, as memory whose power failed. What nobody has written stays
    /// zero, so the cost is that of what was used.
    ///
    /// # Errors
    /// The host's.
    pub fn overwrite(&self, byte: u8) -> io::Result<()> {
        let block = [byte; 64 << 10];
        let mut at = 0;
        while at < self.size() {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                // Nothing but holes from here on.
                Err(Errno::NXIO) => return Ok(()),
                data => data?.min(self.size()),
            };
            let end = rustix::fs::seek(&self.file, SeekFrom::Hole(data))?.min(self.size());
            at = data;
            while at < end {
                let length = (end - at).min(block.len() as u64) as usize;
                self.file.write_all_at(&block[..length], at)?;
                at += length as u64;
            }
            // A file that shrinks under us has its hole before its data.
            at = at.max(data.saturating_add(1));
        }
        Ok(())
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// The memory at `ranges` of (offset, length), in order; `None` where one leaves the memory, or it is closed.
    pub fn buffers(&self, ranges: &[(u64, u64)]) -> Option<DmaBuffers<'_>> {
        let mut buffers = DmaBuffers::default();
        for &(offset, length) in ranges {
            buffers.push(self.slice(offset, length)?);
        }
        Some(buffers)
    }

    pub(crate) fn slice(&self, offset: u64, length: u64) -> Option<VolatileSlice<'_>> {
        if !self.is_open() {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        let length = usize::try_from(length).ok()?;
        self.region.get_slice(offset, length).ok()
    }

    /// Copies from `offset` into `data`; `false`, and nothing copied, where the range leaves the memory or it is
    /// closed.
    #[must_use]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        self.slice(offset, data.len() as u64)
            .is_some_and(|slice| slice.read_slice(data, 0).is_ok())
    }

    /// Copies `data` to `offset`; `false`, and nothing copied, where the range leaves the memory or it is closed.
    #[must_use]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        self.slice(offset, data.len() as u64)
            .is_some_and(|slice| slice.write_slice(data, 0).is_ok())
    }

    /// The file that backs the memory, for a transport that maps it into a guest.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes all that was written durable, where the memory is a file's.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn open_file(path: &Path, create: bool, size: u64) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if create && !path.exists() {
        let made = options.create_new(true).open(path)?;
        let ready = made
            .set_len(size)
            .and_then(|()| reserve(&made, size))
            .and_then(|()| keep_new_file(&made, path));
        if let Err(error) = ready {
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        claim_file(&made, false)?;
        return Ok(made);
    }
    let file = options.open(path)?;
    claim_file(&file, false)?;
    reserve(&file, size.min(file.metadata()?.len()))?;
    Ok(file)
}

/// Sets space for the first `size` bytes of `file` aside, where its file system can.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, size) {
        Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS) => {
            tracing::debug!("no space is set aside: the file system cannot");
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Takes a file for as long as it is open, alone or with other readers: two endpoints that write the same file would each
/// destroy what the other has acknowledged. A file system that has no locks works without.
///
/// # Errors
/// [`io::ErrorKind::ResourceBusy`] where it is taken.
pub fn claim_file(file: &File, with_others: bool) -> io::Result<()> {
    let taken = if with_others {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match taken {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another lab, or another endpoint of this one, has it",
        )),
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, "a file cannot be locked; see that no other lab uses it");
            Ok(())
        }
    }
}

/// Makes a file that was just created survive a loss of power: itself, and its name in its folder.
///
/// # Errors
/// The host's.
pub fn keep_new_file(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let folder = File::open(folder.unwrap_or(Path::new(".")));
    // Some file systems have no folders to flush, and some folders may not be read: the file is there in any case.
    if let Err(error) = folder.and_then(|folder| folder.sync_all()) {
        tracing::debug!(%error, ?path, "the folder of a new file cannot be flushed");
    }
    Ok(())
}

/// A list of memory ranges that a DMA moves bytes to or from, in order. Guests and peers may change the
/// memory at any time: there are no references to it, only copies in and out.
#[derive(Debug, Default)]
pub struct DmaBuffers<'a> {
    slices: Vec<VolatileSlice<'a>>,
    length: u64,
}

impl<'a> DmaBuffers<'a> {
    pub(crate) fn push(&mut self, slice: VolatileSlice<'a>) {
        self.length += slice.len() as u64;
        self.slices.push(slice);
    }

    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Fills all of the memory from `file` at `offset`, straight into it.
    ///
    /// # Errors
    /// The file's; [`io::ErrorKind::UnexpectedEof`] where it ends too early.
    pub fn fill_from_file(&self, file: &File, offset: u64) -> io::Result<()> {
        file_io::read_exact_at(file, &self.slices, offset)
    }

    /// Writes all of the memory to `file` at `offset`, straight from it.
    ///
    /// # Errors
    /// The file's; [`io::ErrorKind::WriteZero`] where it takes no more.
    pub fn drain_to_file(&self, file: &File, offset: u64) -> io::Result<()> {
        file_io::write_all_at(file, &self.slices, offset)
    }

    /// Fills the memory from `data`, which must be [`len`](Self::len) long. Bytes land in rising order as far
    /// as a reader on another CPU can tell: the last eight, where completion queues keep their phase bit,
    /// become visible after all others.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the lengths differ.
    pub fn fill_from_slice(&self, data: &[u8]) -> io::Result<()> {
        let mut rest = self.checked(data.len()).map(|()| data)?;
        for slice in &self.slices {
            let (now, later) = rest.split_at(slice.len());
            let body = if later.is_empty() {
                now.len().saturating_sub(8)
            } else {
                now.len()
            };
            copy_in(slice, 0, &now[..body])?;
            fence(Ordering::Release);
            // In one store where it is aligned: no reader sees a phase bit without the status beside it.
            let word = now.get(body..).and_then(|tail| tail.try_into().ok());
            let stored = word.is_some_and(|word| {
                let word = u64::from_ne_bytes(word);
                slice.store(word, body, Ordering::Release).is_ok()
            });
            if !stored {
                copy_in(slice, body, &now[body..])?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Copies the memory into `data`, which must be [`len`](Self::len) long.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the lengths differ.
    pub fn drain_to_slice(&self, data: &mut [u8]) -> io::Result<()> {
        self.checked(data.len())?;
        let mut rest = data;
        for slice in &self.slices {
            let (now, later) = rest.split_at_mut(slice.len());
            slice.read_slice(now, 0).map_err(io::Error::other)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies all of the memory to `target`, which must be as long.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the lengths differ.
    pub fn copy_to(&self, target: &DmaBuffers<'_>) -> io::Result<()> {
        if self.length != target.length {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let mut targets = target.slices.iter().copied();
        let mut room: Option<VolatileSlice<'_>> = None;
        for source in &self.slices {
            let mut source = *source;
            while !source.is_empty() {
                let into = match room.take().filter(|slice| !slice.is_empty()) {
                    Some(slice) => slice,
                    None => match targets.next() {
                        Some(slice) => slice,
                        None => return Ok(()),
                    },
                };
                let n = source.len().min(into.len());
                let piece = source.subslice(0, n).map_err(io::Error::other)?;
                piece.copy_to_volatile_slice(into.subslice(0, n).map_err(io::Error::other)?);
                source = source.offset(n).map_err(io::Error::other)?;
                room = into.offset(n).ok();
            }
        }
        Ok(())
    }

    fn checked(&self, length: usize) -> io::Result<()> {
        if length as u64 == self.length {
            Ok(())
        } else {
            Err(io::Error::from(io::ErrorKind::InvalidInput))
        }
    }
}

fn copy_in(slice: &VolatileSlice<'_>, offset: usize, data: &[u8]) -> io::Result<()> {
    if data.is_empty() {
        return Ok(());
    }
    slice.write_slice(data, offset).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_outside_the_memory_are_refused() {
        let memory = BarMemory::anonymous("test", 8192).unwrap();
        assert!(memory.write(8188, &[1, 2, 3, 4]));
        assert!(!memory.write(8189, &[1, 2, 3, 4]));
        assert!(!memory.read(u64::MAX, &mut [0]));
        assert!(memory.buffers(&[(0, 8192), (8191, 2)]).is_none());
    }

    #[test]
    fn closed_memory_answers_nobody() {
        let memory = BarMemory::anonymous("test", 4096).unwrap();
        assert!(memory.write(0, &[1]));
        memory.close();
        assert!(!memory.write(0, &[2]) && !memory.read(0, &mut [0]));
        assert!(memory.buffers(&[(0, 1)]).is_none());
        memory.open_after(Duration::from_secs(3600));
        assert!(!memory.is_open());
        memory.open_after(Duration::from_millis(5));
        while !memory.is_open() {
            std::thread::yield_now();
        }
        let mut byte = [0];
        assert!(memory.read(0, &mut byte));
        assert_eq!(byte, [1]);
        memory.clear().unwrap();
        assert!(memory.read(0, &mut byte));
        assert_eq!(byte, [0]);
        memory.open_after(Duration::MAX);
        assert!(!memory.is_open());
        memory.open_after(Duration::ZERO);
        assert!(memory.is_open());
    }

    #[test]
    fn a_file_has_its_space_from_the_start_and_keeps_it() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let backing = |create| MemoryBacking::File {
            path: path.clone(),
            create,
        };
        let size = 1 << 20;
        let error = BarMemory::open("test", &backing(false), size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let used = || path.metadata().unwrap().blocks() * 512;
        let memory = BarMemory::open("test", &backing(true), size).unwrap();
        assert!(used() >= size, "{}", used());
        assert!(memory.write(4096, &[5]));
        memory.clear().unwrap();
        assert!(used() >= size, "{}", used());
        let mut byte = [1];
        assert!(memory.read(4096, &mut byte) && byte == [0]);
        assert!(memory.write(8192, &[7]));
        // An existing file keeps what is in it, and gets the space that a sparse one lacks.
        drop(memory);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, 64 << 10, size - (64 << 10)).unwrap();
        assert!(used() < size);
        let memory = BarMemory::open("test", &backing(true), size).unwrap();
        assert!(used() >= size, "{}", used());
        assert!(memory.read(8192, &mut byte) && byte == [7]);
        let error = BarMemory::open("test", &backing(true), size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "two writers");
        drop(memory);
        let error = BarMemory::open("test", &backing(true), 2 * size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        // What no file system has room for is no file.
        let other = folder.path().join("other");
        let backing = MemoryBacking::File {
            path: other.clone(),
            create: true,
        };
        assert!(BarMemory::open("test", &backing, 1 << 50).is_err());
        assert!(!other.exists());
    }

    #[test]
    fn lost_memory_is_overwritten_where_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let backing = MemoryBacking::File {
            path: folder.path().join("memory"),
            create: true,
        };
        let size = 64 << 20;
        for memory in [
            BarMemory::open("test", &MemoryBacking::Memory, size).unwrap(),
            BarMemory::open("test", &backing, size).unwrap(),
        ] {
            for at in [0, 10 << 20, size - 1] {
                assert!(memory.write(at, &[3]));
            }
            memory.overwrite(0xff).unwrap();
            let mut page = [0; 4096];
            for at in [0, 10 << 20, size - 4096] {
                assert!(memory.read(at, &mut page));
                assert_eq!(page, [0xff; 4096]);
            }
            assert!(memory.read(20 << 20, &mut page));
            assert_eq!(page, [0; 4096]);
        }
        let untouched = BarMemory::anonymous("test", size).unwrap();
        untouched.overwrite(0xff).unwrap();
    }

    #[test]
    fn buffers_move_bytes_in_order() {
        let memory = BarMemory::anonymous("test", 8192).unwrap();
        let data: Vec<u8> = (0..100).collect();
        memory
            .buffers(&[(4096, 60), (10, 40)])
            .unwrap()
            .fill_from_slice(&data)
            .unwrap();
        let mut back = [0; 60];
        assert!(memory.read(4096, &mut back));
        assert_eq!(back, data[..60]);
        let other = BarMemory::anonymous("other", 4096).unwrap();
        let from = memory.buffers(&[(4096, 60), (10, 40)]).unwrap();
        from.copy_to(&other.buffers(&[(7, 1), (100, 99)]).unwrap())
            .unwrap();
        let mut back = vec![0; 100];
        other
            .buffers(&[(7, 1), (100, 99)])
            .unwrap()
            .drain_to_slice(&mut back)
            .unwrap();
        assert_eq!(back, data);
        assert!(from.drain_to_slice(&mut [0; 99]).is_err());
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let memory = BarMemory::anonymous("test", 1 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        // More pieces than one system call takes (IOV_MAX is 1024).
        let ranges: Vec<(u64, u64)> = (0..3000).map(|i| (i * 200, 100)).collect();
        let buffers = memory.buffers(&ranges).unwrap();
        buffers.fill_from_slice(&data).unwrap();
        buffers.drain_to_file(&file, 5).unwrap();
        buffers.fill_from_slice(&vec![0; 300_000]).unwrap();
        buffers.fill_from_file(&file, 5).unwrap();
        let mut back = vec![0; 300_000];
        buffers.drain_to_slice(&mut back).unwrap();
        assert_eq!(back, data);
        let error = buffers.fill_from_file(&file, 6).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
