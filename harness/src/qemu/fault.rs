//! What ended or hurt the guest, on one board.
//!
//! A guest that panics makes the agent fall silent, the monitor close and the boot wait run on, each of
//! which would be reported as something else. So whoever sees the cause (the console's scanner, the
//! watcher of QEMU's exit, the agent client) puts it on [`Faults`], and every waiter looks there.

use std::fmt;
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex};

use crate::wait::{self, Deadline, DeadlineExceeded, lock};

/// What kind of report the guest's kernel made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// RCU stall: a CPU has not passed through a quiescent state for 21 s (default).
    RcuStall,
    /// A task has been blocked for more than 40 s (the lab's setting; the kernel's default is 120 s).
    HungTask,
    /// A CPU did not schedule for more than 20 s (default).
    SoftLockup,
    /// A CPU took no interrupts for more than 10 s (default).
    HardLockup,
    /// `BUG: ` or `kernel BUG at`.
    Bug,
    /// `Oops: `, general protection fault and their like.
    Oops,
    /// Kernel panic.
    Panic,
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RcuStall => "RCU stall",
            Self::HungTask => "hung task",
            Self::SoftLockup => "soft lockup",
            Self::HardLockup => "hard lockup",
            Self::Bug => "kernel BUG",
            Self::Oops => "kernel oops",
            Self::Panic => "kernel panic",
        })
    }
}

/// A kernel report seen on the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFault {
    /// The gravest kind that the report contains.
    pub kind: FaultKind,
    /// The line that named it.
    pub line: String,
    /// The console's last lines, up to the report's end.
    pub tail: Vec<String>,
}

/// The first thing that went wrong.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The guest's kernel reported it.
    Guest(GuestFault),
    /// QEMU is gone, for better or worse.
    QemuExited {
        /// Its exit status, or the signal that ended it.
        status: ExitStatus,
        /// The last lines of qemu.log.
        log_tail: Vec<String>,
        /// What was known before that explains it; see [`Faults::note`].
        known: Vec<String>,
    },
    /// Seen by somebody else, in one sentence: the agent is lost, a device's server died.
    Other(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (source, tail) = match self {
            Self::Guest(GuestFault { kind, line, tail }) => {
                write!(f, "{kind} in the guest: {line}")?;
                ("console", tail)
            }
            Self::QemuExited {
                status,
                log_tail,
                known,
            } => {
                write!(f, "QEMU has ended ({status})")?;
                known.iter().try_for_each(|note| write!(f, "; {note}"))?;
                ("qemu.log", log_tail)
            }
            Self::Other(sentence) => return f.write_str(sentence),
        };
        if !tail.is_empty() {
            write!(f, "\nThe last {} lines of {source}:", tail.len())?;
        }
        tail.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}

impl std::error::Error for Fault {}

impl Fault {
    /// Whether it is none: QEMU ended in order, as when its guest powers off.
    pub fn is_power_off(&self) -> bool {
        matches!(self, Self::QemuExited { status, .. } if status.success())
    }
}

type Subscriber = Arc<dyn Fn(&Arc<Fault>) + Send + Sync>;

#[derive(Default)]
struct Board {
    first: Option<Arc<Fault>>,
    subscribers: Vec<Subscriber>,
    notes: Vec<String>,
}

/// The board: keeps the first fault and tells everybody. Clones share it.
#[derive(Clone, Default)]
pub struct Faults {
    board: Arc<(Mutex<Board>, Condvar)>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("first", &self.first())
            .finish_non_exhaustive()
    }
}

impl Faults {
    /// An empty board.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a fault on the board. Only the first stays: what follows is its consequence.
    pub fn raise(&self, fault: Fault) {
        let fault = Arc::new(fault);
        let subscribers = {
            let mut board = lock(&self.board.0);
            if board.first.is_some() {
                tracing::debug!("a further fault: {fault}");
                return;
            }
            board.first = Some(Arc::clone(&fault));
            self.board.1.notify_all();
            board.subscribers.clone()
        };
        // Unlocked: a subscriber takes locks under which others look at the board.
        subscribers.iter().for_each(|subscriber| subscriber(&fault));
    }

    /// Remembers what will explain QEMU's end, should it come: that somebody stopped a device's server.
    pub fn note(&self, sentence: impl Into<String>) {
        lock(&self.board.0).notes.push(sentence.into());
    }

    /// What was noted so far.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.board.0).notes.clone()
    }

    /// The fault, if there is one.
    pub fn first(&self) -> Option<Arc<Fault>> {
        lock(&self.board.0).first.clone()
    }

    /// Takes the fault off the board: for a scenario that provoked an oops and goes on.
    pub fn clear(&self) -> Option<Arc<Fault>> {
        lock(&self.board.0).first.take()
    }

    /// Calls `subscriber` for every first fault, at once if there is one already.
    ///
    /// It runs on the thread that noticed the fault and must be brief.
    pub fn subscribe(&self, subscriber: impl Fn(&Arc<Fault>) + Send + Sync + 'static) {
        let subscriber: Subscriber = Arc::new(subscriber);
        let first = {
            let mut board = lock(&self.board.0);
            board.subscribers.push(Arc::clone(&subscriber));
            board.first.clone()
        };
        if let Some(fault) = first {
            subscriber(&fault);
        }
    }

    /// Waits for a fault.
    pub fn wait(&self, deadline: &Deadline) -> Result<Arc<Fault>, DeadlineExceeded> {
        wait::wait_for(&self.board.0, &self.board.1, deadline, |board| {
            board.first.clone()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_first_fault_stays_and_everybody_hears_of_it_once() {
        let faults = Faults::new();
        let heard = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&heard);
        faults.subscribe(move |_| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        faults.raise(Fault::Other("first".into()));
        faults.raise(Fault::Other("second".into()));
        assert_eq!(faults.first().unwrap().to_string(), "first");
        assert_eq!(heard.load(Ordering::SeqCst), 1);
        let count = Arc::clone(&heard);
        faults.subscribe(move |_| {
            count.fetch_add(10, Ordering::SeqCst);
        });
        assert_eq!(
            heard.load(Ordering::SeqCst),
            11,
            "a late subscriber hears at once"
        );
    }

    #[test]
    fn a_guest_fault_reads_as_what_it_is_with_its_lines() {
        let fault = Fault::Guest(GuestFault {
            kind: FaultKind::Panic,
            line: "Kernel panic - not syncing: x".into(),
            tail: vec!["a".into(), "b".into()],
        });
        assert_eq!(
            fault.to_string(),
            "kernel panic in the guest: Kernel panic - not syncing: x\n\
             The last 2 lines of console:\n    a\n    b"
        );
    }
}
