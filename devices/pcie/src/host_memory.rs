//! Host memory as one endpoint sees it: what its transport has mapped.
//!
//! QEMU maps and unmaps guest RAM at any time, in ranges of any size (the firmware remaps low memory while
//! queues are live). DMA holds the table for reading while it touches memory, and an unmap takes it for
//! writing: when that returns, nothing touches the range any more, and no pointer to it is kept anywhere.
//!
//! A file that its owner makes shorter takes mapped pages away, and touching them kills the process (SIGBUS); so
//! does a page that huge page memory lacks when it is touched, and a file system in user space can make a touch wait
//! for ever. Only memory that can do none of this is mapped: a memfd of ordinary pages, sealed against shrinking. It is
//! sealed here where it is not yet; QEMU's memory-backend-memfd comes sealed.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{OFlags, SealFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::function::{Access, MapError};

/// Bound on the mappings of one endpoint. QEMU makes some tens of them for a guest without an IOMMU; one with an IOMMU
/// maps each page of each transfer that is under way. QEMU 11.1 connects to nobody who offers more.
pub(crate) const MAX_MAPPINGS: usize = 65535;
/// Bound on the open files behind them; QEMU has one for each memory backend.
const MAX_FILES: usize = 64;
/// Where a file's parts may begin.
const PAGE: u64 = 4096;
/// Bound on the bytes mapped: a client must not use up the process's addresses.
const MAX_BYTES: u64 = 2 << 40;

/// The host memory of one endpoint.
#[derive(Debug, Default)]
pub struct HostMemory {
    table: RwLock<HostTable>,
}

/// A mapped range.
#[derive(Clone, Debug)]
struct Mapping {
    start: u64,
    length: u64,
    access: Access,
    /// `None` for a range without a file: another device's BAR, which only the fabric can reach.
    memory: Option<(Arc<MmapRegion>, u64)>,
}

impl Mapping {
    fn end(&self) -> u64 {
        // Cannot overflow: `map` refuses ranges that wrap.
        self.start + self.length
    }

    /// The part of the mapping between `from` and `to`, which lie inside it.
    fn part(&self, from: u64, to: u64) -> Mapping {
        Mapping {
            start: from,
            length: to - from,
            access: self.access,
            memory: self
                .memory
                .as_ref()
                .map(|(m, offset)| (m.clone(), offset + from - self.start)),
        }
    }
}

/// What a DMA finds at an address.
pub(crate) enum HostLookup<'a> {
    /// Memory, as much of it as is contiguous and was asked for.
    Memory(VolatileSlice<'a>),
    /// Mapped, but not for this direction, or not ours to touch; this many bytes of it.
    Refused,
    /// Nothing.
    Unmapped,
}

/// A client's file, mapped whole. Mappings of its parts share it: a process may have 65530 of its own by default
/// (vm.max_map_count).
#[derive(Debug)]
struct Mapped {
    identity: (u64, u64, OFlags),
    access: Access,
    region: Arc<MmapRegion>,
}

/// The table of mappings, sorted by address, without overlaps.
#[derive(Debug, Default)]
pub struct HostTable {
    mappings: Vec<Mapping>,
    files: Vec<Mapped>,
}

impl HostTable {
    /// What lies at `address`, at most `length` bytes of it.
    pub(crate) fn lookup(&self, address: u64, length: u64, write: bool) -> HostLookup<'_> {
        let after = self.mappings.partition_point(|m| m.start <= address);
        let Some(mapping) = after
            .checked_sub(1)
            .and_then(|i| self.mappings.get(i))
            .filter(|m| address - m.start < m.length)
        else {
            return HostLookup::Unmapped;
        };
        let inside = address - mapping.start;
        let allowed = if write {
            mapping.access.write
        } else {
            mapping.access.read
        };
        let Some((memory, offset)) = mapping.memory.as_ref().filter(|_| allowed) else {
            return HostLookup::Refused;
        };
        let take = length.min(mapping.length - inside);
        let slice = usize::try_from(offset + inside)
            .ok()
            .zip(usize::try_from(take).ok())
            .and_then(|(at, n)| memory.get_slice(at, n).ok());
        match slice {
            Some(slice) => HostLookup::Memory(slice),
            None => HostLookup::Refused,
        }
    }

    /// Whether removing `[start, end)` would leave two parts of one mapping.
    fn splits(&self, start: u64, end: u64) -> bool {
        let after = self.mappings.partition_point(|m| m.start < start);
        let before = after.checked_sub(1).and_then(|i| self.mappings.get(i));
        before.is_some_and(|m| m.end() > end)
    }

    /// The file that `fd` has open, at least `end` bytes of it. QEMU sends a descriptor with each mapping, most of them
    /// of one file.
    fn file(&mut self, fd: OwnedFd, end: u64, access: Access) -> Result<Arc<MmapRegion>, MapError> {
        let identity = identity(&fd).map_err(|error| MapError::Os(error.into()))?;
        let known = self.files.iter().find(|file| {
            let same = file.identity == identity && file.access == access;
            same && file.region.size() as u64 >= end
        });
        if let Some(known) = known {
            return Ok(known.region.clone());
        }
        // Those that nothing is mapped from any more.
        self.files
            .retain(|file| Arc::strong_count(&file.region) > 1);
        let others = self.files.iter().map(|file| file.region.size() as u64);
        let room = MAX_BYTES.saturating_sub(others.sum());
        if self.files.len() >= MAX_FILES {
            return Err(MapError::TooMany);
        }
        let region = Arc::new(map_file(File::from(fd), end, room, access)?);
        self.files.push(Mapped {
            identity,
            access,
            region: region.clone(),
        });
        Ok(region)
    }

    /// Removes `[start, end)`; returns whether any of it was mapped.
    fn remove(&mut self, start: u64, end: u64) -> bool {
        let first = self.mappings.partition_point(|m| m.end() <= start);
        let after = self.mappings.partition_point(|m| m.start < end);
        let Some(touched) = self.mappings.get(first..after).filter(|m| !m.is_empty()) else {
            return false;
        };
        let before = touched.first().filter(|m| m.start < start);
        let before = before.map(|m| m.part(m.start, start));
        let behind = touched.last().filter(|m| m.end() > end);
        let behind = behind.map(|m| m.part(end, m.end()));
        self.mappings
            .splice(first..after, before.into_iter().chain(behind));
        true
    }
}

impl HostMemory {
    /// No memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Holds all mappings in place while the guard lives.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, HostTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HostTable> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Function::map_host_memory`](crate::Function::map_host_memory).
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map(
        &self,
        address: u64,
        length: u64,
        access: Access,
        file: Option<OwnedFd>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        let end = address.checked_add(length).ok_or(MapError::BadRange)?;
        if length == 0 {
            return Err(MapError::BadRange);
        }
        if let Some(fd) = &file {
            // Parts of pages would move words across their bounds.
            if !file_offset.is_multiple_of(PAGE) {
                return Err(MapError::BadRange);
            }
            seal(fd)?;
        }
        let mut table = self.write();
        let memory = match file {
            Some(fd) => {
                let file_end = file_offset.checked_add(length).ok_or(MapError::BadRange)?;
                Some((table.file(fd, file_end, access)?, file_offset))
            }
            None => None,
        };
        if table.mappings.len() >= MAX_MAPPINGS {
            return Err(MapError::TooMany);
        }
        let at = table.mappings.partition_point(|m| m.start < address);
        let before = at.checked_sub(1).and_then(|i| table.mappings.get(i));
        if before.is_some_and(|m| m.end() > address)
            || table.mappings.get(at).is_some_and(|m| m.start < end)
        {
            return Err(MapError::Overlap);
        }
        table.mappings.insert(
            at,
            Mapping {
                start: address,
                length,
                access,
                memory,
            },
        );
        Ok(())
    }

    /// See [`Function::unmap_host_memory`](crate::Function::unmap_host_memory).
    ///
    /// # Errors
    /// [`MapError::BadRange`], [`MapError::NotMapped`], or [`MapError::TooMany`] where a hole would make one
    /// mapping too many; then all stays mapped.
    pub fn unmap(&self, address: u64, length: u64) -> Result<(), MapError> {
        let more = length.checked_sub(1).ok_or(MapError::BadRange)?;
        let last = address.checked_add(more).ok_or(MapError::BadRange)?;
        // A range may end where addresses do, as that of a guest's IOMMU does; a mapping ends before.
        let end = last.saturating_add(1);
        let mut table = self.write();
        // Holes make mappings, too.
        if table.mappings.len() >= MAX_MAPPINGS && table.splits(address, end) {
            return Err(MapError::TooMany);
        }
        if table.remove(address, end) {
            Ok(())
        } else {
            Err(MapError::NotMapped)
        }
    }

    /// Takes all mappings away.
    pub fn unmap_all(&self) {
        *self.write() = HostTable::default();
    }
}

/// What tells open files apart: device, inode and the rights that they were opened with.
fn identity(fd: impl AsFd) -> rustix::io::Result<(u64, u64, OFlags)> {
    let found = rustix::fs::fstat(&fd)?;
    let flags = rustix::fs::fcntl_getfl(&fd)? & OFlags::RWMODE;
    Ok((found.st_dev, found.st_ino, flags))
}

/// Keeps the file from getting shorter, which would raise SIGBUS on access. Asked before anything else, and while nothing
/// is locked: a file system in user space, which may take for ever to answer other questions, has no seals.
fn seal(fd: &OwnedFd) -> Result<(), MapError> {
    // What cannot be sealed any more was sealed by its owner, or is refused.
    let _ = rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK);
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => Ok(()),
        _ => Err(MapError::NotSealed),
    }
}

/// Maps all of `file`, which is sealed and must have `end` bytes and no more than `room`.
fn map_file(file: File, end: u64, room: u64, access: Access) -> Result<MmapRegion, MapError> {
    // Huge pages, which also take seals, are another file system (linux/magic.h).
    let ordinary = rustix::fs::fstatfs(&file).is_ok_and(|stat| stat.f_type == libc::TMPFS_MAGIC);
    if !ordinary {
        return Err(MapError::NotSealed);
    }
    let size = rustix::fs::fstat(&file)
        .map_err(|e| MapError::Os(e.into()))?
        .st_size;
    let size = u64::try_from(size).unwrap_or(0);
    if size < end {
        return Err(MapError::FileTooShort);
    }
    if size > room {
        return Err(MapError::TooMany);
    }
    let length = usize::try_from(size).map_err(|_| MapError::TooMany)?;
    let mut protection = 0;
    if access.read {
        protection |= libc::PROT_READ;
    }
    if access.write {
        protection |= libc::PROT_WRITE;
    }
    MmapRegionBuilder::new(length)
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(protection)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| MapError::Os(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RW: Access = Access {
        read: true,
        write: true,
    };

    fn memfd(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        fd
    }

    fn found(host: &HostMemory, address: u64, write: bool) -> Option<usize> {
        match host.read().lookup(address, 1 << 20, write) {
            HostLookup::Memory(slice) => Some(slice.len()),
            _ => None,
        }
    }

    #[test]
    fn a_hole_in_the_middle_of_a_mapping_splits_it() {
        let host = HostMemory::new();
        host.map(0x10000, 0x4000, RW, Some(memfd(0x5000)), 0x1000)
            .unwrap();
        host.unmap(0x11000, 0x1000).unwrap();
        assert_eq!(found(&host, 0x10000, true), Some(0x1000));
        assert_eq!(found(&host, 0x11000, true), None);
        assert_eq!(found(&host, 0x12000, true), Some(0x2000));
        assert!(matches!(
            host.unmap(0x11000, 0x1000),
            Err(MapError::NotMapped)
        ));
        host.map(0x11000, 0x1000, RW, Some(memfd(0x1000)), 0)
            .unwrap();
        assert_eq!(found(&host, 0x11000, true), Some(0x1000));
    }

    /// What QEMU asks for when a guest's IOMMU drops a page table.
    #[test]
    fn an_unmap_may_end_where_addresses_do() {
        let host = HostMemory::new();
        for address in [0x1000, 0x4000, u64::MAX - 0x1fff] {
            host.map(address, 0x1000, RW, None, 0).unwrap();
        }
        host.unmap(0x2000, u64::MAX - 0x1fff).unwrap();
        let starts = |host: &HostMemory| {
            host.read()
                .mappings
                .iter()
                .map(|m| m.start)
                .collect::<Vec<_>>()
        };
        assert_eq!(starts(&host), [0x1000]);
        for (address, length) in [(0x2000, u64::MAX - 0x1ffe), (u64::MAX, 2), (0x1000, 0)] {
            let refused = host.unmap(address, length);
            assert!(matches!(refused, Err(MapError::BadRange)), "{refused:?}");
        }
        assert_eq!(starts(&host), [0x1000]);
    }

    #[test]
    fn hostile_mappings_are_refused() {
        let host = HostMemory::new();
        let map = |address, length, size, offset| {
            host.map(address, length, RW, Some(memfd(size)), offset)
        };
        assert!(matches!(map(0, 0, 4096, 0), Err(MapError::BadRange)));
        assert!(matches!(map(u64::MAX, 2, 4096, 0), Err(MapError::BadRange)));
        assert!(matches!(map(0, 8192, 4096, 0), Err(MapError::FileTooShort)));
        assert!(matches!(
            map(0, 4096, 4096, u64::MAX - 4095),
            Err(MapError::BadRange)
        ));
        assert!(matches!(map(0, 4096, 1 << 20, 17), Err(MapError::BadRange)));
        map(0x1000, 0x2000, 0x2000, 0).unwrap();
        assert!(matches!(
            map(0x2000, 0x2000, 0x2000, 0),
            Err(MapError::Overlap)
        ));
        assert!(matches!(map(0, 0x1001, 0x2000, 0), Err(MapError::Overlap)));
    }

    #[test]
    fn read_only_memory_is_not_written() {
        let host = HostMemory::new();
        host.map(
            0,
            4096,
            Access {
                read: true,
                write: false,
            },
            Some(memfd(4096)),
            0,
        )
        .unwrap();
        assert_eq!(found(&host, 0, false), Some(4096));
        assert_eq!(found(&host, 0, true), None);
    }

    /// Each hole in one mapping makes another, which a client could go on with for ever.
    #[test]
    fn holes_are_bounded_like_mappings() {
        let host = HostMemory::new();
        host.map(0, 1 << 40, RW, None, 0).unwrap();
        let hole = |number: usize| host.unmap(0x1000 + 0x2000 * number as u64, 0x1000);
        for number in 0..MAX_MAPPINGS - 1 {
            hole(number).unwrap();
        }
        assert!(matches!(hole(MAX_MAPPINGS - 1), Err(MapError::TooMany)));
        // What splits nothing is still done, and makes room.
        host.unmap(0, 0x10000).unwrap();
        hole(MAX_MAPPINGS - 1).unwrap();
    }

    #[test]
    fn a_mapped_memfd_cannot_be_cut_short() {
        use rustix::fs::MemfdFlags;
        let fd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 0x2000).unwrap();
        let host = HostMemory::new();
        host.map(0, 0x2000, RW, Some(fd.try_clone().unwrap()), 0)
            .unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert_eq!(found(&host, 0, true), Some(0x2000));
    }

    /// What could take its pages away, or never give them, is not mapped.
    #[test]
    fn only_sealed_memfds_are_mapped() {
        use rustix::fs::MemfdFlags;
        let host = HostMemory::new();
        let unsealable = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let on_disk = tempfile::tempfile().unwrap();
        for fd in [unsealable, on_disk.into()] {
            rustix::fs::ftruncate(&fd, 0x1000).unwrap();
            let refused = host.map(0, 0x1000, RW, Some(fd), 0);
            assert!(matches!(refused, Err(MapError::NotSealed)), "{refused:?}");
        }
    }

    #[test]
    fn files_and_bytes_are_bounded() {
        let host = HostMemory::new();
        let page = 0x1000;
        for number in 0..MAX_FILES as u64 {
            host.map(number * page, page, RW, Some(memfd(page)), 0)
                .unwrap();
        }
        let at = 1 << 30;
        let one_more = host.map(at, page, RW, Some(memfd(page)), 0);
        assert!(matches!(one_more, Err(MapError::TooMany)), "{one_more:?}");
        host.unmap_all();
        let too_large = host.map(0, page, RW, Some(memfd(MAX_BYTES + page)), 0);
        assert!(matches!(too_large, Err(MapError::TooMany)), "{too_large:?}");
        host.map(0, MAX_BYTES, RW, Some(memfd(MAX_BYTES)), 0)
            .unwrap();
        let more = |size| host.map(MAX_BYTES, page, RW, Some(memfd(size)), 0);
        assert!(matches!(more(page), Err(MapError::TooMany)));
        // What is not mapped any more makes room.
        host.unmap(0, MAX_BYTES).unwrap();
        more(page).unwrap();
        assert_eq!(host.read().files.len(), 1);
    }

    #[test]
    fn mappings_of_one_file_share_a_descriptor() {
        let host = HostMemory::new();
        let (one, other) = (memfd(0x8000), memfd(0x8000));
        for page in 0..8 {
            for (base, fd) in [(0, &one), (0x10000, &other)] {
                let fd = Some(fd.try_clone().unwrap());
                host.map(base + page * 0x1000, 0x1000, RW, fd, page * 0x1000)
                    .unwrap();
            }
        }
        let table = host.read();
        let files = table.mappings.iter().filter_map(|m| m.memory.as_ref());
        let files: std::collections::BTreeSet<_> = files
            .map(|(region, _)| {
                std::os::fd::AsRawFd::as_raw_fd(region.file_offset().unwrap().file())
            })
            .collect();
        assert_eq!(files.len(), 2);
    }

    proptest! {
        /// Page by page, the table equals a plain model after any sequence of maps and unmaps.
        #[test]
        fn the_table_equals_a_page_map(
            steps in prop::collection::vec((any::<bool>(), 0u64..32, 1u64..12), 1..40)
        ) {
            let host = HostMemory::new();
            let mut model = [false; 64];
            for (map, start, length) in steps {
                let pages = start as usize..(start + length) as usize;
                if map {
                    let free = !model[pages.clone()].iter().any(|p| *p);
                    let result = host.map(start << 12, length << 12, RW, None, 0);
                    prop_assert_eq!(result.is_ok(), free);
                    if free {
                        model[pages].fill(true);
                    }
                } else {
                    let any = model[pages.clone()].iter().any(|p| *p);
                    prop_assert_eq!(host.unmap(start << 12, length << 12).is_ok(), any);
                    model[pages].fill(false);
                }
                for (page, mapped) in model.iter().enumerate() {
                    let table = host.read();
                    let hit = table.lookup((page as u64) << 12, 1, true);
                    prop_assert_eq!(!matches!(hit, HostLookup::Unmapped), *mapped);
                }
            }
        }
    }
}
