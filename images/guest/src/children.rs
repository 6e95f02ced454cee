//! Starting processes and reaping them, in one place.
//!
//! Init must reap every orphan, and must not steal a child from code that waits for it. So nothing else
//! in the agent waits: a child is registered under the same lock under which it was forked, and the
//! reaper first looks (WNOWAIT), then takes the lock, then reaps. A pid that is still registered is thus
//! never another process's, which makes signalling it safe.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, waitpid};

use crate::protocol::Exit;
use crate::sys::wait_ended;

/// What children find in their environment where neither the caller nor the agent's own environment
/// says otherwise: the kernel gives init no PATH, and HOME=/.
const DEFAULTS: &[(&str, &str)] = &[
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
];

/// What to reap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaping {
    /// Every process that becomes ours: for init.
    Everything,
    /// Only children started here: for a process that has others.
    Own,
}

/// The registry of children; clones share it.
#[derive(Debug, Clone)]
pub struct Children {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    reaping: Reaping,
    running: Mutex<HashMap<i32, Arc<Ended>>>,
    changed: Condvar,
}

/// Tells that a child ended; its descriptor becomes readable then.
#[derive(Debug)]
pub struct Ended {
    event: OwnedFd,
    exit: OnceLock<Exit>,
}

impl Ended {
    /// How it ended, if it has.
    pub fn get(&self) -> Option<Exit> {
        self.exit.get().copied()
    }
}

impl AsFd for Ended {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A child that was started, with the pipes that its `Command` asked for.
#[derive(Debug)]
pub struct Started {
    /// Its process id and, if asked for, its process group.
    pub pid: i32,
    /// Its standard input.
    pub stdin: Option<ChildStdin>,
    /// Its standard output.
    pub stdout: Option<ChildStdout>,
    /// Its standard error.
    pub stderr: Option<ChildStderr>,
    /// Its end.
    pub ended: Arc<Ended>,
}

impl Children {
    /// An empty registry with its reaper.
    pub fn new(reaping: Reaping) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            reaping,
            running: Mutex::default(),
            changed: Condvar::new(),
        });
        if reaping == Reaping::Everything {
            let reaper = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("reaper".into())
                .spawn(move || reaper.reap_everything())?;
        }
        Ok(Self { shared })
    }

    /// Starts `command`; with `own_group`, as the leader of a new process group.
    pub fn spawn(&self, command: &mut Command, own_group: bool) -> io::Result<Started> {
        if own_group {
            command.process_group(0);
        }
        for (name, value) in DEFAULTS {
            let given = command.get_envs().any(|(known, _)| known == *name);
            if !given && std::env::var_os(name).is_none_or(|value| value.is_empty()) {
                command.env(name, value);
            }
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ended = Arc::new(Ended {
            event,
            exit: OnceLock::new(),
        });
        let (pid, started) = {
            let mut running = self.shared.lock();
            let mut child = command.spawn()?;
            let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
            running.insert(pid, Arc::clone(&ended));
            let started = Started {
                pid,
                stdin: child.stdin.take(),
                stdout: child.stdout.take(),
                stderr: child.stderr.take(),
                ended,
            };
            (pid, started)
        };
        self.shared.changed.notify_all();
        if self.shared.reaping == Reaping::Own {
            let shared = Arc::clone(&self.shared);
            std::thread::Builder::new()
                .name(format!("wait {pid}"))
                .spawn(move || {
                    let _ = wait_ended(Some(pid));
                    shared.reap(pid);
                })?;
        }
        Ok(started)
    }

    /// Sends `signal` to the process group of a child started with its own group; `NotFound` once it has
    /// ended.
    pub fn kill_group(&self, pid: i32, signal: i32) -> io::Result<()> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("no signal {signal}"));
        let signal = Signal::from_named_raw(signal).ok_or_else(invalid)?;
        let running = self.shared.lock();
        match Pid::from_raw(pid).filter(|_| running.contains_key(&pid)) {
            Some(group) => Ok(kill_process_group(group, signal)?),
            None => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the command has ended",
            )),
        }
    }

    /// Waits until no registered child runs; false if some still do after `limit`.
    pub fn wait_none(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut running = self.shared.lock();
        while !running.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            running = self
                .shared
                .changed
                .wait_timeout(running, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<Ended>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps until the process ends. Orphans only exist below children of ours, so having none
    /// means that nothing can need reaping until the next one is started.
    fn reap_everything(&self) {
        loop {
            match wait_ended(None) {
                Ok(pid) => self.reap(pid),
                Err(_) => {
                    let running = self.lock();
                    if running.is_empty() {
                        drop(self.changed.wait(running));
                    }
                }
            }
        }
    }

    fn reap(&self, pid: i32) {
        let mut running = self.lock();
        let Ok(Some((_, status))) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG) else {
            return;
        };
        let Some(ended) = running.remove(&pid) else {
            return;
        };
        let exit = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Status(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Status(-1),
        };
        let _ = ended.exit.set(exit);
        let _ = rustix::io::write(&ended.event, &1u64.to_ne_bytes());
        drop(running);
        self.changed.notify_all();
    }
}
