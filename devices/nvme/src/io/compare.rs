//! Compare and Verify (NVM 3.2.1, 3.2.5): reads whose data stays in the controller.

use std::os::unix::fs::FileExt;

use super::dataset::VSL;
use super::{data_extent, limited_extent, metadata, read_error, refuse_if_unreadable, settle};
use crate::controller::Shared;
use crate::counters::add;
use crate::dma::{Direction, Dma};
use crate::namespace::{Extent, Namespace};
use crate::spec::PAGE_SIZE;
use crate::spec::command::Command;
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Blocks are read in pieces of this size.
const CHUNK: u64 = 64 << 10;

/// Reads the blocks of `extent` piece by piece.
fn each_chunk(
    ns: &Namespace,
    extent: &Extent,
    mut take: impl FnMut(&Extent, &mut [u8]) -> Result<(), Status>,
) -> Result<(), Status> {
    let mut chunk = [0u8; CHUNK as usize];
    let step = CHUNK >> ns.block_shift;
    let mut slba = extent.slba;
    while slba < extent.end() {
        let count = step.min(extent.end() - slba);
        let piece = ns.extent(slba, count).ok_or(Status::LBA_OUT_OF_RANGE)?;
        // The cast is of at most a chunk.
        let data = chunk.get_mut(..piece.length as usize);
        let data = data.ok_or(Status::INTERNAL_ERROR)?;
        ns.file
            .read_exact_at(data, piece.offset)
            .map_err(read_error(ns))?;
        take(&piece, data)?;
        slba += count;
    }
    Ok(())
}

pub(super) fn compare(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let extent = data_extent(shared, ns, command)?;
    settle(ns, command, &extent)?;
    refuse_if_unreadable(ns, &extent)?;
    transfer.with_bounce(extent.length, |transfer, data| {
        if ns.format.has_metadata() {
            compare_with_metadata(dma, ns, command, &extent, transfer, data)
        } else {
            dma.data(
                command,
                extent.length,
                Direction::ToController,
                transfer,
                |memory, _| memory.drain_to_slice(data),
            )?;
            let mut expected = &*data;
            each_chunk(ns, &extent, |_, found| take_equal(&mut expected, found))
        }
    })?;
    add(&shared.counters.bytes_read, extent.length);
    add(&shared.counters.host_reads, 1);
    Ok(())
}

/// Takes `found` off the front of `expected`, if it is there.
fn take_equal(expected: &mut &[u8], found: &[u8]) -> Result<(), Status> {
    let rest = expected.strip_prefix(found);
    *expected = rest.ok_or(Status::COMPARE_FAILURE)?;
    Ok(())
}

/// Compares data and metadata. Protection information is checked on both sides and not compared: it differs where the
/// host turned its checks off (NVM 5.2.2.3).
fn compare_with_metadata(
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    extent: &Extent,
    transfer: &mut Transfer,
    data: &mut [u8],
) -> Result<(), Status> {
    let protection = metadata::protection(ns, command, extent.slba)?;
    let protection = protection.as_ref();
    let expected = metadata::fetch(dma, ns, command, extent, protection, transfer, data)?;
    let mut rest = &*data;
    let block = 1 << ns.block_shift;
    each_chunk(ns, extent, |piece, found| {
        if let Some(protection) = protection {
            let tuples = ns.read_metadata(piece).map_err(read_error(ns))?;
            let at = piece.slba - extent.slba;
            protection.at_block(at).check(found, block, &tuples)?;
        }
        take_equal(&mut rest, found)
    })?;
    if protection.is_none() {
        let found = ns.read_metadata(extent).map_err(read_error(ns))?;
        take_equal(&mut expected.as_slice(), &found)?;
    }
    Ok(())
}

/// Verify: reads the blocks, and checks their protection information as PRINFO says.
pub(super) fn verify(shared: &Shared, ns: &Namespace, command: &Command) -> Result<(), Status> {
    let extent = limited_extent(ns, command, PAGE_SIZE << VSL)?;
    settle(ns, command, &extent)?;
    refuse_if_unreadable(ns, &extent)?;
    let protection = metadata::protection(ns, command, extent.slba)?;
    each_chunk(ns, &extent, |piece, found| {
        let Some(protection) = &protection else {
            return Ok(());
        };
        let tuples = ns.read_metadata(piece).map_err(read_error(ns))?;
        let here = protection.at_block(piece.slba - extent.slba);
        here.check(found, 1 << ns.block_shift, &tuples)
    })?;
    add(&shared.counters.bytes_read, extent.length);
    add(&shared.counters.host_reads, 1);
    Ok(())
}
