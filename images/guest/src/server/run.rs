//! One running command: its pipes, its deadline, its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Shared, Stale};
use crate::children::Started;
use crate::protocol::{Bytes, ErrorKind, Exit, MAX_CHUNK, Reply, Run};

/// How long a killed command may take to end before its end is reported regardless (a process in an
/// uninterruptible wait does not end).
const KILL_GRACE: Duration = Duration::from_secs(2);

/// Chunks read from each pipe after the end: all that the largest pipe (1 MiB) can hold, but not for ever,
/// for a process left behind may go on writing.
const ROUNDS_AFTER_END: u32 = (1 << 20) / MAX_CHUNK as u32 + 1;

/// Runs a command to its end and reports it.
pub(super) fn run(shared: &Shared, session: u64, id: u64, run: Run) {
    let name = run.argv.first().cloned().unwrap_or_default();
    let deadline_ms = run.deadline_ms;
    let result = start(shared, session, id, run).and_then(|mut running| {
        running.deadline =
            deadline_ms.and_then(|limit| Instant::now().checked_add(Duration::from_millis(limit)));
        running.pump(shared, session, id)
    });
    {
        // A hello may have emptied the table, and the id may be in use again since.
        let mut commands = shared.commands();
        if shared.session.load(std::sync::atomic::Ordering::SeqCst) == session {
            commands.remove(&id);
        }
    }
    match result {
        Ok(Some(exit)) => drop(shared.send(session, id, Reply::Exit(exit))),
        Ok(None) => {}
        Err(error) => {
            shared.error(
                session,
                id,
                ErrorKind::System,
                format!("cannot run {name:?}: {error}"),
            );
        }
    }
}

/// A stream of the command's output.
struct Output {
    pipe: Option<OwnedFd>,
    wrap: fn(Bytes) -> Reply,
}

struct Running {
    started: Started,
    stdin: Option<(OwnedFd, Vec<u8>)>,
    outputs: [Output; 2],
    deadline: Option<Instant>,
    expired: bool,
}

fn start(shared: &Shared, session: u64, id: u64, run: Run) -> io::Result<Running> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
    let (program, arguments) = run
        .argv
        .split_first()
        .ok_or_else(|| invalid("argv is empty"))?;
    if run
        .env
        .iter()
        .any(|(name, _)| name.is_empty() || name.contains('='))
    {
        return Err(invalid("a variable's name is empty or has a '=' in it"));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(run.env)
        .current_dir(run.cwd.as_deref().unwrap_or("/"));
    command.stdin(if run.stdin.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut started = shared.children.spawn(&mut command, true)?;
    let pid = started.pid;
    {
        let mut commands = shared.commands();
        match commands.get_mut(&id) {
            Some(slot) if shared.session.load(std::sync::atomic::Ordering::SeqCst) == session => {
                *slot = Some(pid);
            }
            // A hello came between: this command belongs to nobody.
            _ => drop(shared.children.kill_group(pid, libc::SIGKILL)),
        }
    }
    let _ = shared.send(session, id, Reply::Started { pid });
    let stdin = match (started.stdin.take(), run.stdin) {
        (Some(pipe), Some(Bytes(bytes))) => Some((nonblocking(pipe.into())?, bytes)),
        _ => None,
    };
    let stdout = started
        .stdout
        .take()
        .map(|pipe| nonblocking(pipe.into()))
        .transpose()?;
    let stderr = started
        .stderr
        .take()
        .map(|pipe| nonblocking(pipe.into()))
        .transpose()?;
    let outputs = [
        Output {
            pipe: stdout,
            wrap: Reply::Stdout,
        },
        Output {
            pipe: stderr,
            wrap: Reply::Stderr,
        },
    ];
    Ok(Running {
        started,
        stdin,
        outputs,
        deadline: None,
        expired: false,
    })
}

fn nonblocking(pipe: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&pipe, true)?;
    Ok(pipe)
}

impl Running {
    /// Moves data until the command has ended; `None` if nobody wants to know any more.
    fn pump(&mut self, shared: &Shared, session: u64, id: u64) -> io::Result<Option<Exit>> {
        let pid = self.started.pid;
        let mut buffer = vec![0; MAX_CHUNK];
        let mut give_up = None::<Instant>;
        let mut rounds_left = ROUNDS_AFTER_END;
        loop {
            // The order matters: what the command wrote before it ended is in the pipes by now.
            let ended = self.started.ended.get();
            let mut moved = false;
            for output in &mut self.outputs {
                match output.move_chunk(&mut buffer, |reply| shared.send(session, id, reply)) {
                    Ok(more) => moved |= more,
                    Err(Stale) => {
                        let _ = shared.children.kill_group(pid, libc::SIGKILL);
                        return Ok(None);
                    }
                }
            }
            self.feed_stdin();
            if ended.is_some() && moved {
                rounds_left -= 1;
            }
            if let Some(exit) = ended.filter(|_| !moved || rounds_left == 0) {
                return Ok(Some(if self.expired { Exit::Deadline } else { exit }));
            }
            let now = Instant::now();
            if !self.expired && ended.is_none() && self.deadline.is_some_and(|at| now >= at) {
                self.expired = true;
                give_up = Some(now + KILL_GRACE);
                let _ = shared.children.kill_group(pid, libc::SIGKILL);
            }
            if give_up.is_some_and(|at| now >= at) {
                return Ok(Some(Exit::Deadline));
            }
            if !moved {
                self.wait(give_up.or(self.deadline))?;
            }
        }
    }

    fn feed_stdin(&mut self) {
        let Some((pipe, bytes)) = &mut self.stdin else {
            return;
        };
        let done = match rustix::io::write(&*pipe, bytes) {
            Ok(count) => {
                bytes.drain(..count.min(bytes.len()));
                bytes.is_empty()
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            // The command closed its input: what is left is not wanted.
            Err(_) => true,
        };
        if done {
            self.stdin = None;
        }
    }

    fn wait(&self, until: Option<Instant>) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.started.ended, PollFlags::IN)];
        if self.started.ended.get().is_some() {
            return Ok(());
        }
        for pipe in self
            .outputs
            .iter()
            .filter_map(|output| output.pipe.as_ref())
        {
            fds.push(PollFd::new(pipe, PollFlags::IN));
        }
        if let Some((pipe, _)) = &self.stdin {
            fds.push(PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::OUT));
        }
        let left = until.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Output {
    /// Sends what one read gives; false if there was nothing to read.
    fn move_chunk(
        &mut self,
        buffer: &mut [u8],
        send: impl FnOnce(Reply) -> Result<(), Stale>,
    ) -> Result<bool, Stale> {
        let Some(pipe) = &self.pipe else {
            return Ok(false);
        };
        match rustix::io::read(pipe, &mut *buffer) {
            Ok(0) => {
                self.pipe = None;
                Ok(false)
            }
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                send((self.wrap)(Bytes(bytes)))?;
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(_) => {
                self.pipe = None;
                Ok(false)
            }
        }
    }
}
