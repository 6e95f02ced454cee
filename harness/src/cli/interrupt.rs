//! Ctrl-C and SIGTERM: they end what is under way through the ordinary error path, so that everything that
//! cleans up behind itself does, and end the process soon in any case.

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::CliError;

/// What the ordinary error path gets before the process just exits.
const GRACE: Duration = Duration::from_secs(3);
/// Between two looks for children: the error path may start one more before it notices.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The signal that asked us to end; 0 for none.
static ENDED_BY: AtomicI32 = AtomicI32::new(0);

fn failed(error: std::io::Error) -> CliError {
    CliError::Failed(format!("cannot watch for signals: {error}"))
}

/// From here on a signal kills our children (QEMU, apt-get). Whoever waits for one of them then fails at
/// once, its error travels up through all that must be tidied, and [`exit_code`] replaces it in the end.
/// A second signal, or [`GRACE`], ends the process whatever it is doing; the kernel kills its children.
pub(super) fn end_on_signals() -> Result<(), CliError> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let watch = move || {
        for signal in signals.forever() {
            if ENDED_BY.swap(signal, Ordering::SeqCst) != 0 {
                std::process::exit(128 + signal);
            }
            let ending = std::thread::Builder::new().name("ending".into());
            if ending.spawn(move || end(signal)).is_err() {
                std::process::exit(128 + signal);
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(watch).map(drop).map_err(failed)
}

fn end(signal: i32) {
    let since = Instant::now();
    while since.elapsed() < GRACE {
        for child in children() {
            kill_child(child);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    std::process::exit(128 + signal);
}

/// Process ids of our children.
fn children() -> Vec<Pid> {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let lists = threads
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("children")).ok());
    lists
        .flat_map(|list| {
            let pids = list.split_ascii_whitespace();
            pids.filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
                .collect::<Vec<_>>()
        })
        .collect()
}

fn kill_child(pid: Pid) {
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    // The number might have become another process's before it was opened; afterwards it cannot.
    if children().contains(&pid) {
        let _ = pidfd_send_signal(pidfd.as_fd(), Signal::KILL);
    }
}

/// The exit status that a shell gives a program ended by a signal, if one has asked us to end.
pub(super) fn exit_code() -> Option<ExitCode> {
    let signal = ENDED_BY.load(Ordering::SeqCst);
    let status = u8::try_from(signal).ok()?.checked_add(128)?;
    (signal != 0).then(|| ExitCode::from(status))
}

/// Waits for one of the signals, for a command that such a signal ends in the regular way. They end nothing
/// by themselves any more.
#[derive(Debug)]
pub(super) struct Interrupt {
    signals: Signals,
}

impl Interrupt {
    /// Takes the signals over.
    pub(super) fn new() -> Result<Self, CliError> {
        let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
        Ok(Self { signals })
    }

    /// Waits for one of them.
    pub(super) fn wait(&mut self) {
        self.signals.forever().next();
    }
}
