//! The interactive shell on the serial console.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use p2plab_guest::children::Children;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::boot::{Options, say};

/// First argument of the agent's own program when it shall become the shell on a terminal: a fresh process
/// can set up session and terminal in safe code, where a forked one could not.
pub const ARGUMENT: &str = "--shell-on";

/// First argument of the agent's own program when it shall wait for the end of the shell that is on the
/// console now: the harness runs it to learn that a person has typed `exit`.
pub const AWAIT_ARGUMENT: &str = "--await-shell";

/// Process id of the shell on the console.
const PID_FILE: &str = "/run/p2plab-shell.pid";

/// Keeps a shell running.
#[derive(Debug)]
pub struct Console {
    children: Children,
    stopping: AtomicBool,
}

impl Console {
    /// Starts the shell and a thread that starts it again when it ends.
    pub fn start(children: Children, options: &Options) -> Arc<Self> {
        let console = Arc::new(Self {
            children,
            stopping: AtomicBool::new(false),
        });
        let terminal = format!("/dev/{}", options.console);
        if options.console == "none" || !Path::new(&terminal).exists() {
            say(format_args!(
                "no shell on the console {:?}",
                options.console
            ));
            return console;
        }
        let keeper = Arc::clone(&console);
        let thread = std::thread::Builder::new().name("console".into());
        if let Err(error) = thread.spawn(move || keeper.keep(&terminal)) {
            say(format_args!("cannot keep a shell on the console: {error}"));
        }
        console
    }

    /// Starts no further shell.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    fn keep(&self, terminal: &str) {
        while !self.stopping.load(Ordering::SeqCst) {
            let begun = Instant::now();
            let mut command = Command::new("/proc/self/exe");
            command.args([ARGUMENT, terminal]);
            match self.children.spawn(&mut command, false) {
                Ok(shell) => {
                    if let Err(error) = std::fs::write(PID_FILE, shell.pid.to_string()) {
                        say(format_args!("cannot write {PID_FILE}: {error}"));
                    }
                    while shell.ended.get().is_none() {
                        let _ = poll(&mut [PollFd::new(&shell.ended, PollFlags::IN)], None);
                    }
                }
                Err(error) => say(format_args!("cannot start a shell on {terminal}: {error}")),
            }
            // A shell that ends at once must not take the machine for itself.
            if begun.elapsed() < Duration::from_secs(1) {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}

/// Turns this process into a login shell that leads a session with `terminal` as its own.
pub fn become_shell(terminal: &str) -> ! {
    let error = match take_terminal(terminal) {
        Ok(()) => Command::new("/bin/sh")
            .arg("-l")
            .env("TERM", "linux")
            .exec(),
        Err(error) => error.into(),
    };
    say(format_args!("cannot run a shell on {terminal}: {error}"));
    std::process::exit(1);
}

/// Writes a line once it watches the shell on the console, and returns when that has ended.
pub fn await_shell() -> std::io::Result<()> {
    let pid = std::fs::read_to_string(PID_FILE)?;
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| std::io::Error::other(format!("{PID_FILE} holds no number")))?;
    let shell = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(shell) => shell,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    println!("waiting");
    loop {
        match poll(&mut [PollFd::new(&shell, PollFlags::IN)], None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn take_terminal(terminal: &str) -> rustix::io::Result<()> {
    rustix::process::setsid()?;
    let tty = rustix::fs::open(terminal, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
    rustix::process::ioctl_tiocsctty(&tty)?;
    rustix::stdio::dup2_stdin(&tty)?;
    rustix::stdio::dup2_stdout(&tty)?;
    rustix::stdio::dup2_stderr(&tty)
}
