//! When the transport's thread looks for commands instead of sleeping.
//!
//! A host that has just got a completion often sends the next command within a tenth of a millisecond, and on an
//! emulated or virtual machine to wake a sleeping thread takes a good part of that. So after work the transport's
//! thread stays awake for [`WINDOW`], if it paid the last time: if the command before came within as much. It looks at
//! shadow doorbells, each look a read that is counted as traffic; an idle controller does neither.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long after the last work to stay awake.
const WINDOW: Duration = Duration::from_micros(200);

/// Time between two looks at shadow doorbells.
const LOOK_EVERY: Duration = Duration::from_micros(3);

/// Whether to stay awake, and since when.
#[derive(Debug)]
pub(crate) struct Polling {
    zero: Instant,
    /// The transport polls at all.
    used: AtomicBool,
    /// It paid the last time.
    pays: AtomicBool,
    /// When a command was executed last, and when doorbells were looked at, in nanoseconds since `zero`.
    worked: AtomicU64,
    looked: AtomicU64,
    /// Queues have been left without asking for a doorbell.
    unasked: AtomicBool,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Look at the doorbells, and come again.
    Look,
    /// Come again.
    Wait,
    /// Ask for doorbells, and sleep.
    Sleep,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            zero: Instant::now(),
            used: AtomicBool::new(false),
            pays: AtomicBool::new(false),
            worked: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            unasked: AtomicBool::new(false),
        }
    }
}

impl Polling {
    fn now(&self) -> u64 {
        // Wraps after 584 years.
        self.zero.elapsed().as_nanos() as u64
    }

    /// Commands were executed, or are about to be: a command has come.
    pub(crate) fn command(&self) {
        let gap = self
            .now()
            .saturating_sub(self.worked.load(Ordering::Relaxed));
        self.pays.store(gap <= nanos(WINDOW), Ordering::Relaxed);
    }

    /// All that there was is done.
    pub(crate) fn done(&self) {
        self.worked.store(self.now(), Ordering::Relaxed);
    }

    /// Whether a queue may be left without asking for a doorbell: the transport will look.
    pub(crate) fn will_look(&self) -> bool {
        let will = self.used.load(Ordering::Relaxed) && self.pays.load(Ordering::Relaxed);
        if will {
            self.unasked.store(true, Ordering::Relaxed);
        }
        will
    }

    /// The transport asks what to do.
    pub(crate) fn next(&self) -> Next {
        self.used.store(true, Ordering::Relaxed);
        let now = self.now();
        let since = |then: &AtomicU64| now.saturating_sub(then.load(Ordering::Relaxed));
        if !self.pays.load(Ordering::Relaxed) || since(&self.worked) > nanos(WINDOW) {
            return Next::Sleep;
        }
        if since(&self.looked) < nanos(LOOK_EVERY) {
            return Next::Wait;
        }
        self.looked.store(now, Ordering::Relaxed);
        Next::Look
    }

    /// Whether queues have been left without asking, for the last time.
    pub(crate) fn take_unasked(&self) -> bool {
        self.unasked.swap(false, Ordering::Relaxed)
    }
}

const fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}
