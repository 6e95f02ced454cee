//! Admin commands (Base 5). They run on the controller's thread, one at a time.

mod doorbell_buffer;
mod features;
mod firmware;
mod format;
mod log_page;
mod namespaces;
mod queues;
mod sanitize;
mod self_test;

use std::sync::Arc;

use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::events::AsyncEvents;
use crate::identify;
use crate::lifecycle::Core;
use crate::locks::lock;
use crate::spec::command::{Command, PSDT_PRP, admin as opcode};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// How a command ended.
pub(crate) enum Outcome {
    /// To be completed with this result in dword 0.
    Done(u32),
    /// Held: an Asynchronous Event Request.
    Held,
}

/// What a Controller Level Reset does to the state that admin commands made.
pub(crate) fn controller_reset(shared: &Shared) {
    shared.self_test.controller_reset(shared);
    lock(&shared.firmware).reset();
    let features = lock(&shared.saved_features).after_reset();
    *lock(&shared.events) = AsyncEvents::new(features.async_events());
    *lock(&shared.features) = features;
    shared.check_health();
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
    shared.sanitize.admit_admin(shared, command)?;
    let done = |()| Outcome::Done(0);
    match command.opcode {
        opcode::CREATE_IO_CQ => queues::create_cq(shared, dma, command).map(done),
        opcode::CREATE_IO_SQ => queues::create_sq(core, shared, dma, command).map(done),
        opcode::DELETE_IO_SQ => queues::delete_sq(core, shared, command).map(done),
        opcode::DELETE_IO_CQ => queues::delete_cq(shared, dma, command).map(done),
        opcode::IDENTIFY => identify(shared, dma, command, transfer).map(done),
        opcode::GET_LOG_PAGE => log_page::get(shared, dma, command, transfer).map(done),
        opcode::GET_FEATURES => features::get(shared, dma, command, transfer).map(Outcome::Done),
        opcode::SET_FEATURES => features::set(shared, dma, command, transfer).map(Outcome::Done),
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
        opcode::FIRMWARE_COMMIT => firmware::commit(shared, command).map(done),
        opcode::FIRMWARE_IMAGE_DOWNLOAD => {
            firmware::download(shared, dma, command, transfer).map(done)
        }
        opcode::SANITIZE => sanitize::execute(shared, command).map(done),
        opcode::DEVICE_SELF_TEST => self_test::execute(shared, command).map(done),
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
        firmware: lock(&shared.firmware).revision(),
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

/// Dword 0 of Abort's completion: bit 0 set says that nothing was aborted. What can be are held Asynchronous Event
/// Requests and commands that wait between being fetched and being executed. All Aborts are executed at once, so that
/// their limit (ACL) is never met.
fn abort(core: &mut Core, shared: &Shared, command: &Command) -> u32 {
    let [a, b, c, d] = command.cdw10.get().to_le_bytes();
    let (sqid, cid) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    if sqid == 0 && lock(&shared.events).abort(cid.into()) {
        core.note_aborted(cid.into());
        return 0;
    }
    u32::from(!shared.held.abort(sqid, cid))
}
