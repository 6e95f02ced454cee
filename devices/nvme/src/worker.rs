//! The worker of an I/O submission queue: fetches, has commands executed, posts, interrupts.
//!
//! A queue's commands are executed one after the other, each to its completion. More than one at a time would be
//! decided in [`Executor::work`]: everything below it works on one command and its permit.

use std::sync::TryLockError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use p2plab_pcie::DmaRange;

use crate::controller::Shared;
use crate::dma::Dma;
use crate::events::Event;
use crate::faults;
use crate::io;
use crate::locks::{lock, read};
use crate::moderation::{Moderation, Verdict};
use crate::polling::Next;
use crate::queue::{Permit, Reply, ShadowError, SubmissionQueue};
use crate::spec::command::{Command, FUSE, FUSE_FIRST, FUSE_SECOND, ReadWriteCdw12, io as opcode};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Completions wait this long for their interrupt while more commands are executed.
const BATCH_TIME: Duration = Duration::from_micros(50);

/// Data that a command may move while completions before it still wait for their interrupt.
const QUICK_BYTES: u64 = 128 << 10;

/// How long the transport's thread works in a worker's place: its next message waits meanwhile.
const VISIT_TIME: Duration = Duration::from_micros(100);

/// Data that a command may move there: what takes about as long as to wake a worker and hand over.
const VISIT_BYTES: u64 = 1 << 20;

/// Executes the commands of one submission queue, for whoever holds it: the queue's worker, or the transport's
/// thread with a doorbell write in its hand.
#[derive(Debug, Default)]
pub(crate) struct Executor {
    /// Where the data of the command at work lies.
    transfer: Transfer,
    /// A command that was fetched and not completed: the one behind the first half of a fused operation, or one that
    /// takes too long for a visitor.
    ahead: Option<Fetched>,
    /// What the data of `ahead` touched, if it was executed.
    ahead_transfer: Transfer,
    unsignalled: Option<Unsignalled>,
    /// Whoever is at work comes again to look for commands.
    polled: bool,
    /// How many completions wait for each other.
    moderation: Moderation,
}

/// Completions that have had no interrupt yet.
#[derive(Clone, Copy, Debug)]
struct Unsignalled {
    /// When the first was posted.
    since: Instant,
    count: u32,
    /// The worker knows of them.
    told: bool,
}

/// Why an executor does nothing more for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// There is nothing to do, or no room for its completion: a doorbell will tell.
    Idle,
    /// There is something left for the worker.
    Left,
    /// The controller has failed.
    Failed,
}

/// The worker of `sq`: returns when the queue is stopped or its memory fails.
pub(crate) fn run(shared: &Shared, dma: &Dma, sq: &SubmissionQueue) {
    while !sq.stop.load(Ordering::Acquire) {
        let due = {
            let mut executor = lock(&sq.executor);
            if executor.work(shared, dma, sq, None) == Rest::Failed {
                break;
            }
            executor.due(sq)
        };
        sq.wake.wait_until(due);
    }
    // Nobody is there to send it later.
    lock(&sq.executor).interrupt(shared, dma, sq);
}

/// A visit of the transport's thread.
#[derive(Clone, Copy, Debug)]
struct Visit {
    /// When it is over.
    end: Instant,
    /// Whether the host is to be asked for a doorbell afterwards: nobody will look.
    ask: bool,
}

/// Does what a doorbell write of the CPU asks for on the transport's thread, if nobody is at it: a command that takes
/// microseconds is over before a worker would have woken up. What takes longer is left to the worker.
pub(crate) fn run_here(shared: &Shared, sq: &SubmissionQueue) {
    shared.polling.command();
    // Whoever is at work may have looked for the last time: the worker looks again.
    if visit(shared, sq, !shared.polling.will_look()).is_none() {
        sq.wake.notify();
    }
}

/// The transport's thread has nothing else to do and looks for commands; returns whether it is to come again.
pub(crate) fn poll(shared: &Shared) -> bool {
    let ask = match shared.polling.next() {
        Next::Wait => return true,
        Next::Look => false,
        Next::Sleep if shared.polling.take_unasked() => true,
        Next::Sleep => return false,
    };
    // Not under the lock: a queue whose memory fails takes it, too.
    let sqs = read(&shared.queues).io_sqs();
    let mut found = false;
    for sq in sqs {
        let before = sq.head();
        // A worker at work looks and asks by itself; others who hold the queue do not.
        if visit(shared, &sq, ask).is_none() && ask {
            sq.wake.notify();
        }
        found |= sq.head() != before;
    }
    !ask || found
}

/// Works on `sq`, if nobody else does. The worker is told of what is left.
fn visit(shared: &Shared, sq: &SubmissionQueue, ask: bool) -> Option<()> {
    let mut executor = match sq.executor.try_lock() {
        Ok(executor) => executor,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return None,
    };
    let end = Instant::now() + VISIT_TIME;
    let rest = executor.work(shared, sq.dma.get()?, sq, Some(Visit { end, ask }));
    // What coalescing lets wait is the worker's to look after; what waits for the rest of a stream is the visitor's.
    let held = executor.holds(sq, ask);
    let waits = executor.unsignalled.as_mut().filter(|_| !held);
    let is_new = waits.is_some_and(|waiting| !std::mem::replace(&mut waiting.told, true));
    drop(executor);
    if is_new || rest == Rest::Left {
        sq.wake.notify();
    }
    Some(())
}

impl Executor {
    /// Executes commands until there are none, or it is time for a visitor to leave.
    fn work(
        &mut self,
        shared: &Shared,
        dma: &Dma,
        sq: &SubmissionQueue,
        visit: Option<Visit>,
    ) -> Rest {
        let ask = visit.is_none_or(|visit| visit.ask);
        self.polled = !ask;
        let before = sq.head();
        let rest = loop {
            if sq.stop.load(Ordering::Acquire) {
                break Rest::Idle;
            }
            match self.find(shared, dma, sq, ask) {
                Ok(true) => {}
                Ok(false) => break Rest::Idle,
                Err(error) => break failed(shared, "shadow doorbells", sq.id, &error),
            }
            if visit.is_some_and(|visit| Instant::now() >= visit.end) {
                break Rest::Left;
            }
            let permit = match sq.cq.reserve_looking(dma, &shared.trace) {
                Ok(Some(permit)) => permit,
                Ok(None) => {
                    // Nothing can join what waits.
                    self.interrupt(shared, dma, sq);
                    break Rest::Idle;
                }
                Err(ShadowError::Invalid(head)) => {
                    shared.bad_doorbell(sq.cq.id, head, Event::INVALID_DOORBELL_VALUE);
                    break Rest::Idle;
                }
                Err(error) => break failed(shared, "shadow doorbells", sq.cq.id, &error),
            };
            let Some(fetched) = self.ahead.take().or_else(|| fetch_next(shared, dma, sq)) else {
                break Rest::Failed;
            };
            if visit.is_some() && !is_for_visitors(shared, &fetched) {
                self.ahead = Some(fetched);
                break Rest::Left;
            }
            if self.one(shared, dma, sq, permit, fetched) == Rest::Failed {
                break Rest::Failed;
            }
        };
        if !self.holds(sq, ask) {
            self.signal(shared, dma, sq);
        }
        if sq.head() != before {
            shared.polling.done();
        }
        rest
    }

    /// Whether there is a command. Looks into the host's memory for one, and, to `ask`, has the host write the doorbell
    /// register with the next if there is none.
    fn find(
        &mut self,
        shared: &Shared,
        dma: &Dma,
        sq: &SubmissionQueue,
        ask: bool,
    ) -> Result<bool, ShadowError> {
        let found = |sq: &SubmissionQueue| !sq.is_empty();
        if self.ahead.is_some() || found(sq) {
            return Ok(true);
        }
        let told = |result| match result {
            Err(ShadowError::Invalid(tail)) => {
                shared.bad_doorbell(sq.id, tail, Event::INVALID_DOORBELL_VALUE);
                Ok(())
            }
            other => other,
        };
        told(sq.look(dma, &shared.trace))?;
        if found(sq) {
            return Ok(true);
        }
        if !self.holds(sq, ask) {
            self.signal(shared, dma, sq);
        }
        if ask {
            told(sq.ask(dma, &shared.trace))?;
        }
        Ok(found(sq))
    }

    /// Executes one command and completes it.
    fn one(
        &mut self,
        shared: &Shared,
        dma: &Dma,
        sq: &SubmissionQueue,
        permit: Permit<'_>,
        fetched: Fetched,
    ) -> Rest {
        let Fetched { fetch, command, .. } = fetched;
        if self.polled {
            self.moderation
                .came(Instant::now(), self.unsignalled.is_some());
        }
        if let Some(waiting) = self.unsignalled {
            let may_be_slow = shared.faults.is_armed();
            let bytes = quick_bytes(shared, &command).filter(|_| !may_be_slow);
            let is_late = if self.polled {
                !self.holds(sq, false)
            } else {
                waiting.since.elapsed() >= BATCH_TIME
            };
            match bytes {
                // A completion never waits behind a command of which nobody knows how long it takes.
                None => self.interrupt(shared, dma, sq),
                Some(bytes) if bytes > QUICK_BYTES || is_late => self.signal(shared, dma, sq),
                Some(_) => {}
            }
        }
        // The second half of a fused operation meets what the first met.
        let fault = match fetched.executed {
            Some(_) => faults::Verdict::NOTHING,
            None => faults::meet(shared, sq, &command),
        };
        let result = if let Some(result) = fetched.executed {
            std::mem::swap(&mut self.transfer, &mut self.ahead_transfer);
            result
        } else if command.flags & FUSE == 0 {
            self.transfer.clear();
            match fault.status {
                None if fault.execute => io::execute(shared, dma, &command, &mut self.transfer),
                status => status.map_or(Ok(()), Err),
            }
        } else {
            self.fused(shared, dma, sq, &command, fault.status)
        };
        if !fault.complete {
            let log = &shared.trace;
            log.record(dma, sq.id, &command, fetch, &self.transfer, None);
            return Rest::Idle;
        }
        let status = shared.account(sq.id, &command, result.err());
        let reply = Reply {
            cid: command.cid,
            result: 0,
            status,
        };
        let posted = sq.cq.post(dma, permit, sq, reply, |slot| {
            let done = Some((slot, status));
            let log = &shared.trace;
            log.record(dma, sq.id, &command, fetch, &self.transfer, done);
        });
        if let Err(error) = posted {
            return failed(shared, "completion queue", sq.cq.id, &error);
        }
        if fault.interrupt {
            let waiting = self.unsignalled.get_or_insert_with(|| Unsignalled {
                since: Instant::now(),
                count: 0,
                told: false,
            });
            waiting.count = waiting.count.saturating_add(1);
        }
        Rest::Idle
    }

    /// Sends the interrupt that completions wait for, unless coalescing lets them wait for more. They are counted for
    /// each submission queue: the threshold is a recommendation, the time holds for all.
    fn signal(&mut self, shared: &Shared, dma: &Dma, sq: &SubmissionQueue) {
        let Some(waiting) = self.unsignalled else {
            return;
        };
        let coalescing = sq.cq.coalescing();
        let (time, threshold) = (coalescing.time(), coalescing.threshold());
        if waiting.count < threshold && waiting.since.elapsed() < time {
            return;
        }
        if !time.is_zero() && sq.cq.outstanding() == 0 {
            // The host has found them all meanwhile: an interrupt for nothing is one that Linux complains of.
            self.unsignalled = None;
            return;
        }
        self.interrupt(shared, dma, sq);
    }

    /// Whether completions wait for those of commands that are about to come: only where somebody looks for those,
    /// which is not before an `ask`, and not where the host has said itself how long they are to wait.
    fn holds(&mut self, sq: &SubmissionQueue, ask: bool) -> bool {
        let Some(waiting) = self.unsignalled.filter(|_| !ask) else {
            return false;
        };
        if !sq.cq.coalescing().time().is_zero() {
            return false;
        }
        let now = Instant::now();
        let verdict = self.moderation.verdict(waiting.count, waiting.since, now);
        if verdict != Verdict::Hold {
            self.moderation.sent(waiting.count, verdict);
        }
        verdict == Verdict::Hold
    }

    /// Sends it at once.
    fn interrupt(&mut self, shared: &Shared, dma: &Dma, sq: &SubmissionQueue) {
        if self.unsignalled.take().is_some() {
            shared.interrupt(dma, &sq.cq);
        }
    }

    /// When completions that wait are due for their interrupt though none may follow.
    fn due(&mut self, sq: &SubmissionQueue) -> Option<Instant> {
        let waiting = self.unsignalled.as_mut()?;
        waiting.told = true;
        waiting.since.checked_add(sq.cq.coalescing().time())
    }

    /// Executes the first half of a fused operation, or refuses what is none (Base 3.4.2). Both halves come with one
    /// doorbell write, so the second is in the queue when the first is fetched, or it is missing. What follows the
    /// first is fetched, executed, too, if it is the second, and left `ahead` to be completed or executed next. A
    /// `fault` of the first fails it.
    fn fused(
        &mut self,
        shared: &Shared,
        dma: &Dma,
        sq: &SubmissionQueue,
        command: &Command,
        fault: Option<Status>,
    ) -> Result<(), Status> {
        self.transfer.clear();
        self.ahead_transfer.clear();
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
            let transfers = [&mut self.transfer, &mut self.ahead_transfer];
            let [first, result] = io::execute_pair(shared, dma, commands, transfers);
            second.executed = Some(result);
            first
        } else {
            Err(Status::MISSING_FUSED_COMMAND)
        };
        self.ahead = Some(second);
        result
    }
}

fn failed(shared: &Shared, what: &str, qid: u16, error: &dyn std::error::Error) -> Rest {
    shared.fatal(&format!("{what} {qid}: {error}"));
    Rest::Failed
}

/// A command and where it was.
#[derive(Debug)]
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

/// Bytes that a command moves, if that is all that takes time; `None` for one that waits for the medium or for more.
fn quick_bytes(shared: &Shared, command: &Command) -> Option<u64> {
    let cdw12 = ReadWriteCdw12::from_bits(command.cdw12.get());
    let Ok(ns) = io::namespace(shared, command.nsid.get()) else {
        return Some(0);
    };
    // Commands that wait for each other may wait for one that waits for the medium.
    if ns.takes_turns() {
        return None;
    }
    let bytes = (u64::from(cdw12.nlb_z()) + 1) << ns.block_shift;
    let durable = match command.opcode {
        opcode::READ => cdw12.fua(),
        // Without the write cache every write waits for the medium.
        opcode::WRITE => cdw12.fua() || !lock(&shared.features).write_cache,
        _ => return None,
    };
    (!durable).then_some(bytes)
}

/// Whether the transport's thread may execute a command. Fused operations wait for others, and faults may delay.
fn is_for_visitors(shared: &Shared, fetched: &Fetched) -> bool {
    let plain = fetched.executed.is_none() && fetched.command.flags & FUSE == 0;
    plain
        && !shared.faults.is_armed()
        && quick_bytes(shared, &fetched.command).is_some_and(|bytes| bytes <= VISIT_BYTES)
}
