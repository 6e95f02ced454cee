//! Compare and Write, the one fused operation (Base 3.4.2, NVM 2.4 and FUSES): two commands that follow each other in
//! a submission queue, of which the second is executed if the first succeeds, and no other command comes between.

use super::{data_extent, namespace, perform};
use crate::controller::Shared;
use crate::dma::Dma;
use crate::spec::command::{Command, FUSE, PSDT_PRP, PSDT_SGL, ReadWriteCdw12, io as opcode};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Atomic Compare and Write Unit: blocks that no other command sees half written.
pub(crate) const ACWU_Z: u16 = 127;

/// Executes the two commands of a fused operation.
pub(crate) fn execute_pair(
    shared: &Shared,
    dma: &Dma,
    commands: [&Command; 2],
    transfers: [&mut Transfer; 2],
) -> [Result<(), Status>; 2] {
    let [first, second] = commands.map(|command| {
        let flags = command.flags & !FUSE;
        Command { flags, ..*command }
    });
    let [first_transfer, second_transfer] = transfers;
    // Neither has been executed yet: what is wrong with one fails it and aborts the other.
    let wrong = check_first(&first).and_then(|()| check_pair(&first, &second));
    if let Err(status) = wrong {
        return [Err(status), Err(Status::FAILED_FUSED_COMMAND)];
    }
    let _passage = match shared.gate.enter(second.opcode) {
        Ok(passage) => passage,
        Err(status) => return [Err(status), Err(Status::FAILED_FUSED_COMMAND)],
    };
    let ns = match namespace(shared, first.nsid.get()) {
        Ok(ns) => ns,
        Err(status) => return [Err(status), Err(Status::FAILED_FUSED_COMMAND)],
    };
    if let Err(status) = data_extent(shared, &ns, &second) {
        return [Err(status), Err(Status::FAILED_FUSED_COMMAND)];
    }
    let _turn = ns.turn_alone();
    if let Err(status) = perform(shared, dma, &ns, &first, first_transfer) {
        return [Err(status), Err(Status::FAILED_FUSED_COMMAND)];
    }
    [Ok(()), perform(shared, dma, &ns, &second, second_transfer)]
}

fn check_first(first: &Command) -> Result<(), Status> {
    if first.opcode != opcode::COMPARE || !matches!(first.flags, PSDT_PRP | PSDT_SGL) {
        return Err(Status::INVALID_FIELD);
    }
    if ReadWriteCdw12::from_bits(first.cdw12.get()).nlb_z() > ACWU_Z {
        return Err(Status::ATOMIC_WRITE_UNIT_EXCEEDED);
    }
    Ok(())
}

/// Both commands address the same blocks.
fn check_pair(first: &Command, second: &Command) -> Result<(), Status> {
    let blocks = |command: &Command| {
        let count_z = ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z();
        (command.nsid.get(), command.slba(), count_z)
    };
    let is_write = second.opcode == opcode::WRITE && matches!(second.flags, PSDT_PRP | PSDT_SGL);
    if is_write && blocks(first) == blocks(second) {
        Ok(())
    } else {
        Err(Status::INVALID_FIELD)
    }
}
