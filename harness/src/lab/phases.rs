//! Where the time of a start goes.

use std::time::{Duration, Instant};

/// A part of a lab's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// What happened in it.
    pub name: &'static str,
    /// How long it took.
    pub took: Duration,
}

/// Divides the time since it was made into phases.
pub(super) struct Phases {
    since: Instant,
    done: Vec<Phase>,
}

impl Phases {
    pub(super) fn begin(since: Instant) -> Self {
        Self {
            since,
            done: Vec::new(),
        }
    }

    /// Ends a phase; the next begins.
    pub(super) fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.done.push(Phase {
            name,
            took: now.saturating_duration_since(self.since),
        });
        self.since = now;
    }

    pub(super) fn into_vec(self) -> Vec<Phase> {
        self.done
    }
}
