//! Admin commands (Base 5). They run on the controller's thread, one at a time.

mod doorbell_buffer;
mod format;
mod namespaces;
mod queues;

use std::sync::Arc;

use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::identify;
use crate::lifecycle::Core;
use crate::locks::{lock, read};
use crate::logs;
use crate::spec::command::{Command, GetLogPageCdw10, PSDT_PRP, admin as opcode, feature};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// How a command ended.
pub(crate) enum Outcome {
    /// To be completed with this result in dword 0.
    Done(u32),
    /// Held: an Asynchronous Event Request.
    Held,
}

/// Executes one admin command.
pub(crate) fn execute(
    core: &mut Core,
    shared: &Arc<Shared>,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<Outcome, Status> {
    // Over PCIe admin commands use PRPs (Base 3.3.3.1, PSDT).
    if command.flags != PSDT_PRP {
        return Err(Status::INVALID_FIELD);
    }
    let done = |()| Outcome::Done(0);
    match command.opcode {
        opcode::CREATE_IO_CQ => queues::create_cq(shared, dma, command).map(done),
        opcode::CREATE_IO_SQ => queues::create_sq(core, shared, dma, command).map(done),
        opcode::DELETE_IO_SQ => queues::delete_sq(core, shared, command).map(done),
        opcode::DELETE_IO_CQ => queues::delete_cq(shared, dma, command).map(done),
        opcode::IDENTIFY => identify(shared, dma, command, transfer).map(done),
        opcode::GET_LOG_PAGE => get_log_page(shared, dma, command, transfer).map(done),
        opcode::GET_FEATURES => lock(&shared.features).get(command).map(Outcome::Done),
        opcode::SET_FEATURES => set_features(shared, command).map(Outcome::Done),
        opcode::FORMAT_NVM => format::format(shared, command).map(done),
        opcode::NAMESPACE_MANAGEMENT => {
            namespaces::manage(shared, dma, command, transfer).map(Outcome::Done)
        }
        opcode::NAMESPACE_ATTACHMENT => {
            namespaces::attach(shared, dma, command, transfer).map(done)
        }
        opcode::DOORBELL_BUFFER_CONFIG => {
            doorbell_buffer::configure(shared, dma, command).map(done)
        }
        opcode::ABORT => Ok(Outcome::Done(abort(core, shared, command))),
        opcode::ASYNC_EVENT_REQUEST => lock(&shared.events)
            .hold(command.cid)
            .map(|()| Outcome::Held),
        _ => Err(Status::INVALID_OPCODE),
    }
}

fn identify(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let [cns, _, cntid @ ..] = command.cdw10.get().to_le_bytes();
    let [.., csi] = command.cdw11.get().to_le_bytes();
    let request = identify::Request {
        cns,
        cntid: u16::from_le_bytes(cntid),
        nsid: command.nsid.get(),
        csi,
    };
    let page = identify::page(&shared.config, &shared.namespaces, request)?;
    reply(dma, command, &page, transfer)
}

fn reply(dma: &Dma, command: &Command, data: &[u8], transfer: &mut Transfer) -> Result<(), Status> {
    dma.data(
        command,
        data.len() as u64,
        Direction::FromController,
        transfer,
        // PRPs alone: there is one run.
        |memory, _| memory.fill_from_slice(data),
    )
}

fn get_log_page(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let cdw10 = GetLogPageCdw10::from_bits(command.cdw10.get());
    let upper = u64::from(command.cdw11.get() & 0xffff) << 16;
    let length = (u64::from(cdw10.numdl_z()) + upper + 1) * 4;
    let offset = u64::from(command.cdw12.get()) | u64::from(command.cdw13.get()) << 32;
    let page = logs::page(shared, cdw10.lid(), command.nsid.get())?;
    if length > shared.config.max_transfer
        || !offset.is_multiple_of(4)
        || offset > page.len() as u64
    {
        return Err(Status::INVALID_FIELD);
    }
    // What lies behind the page's end reads as zeros. Both numbers are small now.
    let mut data: Vec<u8> = page.into_iter().skip(offset as usize).collect();
    data.resize(length as usize, 0);
    reply(dma, command, &data, transfer)?;
    if !cdw10.rae() {
        lock(&shared.events).log_was_read(cdw10.lid());
    }
    Ok(())
}

fn set_features(shared: &Shared, command: &Command) -> Result<u32, Status> {
    let queues_exist = read(&shared.queues).has_io_queues();
    let result = lock(&shared.features).set(command, queues_exist)?;
    let [fid, ..] = command.cdw10.get().to_le_bytes();
    if fid == feature::VOLATILE_WRITE_CACHE && command.cdw11.get() & 1 == 0 {
        // Turning the cache off must not leave anything in it (NVM 4.1.3.2).
        let flushed = shared.namespaces.flush_all();
        flushed.map_err(|_| Status::WRITE_FAULT)?;
    }
    Ok(result)
}

/// Dword 0 of Abort's completion: bit 0 set says that nothing was aborted. Commands on I/O queues are executed
/// as soon as they are fetched and cannot be; a held Asynchronous Event Request can.
fn abort(core: &mut Core, shared: &Shared, command: &Command) -> u32 {
    let (sqid, cid) = (
        command.cdw10.get() & 0xffff,
        (command.cdw10.get() >> 16) as u16,
    );
    if sqid == 0 && lock(&shared.events).abort(cid.into()) {
        core.note_aborted(cid.into());
        return 0;
    }
    1
}
