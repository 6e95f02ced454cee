//! The controller's thread and what it owns: enable, reset, shutdown, the admin queue, the workers.
//!
//! [`Core`] is behind one lock, which its thread holds while it works and nobody holds for longer than a
//! command takes. A reset from the bus takes the lock, too, and so waits for what is in flight.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};

use p2plab_pcie::DmaRange;
use zerocopy::little_endian::U16;

use crate::admin::{self, Outcome};
use crate::controller::Shared;
use crate::dma::Dma;
use crate::locks::{lock, write};
use crate::queue::{CompletionQueue, Permit, Reply, SubmissionQueue};
use crate::spec::registers::{Csts, shst};
use crate::spec::status::Status;
use crate::transfer::Transfer;
use crate::worker;

struct Worker {
    sq: Arc<SubmissionQueue>,
    thread: JoinHandle<()>,
}

/// What only the controller's thread, or a reset, touches.
#[derive(Default)]
pub(crate) struct Core {
    admin: Option<Arc<SubmissionQueue>>,
    workers: HashMap<u16, Worker>,
    /// A held Asynchronous Event Request that was aborted and waits for its completion.
    aborted: Vec<U16>,
}

impl Core {
    /// Does all that is to do, until there is nothing.
    pub(crate) fn service(&mut self, shared: &Arc<Shared>, dma: &Dma) {
        let mut signal = false;
        loop {
            let pending = std::mem::take(&mut lock(&shared.registers).pending);
            if pending.reset {
                self.disable(shared);
                self.leave_reset(shared, dma);
                signal = false;
            }
            if pending.enable {
                self.enable(shared);
            }
            if pending.shutdown {
                shut_down(shared);
            }
            match self.admin.clone() {
                Some(sq) if self.step(shared, dma, &sq) => signal = true,
                Some(sq) => {
                    if signal {
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
        for worker in self.workers.values() {
            worker.sq.stop.store(true, Ordering::Release);
            worker.sq.wake.notify();
        }
        for (_, worker) in self.workers.drain() {
            // A worker that panicked has said so; the controller goes on without it.
            let _ = worker.thread.join();
        }
        self.admin = None;
        self.aborted.clear();
        admin::controller_reset(shared);
    }

    fn leave_reset(&mut self, shared: &Shared, dma: &Dma) {
        shared.update_intx(&dma.port);
        lock(&shared.registers).controller_reset();
    }

    fn enable(&mut self, shared: &Shared) {
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
        let fits = |base: u64, bytes: u32| base.checked_add(bytes.into()).is_some();
        if !fits(registers.asq, sq_entries * 64) || !fits(registers.acq, cq_entries * 16) {
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
        registers.csts = Csts::new().with_rdy(true);
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
        let mut transfer = Transfer::default();
        let outcome = admin::execute(self, shared, dma, &command, &mut transfer);
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
            let (shared, dma, sq) = (Arc::clone(shared), dma.clone(), Arc::clone(sq));
            move || worker::run(&shared, &dma, &sq)
        })?;
        self.workers.insert(
            sq.id,
            Worker {
                sq: Arc::clone(sq),
                thread,
            },
        );
        Ok(())
    }

    /// Stops the worker of queue `qid` and waits for the command that it executes.
    pub(crate) fn stop_worker(&mut self, qid: u16) {
        if let Some(worker) = self.workers.remove(&qid) {
            worker.sq.stop.store(true, Ordering::Release);
            worker.sq.wake.notify();
            let _ = worker.thread.join();
            worker.sq.cq.detach(qid);
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

/// Shutdown processing (Base 3.6): everything acknowledged reaches the medium.
fn shut_down(shared: &Shared) {
    for ns in shared.namespaces.all() {
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
