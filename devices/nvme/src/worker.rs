//! The worker of an I/O submission queue: fetches, has commands executed, posts, interrupts.
//!
//! A worker executes its commands one after the other, each to its completion. More than one at a time
//! would be decided in [`run`]: everything below it works on one command and its permit.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use p2plab_pcie::DmaRange;

use crate::controller::Shared;
use crate::dma::Dma;
use crate::faults;
use crate::io;
use crate::locks::lock;
use crate::queue::{Reply, SubmissionQueue};
use crate::spec::command::{Command, FUSE, FUSE_FIRST, FUSE_SECOND, ReadWriteCdw12, io as opcode};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Completions wait this long for their interrupt while more commands are executed.
const BATCH_TIME: Duration = Duration::from_micros(50);

/// Data that a command may move while completions before it still wait for their interrupt.
const QUICK_BYTES: u64 = 32 << 10;

/// The worker of `sq`: returns when the queue is stopped or its memory fails.
pub(crate) fn run(shared: &Shared, dma: &Dma, sq: &SubmissionQueue) {
    let mut transfer = Transfer::default();
    // The command that follows the first half of a fused operation, and what its data touched.
    let mut ahead: Option<Fetched> = None;
    let mut ahead_transfer = Transfer::default();
    // When the first completion was posted that has had no interrupt yet.
    let mut unsignalled: Option<Instant> = None;
    while !sq.stop.load(Ordering::Acquire) {
        let idle = ahead.is_none() && sq.is_empty();
        let permit = if idle { None } else { sq.cq.reserve() };
        let Some(permit) = permit else {
            if unsignalled.take().is_some() {
                shared.interrupt(dma, &sq.cq);
            }
            sq.wake.wait();
            continue;
        };
        let Some(fetched) = ahead.take().or_else(|| fetch_next(shared, dma, sq)) else {
            break;
        };
        let Fetched { fetch, command, .. } = fetched;
        // A completion never waits behind a slow command.
        let waiting = unsignalled.is_some_and(|since| since.elapsed() >= BATCH_TIME);
        if unsignalled.is_some()
            && (waiting || shared.faults.is_armed() || !is_quick(shared, &command))
        {
            shared.interrupt(dma, &sq.cq);
            unsignalled = None;
        }
        // The second half of a fused operation meets what the first met.
        let fault = match fetched.executed {
            Some(_) => faults::Verdict::NOTHING,
            None => faults::meet(shared, sq, &command),
        };
        let result = if let Some(result) = fetched.executed {
            std::mem::swap(&mut transfer, &mut ahead_transfer);
            result
        } else if command.flags & FUSE == 0 {
            transfer.clear();
            match fault.status {
                None if fault.execute => io::execute(shared, dma, &command, &mut transfer),
                status => status.map_or(Ok(()), Err),
            }
        } else {
            let transfers = [&mut transfer, &mut ahead_transfer];
            execute_fused(
                shared,
                dma,
                sq,
                (&command, fault.status),
                &mut ahead,
                transfers,
            )
        };
        if !fault.complete {
            let log = &shared.trace;
            log.record(dma, sq.id, &command, fetch, &transfer, None);
            continue;
        }
        let status = shared.account(sq.id, &command, result.err());
        let reply = Reply {
            cid: command.cid,
            result: 0,
            status,
        };
        let posted = sq.cq.post(dma, permit, sq, reply, |slot| {
            let done = Some((slot, status));
            shared
                .trace
                .record(dma, sq.id, &command, fetch, &transfer, done);
        });
        if let Err(error) = posted {
            shared.fatal(&format!("completion queue {}: {error}", sq.cq.id));
            break;
        }
        if fault.interrupt {
            unsignalled.get_or_insert_with(Instant::now);
        }
    }
    if unsignalled.is_some() {
        shared.interrupt(dma, &sq.cq);
    }
}

/// A command and where it was.
struct Fetched {
    fetch: DmaRange,
    command: Command,
    /// How it ended, if it was executed together with the command before it.
    executed: Option<Result<(), Status>>,
}

/// Fetches a command; `None`, and the controller has failed, where the queue cannot be read.
fn fetch_next(shared: &Shared, dma: &Dma, sq: &SubmissionQueue) -> Option<Fetched> {
    let fetch = sq.next_entry();
    let command = sq
        .fetch(dma)
        .map_err(|error| shared.fatal(&format!("submission queue {}: {error}", sq.id)))
        .ok()?;
    Some(Fetched {
        fetch,
        command,
        executed: None,
    })
}

/// Executes half of a fused operation (Base 3.4.2). Both halves come with one doorbell write, so the second is in the
/// queue when the first is fetched, or it is missing. What follows the first is fetched, executed, too, if it is the
/// second, and left in `ahead` to be completed or executed next. A `fault` of the first fails it.
fn execute_fused(
    shared: &Shared,
    dma: &Dma,
    sq: &SubmissionQueue,
    (command, fault): (&Command, Option<Status>),
    ahead: &mut Option<Fetched>,
    transfers: [&mut Transfer; 2],
) -> Result<(), Status> {
    let [transfer, ahead_transfer] = transfers;
    transfer.clear();
    ahead_transfer.clear();
    match command.flags & FUSE {
        FUSE_FIRST if !sq.is_empty() => {}
        FUSE_FIRST | FUSE_SECOND => return Err(Status::MISSING_FUSED_COMMAND),
        _ => return Err(Status::INVALID_FIELD),
    }
    // If that fails, so has the controller.
    let mut second = fetch_next(shared, dma, sq).ok_or(Status::MISSING_FUSED_COMMAND)?;
    let is_pair = second.command.flags & FUSE == FUSE_SECOND;
    let result = if let Some(status) = fault {
        second.executed = is_pair.then_some(Err(Status::FAILED_FUSED_COMMAND));
        Err(status)
    } else if is_pair {
        let commands = [command, &second.command];
        let [first, result] = io::execute_pair(shared, dma, commands, [transfer, ahead_transfer]);
        second.executed = Some(result);
        first
    } else {
        Err(Status::MISSING_FUSED_COMMAND)
    };
    *ahead = Some(second);
    result
}

/// Whether a command ends soon enough for completions to wait behind it.
fn is_quick(shared: &Shared, command: &Command) -> bool {
    let cdw12 = ReadWriteCdw12::from_bits(command.cdw12.get());
    let Ok(ns) = io::namespace(shared, command.nsid.get()) else {
        return true;
    };
    let bytes = (u64::from(cdw12.nlb_z()) + 1) << ns.block_shift;
    let durable = match command.opcode {
        opcode::READ => cdw12.fua(),
        // Without the write cache every write waits for the medium.
        opcode::WRITE => cdw12.fua() || !lock(&shared.features).write_cache,
        _ => return false,
    };
    !durable && bytes <= QUICK_BYTES
}
