//! Copy (NVM 3.2.2): blocks to blocks of the same namespace. The host sends the list of sources and nothing else.

use std::os::unix::fs::FileExt;

use zerocopy::{FromZeros, IntoBytes};

use super::{
    before_change, read_error, refuse_if_read_only, refuse_if_unreadable, write_fault, written,
};
use crate::controller::Shared;
use crate::counters::add;
use crate::dma::{Direction, Dma};
use crate::namespace::{Extent, METADATA, Namespace, Protection};
use crate::spec::command::{Command, CopyCdw12, CopyRange};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Maximum Source Range Count.
pub(crate) const MSRC_Z: u8 = 127;

/// Bytes that a command copies at most; in blocks it is the Maximum Copy Length and the Maximum Single Source Range
/// Length. All sources are read before the target is written: ranges that overlap are no special case.
pub(crate) const MAX_COPY: u64 = 4 << 20;

pub(super) fn copy(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let cdw12 = CopyCdw12::from_bits(command.cdw12.get());
    // One descriptor format (OCFS), and no directives.
    if cdw12.desfmt() != 0 || cdw12.dtype() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    if cdw12.nr_z() > MSRC_Z {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    }
    let mut ranges = [CopyRange::new_zeroed(); MSRC_Z as usize + 1];
    let ranges = ranges.get_mut(..=usize::from(cdw12.nr_z()));
    let ranges = ranges.ok_or(Status::INTERNAL_ERROR)?;
    dma.data(
        command,
        size_of_val(ranges) as u64,
        Direction::ToController,
        transfer,
        // Buckets have no effect here, so there is one run.
        |memory, _| memory.drain_to_slice(ranges.as_mut_bytes()),
    )?;
    refuse_if_read_only(ns)?;
    let sources = sources(ns, ranges)?;
    let count = sources.iter().map(|source| source.count).sum();
    let target = ns.extent(command.slba(), count);
    let target = target.ok_or(Status::LBA_OUT_OF_RANGE)?;
    transfer.with_bounce(target.length, |_, data| {
        load(ns, &sources, data)?;
        let metadata = if ns.format.has_metadata() {
            Some(metadata(ns, command, ranges, &sources, &target, data)?)
        } else {
            None
        };
        before_change(ns, &target)?;
        ns.file
            .write_all_at(data, target.offset)
            .and_then(|()| {
                metadata.map_or(Ok(()), |metadata| ns.write_metadata(target.slba, metadata))
            })
            .map_err(write_fault(ns))
    })?;
    written(shared, ns, &target, cdw12.fua())?;
    add(&shared.counters.bytes_written, target.length);
    add(&shared.counters.host_writes, 1);
    Ok(())
}

/// The sources, if all lie in the namespace and can be read, and are no more than a command may copy.
fn sources(ns: &Namespace, ranges: &[CopyRange]) -> Result<Vec<Extent>, Status> {
    let count = |range: &CopyRange| u64::from(range.nlb_z.get()) + 1;
    let limit = MAX_COPY >> ns.block_shift;
    // At most 128 times 65536, of which none must be longer than all may be.
    if ranges.iter().map(count).sum::<u64>() > limit {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    }
    let source = |range: &CopyRange| {
        let extent = ns.extent(range.slba.get(), count(range));
        let extent = extent.ok_or(Status::LBA_OUT_OF_RANGE)?;
        refuse_if_unreadable(ns, &extent)?;
        Ok(extent)
    };
    ranges.iter().map(source).collect()
}

/// The part of `all` that belongs to each source, with `unit` bytes for a block.
fn parts<'a>(
    sources: &'a [Extent],
    mut all: &'a mut [u8],
    unit: u64,
) -> impl Iterator<Item = (&'a Extent, &'a mut [u8])> {
    sources.iter().map_while(move |source| {
        let length = usize::try_from(source.count * unit).ok()?;
        let (part, rest) = std::mem::take(&mut all).split_at_mut_checked(length)?;
        all = rest;
        Some((source, part))
    })
}

/// Reads the sources' data, one behind the other.
fn load(ns: &Namespace, sources: &[Extent], data: &mut [u8]) -> Result<(), Status> {
    for (source, part) in parts(sources, data, 1 << ns.block_shift) {
        ns.file
            .read_exact_at(part, source.offset)
            .map_err(read_error(ns))?;
    }
    Ok(())
}

/// The target's metadata: the sources', or, with PRACT, protection information made anew. That of the sources is checked
/// as PRINFOR says, that of the target as PRINFOW does.
fn metadata(
    ns: &Namespace,
    command: &Command,
    ranges: &[CopyRange],
    sources: &[Extent],
    target: &Extent,
    data: &mut [u8],
) -> Result<Vec<u8>, Status> {
    let block = 1usize << ns.block_shift;
    let mut all = Vec::new();
    for ((source, part), range) in parts(sources, data, block as u64).zip(ranges) {
        let metadata = ns.read_metadata(source).map_err(read_error(ns))?;
        if ns.format.protected {
            let protection = Protection::of_source(command, range);
            protection.fits(source.slba)?;
            protection.check(part, block, &metadata)?;
        }
        all.extend(metadata);
    }
    if ns.format.protected {
        let protection = Protection::of_copy(command);
        let stripped = sources
            .first()
            .zip(ranges.first())
            .is_some_and(|(_, range)| Protection::of_source(command, range).acts());
        // Stripped on the way in, it must be made on the way out, and not otherwise (NVM 3.2.2).
        if stripped != protection.acts() {
            return Err(Status::INVALID_FIELD);
        }
        protection.fits(target.slba)?;
        if protection.acts() {
            all.resize((target.count * METADATA) as usize, 0);
            protection.generate(data, block, &mut all);
        } else {
            protection.check(data, block, &all)?;
        }
    }
    Ok(all)
}
