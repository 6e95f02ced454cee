//! The commands of the NVM command set (NVM 3.2), as a `worker` executes them.

mod compare;
mod copy;
mod dataset;
mod fused;
mod metadata;
mod read_write;

use std::io;
use std::sync::Arc;

use crate::controller::Shared;
use crate::dma::Dma;
use crate::locks::lock;
use crate::namespace::{Extent, Namespace};
use crate::spec::command::{Command, NSID_ALL, PSDT_PRP, PSDT_SGL, ReadWriteCdw12, io as opcode};
use crate::spec::status::Status;
use crate::transfer::Transfer;

pub(crate) use copy::{MAX_COPY, MSRC_Z};
pub(crate) use dataset::{VSL, WZSL};
pub(crate) use fused::{ACWU_Z, execute_pair};

pub(crate) fn namespace(shared: &Shared, nsid: u32) -> Result<Arc<Namespace>, Status> {
    shared.namespaces.get(nsid)
}

/// Executes one I/O command.
pub(crate) fn execute(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    // No SGLs for metadata: Identify says so (SGLS). Fused commands come in pairs, elsewhere.
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
        // Before the namespace is looked at: an opcode is not more valid with a better one.
        other if !modifies(other) && !reads(other) => Err(Status::INVALID_OPCODE),
        _ => {
            let ns = namespace(shared, nsid)?;
            let _turn = ns.turn(modifies(command.opcode));
            perform(shared, dma, &ns, command, transfer)
        }
    }
}

/// Executes a command on the blocks of `ns`. The caller holds its turn.
fn perform(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    match command.opcode {
        opcode::READ => read_write::read(shared, dma, ns, command, transfer),
        opcode::WRITE => read_write::write(shared, dma, ns, command, transfer),
        opcode::WRITE_UNCORRECTABLE => dataset::write_uncorrectable(ns, command),
        opcode::COMPARE => compare::compare(shared, dma, ns, command, transfer),
        opcode::WRITE_ZEROES => dataset::write_zeroes(shared, ns, command),
        opcode::DATASET_MANAGEMENT => dataset::deallocate(shared, dma, ns, command, transfer),
        opcode::VERIFY => compare::verify(shared, ns, command),
        opcode::COPY => copy::copy(shared, dma, ns, command, transfer),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Whether an I/O command changes blocks.
pub(crate) fn modifies(opcode: u8) -> bool {
    matches!(
        opcode,
        opcode::WRITE
            | opcode::WRITE_UNCORRECTABLE
            | opcode::WRITE_ZEROES
            | opcode::DATASET_MANAGEMENT
            | opcode::COPY
    )
}

/// Whether a command has blocks read, and changes none.
fn reads(opcode: u8) -> bool {
    matches!(opcode, opcode::READ | opcode::COMPARE | opcode::VERIFY)
}

/// The status of a command that could not change the blocks' file.
fn write_fault(ns: &Namespace) -> impl Fn(io::Error) -> Status {
    |error| {
        ns.report(&error);
        Status::WRITE_FAULT
    }
}

/// The status of a command that could not read it.
fn read_error(ns: &Namespace) -> impl Fn(io::Error) -> Status {
    |error| {
        ns.report(&error);
        Status::UNRECOVERED_READ_ERROR
    }
}

fn flush(ns: &Namespace) -> Result<(), Status> {
    ns.flush().map_err(write_fault(ns))
}

/// To be called when nothing refuses a command that changes the blocks of `extent`, before it does.
fn before_change(ns: &Namespace, extent: &Extent) -> Result<(), Status> {
    ns.before_change(extent).map_err(write_fault(ns))
}

/// The blocks that a command addresses.
fn extent(ns: &Namespace, command: &Command) -> Result<Extent, Status> {
    let count = u64::from(ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z()) + 1;
    ns.extent(command.slba(), count)
        .ok_or(Status::LBA_OUT_OF_RANGE)
}

/// The same for a command that moves data, which MDTS limits.
fn data_extent(shared: &Shared, ns: &Namespace, command: &Command) -> Result<Extent, Status> {
    limited_extent(ns, command, shared.config.max_transfer)
}

/// The same for a command that may address up to `limit` bytes.
fn limited_extent(ns: &Namespace, command: &Command, limit: u64) -> Result<Extent, Status> {
    let count = u64::from(ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z()) + 1;
    if count << ns.block_shift > limit {
        return Err(Status::INVALID_FIELD);
    }
    extent(ns, command)
}

fn fua(command: &Command) -> bool {
    ReadWriteCdw12::from_bits(command.cdw12.get()).fua()
}

/// What a command with FUA reads must be on the medium (NVM 3.2.4).
fn settle(ns: &Namespace, command: &Command, extent: &Extent) -> Result<(), Status> {
    if fua(command) {
        ns.settle(extent).map_err(write_fault(ns))
    } else {
        Ok(())
    }
}

/// Blocks that Write Uncorrectable marked cannot be read. No retry helps, limited (LR) or not.
fn refuse_if_unreadable(ns: &Namespace, extent: &Extent) -> Result<(), Status> {
    if ns.uncorrectable.overlaps(extent.slba, extent.end()) {
        Err(Status::UNRECOVERED_READ_ERROR)
    } else {
        Ok(())
    }
}

fn refuse_if_read_only(ns: &Namespace) -> Result<(), Status> {
    if ns.read_only {
        Err(Status::WRITE_PROTECTED)
    } else {
        Ok(())
    }
}

/// The blocks were written; with `fua`, or with the volatile write cache turned off, nothing is acknowledged that
/// could be lost.
fn written(shared: &Shared, ns: &Namespace, extent: &Extent, fua: bool) -> Result<(), Status> {
    ns.uncorrectable.clear(extent.slba, extent.end());
    if fua || !lock(&shared.features).write_cache {
        ns.settle(extent).map_err(write_fault(ns))
    } else {
        Ok(())
    }
}
