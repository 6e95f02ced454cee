//! The gate that every I/O command passes: a sanitize operation closes it, and waits for those inside.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::spec::command::io;
use crate::spec::status::Status;

#[derive(Debug)]
pub(crate) struct Gate {
    /// Status that commands are refused with; 0 while the gate is open.
    refusal: AtomicU16,
    /// Commands inside.
    inside: AtomicU32,
    busy: Busy,
}

/// Time in which there was at least one command inside, in nanoseconds. Commands that come and go at the same
/// instant may err about who begins and who ends it: it is a statistic, and takes no lock.
#[derive(Debug)]
struct Busy {
    epoch: Instant,
    since: AtomicU64,
    total: AtomicU64,
}

impl Busy {
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn begin(&self) {
        self.since.store(self.now(), Ordering::Relaxed);
    }
}

/// A command inside, until it is dropped.
pub(crate) struct Passage<'a>(Option<&'a Gate>);

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            refusal: AtomicU16::new(0),
            inside: AtomicU32::new(0),
            busy: Busy {
                epoch: Instant::now(),
                since: AtomicU64::new(0),
                total: AtomicU64::new(0),
            },
        }
    }

    /// Lets an I/O command in, unless the gate is closed. Flush always passes: it does no harm (NVM 5.9), and nobody
    /// waits for one that comes late.
    pub(crate) fn enter(&self, opcode: u8) -> Result<Passage<'_>, Status> {
        if opcode == io::FLUSH && self.refusal().is_some() {
            return Ok(Passage(None));
        }
        let alone = self.inside.load(Ordering::Relaxed) == 0;
        if alone {
            self.busy.begin();
        }
        // Counted first, then looked: who closes the gate in between sees the count.
        if self.inside.fetch_add(1, Ordering::SeqCst) == 0 && !alone {
            self.busy.begin();
        }
        let passage = Passage(Some(self));
        self.refusal().map_or(Ok(passage), Err)
    }

    /// What commands are refused with, if the gate is closed.
    pub(crate) fn refusal(&self) -> Option<Status> {
        let status = Status(self.refusal.load(Ordering::SeqCst));
        (!status.is_success()).then_some(status)
    }

    pub(crate) fn close(&self, refusal: Status) {
        self.refusal.store(refusal.0, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.refusal.store(Status::SUCCESS.0, Ordering::SeqCst);
    }

    /// Whether nobody is inside.
    pub(crate) fn is_empty(&self) -> bool {
        self.inside.load(Ordering::SeqCst) == 0
    }

    /// How long the controller was busy with I/O commands.
    pub(crate) fn busy_time(&self) -> Duration {
        let running = if self.is_empty() {
            0
        } else {
            let since = self.busy.since.load(Ordering::Relaxed);
            self.busy.now().saturating_sub(since)
        };
        let total = self.busy.total.load(Ordering::Relaxed);
        Duration::from_nanos(total.saturating_add(running))
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let Some(gate) = self.0 else { return };
        // Looked at while this one is still counted: nobody begins another busy time before.
        let since = gate.busy.since.load(Ordering::Relaxed);
        if gate.inside.fetch_sub(1, Ordering::SeqCst) == 1 {
            let time = gate.busy.now().saturating_sub(since);
            gate.busy.total.fetch_add(time, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_keeps_all_but_flush_out_and_some_in() {
        let gate = Gate::new();
        let read = gate.enter(io::READ).ok();
        gate.close(Status::SANITIZE_IN_PROGRESS);
        assert_eq!(
            gate.enter(io::READ).err(),
            Some(Status::SANITIZE_IN_PROGRESS)
        );
        assert!(!gate.is_empty());
        drop(read);
        let flush = gate.enter(io::FLUSH);
        assert!(flush.is_ok() && gate.is_empty());
        gate.open();
        assert!(gate.enter(io::WRITE).is_ok());
    }

    #[test]
    fn busy_is_the_time_of_any_command() {
        let gate = Gate::new();
        let times = || gate.busy_time().as_millis();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(times(), 0);
        let first = gate.enter(io::READ);
        let second = gate.enter(io::READ);
        std::thread::sleep(Duration::from_millis(20));
        drop(first);
        assert!(times() >= 20);
        drop(second);
        let total = times();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(times(), total);
    }
}
