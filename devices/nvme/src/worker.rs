//! The worker of an I/O submission queue: fetches, has commands executed, posts, interrupts.
//!
//! A worker executes its commands one after the other, each to its completion. More than one at a time
//! would be decided in [`run`]: everything below it works on one command and its permit.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::controller::Shared;
use crate::dma::Dma;
use crate::faults;
use crate::io;
use crate::locks::lock;
use crate::queue::{Reply, SubmissionQueue};
use crate::spec::command::{Command, ReadWriteCdw12, io as opcode};
use crate::transfer::Transfer;

/// Completions wait this long for their interrupt while more commands are executed.
const BATCH_TIME: Duration = Duration::from_micros(50);

/// Data that a command may move while completions before it still wait for their interrupt.
const QUICK_BYTES: u64 = 32 << 10;

/// The worker of `sq`: returns when the queue is stopped or its memory fails.
pub(crate) fn run(shared: &Shared, dma: &Dma, sq: &SubmissionQueue) {
    let mut transfer = Transfer::default();
    // When the first completion was posted that has had no interrupt yet.
    let mut unsignalled: Option<Instant> = None;
    while !sq.stop.load(Ordering::Acquire) {
        let permit = if sq.is_empty() { None } else { sq.cq.reserve() };
        let Some(permit) = permit else {
            if unsignalled.take().is_some() {
                shared.interrupt(dma, &sq.cq);
            }
            sq.wake.wait();
            continue;
        };
        let fetch = sq.next_entry();
        let command = match sq.fetch(dma) {
            Ok(command) => command,
            Err(error) => {
                shared.fatal(&format!("submission queue {}: {error}", sq.id));
                break;
            }
        };
        // A completion never waits behind a slow command.
        let waiting = unsignalled.is_some_and(|since| since.elapsed() >= BATCH_TIME);
        if unsignalled.is_some()
            && (waiting || shared.faults.is_armed() || !is_quick(shared, &command))
        {
            shared.interrupt(dma, &sq.cq);
            unsignalled = None;
        }
        transfer.clear();
        let fault = faults::meet(shared, sq, &command);
        let error = match fault.status {
            None if fault.execute => io::execute(shared, dma, &command, &mut transfer).err(),
            status => status,
        };
        if !fault.complete {
            let log = &shared.trace;
            log.record(dma, sq.id, &command, fetch, &transfer, None);
            continue;
        }
        let status = shared.account(sq.id, &command, error);
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
