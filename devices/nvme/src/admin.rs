//! Admin commands (Base 5). They run on the controller's thread, one at a time.

use std::sync::Arc;

use p2plab_pcie::DmaRange;

use crate::cmb::Place;
use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::identify;
use crate::lifecycle::Core;
use crate::locks::{lock, read, write};
use crate::logs;
use crate::queue::{CompletionQueue, SubmissionQueue, Wake};
use crate::regs::MAX_QUEUE_ENTRIES_Z;
use crate::spec::PAGE_SIZE;
use crate::spec::command::{
    Command, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11, GetLogPageCdw10, PSDT_PRP,
    admin as opcode, feature,
};
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
        opcode::CREATE_IO_CQ => create_cq(shared, dma, command).map(done),
        opcode::CREATE_IO_SQ => create_sq(core, shared, dma, command).map(done),
        opcode::DELETE_IO_SQ => delete_sq(core, shared, command).map(done),
        opcode::DELETE_IO_CQ => delete_cq(shared, dma, command).map(done),
        opcode::IDENTIFY => identify(shared, dma, command, transfer).map(done),
        opcode::GET_LOG_PAGE => get_log_page(shared, dma, command, transfer).map(done),
        opcode::GET_FEATURES => lock(&shared.features).get(command).map(Outcome::Done),
        opcode::SET_FEATURES => set_features(shared, command).map(Outcome::Done),
        opcode::ABORT => Ok(Outcome::Done(abort(core, shared, command))),
        opcode::ASYNC_EVENT_REQUEST => lock(&shared.events)
            .hold(command.cid)
            .map(|()| Outcome::Held),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Size and base address of a new queue with entries of `entry` bytes, checked.
fn queue_memory(command: &Command, pc: bool, entry: u64) -> Result<(u32, DmaRange), Status> {
    let entries_z = CreateQueueCdw10::from_bits(command.cdw10.get()).qsize_z();
    if entries_z == 0 || entries_z > MAX_QUEUE_ENTRIES_Z {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    // CAP.CQR: queues are physically contiguous.
    if !pc {
        return Err(Status::INVALID_FIELD);
    }
    let address = command.prp1.get();
    if !address.is_multiple_of(PAGE_SIZE) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let entries = u32::from(entries_z) + 1;
    let length = u64::from(entries) * entry;
    address.checked_add(length).ok_or(Status::INVALID_FIELD)?;
    Ok((entries, DmaRange { address, length }))
}

fn create_cq(shared: &Shared, dma: &Dma, command: &Command) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    let cdw11 = CreateCqCdw11::from_bits(command.cdw11.get());
    let limit = lock(&shared.features).queues.1;
    if qid == 0 || qid > limit || read(&shared.queues).cq(qid).is_some() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    if lock(&shared.registers).cc.iocqes() != 4 {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    let (entries, memory) = queue_memory(command, cdw11.pc(), 16)?;
    if cdw11.iv() > shared.config.io_queues {
        return Err(Status::INVALID_INTERRUPT_VECTOR);
    }
    // CMBSZ.CQS is clear.
    if dma.place(memory) != Place::Bus {
        return Err(Status::INVALID_USE_OF_CMB);
    }
    let vector = cdw11.ien().then_some(cdw11.iv());
    let cq = Arc::new(CompletionQueue::new(qid, memory.address, entries, vector));
    write(&shared.queues).set_cq(qid, Some(cq));
    Ok(())
}

fn create_sq(
    core: &mut Core,
    shared: &Arc<Shared>,
    dma: &Dma,
    command: &Command,
) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    let cdw11 = CreateSqCdw11::from_bits(command.cdw11.get());
    let limit = lock(&shared.features).queues.0;
    if cdw11.cqid() == 0 || cdw11.cqid() > shared.config.io_queues {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    let cq = read(&shared.queues)
        .cq(cdw11.cqid())
        .ok_or(Status::COMPLETION_QUEUE_INVALID)?;
    if qid == 0 || qid > limit || read(&shared.queues).sq(qid).is_some() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    if lock(&shared.registers).cc.iosqes() != 6 {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    let (entries, memory) = queue_memory(command, cdw11.pc(), 64)?;
    let sqs = shared.cmb.as_ref().is_some_and(|cmb| cmb.config.sqs);
    match dma.place(memory) {
        Place::Bus => {}
        Place::Cmb(_) if sqs => {}
        Place::Cmb(_) | Place::Straddles => return Err(Status::INVALID_USE_OF_CMB),
    }
    let wake = Arc::new(Wake::default());
    cq.attach(qid, Arc::clone(&wake));
    let sq = Arc::new(SubmissionQueue::new(
        qid,
        memory.address,
        entries,
        Arc::clone(&cq),
        wake,
    ));
    if let Err(error) = core.start_worker(shared, dma, &sq) {
        tracing::error!(%error, qid, "no thread for a submission queue");
        cq.detach(qid);
        return Err(Status::INTERNAL_ERROR);
    }
    write(&shared.queues).set_sq(qid, Some(sq));
    Ok(())
}

fn delete_sq(core: &mut Core, shared: &Shared, command: &Command) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    if qid == 0 || read(&shared.queues).sq(qid).is_none() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    // Off the doorbells first; then what was fetched is completed, and nothing else is fetched.
    write(&shared.queues).set_sq(qid, None);
    core.stop_worker(qid);
    Ok(())
}

fn delete_cq(shared: &Shared, dma: &Dma, command: &Command) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    let cq = read(&shared.queues).cq(qid).filter(|_| qid != 0);
    if cq.ok_or(Status::INVALID_QUEUE_IDENTIFIER)?.in_use() {
        return Err(Status::INVALID_QUEUE_DELETION);
    }
    write(&shared.queues).set_cq(qid, None);
    shared.update_intx(&dma.port);
    Ok(())
}

fn identify(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let [cns, ..] = command.cdw10.get().to_le_bytes();
    let [.., csi] = command.cdw11.get().to_le_bytes();
    let page = identify::page(
        &shared.config,
        &shared.namespaces,
        cns,
        command.nsid.get(),
        csi,
    )?;
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
        let flushed = shared.namespaces.iter().try_for_each(|ns| ns.flush());
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
