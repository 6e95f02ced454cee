//! What a namespace does for a write cache that forgets.

use std::io;
use std::os::unix::fs::FileExt;

use super::{ALL, Extent, METADATA, Namespace};
use crate::write_cache::Durable;

/// Blocks are looked at in pieces of this size.
const CHUNK: u64 = 64 << 10;

impl Namespace {
    /// The blocks of `extent` are about to change; the caller has its turn alone. What they hold is kept until they are
    /// durable. More than the cache can hold goes around it.
    pub(crate) fn before_change(&self, extent: &Extent) -> io::Result<()> {
        let Some(cache) = &self.cache else {
            return Ok(());
        };
        if extent.length > cache.size() {
            self.forget_cached_of(extent);
            return Ok(());
        }
        let step = CHUNK >> self.block_shift;
        let mut slba = extent.slba;
        while slba < extent.end() {
            let count = step.min(extent.end() - slba);
            if !cache.holds(self.identity, slba..slba + count) {
                self.hold(slba, count)?;
            }
            slba += count;
        }
        Ok(())
    }

    fn hold(&self, slba: u64, count: u64) -> io::Result<()> {
        let (Some(cache), Some(extent)) = (&self.cache, self.extent(slba, count)) else {
            return Ok(());
        };
        let block = 1usize << self.block_shift;
        let length = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
        let mut data = vec![0; length(extent.length)?];
        self.file.read_exact_at(&mut data, extent.offset)?;
        let mut metadata = Vec::new();
        if let Some(file) = &self.metadata {
            metadata.resize(length(count * METADATA)?, 0);
            file.read_exact_at(&mut metadata, slba * METADATA)?;
        }
        let mut tuples = metadata.chunks_exact(METADATA as usize);
        for (slba, data) in (slba..).zip(data.chunks_exact(block)) {
            let is_zero = data.iter().all(|byte| *byte == 0);
            let durable = Durable {
                data: (!is_zero).then(|| data.into()),
                metadata: tuples.next().unwrap_or_default().into(),
                uncorrectable: self.uncorrectable.overlaps(slba, slba + 1),
                bytes: block as u64,
            };
            cache.hold(self.identity, slba, durable);
        }
        Ok(())
    }

    /// All blocks are durable, or not to come back.
    pub(crate) fn forget_cached(&self) {
        if let Some(cache) = &self.cache {
            cache.settle(self.identity, ALL);
        }
    }

    /// The same of the blocks of `extent`.
    pub(crate) fn forget_cached_of(&self, extent: &Extent) {
        if let Some(cache) = &self.cache {
            cache.settle(self.identity, extent.slba..extent.end());
        }
    }

    /// Makes block `slba` what it was when it was last durable.
    pub(crate) fn restore(&self, slba: u64, durable: &Durable) -> io::Result<()> {
        let extent = self.extent(slba, 1).ok_or(io::ErrorKind::InvalidInput)?;
        match &durable.data {
            Some(data) => self.file.write_all_at(data, extent.offset)?,
            None => self.medium.zero(extent.offset, extent.length)?,
        }
        if let Some(file) = &self.metadata {
            file.write_all_at(&durable.metadata, slba * METADATA)?;
        }
        if durable.uncorrectable {
            let marked = self.uncorrectable.mark(slba, extent.end());
            return marked.map_err(|_| io::Error::other("too many marks"));
        }
        self.uncorrectable.clear(slba, extent.end());
        Ok(())
    }
}
