//! Namespaces: blocks in a file, and what is known of them.

mod backing;
mod cached;
mod format;
mod protection;
mod uncorrectable;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use p2plab_pcie::DmaBuffers;

use crate::config::{NamespaceConfig, NvmeError};
use crate::locks::{lock, read, write};
use crate::spec::status::Status;
use crate::write_cache::WriteCache;

pub(crate) use backing::Medium;
pub(crate) use format::{FORMATS, Format, METADATA};
pub(crate) use protection::Protection;
pub(crate) use uncorrectable::Uncorrectable;

/// One namespace in one format; formatted, it is another one.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) nsid: u32,
    /// What its identifiers derive from: a namespace made later with the same NSID has others.
    pub(crate) identity: u64,
    pub(crate) file: Arc<File>,
    pub(crate) block_shift: u8,
    pub(crate) blocks: u64,
    pub(crate) read_only: bool,
    pub(crate) format: Format,
    pub(crate) uncorrectable: Uncorrectable,
    medium: Medium,
    /// With a format that has metadata: 8 bytes for each block, complemented if they are protection information, so
    /// that those of a block never written, a hole, are FFh, and turn checks off (NVM 3.2.3.2.1).
    metadata: Option<File>,
    cache: Option<Arc<WriteCache>>,
    turns: RwLock<()>,
    /// Lives as long as the namespace: its receiver learns when the last command lets go.
    in_use: Mutex<Option<Sender<Infallible>>>,
}

/// A range of blocks, in blocks and in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) slba: u64,
    pub(crate) count: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Extent {
    /// The block behind the last.
    pub(crate) fn end(&self) -> u64 {
        self.slba.saturating_add(self.count)
    }
}

/// All blocks that there can be.
const ALL: Range<u64> = 0..u64::MAX;

/// A command's turn on the blocks of a namespace.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not looked at")]
pub(crate) enum Turn<'a> {
    /// Beside other commands.
    Shared(RwLockReadGuard<'a, ()>),
    /// Alone.
    Alone(RwLockWriteGuard<'a, ()>),
}

impl Namespace {
    pub(crate) fn open(nsid: u32, config: &NamespaceConfig) -> Result<Self, NvmeError> {
        let format = Format::configured(config).ok_or(NvmeError::BadBlockSize {
            nsid,
            given: config.block_size,
        })?;
        let medium = Medium::open(nsid, config)?;
        let size = medium.size;
        if size == 0 || size % u64::from(config.block_size) != 0 || i64::try_from(size).is_err() {
            return Err(NvmeError::BadNamespaceSize {
                nsid,
                size,
                block_size: config.block_size,
            });
        }
        let path = medium.metadata_path();
        let blocks = size >> format.block_shift();
        let metadata = format.has_metadata();
        let metadata = metadata.then(|| medium.metadata(blocks * METADATA, false));
        let metadata = metadata.transpose();
        let metadata = metadata.map_err(|source| NvmeError::Metadata { nsid, path, source })?;
        Ok(Self::assemble(nsid, nsid.into(), medium, format, metadata))
    }

    /// An empty namespace on `medium`, whose blocks are empty.
    pub(crate) fn new(
        nsid: u32,
        identity: u64,
        medium: Medium,
        format: Format,
    ) -> io::Result<Self> {
        let blocks = medium.size >> format.block_shift();
        let metadata = format.has_metadata();
        let metadata = metadata.then(|| medium.metadata(blocks * METADATA, true));
        let metadata = metadata.transpose()?;
        Ok(Self::assemble(nsid, identity, medium, format, metadata))
    }

    fn assemble(
        nsid: u32,
        identity: u64,
        medium: Medium,
        format: Format,
        metadata: Option<File>,
    ) -> Self {
        let block_shift = format.block_shift();
        Self {
            nsid,
            identity,
            file: Arc::clone(&medium.file),
            block_shift,
            blocks: medium.size >> block_shift,
            read_only: medium.read_only,
            format,
            uncorrectable: Uncorrectable::default(),
            metadata,
            medium,
            cache: None,
            turns: RwLock::new(()),
            in_use: Mutex::new(None),
        }
    }

    /// The same with a write cache, if its blocks are kept at all.
    pub(crate) fn cached(mut self, cache: Option<Arc<WriteCache>>) -> Self {
        self.cache = cache.filter(|_| !self.is_nothing());
        self
    }

    /// Why it cannot have `format`.
    pub(crate) fn refuses(&self, format: Format) -> Option<Status> {
        if self.read_only {
            return Some(Status::WRITE_PROTECTED);
        }
        let fits = self.medium.size >> format.block_shift() > 0;
        let has_place = !format.has_metadata() || self.medium.takes_metadata();
        (!fits || !has_place).then_some(Status::INVALID_FORMAT)
    }

    /// Waits until no command works on it, and makes an empty one of `format` of it. Where that fails the blocks are
    /// there, without metadata, and what they hold is not defined.
    pub(crate) fn formatted(self: Arc<Self>, format: Format) -> (Self, io::Result<()>) {
        let (nsid, identity, medium) = (self.nsid, self.identity, self.medium.clone());
        let (had_metadata, cache) = (self.metadata.is_some(), self.cache.clone());
        let (sender, receiver) = channel();
        *lock(&self.in_use) = Some(sender);
        drop(self);
        // Nothing is ever sent: this ends when the namespace does.
        let _ = receiver.recv();
        if let Some(cache) = &cache {
            cache.settle(identity, ALL);
        }
        let erased = medium.erase().and_then(|()| {
            if had_metadata && !format.has_metadata() {
                medium.forget_metadata()
            } else {
                Ok(())
            }
        });
        let (namespace, result) =
            match erased.and_then(|()| Self::new(nsid, identity, medium.clone(), format)) {
                Ok(namespace) => (namespace, Ok(())),
                Err(error) => {
                    let plain = format.without_metadata();
                    let namespace = Self::assemble(nsid, identity, medium, plain, None);
                    (namespace, Err(error))
                }
            };
        (namespace.cached(cache), result)
    }

    /// Bytes that it takes of the controller's capacity.
    pub(crate) fn size(&self) -> u64 {
        self.medium.size
    }

    /// Bytes of its blocks: the medium's, but for a rest that is no block.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks << self.block_shift
    }

    /// Reads as zeros, and has no storage.
    pub(crate) fn is_nothing(&self) -> bool {
        self.medium.is_nothing()
    }

    /// The range of `count` blocks from `slba`, if they lie in the namespace.
    pub(crate) fn extent(&self, slba: u64, count: u64) -> Option<Extent> {
        let end = slba.checked_add(count)?;
        (end <= self.blocks).then(|| Extent {
            slba,
            count,
            offset: slba << self.block_shift,
            length: count << self.block_shift,
        })
    }

    /// A command's turn. Commands go side by side, as many as there are workers: to them this is one uncontended
    /// read lock. Alone goes what must not be seen half done: a fused Compare and Write, and whatever `modifies` blocks
    /// that have metadata, as a reader between data and metadata would find a mismatch, or a write cache, which looks
    /// at what they hold before. The lock is the namespace's, not a range's: what needs it is rare, and a table of
    /// ranges would cost every command more than it.
    pub(crate) fn turn(&self, modifies: bool) -> Turn<'_> {
        if modifies && self.takes_turns() {
            self.turn_alone()
        } else {
            Turn::Shared(read(&self.turns))
        }
    }

    /// Whether commands that modify blocks go alone, and others wait for them.
    pub(crate) fn takes_turns(&self) -> bool {
        self.metadata.is_some() || self.cache.is_some()
    }

    /// A turn with no other command beside.
    pub(crate) fn turn_alone(&self) -> Turn<'_> {
        Turn::Alone(write(&self.turns))
    }

    /// Makes all writes so far survive a loss of power. Once it has failed it fails.
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.sync()?;
        self.forget_cached();
        Ok(())
    }

    /// The same for `extent`, and for others only where that costs nothing.
    pub(crate) fn settle(&self, extent: &Extent) -> io::Result<()> {
        self.sync()?;
        self.forget_cached_of(extent);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if !self.medium.durable || self.read_only {
            return Ok(());
        }
        self.medium.sync(self.metadata.as_ref())
    }

    /// Tells people that its file failed, now and then: a host can make it fail as often as it likes.
    pub(crate) fn report(&self, error: &io::Error) {
        if self.medium.failure_is_worth_a_line() {
            tracing::warn!(%error, nsid = self.nsid, "the namespace's file failed");
        }
    }

    /// Fills `buffers` with blocks, from byte `offset` on.
    pub(crate) fn read_blocks(&self, buffers: &DmaBuffers<'_>, offset: u64) -> io::Result<()> {
        self.medium.read(buffers, offset)
    }

    /// Writes `buffers` to blocks, from byte `offset` on.
    pub(crate) fn write_blocks(&self, buffers: &DmaBuffers<'_>, offset: u64) -> io::Result<()> {
        self.medium.write(buffers, offset)
    }

    /// The metadata of the blocks of `extent`.
    pub(crate) fn read_metadata(&self, extent: &Extent) -> io::Result<Vec<u8>> {
        let mut data = vec![0; usize::try_from(extent.count * METADATA).map_err(io::Error::other)?];
        if let Some(file) = &self.metadata {
            file.read_exact_at(&mut data, extent.slba * METADATA)?;
        }
        self.complement(&mut data);
        Ok(data)
    }

    /// Writes `data`, the metadata of the blocks from `slba`.
    pub(crate) fn write_metadata(&self, slba: u64, mut data: Vec<u8>) -> io::Result<()> {
        self.complement(&mut data);
        let file = self.metadata.as_ref();
        file.map_or(Ok(()), |file| file.write_all_at(&data, slba * METADATA))
    }

    fn complement(&self, data: &mut [u8]) {
        if self.format.protected {
            data.iter_mut().for_each(|byte| *byte = !*byte);
        }
    }

    /// Gives the blocks' storage back; they read as zeros. `false` where the file cannot.
    pub(crate) fn deallocate(&self, extent: &Extent) -> io::Result<bool> {
        if self.medium.is_nothing() {
            return Ok(true);
        }
        if !self.medium.punch(extent.offset, extent.length)? {
            return Ok(false);
        }
        self.clear_metadata(extent)?;
        Ok(true)
    }

    /// Makes the blocks read as zeros.
    pub(crate) fn write_zeroes(&self, extent: &Extent) -> io::Result<()> {
        if self.medium.is_nothing() {
            return Ok(());
        }
        self.medium.zero(extent.offset, extent.length)?;
        self.clear_metadata(extent)
    }

    /// Leaves nothing of what the blocks of `extent` held, their metadata and their marks.
    pub(crate) fn erase(&self, extent: &Extent) -> io::Result<()> {
        self.uncorrectable.clear(extent.slba, extent.end());
        self.write_zeroes(extent)
    }

    /// The same for what lies behind the last block: another format may have had blocks there.
    pub(crate) fn erase_rest(&self) -> io::Result<()> {
        let rest = self.size().saturating_sub(self.bytes());
        if self.medium.is_nothing() {
            return Ok(());
        }
        self.medium.zero(self.bytes(), rest)
    }

    /// Makes the blocks' metadata that of blocks never written.
    fn clear_metadata(&self, extent: &Extent) -> io::Result<()> {
        let (offset, length) = (extent.slba * METADATA, extent.count * METADATA);
        let file = self.metadata.as_ref();
        file.map_or(Ok(()), |file| backing::zero(file, offset, length))
    }
}

#[cfg(test)]
mod tests;
