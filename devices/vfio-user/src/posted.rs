//! What of a client's messages has been done: peers that read the function's memory wait for writes that came before.

use std::cell::Cell;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use p2plab_pcie::Posted;

/// How long a peer waits at most.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long it does on a thread that serves a client itself: two of those may wait for each other.
const SERVING_PATIENCE: Duration = Duration::from_micros(200);

/// Time in which a peer looks again and again before it begins to sleep in between.
const AWAKE: Duration = Duration::from_micros(50);

thread_local! {
    /// This thread serves a client.
    static SERVING: Cell<bool> = const { Cell::new(false) };
}

/// Says that this thread serves clients.
pub(crate) fn serving() {
    SERVING.set(true);
}

/// How far the messages of a client have come, in bytes since it connected.
#[derive(Debug)]
pub(crate) struct Progress {
    stream: UnixStream,
    /// Bytes are being taken from the socket: they are neither there nor counted.
    taking: AtomicBool,
    taken: AtomicU64,
    /// What these bytes ask for has been done, as far as memory is concerned.
    delivered: AtomicU64,
    /// What `delivered` was when somebody waited in vain: nobody waits again until it has moved.
    stuck: AtomicU64,
}

impl Progress {
    pub(crate) fn new(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self {
            stream: stream.try_clone()?,
            taking: AtomicBool::new(false),
            taken: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            stuck: AtomicU64::new(u64::MAX),
        })
    }

    /// Takes bytes from the socket, by `take`, which does not wait for any and returns how many there were.
    pub(crate) fn take<E>(&self, take: impl FnOnce() -> Result<usize, E>) -> Result<usize, E> {
        self.taking.store(true, Ordering::SeqCst);
        let result = take();
        if let Ok(count) = &result {
            self.taken.fetch_add(*count as u64, Ordering::SeqCst);
        }
        self.taking.store(false, Ordering::SeqCst);
        result
    }

    /// All up to byte `position` has been done.
    pub(crate) fn delivered(&self, position: u64) {
        self.delivered.store(position, Ordering::Release);
    }

    /// Bytes that have arrived so far; `None` while it cannot be said.
    fn arrived(&self) -> Option<u64> {
        let taking = || self.taking.load(Ordering::SeqCst);
        let before = self.taken.load(Ordering::SeqCst);
        if taking() {
            return None;
        }
        // A socket that cannot tell has nothing more to deliver.
        let waiting = rustix::io::ioctl_fionread(&self.stream).unwrap_or(0);
        let same = !taking() && self.taken.load(Ordering::SeqCst) == before;
        same.then(|| before.wrapping_add(waiting))
    }

    fn has_delivered(&self, position: u64) -> bool {
        let ahead = self
            .delivered
            .load(Ordering::Acquire)
            .wrapping_sub(position);
        ahead < 1 << 63
    }
}

impl Posted for Progress {
    fn is_delivered(&self) -> bool {
        self.arrived()
            .is_some_and(|arrived| self.has_delivered(arrived))
    }

    fn wait(&self) {
        let begun = Instant::now();
        let patience = if SERVING.get() {
            SERVING_PATIENCE
        } else {
            PATIENCE
        };
        let mut target = None;
        let is_stuck =
            || self.stuck.load(Ordering::Relaxed) == self.delivered.load(Ordering::Acquire);
        while !is_stuck() {
            target = target.or_else(|| self.arrived());
            let waited = begun.elapsed();
            if target.is_some_and(|target| self.has_delivered(target)) {
                return;
            }
            if waited >= patience {
                // A thread that serves a client gives up early, and says nothing of how long others may wait.
                if !SERVING.get() {
                    let delivered = self.delivered.load(Ordering::Acquire);
                    self.stuck.store(delivered, Ordering::Relaxed);
                }
                return;
            }
            if waited < AWAKE {
                std::thread::yield_now();
            } else {
                std::thread::sleep(AWAKE);
            }
        }
    }
}
