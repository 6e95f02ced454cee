//! Read and Write (NVM 3.2.4, 3.2.6).

use super::{
    before_change, data_extent, fua, metadata, refuse_if_read_only, refuse_if_unreadable, settle,
    written,
};
use crate::controller::Shared;
use crate::counters::add;
use crate::dma::{Direction, Dma};
use crate::namespace::Namespace;
use crate::spec::command::Command;
use crate::spec::status::Status;
use crate::transfer::Transfer;

pub(super) fn read(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let extent = data_extent(shared, ns, command)?;
    settle(ns, command, &extent)?;
    refuse_if_unreadable(ns, &extent)?;
    if ns.format.has_metadata() {
        metadata::read(dma, ns, command, &extent, transfer)?;
    } else {
        dma.data(
            command,
            extent.length,
            Direction::FromController,
            transfer,
            |memory, at| ns.read_blocks(memory, extent.offset + at),
        )?;
    }
    add(&shared.counters.bytes_read, extent.length);
    add(&shared.counters.host_reads, 1);
    Ok(())
}

pub(super) fn write(
    shared: &Shared,
    dma: &Dma,
    ns: &Namespace,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let extent = data_extent(shared, ns, command)?;
    refuse_if_read_only(ns)?;
    before_change(ns, &extent)?;
    if ns.format.has_metadata() {
        metadata::write(dma, ns, command, &extent, transfer)?;
    } else {
        dma.data(
            command,
            extent.length,
            Direction::ToController,
            transfer,
            |memory, at| ns.write_blocks(memory, extent.offset + at),
        )?;
    }
    written(shared, ns, &extent, fua(command))?;
    add(&shared.counters.bytes_written, extent.length);
    add(&shared.counters.host_writes, 1);
    Ok(())
}
