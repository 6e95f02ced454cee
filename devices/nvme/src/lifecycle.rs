//! The controller's thread and what it owns: enable, reset, shutdown, the admin queue, the workers.
//!
//! [`Core`] is behind one lock, which its thread holds while it works and nobody holds for longer than a
//! command takes. A reset from the bus takes the lock, too, and so waits for what is in flight.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};

use p2plab_pcie::{DmaRange, Port};
use zerocopy::little_endian::U16;

use crate::admin::{self, Outcome};
use crate::controller::Shared;
use crate::dma::Dma;
use crate::faults;
use crate::locks::{lock, write};
use crate::queue::{CompletionQueue, Permit, Reply, SubmissionQueue};
use crate::spec::registers::{Csts, shst};
use crate::spec::status::Status;
use crate::transfer::Transfer;
use crate::worker;

struct Worker {
    sq: Arc<SubmissionQueue>,
    /// None once it was stopped by a shutdown.
    thread: Option<JoinHandle<()>>,
}

/// Ends workers: tells all, then waits for the commands that they execute.
fn stop<'a>(workers: impl IntoIterator<Item = &'a mut Worker>) {
    let workers: Vec<_> = workers.into_iter().collect();
    for worker in &workers {
        worker.sq.stop.store(true, Ordering::Release);
        worker.sq.wake.notify();
    }
    for worker in workers {
        if let Some(thread) = worker.thread.take() {
            // A worker that panicked has said so; the controller goes on without it.
            let _ = thread.join();
        }
        // The transport's thread may be at work in its place.
        drop(lock(&worker.sq.executor));
    }
}

/// What only the controller's thread, or a reset, touches.
#[derive(Default)]
pub(crate) struct Core {
    admin: Option<Arc<SubmissionQueue>>,
    workers: HashMap<u16, Worker>,
    /// A held Asynchronous Event Request that was aborted and waits for its completion.
    aborted: Vec<U16>,
    /// Completions on the admin queue wait for their interrupt.
    signal: bool,
}

impl Core {
    /// Does all that is to do, until there is nothing.
    pub(crate) fn service(&mut self, shared: &Arc<Shared>, dma: &Dma) {
        loop {
            let pending = std::mem::take(&mut lock(&shared.registers).pending);
            if pending.power_cut {
                let prepared = !shared.is_unsafe_to_lose_power();
                self.power_cut(shared, Some(&dma.port), prepared);
                continue;
            }
            if pending.subsystem_reset {
                self.start_over(shared, Some(&dma.port), true);
                continue;
            }
            if pending.pmr_disable
                && let Some(pmr) = &shared.pmr
            {
                pmr.settle(Some(&dma.port));
            }
            if pending.reset {
                self.disable(shared);
                self.leave_reset(shared, dma);
            }
            if pending.enable {
                self.enable(shared, dma);
            }
            if pending.shutdown {
                self.shut_down(shared);
            }
            match self.admin.clone() {
                Some(sq) if self.step(shared, dma, &sq) => {}
                Some(sq) => {
                    if std::mem::take(&mut self.signal) {
                        shared.interrupt(dma, &sq.cq);
                    }
                    return;
                }
                None => return,
            }
        }
    }

    /// Stops and deletes all queues. Returns when nothing is in flight.
    pub(crate) fn disable(&mut self, shared: &Shared) {
        write(&shared.queues).clear();
        stop(self.workers.values_mut());
        self.workers.clear();
        *lock(&shared.doorbell_buffer) = None;
        self.admin = None;
        self.aborted.clear();
        admin::controller_reset(shared);
        self.signal = false;
    }

    /// Brings everything to the state after power on. Registers change when nothing is in flight any more: until
    /// then a host finds the controller ready.
    fn start_over(&mut self, shared: &Shared, port: Option<&Port>, nssro: bool) {
        self.disable(shared);
        {
            let mut registers = lock(&shared.registers);
            registers.reset_all();
            registers.csts.set_nssro(nssro);
            shared.set_windows(&mut registers);
        }
        if let Some(pmr) = &shared.pmr {
            pmr.settle(port);
        }
        if let Some(port) = port {
            shared.update_intx(port);
        }
    }

    /// The power fails and comes back. What was flushed is there. So is what was not, unless there is a write cache that
    /// forgets: the namespaces' files have every write at once, and whether the host's page cache loses it is the host's
    /// affair. The CMB has nothing to keep it. `prepared`: the host had shut the controller down, or had not begun with it.
    pub(crate) fn power_cut(&mut self, shared: &Arc<Shared>, port: Option<&Port>, prepared: bool) {
        shared.health.power_off(prepared);
        shared.self_test.background.end();
        shared.sanitize.background.end();
        self.start_over(shared, port, false);
        shared.lose_unflushed();
        if let Some(Err(error)) = shared.cmb.as_ref().map(|cmb| cmb.memory.clear()) {
            tracing::error!(%error, "the CMB keeps its content over the power cut");
        }
        shared.health.power_on();
        shared.self_test.resume(shared);
        shared.sanitize.resume(shared);
    }

    fn leave_reset(&mut self, shared: &Shared, dma: &Dma) {
        shared.update_intx(&dma.port);
        lock(&shared.registers).controller_reset();
    }

    fn enable(&mut self, shared: &Shared, dma: &Dma) {
        shared.health.power_on();
        let mut registers = lock(&shared.registers);
        if let Some(why) = registers.bad_configuration() {
            if shared.mistakes.is_worth_a_line() {
                tracing::warn!(why, "the controller cannot be enabled");
            }
            registers.csts.set_cfs(true);
            return;
        }
        let aqa = registers.aqa();
        let (sq_entries, cq_entries) = (u32::from(aqa.asqs_z()) + 1, u32::from(aqa.acqs_z()) + 1);
        // No command can be given a status yet.
        let fits = |address: u64, entries: u32, entry: u32, in_cmb: bool| {
            let length = u64::from(entries * entry);
            let range = DmaRange { address, length };
            address.checked_add(length).is_some() && dma.check_queue(range, in_cmb).is_ok()
        };
        let (sqs, cqs) = shared.config.cmb.map_or((false, false), |c| (c.sqs, c.cqs));
        if !fits(registers.asq, sq_entries, 64, sqs) || !fits(registers.acq, cq_entries, 16, cqs) {
            registers.csts.set_cfs(true);
            return;
        }
        let cq = Arc::new(CompletionQueue::new(0, registers.acq, cq_entries, Some(0)));
        let wake = Arc::clone(&shared.wake);
        cq.attach(0, Arc::clone(&wake));
        let sq = SubmissionQueue::new(0, registers.asq, sq_entries, Arc::clone(&cq), wake);
        let sq = Arc::new(sq);
        self.admin = Some(Arc::clone(&sq));
        let mut queues = write(&shared.queues);
        queues.set_cq(0, Some(cq));
        queues.set_sq(0, Some(sq));
        let nssro = registers.csts.nssro();
        registers.csts = Csts::new().with_rdy(true).with_nssro(nssro);
    }

    /// Executes one admin command or completes one held request; `false` if there is nothing to do.
    fn step(&mut self, shared: &Arc<Shared>, dma: &Dma, sq: &SubmissionQueue) -> bool {
        // A reset from the bus clears RDY before it waits for this thread: it waits for one command, not a queue.
        let csts = lock(&shared.registers).csts;
        if csts.cfs() || !csts.rdy() {
            return false;
        }
        let event_ready = !self.aborted.is_empty() || lock(&shared.events).is_ready();
        if sq.is_empty() && !event_ready {
            return false;
        }
        let Some(permit) = sq.cq.reserve() else {
            return false;
        };
        if let Some(cid) = self.aborted.pop() {
            let (result, status) = (0, Status::ABORT_REQUESTED);
            let reply = Reply {
                cid,
                result,
                status,
            };
            self.signal = true;
            return post(shared, dma, sq, permit, reply, |_| {});
        }
        // The lock must not last into the post: doorbell writes take it, too.
        let event = lock(&shared.events).next();
        if let Some((cid, event)) = event {
            let (result, status) = (event.dword(), Status::SUCCESS);
            let reply = Reply {
                cid,
                result,
                status,
            };
            self.signal = true;
            return post(shared, dma, sq, permit, reply, |_| {});
        }
        let fetch = sq.next_entry();
        let command = match sq.fetch(dma) {
            Ok(command) => command,
            Err(error) => {
                shared.fatal(&format!("admin submission queue: {error}"));
                return false;
            }
        };
        let dma = &dma.of_queue(sq);
        let mut transfer = Transfer::default();
        let fault = faults::meet(shared, sq, &command);
        let outcome = match fault.status {
            None if fault.execute => admin::execute(self, shared, dma, &command, &mut transfer),
            // Without a status nothing is completed.
            status => Err(status.unwrap_or(Status::INTERNAL_ERROR)),
        };
        if !fault.complete {
            let log = &shared.trace;
            log.record(dma, 0, &command, fetch, &transfer, None);
            return true;
        }
        let (result, error) = match outcome {
            Ok(Outcome::Done(result)) => (result, None),
            Ok(Outcome::Held) => {
                shared.account(0, &command, None);
                shared
                    .trace
                    .record(dma, 0, &command, fetch, &transfer, None);
                return true;
            }
            Err(status) => (0, Some(status)),
        };
        let status = shared.account(0, &command, error);
        let reply = Reply {
            cid: command.cid,
            result,
            status,
        };
        self.signal |= fault.interrupt;
        post(shared, dma, sq, permit, reply, |slot| {
            shared
                .trace
                .record(dma, 0, &command, fetch, &transfer, Some((slot, status)));
        })
    }

    /// Starts the worker of `sq`.
    pub(crate) fn start_worker(
        &mut self,
        shared: &Arc<Shared>,
        dma: &Dma,
        sq: &Arc<SubmissionQueue>,
    ) -> io::Result<()> {
        let thread = Builder::new().name(format!("nvme-sq{}", sq.id)).spawn({
            let (shared, dma, sq) = (Arc::clone(shared), dma.of_queue(sq), Arc::clone(sq));
            // Set once: a queue has one worker.
            let _ = sq.dma.set(dma.clone());
            move || worker::run(&shared, &dma, &sq)
        })?;
        self.workers.insert(
            sq.id,
            Worker {
                sq: Arc::clone(sq),
                thread: Some(thread),
            },
        );
        Ok(())
    }

    /// Stops the worker of queue `qid` and waits for the command that it executes.
    pub(crate) fn stop_worker(&mut self, qid: u16) {
        if let Some(mut worker) = self.workers.remove(&qid) {
            stop([&mut worker]);
            worker.sq.cq.detach(qid);
        }
    }

    /// Shutdown processing (Base 3.6): everything acknowledged reaches the medium. First the workers end, so that
    /// nothing is acknowledged afterwards; a reset brings the controller back. The admin queue stays in service.
    /// An abrupt shutdown does the same: flushing is all that takes time, and it saves data.
    fn shut_down(&mut self, shared: &Shared) {
        stop(self.workers.values_mut());
        // Also those detached: a command that was under way may have come after the flush of that.
        for ns in shared.namespaces.all_allocated() {
            if let Err(error) = ns.flush() {
                tracing::error!(%error, nsid = ns.nsid, "flush at shutdown");
            }
        }
        let mut registers = lock(&shared.registers);
        // A reset in between has cleared the request.
        if registers.cc.shn() != 0 {
            registers.csts.set_shst(shst::COMPLETE);
        }
    }

    /// Takes note that the held request `cid` is aborted; its own completion follows.
    pub(crate) fn note_aborted(&mut self, cid: U16) {
        self.aborted.push(cid);
    }
}

fn post(
    shared: &Shared,
    dma: &Dma,
    sq: &SubmissionQueue,
    permit: Permit<'_>,
    reply: Reply,
    before: impl FnOnce(DmaRange),
) -> bool {
    let posted = sq.cq.post(dma, permit, sq, reply, before);
    posted
        .map_err(|error| shared.fatal(&format!("admin completion queue: {error}")))
        .is_ok()
}
