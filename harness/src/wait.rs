//! Waiting: every wait in the lab has a deadline, and a deadline knows what it waits for.
//!
//! A bare `Duration` makes failures that read "timed out". A [`Deadline`] is made where the wait begins,
//! is passed down through every layer that takes part in it, and yields a [`DeadlineExceeded`] that
//! names the thing that did not happen and how long it was given.

use std::borrow::Cow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};

/// Cold boot to a ready agent. An idle machine needs 8 to 13 s under TCG; a loaded CI machine far more.
pub const BOOT: Duration = Duration::from_secs(120);
/// QEMU's start: from exec to QMP's greeting.
pub const QEMU_START: Duration = Duration::from_secs(30);
/// An ordinary QMP command's answer.
pub const QMP_COMMAND: Duration = Duration::from_secs(20);
/// Writing a base image.
pub const SNAPSHOT_SAVE: Duration = Duration::from_secs(60);
/// Loading a base image into a new QEMU (0.1 s on an idle machine).
pub const SNAPSHOT_RESTORE: Duration = Duration::from_secs(30);
/// A restored guest's first answer.
pub const RESTORED_AGENT: Duration = Duration::from_secs(30);
/// A guest command, unless its caller says otherwise.
pub const AGENT_COMMAND: Duration = Duration::from_secs(30);
/// Hot-add until the guest's driver has bound, or hot-remove until QEMU has let go of the device.
pub const HOTPLUG: Duration = Duration::from_secs(30);
/// Orderly power-off of the guest.
pub const SHUTDOWN: Duration = Duration::from_secs(30);
/// A killed process's end. Only a process stuck in the host's kernel needs longer.
pub const KILL: Duration = Duration::from_secs(5);

/// A wait that ended without what it waited for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("waited {:.1} s for {what}, in vain", after.as_secs_f64())]
pub struct DeadlineExceeded {
    /// What was waited for, as the object of a sentence: "the guest agent's greeting".
    pub what: String,
    /// How long it was given.
    pub after: Duration,
}

/// A point in time by which something named must have happened.
#[derive(Debug, Clone)]
pub struct Deadline {
    what: Cow<'static, str>,
    since: Instant,
    allowed: Duration,
}

impl Deadline {
    /// A deadline `allowed` from now for `what`, the object of "waited for".
    pub fn new(what: impl Into<Cow<'static, str>>, allowed: Duration) -> Self {
        Self {
            what: what.into(),
            since: Instant::now(),
            allowed,
        }
    }

    /// The same point in time for a part of the wait, under the part's own name.
    pub fn part(&self, what: impl Into<Cow<'static, str>>) -> Self {
        Self {
            what: what.into(),
            ..self.clone()
        }
    }

    /// What is waited for.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// When the wait began.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The time left, zero once the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.allowed.saturating_sub(self.since.elapsed())
    }

    /// The time left, or the error once there is none.
    pub fn check(&self) -> Result<Duration, DeadlineExceeded> {
        match self.remaining() {
            Duration::ZERO => Err(self.exceeded()),
            left => Ok(left),
        }
    }

    /// The error that says that this deadline has passed.
    pub fn exceeded(&self) -> DeadlineExceeded {
        DeadlineExceeded {
            what: self.what.to_string(),
            after: self.allowed,
        }
    }
}

/// Locks, also after another thread panicked while it held the lock: what is behind these locks is only
/// ever replaced whole, and the panic that matters is the first.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `changed` until `found` makes something of the state behind `mutex`.
pub fn wait_for<T, R>(
    mutex: &Mutex<T>,
    changed: &Condvar,
    deadline: &Deadline,
    mut found: impl FnMut(&mut T) -> Option<R>,
) -> Result<R, DeadlineExceeded> {
    let mut state = lock(mutex);
    loop {
        // The state is looked at before the clock: what has already happened is never reported as late.
        if let Some(result) = found(&mut state) {
            return Ok(result);
        }
        let left = deadline.check()?;
        state = changed
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

/// Polls `fds` for at most `timeout`, across signals. Returns how many are ready, 0 if none became so.
pub fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) -> std::io::Result<usize> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_exceeded_deadline_names_what_and_how_long() {
        let deadline = Deadline::new("the kettle", Duration::from_millis(5));
        let state = Mutex::new(());
        let error = wait_for(&state, &Condvar::new(), &deadline, |()| None::<()>).unwrap_err();
        assert_eq!(error.what, "the kettle");
        assert_eq!(error.after, Duration::from_millis(5));
        assert_eq!(error.to_string(), "waited 0.0 s for the kettle, in vain");
        assert_eq!(deadline.remaining(), Duration::ZERO);
    }

    #[test]
    fn what_has_happened_is_found_even_after_the_deadline() {
        let deadline = Deadline::new("nothing", Duration::ZERO);
        let found = wait_for(&Mutex::new(7), &Condvar::new(), &deadline, |n| Some(*n));
        assert_eq!(found, Ok(7));
    }

    #[test]
    fn a_notification_ends_the_wait() {
        let shared = Arc::new((Mutex::new(false), Condvar::new()));
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            *lock(&theirs.0) = true;
            theirs.1.notify_all();
        });
        let deadline = Deadline::new("the flag", Duration::from_secs(20));
        wait_for(&shared.0, &shared.1, &deadline, |set| set.then_some(())).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn a_part_keeps_the_end_of_the_whole() {
        let whole = Deadline::new("boot", Duration::from_secs(100));
        let part = whole.part("the greeting");
        assert_eq!(part.since(), whole.since());
        assert_eq!(part.exceeded().what, "the greeting");
    }
}
