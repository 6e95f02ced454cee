//! Doorbell Buffer Config (Base 5.8).

use p2plab_pcie::DmaRange;

use crate::controller::Shared;
use crate::dma::Dma;
use crate::locks::{lock, read};
use crate::shadow::DoorbellBuffer;
use crate::spec::PAGE_SIZE;
use crate::spec::command::Command;
use crate::spec::status::Status;

/// The host's pages are used for all I/O queues, those that exist and those to come, until a controller reset.
pub(super) fn configure(shared: &Shared, dma: &Dma, command: &Command) -> Result<(), Status> {
    if !shared.config.offers_shadow_doorbells() {
        return Err(Status::INVALID_OPCODE);
    }
    // The level of INTx depends on how far the host has come, which the controller would have to ask all the time.
    if !dma.port.msix_enabled() {
        return Err(Status::COMMAND_SEQUENCE_ERROR);
    }
    let buffer = DoorbellBuffer {
        doorbells: command.prp1.get(),
        events: command.prp2.get(),
    };
    for address in [buffer.doorbells, buffer.events] {
        if !address.is_multiple_of(PAGE_SIZE) {
            return Err(Status::INVALID_FIELD);
        }
        let length = PAGE_SIZE;
        dma.check_queue(DmaRange { address, length }, false)?;
    }
    let (sqs, cqs) = {
        let queues = read(&shared.queues);
        (queues.io_sqs(), queues.io_cqs())
    };
    let failed = |_| Status::DATA_TRANSFER_ERROR;
    for cq in &cqs {
        cq.adopt(dma, &shared.trace, buffer).map_err(failed)?;
    }
    for sq in &sqs {
        let _executor = lock(&sq.executor);
        sq.adopt(dma, &shared.trace, buffer).map_err(failed)?;
    }
    *lock(&shared.doorbell_buffer) = Some(buffer);
    Ok(())
}
