//! Submission and completion queues (Base 3.3).
//!
//! The rule that nothing breaks: a completion slot is reserved ([`Permit`]) before a command is fetched, so
//! that a command that was executed can always be completed.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use p2plab_pcie::{DmaError, DmaRange};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use crate::dma::Dma;
use crate::features::{Coalescing, Features};
use crate::shadow::{Doorbell, DoorbellBuffer, Shadow};
use crate::spec::command::Command;
use crate::spec::completion::Completion;
use crate::spec::status::Status;
use crate::trace::Trace;
use crate::worker::Executor;

/// Wakes one worker.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    pending: Mutex<bool>,
    condition: Condvar,
}

impl Wake {
    pub(crate) fn notify(&self) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.condition.notify_one();
    }

    /// Returns after a [`notify`](Self::notify) since the last return. Whoever waits here is woken by the
    /// host's next doorbell, by a change of CC or by its own end.
    pub(crate) fn wait(&self) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        while !*pending {
            pending = self
                .condition
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *pending = false;
    }

    /// The same, but no later than at `deadline`, if there is one: completions wait for their interrupt.
    pub(crate) fn wait_until(&self, deadline: Option<Instant>) {
        let Some(deadline) = deadline else {
            return self.wait();
        };
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = self
            .condition
            .wait_timeout_while(pending, left, |pending| !*pending);
        let (mut pending, _) = ended.unwrap_or_else(PoisonError::into_inner);
        *pending = false;
    }
}

/// Why a doorbell write is refused (Base 5.16.1.1, asynchronous event "Invalid Doorbell Write Value").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InvalidDoorbell;

/// Why the host's doorbells in its own memory do not help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShadowError {
    /// They cannot be reached: the controller cannot go on.
    #[error("shadow doorbell: {0}")]
    Unreachable(#[from] DmaError),
    /// The host wrote an index that cannot be.
    #[error("shadow doorbell of {0}")]
    Invalid(u32),
}

/// A submission queue. Whoever holds the executor owns the head; the doorbell owns the tail.
pub(crate) struct SubmissionQueue {
    pub(crate) id: u16,
    pub(crate) base: u64,
    pub(crate) entries: u32,
    pub(crate) cq: Arc<CompletionQueue>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) stop: AtomicBool,
    /// The tail, where the host writes it into its memory.
    shadow: Shadow,
    /// Fetches and executes; nobody else does.
    pub(crate) executor: Mutex<Executor>,
    /// The way to memory for its commands, once it has a worker.
    pub(crate) dma: OnceLock<Dma>,
    head: AtomicU32,
    tail: AtomicU32,
}

impl SubmissionQueue {
    pub(crate) fn new(
        id: u16,
        base: u64,
        entries: u32,
        cq: Arc<CompletionQueue>,
        wake: Arc<Wake>,
    ) -> Self {
        let (head, tail, stop) = (AtomicU32::new(0), AtomicU32::new(0), AtomicBool::new(false));
        Self {
            id,
            base,
            entries,
            cq,
            wake,
            stop,
            shadow: Shadow::default(),
            executor: Mutex::default(),
            dma: OnceLock::new(),
            head,
            tail,
        }
    }

    /// The doorbell register was written. Whoever calls sees to it that somebody looks.
    pub(crate) fn ring(&self, tail: u32) -> Result<(), InvalidDoorbell> {
        if tail >= self.entries {
            return Err(InvalidDoorbell);
        }
        if !self.shadow.is_used() {
            self.tail.store(tail, Ordering::Release);
        }
        Ok(())
    }

    /// Goes over to shadow doorbells, from others if it has any: what the host wrote there is nowhere else. Nobody may
    /// hold the executor but the caller.
    pub(crate) fn adopt(
        &self,
        dma: &Dma,
        trace: &Trace,
        buffer: DoorbellBuffer,
    ) -> Result<(), DmaError> {
        // What cannot be reached, or cannot be, was not written.
        let _ = self.look(dma, trace);
        let which = Doorbell::Tail(self.id);
        self.shadow.adopt(dma, trace, buffer, which, self.tail())
    }

    /// Looks at the shadow doorbell, if there is one.
    pub(crate) fn look(&self, dma: &Dma, trace: &Trace) -> Result<(), ShadowError> {
        match self.shadow.look(dma, trace)? {
            None => Ok(()),
            Some(tail) if tail < self.entries => {
                self.tail.store(tail, Ordering::Release);
                Ok(())
            }
            Some(tail) => Err(ShadowError::Invalid(tail)),
        }
    }

    /// Asks for a register write with the next command, and looks once more.
    pub(crate) fn ask(&self, dma: &Dma, trace: &Trace) -> Result<(), ShadowError> {
        if self.shadow.is_used() {
            self.shadow.ask(dma, trace, self.tail())?;
            self.look(dma, trace)?;
        }
        Ok(())
    }

    pub(crate) fn head(&self) -> u32 {
        self.head.load(Ordering::Acquire)
    }

    pub(crate) fn tail(&self) -> u32 {
        self.tail.load(Ordering::Acquire)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head() == self.tail()
    }

    /// Where the next entry lies.
    pub(crate) fn next_entry(&self) -> DmaRange {
        // The base was checked at creation: the whole queue has addresses.
        DmaRange {
            address: self.base + u64::from(self.head()) * 64,
            length: 64,
        }
    }

    /// Takes the next entry. Entries are read one at a time, 64 bytes each: the number of TLPs of a
    /// command then does not depend on how many commands happened to wait.
    pub(crate) fn fetch(&self, dma: &Dma) -> Result<Command, DmaError> {
        let mut command = Command::new_zeroed();
        dma.read(self.next_entry().address, command.as_mut_bytes())?;
        self.head
            .store((self.head() + 1) % self.entries, Ordering::Release);
        Ok(command)
    }
}

/// A completion queue. Workers of its submission queues post to it; the doorbell owns the head.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    pub(crate) id: u16,
    pub(crate) base: u64,
    pub(crate) entries: u32,
    /// Vector, if interrupts are enabled.
    pub(crate) vector: Option<u16>,
    /// What the features say of that vector, for workers that ask for each interrupt.
    coalescing: AtomicU16,
    post: Mutex<PostState>,
    /// The head, where the host writes it into its memory.
    shadow: Shadow,
    /// Held from a look at it until the head has followed: of two workers that look, the one that has seen less must
    /// not follow last.
    looking: Mutex<()>,
    /// Apart from the lock: a doorbell write must not wait for a post's DMA (see `Endpoint`).
    head: AtomicU32,
    tail: AtomicU32,
    starved: AtomicBool,
    waiters: Mutex<Vec<(u16, Arc<Wake>)>>,
}

#[derive(Debug)]
struct PostState {
    phase: bool,
    reserved: u32,
}

/// What a completion says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    pub(crate) cid: U16,
    /// Dword 0.
    pub(crate) result: u32,
    pub(crate) status: Status,
}

/// A reserved slot of a completion queue. It is used up by [`CompletionQueue::post`], or given back.
#[must_use]
pub(crate) struct Permit<'a> {
    queue: &'a CompletionQueue,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.queue.lock().reserved -= 1;
        // A worker that starved on this reservation has no doorbell to wait for.
        self.queue.wake_starved();
    }
}

impl CompletionQueue {
    pub(crate) fn new(id: u16, base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self {
            id,
            base,
            entries,
            vector,
            coalescing: AtomicU16::new(0),
            post: Mutex::new(PostState {
                phase: true,
                reserved: 0,
            }),
            shadow: Shadow::default(),
            looking: Mutex::default(),
            head: AtomicU32::new(0),
            tail: AtomicU32::new(0),
            starved: AtomicBool::new(false),
            waiters: Mutex::new(Vec::new()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PostState> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiters(&self) -> std::sync::MutexGuard<'_, Vec<(u16, Arc<Wake>)>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn attach(&self, sqid: u16, wake: Arc<Wake>) {
        self.waiters().push((sqid, wake));
    }

    pub(crate) fn detach(&self, sqid: u16) {
        self.waiters().retain(|(id, _)| *id != sqid);
    }

    /// Whether a submission queue uses it.
    pub(crate) fn in_use(&self) -> bool {
        !self.waiters().is_empty()
    }

    pub(crate) fn head(&self) -> u32 {
        self.head.load(Ordering::Acquire)
    }

    pub(crate) fn tail(&self) -> u32 {
        self.tail.load(Ordering::Acquire)
    }

    /// How its completions are to be signalled.
    pub(crate) fn coalescing(&self) -> Coalescing {
        Coalescing(self.coalescing.load(Ordering::Relaxed))
    }

    /// Takes note of new features.
    pub(crate) fn follow(&self, features: &Features) {
        let coalescing = self.vector.map(|vector| features.coalescing(vector));
        let Coalescing(bits) = coalescing.unwrap_or_default();
        self.coalescing.store(bits, Ordering::Relaxed);
    }

    /// Entries that the host has not consumed.
    pub(crate) fn outstanding(&self) -> u32 {
        (self.tail() + self.entries - self.head()) % self.entries
    }

    /// Reserves a slot. `None` where the queue is full: the host's next head doorbell wakes the workers.
    pub(crate) fn reserve(&self) -> Option<Permit<'_>> {
        let mut post = self.lock();
        if !self.has_room(&post) {
            // Set first, then look again: a doorbell in between either sees it or has made room.
            self.starved.store(true, Ordering::SeqCst);
            if !self.has_room(&post) {
                return None;
            }
        }
        post.reserved += 1;
        Some(Permit { queue: self })
    }

    fn has_room(&self, post: &PostState) -> bool {
        let head = self.head.load(Ordering::SeqCst);
        let used = (self.tail() + self.entries - head) % self.entries;
        used + post.reserved < self.entries - 1
    }

    /// The doorbell register was written: the host has consumed entries up to `head`. With a shadow doorbell it is the
    /// workers' to look.
    pub(crate) fn ring(&self, head: u32) -> Result<(), InvalidDoorbell> {
        if self.shadow.is_used() && head < self.entries {
            self.wake_starved();
            return Ok(());
        }
        self.consumed(head)
    }

    /// Goes over to shadow doorbells, from others if it has any: what the host wrote there is nowhere else.
    pub(crate) fn adopt(
        &self,
        dma: &Dma,
        trace: &Trace,
        buffer: DoorbellBuffer,
    ) -> Result<(), DmaError> {
        // What cannot be reached, or cannot be, was not written.
        let _ = self.look(dma, trace);
        let which = Doorbell::Head(self.id);
        self.shadow.adopt(dma, trace, buffer, which, self.head())
    }

    /// As [`reserve`](Self::reserve); where the queue seems full, first looks how far the host has come, and if it is
    /// full asks the host to write the register.
    pub(crate) fn reserve_looking(
        &self,
        dma: &Dma,
        trace: &Trace,
    ) -> Result<Option<Permit<'_>>, ShadowError> {
        if let Some(permit) = self.reserve() {
            return Ok(Some(permit));
        }
        if !self.look(dma, trace)? {
            return Ok(None);
        }
        if let Some(permit) = self.reserve() {
            return Ok(Some(permit));
        }
        self.shadow.ask(dma, trace, self.head())?;
        self.look(dma, trace)?;
        Ok(self.reserve())
    }

    /// Looks at the shadow doorbell; `false` where there is none.
    fn look(&self, dma: &Dma, trace: &Trace) -> Result<bool, ShadowError> {
        if !self.shadow.is_used() {
            return Ok(false);
        }
        let _looking = crate::locks::lock(&self.looking);
        let Some(head) = self.shadow.look(dma, trace)? else {
            return Ok(false);
        };
        self.consumed(head)
            .map_err(|InvalidDoorbell| ShadowError::Invalid(head))?;
        Ok(true)
    }

    fn consumed(&self, head: u32) -> Result<(), InvalidDoorbell> {
        let consumed = head
            .checked_add(self.entries)
            .map(|h| (h - self.head()) % self.entries);
        if head >= self.entries || consumed.is_none_or(|c| c > self.outstanding()) {
            return Err(InvalidDoorbell);
        }
        self.head.store(head, Ordering::SeqCst);
        self.wake_starved();
        Ok(())
    }

    fn wake_starved(&self) {
        if self.starved.swap(false, Ordering::SeqCst) {
            for (_, wake) in self.waiters().iter() {
                wake.notify();
            }
        }
    }

    /// Writes a completion into the slot that `permit` holds. `before` is told where, while the host cannot know
    /// yet: what it records is there when the host sees the completion.
    ///
    /// One write of 16 bytes: the phase tag is in its last two, and becomes visible last.
    pub(crate) fn post(
        &self,
        dma: &Dma,
        permit: Permit<'_>,
        sq: &SubmissionQueue,
        reply: Reply,
        before: impl FnOnce(DmaRange),
    ) -> Result<(), DmaError> {
        {
            let mut post = self.lock();
            let tail = self.tail();
            let address = self.base + u64::from(tail) * 16;
            before(DmaRange {
                address,
                length: 16,
            });
            let completion = Completion {
                dw0: U32::new(reply.result),
                dw1: U32::new(0),
                sqhd: U16::new((sq.head() & 0xffff) as u16),
                sqid: U16::new(sq.id),
                cid: reply.cid,
                status_phase: Completion::pack_status(reply.status, post.phase),
            };
            // The tail goes first: a host that is quick to ring the head doorbell must find it moved.
            let next = (tail + 1) % self.entries;
            self.tail.store(next, Ordering::Release);
            if let Err(error) = dma.write(address, completion.as_bytes()) {
                self.tail.store(tail, Ordering::Release);
                return Err(error);
            }
            if next == 0 {
                post.phase = !post.phase;
            }
        }
        drop(permit);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_gives_no_permit_until_the_host_consumes() {
        let cq = CompletionQueue::new(1, 0x1000, 4, Some(1));
        let permits: Vec<_> = std::iter::from_fn(|| cq.reserve()).collect();
        assert_eq!(permits.len(), 3);
        drop(permits);
        assert!(cq.reserve().is_some());
    }

    #[test]
    fn doorbells_are_checked() {
        let cq = Arc::new(CompletionQueue::new(1, 0x1000, 4, None));
        assert_eq!(cq.ring(1), Err(InvalidDoorbell));
        assert_eq!(cq.ring(4), Err(InvalidDoorbell));
        assert_eq!(cq.ring(u32::MAX), Err(InvalidDoorbell));
        assert_eq!(cq.ring(0), Ok(()));
        let sq = SubmissionQueue::new(1, 0x2000, 8, cq, Arc::default());
        assert_eq!(sq.ring(8), Err(InvalidDoorbell));
        assert_eq!(sq.ring(7), Ok(()));
        assert!(!sq.is_empty());
    }
}
