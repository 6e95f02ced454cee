//! One QEMU child and everything that watches it.
//!
//! | part           | what it owns                                                                   |
//! |----------------|--------------------------------------------------------------------------------|
//! | [`process`]    | the child: started so that it dies with us, its exit observed, its log         |
//! | [`qmp`]        | the monitor: commands, events, descriptors                                     |
//! | [`commands`]   | the monitor commands that the lab uses, by name                                |
//! | [`console`]    | the serial console: recorded from the first byte, scanned for kernel reports   |
//! | [`attach`]     | the console joined to a person's terminal                                      |
//! | [`fault`]      | the board on which whoever notices it first says what ended the guest          |
//! | [`snapshot`]   | saving a base image and starting from it                                       |
//!
//! [`Qemu`] puts them together. It knows nothing of topologies, artifacts or the guest agent's language:
//! it is given an argument vector and gives back a monitor, a console and the agent port's stream.
//!
//! No socket files: monitor, console and agent port are socket pairs whose far ends QEMU inherits, so
//! that nothing is left behind when this process is killed, and nobody else can connect.

pub mod attach;
pub mod commands;
pub mod console;
mod die_with_us;
pub mod fault;
pub mod process;
pub mod qmp;
mod scan;
pub mod snapshot;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::wait::{self, Deadline};
use console::Console;
use fault::{Fault, Faults};
use process::{Child, Spawn, SpawnError};
use qmp::{Qmp, QmpError};

/// Why a QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It started and its monitor did not come up.
    #[error("QEMU's monitor: {0}")]
    Qmp(#[from] QmpError),
    /// The host refused a socket pair, a thread or a log file.
    #[error("cannot prepare QEMU's start: {0}")]
    Io(#[from] io::Error),
}

/// Three socket pairs between us and a QEMU that is about to start.
///
/// The chardev ids are `qmp`, `agent` and `console`. The monitor is already connected to its chardev;
/// the lab connects the other two: `-serial chardev:console`, `-device virtserialport,chardev=agent,...`.
#[derive(Debug)]
pub struct Links {
    ours: [UnixStream; 3],
    theirs: [OwnedFd; 3],
}

impl Links {
    /// Opens the socket pairs; all six ends are close-on-exec until the child takes its three.
    pub fn new() -> io::Result<Self> {
        let [qmp, agent, console] = [
            UnixStream::pair()?,
            UnixStream::pair()?,
            UnixStream::pair()?,
        ];
        Ok(Self {
            ours: [qmp.0, agent.0, console.0],
            theirs: [qmp.1.into(), agent.1.into(), console.1.into()],
        })
    }

    /// The arguments that make QEMU use them.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Vec::new();
        for (id, end) in ["qmp", "agent", "console"].into_iter().zip(&self.theirs) {
            arguments.push("-chardev".into());
            arguments.push(format!("socket,id={id},fd={}", end.as_raw_fd()).into());
        }
        // QEMU 11.1 warns that -mon is deprecated in favour of this.
        arguments.extend(["-object", "monitor-qmp,id=monitor,chardev=qmp"].map(OsString::from));
        arguments
    }
}

/// A running QEMU with its monitor and console. Dropping it kills and reaps the child.
#[derive(Debug)]
pub struct Qemu {
    /// The child process.
    pub child: Arc<Child>,
    /// The monitor, capabilities negotiated.
    pub qmp: Qmp,
    /// The serial console.
    pub console: Console,
    /// What went wrong, by whoever noticed first.
    pub faults: Faults,
    agent: Option<UnixStream>,
}

impl Qemu {
    /// Starts QEMU: `argv` is the whole command line, including [`Links::arguments`] of `links`.
    ///
    /// `log` receives stdout and stderr, `console_log` the serial console. Returns when the monitor
    /// answers; a QEMU that exits instead fails with its status and last words at once.
    pub fn start(
        argv: Vec<OsString>,
        links: Links,
        log: &Path,
        console_log: &Path,
    ) -> Result<Self, StartError> {
        let deadline = Deadline::new("QEMU's monitor to greet", wait::QEMU_START);
        let Links {
            ours: [monitor, agent, console],
            theirs,
        } = links;
        let faults = Faults::new();
        let console = Console::start(console, console_log, faults.clone())?;
        let spawn = Spawn {
            name: "QEMU".into(),
            argv,
            inherit: theirs.into(),
            log: log.into(),
        };
        let child = Arc::new(spawn.start()?);
        watch_exit(&child, &console, &faults)?;
        let last_words = faults.clone();
        let qmp = Qmp::connect(
            monitor,
            move || {
                // The monitor's end is the symptom; its cause is on the board a moment later.
                let cause = Deadline::new("QEMU's exit status", Duration::from_secs(10));
                match last_words.wait(&cause) {
                    Ok(fault) => fault.to_string(),
                    Err(_) => "QEMU closed its monitor and goes on running".to_owned(),
                }
            },
            &deadline,
        )?;
        Ok(Self {
            child,
            qmp,
            console,
            faults,
            agent: Some(agent),
        })
    }

    /// The agent port's stream, once: whoever takes it owns it.
    pub fn take_agent(&mut self) -> Option<UnixStream> {
        self.agent.take()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.child.kill();
        if let Err(error) = self.child.wait(&Deadline::new("QEMU's end", wait::KILL)) {
            tracing::error!(pid = self.child.pid(), "{error}");
        }
    }
}

/// Puts the child's exit on the board, after the console has been read to its end: a kernel panic that
/// makes QEMU exit is reported as the panic.
fn watch_exit(child: &Arc<Child>, console: &Console, faults: &Faults) -> io::Result<()> {
    let (child, console, faults) = (Arc::clone(child), console.clone(), faults.clone());
    std::thread::Builder::new()
        .name("qemu-exit".into())
        .spawn(move || {
            let Ok(status) = child.wait_forever() else {
                return;
            };
            let drained = Deadline::new("the console's end", Duration::from_secs(1));
            if let Err(error) = console.wait_closed(&drained) {
                tracing::warn!("{error}");
            }
            faults.raise(Fault::QemuExited {
                status,
                log_tail: child.log_tail(process::TAIL_LINES),
                known: faults.notes(),
            });
        })?;
    Ok(())
}
