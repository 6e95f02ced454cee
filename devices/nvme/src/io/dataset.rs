//! Commands that say what blocks are without sending them: Dataset Management, Write Uncorrectable, Write Zeroes
//! (NVM 3.2.3, 3.2.7, 3.2.8).

use zerocopy::{FromZeros, IntoBytes};

use super::{
    before_change, extent, flush, limited_extent, refuse_if_read_only, write_fault, written,
};
use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::locks::lock;
use crate::namespace::{Extent, METADATA, Namespace, Protection};
use crate::spec::PAGE_SIZE;
use crate::spec::command::{Command, DatasetRange};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Verify Size Limit: pages of a command, as a power of two. Verify reads what it verifies.
pub(crate) const VSL: u8 = 11;

/// Write Zeroes Size Limit: pages of a command, as a power of two. A file without holes has its zeros written. It is no
/// more than NLB can say in blocks of 512 bytes: Linux makes requests of this size and cuts their NLB off.
pub(crate) const WZSL: u8 = 13;

/// Write Zeroes. Blocks that are to be zeroed may be deallocated whether the host asks for it (DEAC) or not, as
/// deallocated blocks read as zeros (DLFEAT).
pub(super) fn write_zeroes(
    shared: &Shared,
    ns: &Namespace,
    command: &Command,
) -> Result<(), Status> {
    let extent = limited_extent(ns, command, PAGE_SIZE << WZSL)?;
    refuse_if_read_only(ns)?;
    let protection = Protection::of(command);
    // There is nothing to check.
    if ns.format.protected && protection.checks() {
        return Err(Status::INVALID_PROTECTION_INFORMATION);
    }
    before_change(ns, &extent)?;
    ns.write_zeroes(&extent).map_err(write_fault(ns))?;
    if ns.format.protected {
        protect_zeroes(ns, &extent, &protection)?;
    }
    written(shared, ns, &extent, super::fua(command))
}

/// Protection information of zeroed blocks: made with PRACT, all zeros without (NVM 3.2.8).
fn protect_zeroes(ns: &Namespace, extent: &Extent, protection: &Protection) -> Result<(), Status> {
    const BLOCKS: u64 = 512;
    let zeros = [0u8; 4096];
    let block = zeros.get(..1 << ns.block_shift).unwrap_or(&zeros);
    let mut done = 0;
    while done < extent.count {
        let count = BLOCKS.min(extent.count - done);
        let mut tuples = vec![0; (count * METADATA) as usize];
        if protection.acts() {
            for (i, tuple) in (done..).zip(tuples.chunks_exact_mut(METADATA as usize)) {
                protection.at_block(i).generate(block, block.len(), tuple);
            }
        }
        let written = ns.write_metadata(extent.slba + done, tuples);
        written.map_err(write_fault(ns))?;
        done += count;
    }
    Ok(())
}

/// Write Uncorrectable: the blocks cannot be read until they are written. No cache forgets that.
pub(super) fn write_uncorrectable(ns: &Namespace, command: &Command) -> Result<(), Status> {
    let extent = extent(ns, command)?;
    refuse_if_read_only(ns)?;
    let marked = ns.uncorrectable.mark(extent.slba, extent.end());
    marked.map_err(|_| Status::INTERNAL_ERROR)?;
    ns.forget_cached_of(&extent);
    Ok(())
}

/// Dataset Management: deallocates, and takes the other attributes as the hints that they are.
pub(super) fn deallocate(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    const DEALLOCATE: u32 = 1 << 2;
    let count = (command.cdw10.get() & 0xff) as usize + 1;
    let mut ranges = [DatasetRange::new_zeroed(); 256];
    let ranges = ranges.get_mut(..count).ok_or(Status::INTERNAL_ERROR)?;
    let length = count as u64 * size_of::<DatasetRange>() as u64;
    dma.data(
        command,
        length,
        Direction::ToController,
        transfer,
        // Buckets have no effect here, so there is one run.
        |memory, _| memory.drain_to_slice(ranges.as_mut_bytes()),
    )?;
    if command.cdw11.get() & DEALLOCATE == 0 {
        return Ok(());
    }
    refuse_if_read_only(ns)?;
    // All ranges are checked before one is deallocated: a refused command changes nothing.
    let extents = ranges.iter().map(|range| {
        ns.extent(range.slba.get(), range.nlb.get().into())
            .ok_or(Status::LBA_OUT_OF_RANGE)
    });
    let extents: Vec<_> = extents.collect::<Result<_, _>>()?;
    for extent in extents.into_iter().filter(|extent| extent.length > 0) {
        before_change(ns, &extent)?;
        if ns.deallocate(&extent).map_err(write_fault(ns))? {
            ns.uncorrectable.clear(extent.slba, extent.end());
        }
    }
    if lock(&shared.features).write_cache {
        Ok(())
    } else {
        flush(ns)
    }
}
