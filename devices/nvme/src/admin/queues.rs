//! Creation and deletion of I/O queues (Base 5.4 to 5.7).

use std::sync::Arc;

use p2plab_pcie::DmaRange;

use crate::controller::Shared;
use crate::dma::Dma;
use crate::lifecycle::Core;
use crate::locks::{lock, read, write};
use crate::queue::{CompletionQueue, SubmissionQueue, Wake};
use crate::regs::MAX_QUEUE_ENTRIES_Z;
use crate::spec::PAGE_SIZE;
use crate::spec::command::{Command, CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11};
use crate::spec::status::Status;

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

pub(super) fn create_cq(shared: &Shared, dma: &Dma, command: &Command) -> Result<(), Status> {
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
    let cqs = shared.config.cmb.is_some_and(|cmb| cmb.cqs);
    dma.check_queue(memory, cqs)?;
    let vector = cdw11.ien().then_some(cdw11.iv());
    let cq = Arc::new(CompletionQueue::new(qid, memory.address, entries, vector));
    cq.follow(&lock(&shared.features));
    if let Some(buffer) = *lock(&shared.doorbell_buffer) {
        cq.adopt(dma, &shared.trace, buffer)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
    }
    write(&shared.queues).set_cq(qid, Some(cq));
    Ok(())
}

pub(super) fn create_sq(
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
    dma.check_queue(memory, sqs)?;
    let wake = Arc::new(Wake::default());
    let buffer = *lock(&shared.doorbell_buffer);
    cq.attach(qid, Arc::clone(&wake));
    let sq = Arc::new(SubmissionQueue::new(
        qid,
        memory.address,
        entries,
        Arc::clone(&cq),
        wake,
    ));
    if let Some(buffer) = buffer
        && sq.adopt(dma, &shared.trace, buffer).is_err()
    {
        cq.detach(qid);
        return Err(Status::DATA_TRANSFER_ERROR);
    }
    if let Err(error) = core.start_worker(shared, dma, &sq) {
        tracing::error!(%error, qid, "no thread for a submission queue");
        cq.detach(qid);
        return Err(Status::INTERNAL_ERROR);
    }
    write(&shared.queues).set_sq(qid, Some(sq));
    Ok(())
}

pub(super) fn delete_sq(core: &mut Core, shared: &Shared, command: &Command) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    if qid == 0 || read(&shared.queues).sq(qid).is_none() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER);
    }
    // Off the doorbells first; then what was fetched is completed, and nothing else is fetched.
    write(&shared.queues).set_sq(qid, None);
    core.stop_worker(qid);
    Ok(())
}

pub(super) fn delete_cq(shared: &Shared, dma: &Dma, command: &Command) -> Result<(), Status> {
    let qid = CreateQueueCdw10::from_bits(command.cdw10.get()).qid();
    let cq = read(&shared.queues).cq(qid).filter(|_| qid != 0);
    if cq.ok_or(Status::INVALID_QUEUE_IDENTIFIER)?.in_use() {
        return Err(Status::INVALID_QUEUE_DELETION);
    }
    write(&shared.queues).set_cq(qid, None);
    shared.update_intx(&dma.port);
    Ok(())
}
