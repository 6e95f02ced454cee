//! The commands of the NVM command set (NVM 3.2), as a `worker` executes them.

use std::io;
use std::sync::Arc;

use zerocopy::{FromZeros, IntoBytes};

use crate::controller::Shared;
use crate::counters::add;
use crate::dma::{Direction, Dma};
use crate::locks::lock;
use crate::namespace::Namespace;
use crate::spec::command::{
    Command, DatasetRange, NSID_ALL, PSDT_PRP, PSDT_SGL, ReadWriteCdw12, io as opcode,
};
use crate::spec::status::Status;
use crate::transfer::Transfer;

pub(crate) fn namespace(shared: &Shared, nsid: u32) -> Result<Arc<Namespace>, Status> {
    shared.namespaces.get(nsid).ok_or(Status::INVALID_NAMESPACE)
}

/// Executes one I/O command.
pub(crate) fn execute(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    // Neither fused commands nor SGLs for metadata: Identify says so (FUSES, SGLS).
    if !matches!(command.flags, PSDT_PRP | PSDT_SGL) {
        return Err(Status::INVALID_FIELD);
    }
    let _passage = shared.gate.enter(command.opcode)?;
    let nsid = command.nsid.get();
    match command.opcode {
        opcode::FLUSH if nsid == NSID_ALL => {
            shared.namespaces.all().iter().try_for_each(|ns| flush(ns))
        }
        opcode::FLUSH => flush(&*namespace(shared, nsid)?),
        opcode::READ => read(shared, dma, &*namespace(shared, nsid)?, command, transfer),
        opcode::WRITE => write(shared, dma, &*namespace(shared, nsid)?, command, transfer),
        opcode::WRITE_ZEROES => write_zeroes(shared, &*namespace(shared, nsid)?, command),
        opcode::DATASET_MANAGEMENT => {
            deallocate(shared, dma, &*namespace(shared, nsid)?, command, transfer)
        }
        _ => Err(Status::INVALID_OPCODE),
    }
}

fn write_fault(error: io::Error) -> Status {
    tracing::warn!(%error, "the namespace's file failed");
    Status::WRITE_FAULT
}

fn flush(ns: &Namespace) -> Result<(), Status> {
    ns.flush().map_err(write_fault)
}

/// Byte offset and length of the blocks that a command addresses.
fn extent(ns: &Namespace, command: &Command) -> Result<(u64, u64), Status> {
    let count = u64::from(ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z()) + 1;
    ns.extent(command.slba(), count)
        .ok_or(Status::LBA_OUT_OF_RANGE)
}

/// The same for a command that moves data, which MDTS limits.
fn data_extent(shared: &Shared, ns: &Namespace, command: &Command) -> Result<(u64, u64), Status> {
    let count = u64::from(ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z()) + 1;
    if count << ns.block_shift > shared.config.max_transfer {
        return Err(Status::INVALID_FIELD);
    }
    extent(ns, command)
}

fn fua(command: &Command) -> bool {
    ReadWriteCdw12::from_bits(command.cdw12.get()).fua()
}

fn read(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let (offset, length) = data_extent(shared, ns, command)?;
    if fua(command) {
        // What a read with FUA returns must be on the medium (NVM 3.2.4).
        flush(ns)?;
    }
    dma.data(
        command,
        length,
        Direction::FromController,
        transfer,
        |memory, at| memory.fill_from_file(&ns.file, offset + at),
    )?;
    add(&shared.counters.bytes_read, length);
    add(&shared.counters.host_reads, 1);
    Ok(())
}

fn write(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let (offset, length) = data_extent(shared, ns, command)?;
    refuse_if_read_only(ns)?;
    dma.data(
        command,
        length,
        Direction::ToController,
        transfer,
        |memory, at| memory.drain_to_file(&ns.file, offset + at),
    )?;
    make_durable(shared, ns, command)?;
    add(&shared.counters.bytes_written, length);
    add(&shared.counters.host_writes, 1);
    Ok(())
}

fn refuse_if_read_only(ns: &Namespace) -> Result<(), Status> {
    if ns.read_only {
        Err(Status::WRITE_PROTECTED)
    } else {
        Ok(())
    }
}

/// With FUA, or with the volatile write cache turned off, nothing is acknowledged that could be lost.
fn make_durable(shared: &Shared, ns: &Namespace, command: &Command) -> Result<(), Status> {
    if fua(command) || !lock(&shared.features).write_cache {
        flush(ns)
    } else {
        Ok(())
    }
}

fn write_zeroes(shared: &Shared, ns: &Namespace, command: &Command) -> Result<(), Status> {
    let (offset, length) = extent(ns, command)?;
    refuse_if_read_only(ns)?;
    ns.write_zeroes(offset, length).map_err(write_fault)?;
    make_durable(shared, ns, command)
}

/// Dataset Management: deallocates, and takes the other attributes as the hints that they are (NVM 3.2.3).
fn deallocate(
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
    for (offset, length) in extents.into_iter().filter(|(_, length)| *length > 0) {
        ns.deallocate(offset, length).map_err(write_fault)?;
    }
    if lock(&shared.features).write_cache {
        Ok(())
    } else {
        flush(ns)
    }
}
