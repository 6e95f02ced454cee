//! Read and Write where blocks have metadata: in a buffer of its own, or made and taken by the controller (PRACT).
//!
//! Data is looked at on its way, so it goes through a buffer, and all of it is checked before a block changes.

use std::os::unix::fs::FileExt;

use super::{read_error, write_fault};
use crate::dma::{Direction, Dma};
use crate::namespace::{Extent, METADATA, Namespace, Protection};
use crate::spec::command::Command;
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// What `command` wants of the protection information, if `ns` has it.
pub(super) fn protection(
    ns: &Namespace,
    command: &Command,
    slba: u64,
) -> Result<Option<Protection>, Status> {
    let protection = ns.format.protected.then(|| Protection::of(command));
    if let Some(protection) = &protection {
        protection.fits(slba)?;
    }
    Ok(protection)
}

/// Reads blocks and their metadata, and checks them as far as `protection` says.
pub(super) fn load(
    ns: &Namespace,
    extent: &Extent,
    protection: Option<&Protection>,
    data: &mut [u8],
) -> Result<Vec<u8>, Status> {
    ns.file
        .read_exact_at(data, extent.offset)
        .map_err(read_error(ns))?;
    let metadata = ns.read_metadata(extent).map_err(read_error(ns))?;
    if let Some(protection) = protection {
        protection.check(data, 1 << ns.block_shift, &metadata)?;
    }
    Ok(metadata)
}

pub(super) fn read(
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    extent: &Extent,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let protection = protection(ns, command, extent.slba)?;
    transfer.with_bounce(extent.length, |transfer, data| {
        let metadata = load(ns, extent, protection.as_ref(), data)?;
        let data = &*data;
        dma.data(
            command,
            extent.length,
            Direction::FromController,
            transfer,
            |memory, at| {
                let run = usize::try_from(at).ok().and_then(|at| data.get(at..));
                let run = run.and_then(|run| run.get(..usize::try_from(memory.len()).ok()?));
                memory.fill_from_slice(run.unwrap_or_default())
            },
        )?;
        if protection.is_some_and(|protection| protection.acts()) {
            return Ok(());
        }
        dma.metadata(
            command,
            extent.count * METADATA,
            Direction::FromController,
            transfer,
            |memory| memory.fill_from_slice(&metadata),
        )
    })
}

/// Fetches the host's blocks into `data`, and their metadata, checked or made.
pub(super) fn fetch(
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    extent: &Extent,
    protection: Option<&Protection>,
    transfer: &mut Transfer,
    data: &mut [u8],
) -> Result<Vec<u8>, Status> {
    dma.data(
        command,
        extent.length,
        Direction::ToController,
        transfer,
        // Buckets have no effect here, so there is one run.
        |memory, _| memory.drain_to_slice(data),
    )?;
    let block = 1 << ns.block_shift;
    let length = extent.count * METADATA;
    let mut metadata = vec![0; usize::try_from(length).map_err(|_| Status::INTERNAL_ERROR)?];
    if let Some(protection) = protection.filter(|protection| protection.acts()) {
        protection.generate(data, block, &mut metadata);
        return Ok(metadata);
    }
    dma.metadata(
        command,
        length,
        Direction::ToController,
        transfer,
        |memory| memory.drain_to_slice(&mut metadata),
    )?;
    if let Some(protection) = protection {
        protection.check(data, block, &metadata)?;
    }
    Ok(metadata)
}

pub(super) fn write(
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    extent: &Extent,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let protection = protection(ns, command, extent.slba)?;
    transfer.with_bounce(extent.length, |transfer, data| {
        let metadata = fetch(
            dma,
            ns,
            command,
            extent,
            protection.as_ref(),
            transfer,
            data,
        )?;
        store(ns, extent, data, metadata)
    })
}

/// Writes blocks and their metadata.
pub(super) fn store(
    ns: &Namespace,
    extent: &Extent,
    data: &[u8],
    metadata: Vec<u8>,
) -> Result<(), Status> {
    ns.file
        .write_all_at(data, extent.offset)
        .and_then(|()| ns.write_metadata(extent.slba, metadata))
        .map_err(write_fault(ns))
}
