//! Firmware Image Download and Firmware Commit (Base 5.12, 5.13).

use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::firmware::Firmware;
use crate::locks::lock;
use crate::spec::command::{Command, FirmwareCommitCdw10};
use crate::spec::status::Status;
use crate::transfer::Transfer;

pub(super) fn download(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    // NUMD is 0's based; both are in dwords.
    let length = (u64::from(command.cdw10.get()) + 1) * 4;
    let offset = u64::from(command.cdw11.get()) * 4;
    if length > shared.config.max_transfer {
        return Err(Status::INVALID_FIELD);
    }
    Firmware::check_piece(offset, length)?;
    let mut piece = vec![0; usize::try_from(length).map_err(|_| Status::INVALID_FIELD)?];
    dma.data(
        command,
        length,
        Direction::ToController,
        transfer,
        |memory, _| memory.drain_to_slice(&mut piece),
    )?;
    lock(&shared.firmware).download(offset, &piece)
}

pub(super) fn commit(shared: &Shared, command: &Command) -> Result<(), Status> {
    let cdw10 = FirmwareCommitCdw10::from_bits(command.cdw10.get());
    let committed = lock(&shared.firmware).commit(cdw10.fs(), cdw10.ca());
    if let Some(event) = committed? {
        shared.event(event);
    }
    Ok(())
}
