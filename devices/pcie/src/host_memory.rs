//! Host memory as one endpoint sees it: what its transport has mapped.
//!
//! QEMU maps and unmaps guest RAM at any time, in ranges of any size (the firmware remaps low memory while
//! queues are live). DMA holds the table for reading while it touches memory, and an unmap takes it for
//! writing: when that returns, nothing touches the range any more, and no pointer to it is kept anywhere.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::function::{Access, MapError};

/// Bound on the mappings of one endpoint; QEMU makes some tens of them.
const MAX_MAPPINGS: usize = 4096;

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

/// The table of mappings, sorted by address, without overlaps.
#[derive(Debug, Default)]
pub struct HostTable {
    mappings: Vec<Mapping>,
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

    /// Removes `[start, end)`; returns whether any of it was mapped.
    fn remove(&mut self, start: u64, end: u64) -> bool {
        let mut found = false;
        let mut kept = Vec::with_capacity(self.mappings.len() + 1);
        for mapping in self.mappings.drain(..) {
            if mapping.end() <= start || mapping.start >= end {
                kept.push(mapping);
                continue;
            }
            found = true;
            if mapping.start < start {
                kept.push(mapping.part(mapping.start, start));
            }
            if mapping.end() > end {
                kept.push(mapping.part(end, mapping.end()));
            }
        }
        self.mappings = kept;
        found
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
        let memory = match file {
            Some(fd) => Some((Arc::new(map_file(fd, file_offset, length, access)?), 0)),
            None => None,
        };
        let mut table = self.write();
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
    /// [`MapError::BadRange`] or [`MapError::NotMapped`].
    pub fn unmap(&self, address: u64, length: u64) -> Result<(), MapError> {
        let end = address.checked_add(length).ok_or(MapError::BadRange)?;
        if length == 0 {
            return Err(MapError::BadRange);
        }
        if self.write().remove(address, end) {
            Ok(())
        } else {
            Err(MapError::NotMapped)
        }
    }

    /// Takes all mappings away.
    pub fn unmap_all(&self) {
        self.write().mappings.clear();
    }
}

/// Maps `length` bytes of `fd` at `offset`. A file shorter than that would raise SIGBUS on access.
fn map_file(fd: OwnedFd, offset: u64, length: u64, access: Access) -> Result<MmapRegion, MapError> {
    let size = rustix::fs::fstat(&fd)
        .map_err(|e| MapError::Os(e.into()))?
        .st_size;
    let end = offset.checked_add(length).ok_or(MapError::BadRange)?;
    if u64::try_from(size).unwrap_or(0) < end {
        return Err(MapError::FileTooShort);
    }
    let length = usize::try_from(length).map_err(|_| MapError::BadRange)?;
    let mut protection = 0;
    if access.read {
        protection |= libc::PROT_READ;
    }
    if access.write {
        protection |= libc::PROT_WRITE;
    }
    MmapRegionBuilder::new(length)
        .with_file_offset(FileOffset::new(fd.into(), offset))
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
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
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
            map(0, 4096, 4096, u64::MAX),
            Err(MapError::BadRange)
        ));
        assert!(matches!(map(0, 4096, 1 << 20, 17), Err(MapError::Os(_))));
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
