//! The namespaces of a controller's subsystem: which are there, which are attached, and what capacity is left.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, RwLock};

use crate::locks::{read, write};
use crate::namespace::{Format, Medium, Namespace};
use crate::spec::status::Status;
use crate::write_cache::WriteCache;

/// NN: the highest NSID.
pub(crate) const MAX_NAMESPACES: u32 = 256;

/// The namespaces by NSID. A command holds its namespace for as long as it works on it, so that one can be deleted
/// or formatted under load.
#[derive(Debug)]
pub(crate) struct Namespaces {
    table: RwLock<Table>,
    /// TNVMCAP: bytes of all namespaces and of what is left for more.
    capacity: u64,
    cache: Option<Arc<WriteCache>>,
}

#[derive(Debug)]
struct Table {
    slots: BTreeMap<u32, Slot>,
    /// Namespaces created so far.
    created: u64,
}

/// An allocated namespace.
#[derive(Debug)]
struct Slot {
    /// `None` while it is formatted.
    namespace: Option<Arc<Namespace>>,
    attached: bool,
    size: u64,
}

impl Slot {
    fn ready(&self) -> Result<Arc<Namespace>, Status> {
        self.namespace.clone().ok_or(Status::FORMAT_IN_PROGRESS)
    }
}

impl Table {
    /// The slot of `nsid` (Base 3.2.1.2): an NSID that no namespace can have is invalid; one that none has is a bad field.
    fn slot(&self, nsid: u32) -> Result<&Slot, Status> {
        let slot = self.slots.get(&nsid);
        slot.ok_or(if (1..=MAX_NAMESPACES).contains(&nsid) {
            Status::INVALID_FIELD
        } else {
            Status::INVALID_NAMESPACE
        })
    }

    fn slot_mut(&mut self, nsid: u32) -> Result<&mut Slot, Status> {
        self.slot(nsid)?;
        self.slots.get_mut(&nsid).ok_or(Status::INTERNAL_ERROR)
    }

    fn allocated(&self) -> u64 {
        let sizes = self.slots.values().map(|slot| slot.size);
        sizes.fold(0, u64::saturating_add)
    }
}

impl Namespaces {
    /// Those of a new controller, all attached, and `unallocated` bytes for more.
    pub(crate) fn new(
        namespaces: impl IntoIterator<Item = Namespace>,
        unallocated: u64,
        cache: Option<Arc<WriteCache>>,
    ) -> Self {
        let slot = |ns: Namespace| Slot {
            attached: true,
            size: ns.size(),
            namespace: Some(Arc::new(ns.cached(cache.clone()))),
        };
        let table = Table {
            slots: namespaces
                .into_iter()
                .map(|ns| (ns.nsid, slot(ns)))
                .collect(),
            created: 0,
        };
        Self {
            capacity: table.allocated().saturating_add(unallocated),
            table: RwLock::new(table),
            cache,
        }
    }

    /// The active namespace `nsid`.
    pub(crate) fn get(&self, nsid: u32) -> Result<Arc<Namespace>, Status> {
        let table = read(&self.table);
        let slot = table.slot(nsid)?;
        if slot.attached {
            slot.ready()
        } else {
            Err(Status::INVALID_FIELD)
        }
    }

    /// The namespace `nsid`, attached or not.
    pub(crate) fn allocated(&self, nsid: u32) -> Result<Arc<Namespace>, Status> {
        read(&self.table).slot(nsid)?.ready()
    }

    /// Whether the namespace `nsid` is attached.
    pub(crate) fn is_attached(&self, nsid: u32) -> Result<bool, Status> {
        read(&self.table).slot(nsid).map(|slot| slot.attached)
    }

    /// All active ones that are not being formatted, in the order of their NSIDs.
    pub(crate) fn all(&self) -> Vec<Arc<Namespace>> {
        let table = read(&self.table);
        let attached = table.slots.values().filter(|slot| slot.attached);
        attached.filter_map(|slot| slot.namespace.clone()).collect()
    }

    /// All that are not being formatted, attached or not, in the order of their NSIDs.
    pub(crate) fn all_allocated(&self) -> Vec<Arc<Namespace>> {
        let table = read(&self.table);
        let slots = table.slots.values();
        slots.filter_map(|slot| slot.namespace.clone()).collect()
    }

    /// The NSIDs of all, or of all active ones, in order.
    pub(crate) fn ids(&self, active: bool) -> Vec<u32> {
        let table = read(&self.table);
        let slots = table.slots.iter();
        slots
            .filter(|(_, slot)| slot.attached || !active)
            .map(|(nsid, _)| *nsid)
            .collect()
    }

    /// TNVMCAP and UNVMCAP.
    pub(crate) fn capacity(&self) -> (u64, u64) {
        let allocated = read(&self.table).allocated();
        (self.capacity, self.capacity.saturating_sub(allocated))
    }

    /// Flushes all; the first error, after all were tried.
    pub(crate) fn flush_all(&self) -> io::Result<()> {
        let results: Vec<_> = self.all_allocated().iter().map(|ns| ns.flush()).collect();
        results.into_iter().collect()
    }

    /// Creates a namespace of `blocks` blocks in sparse memory, not attached yet; its NSID.
    pub(crate) fn create(&self, blocks: u64, format: Format) -> Result<u32, Status> {
        let size = blocks.checked_mul(1 << format.block_shift());
        let size = size.filter(|size| i64::try_from(*size).is_ok());
        let size = size.ok_or(Status::NAMESPACE_INSUFFICIENT_CAPACITY)?;
        if size == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let mut table = write(&self.table);
        if size > self.capacity.saturating_sub(table.allocated()) {
            return Err(Status::NAMESPACE_INSUFFICIENT_CAPACITY);
        }
        let nsid = (1..=MAX_NAMESPACES).find(|nsid| !table.slots.contains_key(nsid));
        let nsid = nsid.ok_or(Status::NAMESPACE_IDENTIFIER_UNAVAILABLE)?;
        table.created += 1;
        let identity = u64::from(nsid) | table.created << 32;
        let namespace = Medium::memory(size)
            .and_then(|medium| Namespace::new(nsid, identity, medium, format))
            .map_err(|error| {
                tracing::warn!(%error, size, "no memory for a namespace");
                Status::INTERNAL_ERROR
            })?;
        let slot = Slot {
            attached: false,
            size,
            namespace: Some(Arc::new(namespace.cached(self.cache.clone()))),
        };
        table.slots.insert(nsid, slot);
        Ok(nsid)
    }

    /// Deletes the namespace `nsid`, attached or not. Commands in flight end on what they hold; a file stays.
    pub(crate) fn delete(&self, nsid: u32) -> Result<(), Status> {
        let mut table = write(&self.table);
        let namespace = table.slot(nsid)?.ready()?;
        if namespace.read_only {
            return Err(Status::WRITE_PROTECTED);
        }
        namespace.forget_cached();
        table.slots.remove(&nsid);
        Ok(())
    }

    /// Attaches the namespace `nsid`.
    pub(crate) fn attach(&self, nsid: u32) -> Result<(), Status> {
        let mut table = write(&self.table);
        let slot = table.slot_mut(nsid)?;
        if std::mem::replace(&mut slot.attached, true) {
            return Err(Status::NAMESPACE_ALREADY_ATTACHED);
        }
        Ok(())
    }

    /// Detaches the namespace `nsid`; what was acknowledged is on the medium then, as no flush comes any more.
    pub(crate) fn detach(&self, nsid: u32) -> Result<(), Status> {
        let namespace = {
            let mut table = write(&self.table);
            let slot = table.slot_mut(nsid)?;
            if !std::mem::replace(&mut slot.attached, false) {
                return Err(Status::NAMESPACE_NOT_ATTACHED);
            }
            slot.namespace.clone()
        };
        let flushed = namespace.map_or(Ok(()), |ns| ns.flush());
        flushed.map_err(|_| Status::WRITE_FAULT)
    }

    /// Formats the active namespace `nsid`: it is empty then. Commands that come in the meantime are refused; those
    /// in flight, of which each ends by itself, are waited for, so that none of them writes into the new format.
    pub(crate) fn format(&self, nsid: u32, format: Format) -> Result<(), Status> {
        self.get(nsid)?.refuses(format).map_or(Ok(()), Err)?;
        let old = write(&self.table).slot_mut(nsid)?.namespace.take();
        let (new, result) = old.ok_or(Status::FORMAT_IN_PROGRESS)?.formatted(format);
        write(&self.table).slot_mut(nsid)?.namespace = Some(Arc::new(new));
        result.map_err(|error| {
            tracing::warn!(%error, nsid, "a format failed");
            Status::WRITE_FAULT
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NamespaceConfig;
    use crate::spec::command::FormatCdw10;

    fn namespaces(unallocated: u64) -> Namespaces {
        let ns = |nsid| Namespace::open(nsid, &NamespaceConfig::memory(1 << 20)).unwrap();
        Namespaces::new([ns(1), ns(2)], unallocated, None)
    }

    fn format(bits: u32) -> Format {
        Format::of_format(FormatCdw10::from_bits(bits)).unwrap()
    }

    #[test]
    fn capacity_is_conserved() {
        let all = namespaces(3 << 20);
        assert_eq!(all.capacity(), (5 << 20, 3 << 20));
        let small = all.create(1 << 11, format(0)).unwrap();
        assert_eq!((small, all.capacity().1), (3, 2 << 20));
        let full = Err(Status::NAMESPACE_INSUFFICIENT_CAPACITY);
        assert_eq!(all.create(513, format(1)), full);
        assert_eq!(all.create(u64::MAX, format(1)), full);
        assert_eq!(all.create(0, format(1)), Err(Status::INVALID_FIELD));
        all.delete(1).unwrap();
        assert_eq!(all.capacity().1, 3 << 20);
        assert_eq!(all.create(768, format(1)), Ok(1));
        assert_eq!(all.capacity(), (5 << 20, 0));
        assert_eq!(all.ids(false), [1, 2, 3]);
        assert_eq!(all.ids(true), [2]);
    }

    #[test]
    fn identifiers_run_out() {
        let all = namespaces(1 << 20);
        for _ in 2..MAX_NAMESPACES {
            all.create(1, format(0)).unwrap();
        }
        let none = Err(Status::NAMESPACE_IDENTIFIER_UNAVAILABLE);
        assert_eq!(all.create(1, format(0)), none);
    }

    #[test]
    fn what_is_not_attached_is_not_active() {
        let all = namespaces(0);
        assert_eq!(all.attach(1), Err(Status::NAMESPACE_ALREADY_ATTACHED));
        all.detach(1).unwrap();
        assert_eq!(all.detach(1), Err(Status::NAMESPACE_NOT_ATTACHED));
        assert_eq!(all.get(1).unwrap_err(), Status::INVALID_FIELD);
        assert!(all.allocated(1).is_ok());
        all.attach(1).unwrap();
        assert!(all.get(1).is_ok());
        for invalid in [0, MAX_NAMESPACES + 1, u32::MAX] {
            assert_eq!(all.get(invalid).unwrap_err(), Status::INVALID_NAMESPACE);
        }
    }

    /// A format waits for a command in flight, which ends on the blocks that it began with.
    #[test]
    fn a_format_waits_for_commands_in_flight() {
        let all = namespaces(0);
        let in_flight = all.get(1).unwrap();
        std::thread::scope(|scope| {
            let formatting = scope.spawn(|| all.format(1, format(1)));
            while all.get(1).is_ok() {
                std::thread::yield_now();
            }
            assert_eq!(all.get(1).unwrap_err(), Status::FORMAT_IN_PROGRESS);
            assert_eq!(all.ids(true), [1, 2]);
            use std::os::unix::fs::FileExt;
            in_flight.file.write_all_at(&[7; 512], 0).unwrap();
            assert!(!formatting.is_finished());
            drop(in_flight);
            formatting.join().unwrap().unwrap();
        });
        let formatted = all.get(1).unwrap();
        assert_eq!((formatted.block_shift, formatted.blocks), (12, 256));
        let mut data = [1; 512];
        use std::os::unix::fs::FileExt;
        formatted.file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, [0; 512]);
    }

    /// The controller goes on with blocks, whatever became of the file beside them.
    #[test]
    fn a_format_that_fails_leaves_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 8192]).unwrap();
        let ns = Namespace::open(1, &NamespaceConfig::file(&path)).unwrap();
        let all = Namespaces::new([ns], 0, None);
        std::fs::create_dir(dir.path().join("disk.meta")).unwrap();
        assert_eq!(all.format(1, format(3)), Err(Status::WRITE_FAULT));
        let left = all.get(1).unwrap();
        assert_eq!(
            (left.block_shift, left.format.index, left.blocks),
            (12, 1, 2)
        );
        assert_eq!(std::fs::read(&path).unwrap(), [0; 8192]);
    }
}
