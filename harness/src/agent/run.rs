//! Commands in the guest.

use std::time::{Duration, Instant};

use p2plab_guest::protocol::{Bytes, Exit, MAX_CHUNK, Reply, Request, Run};

use super::client::{AgentClient, Pending, unexpected};
use super::error::AgentError;

/// How long a command may take if nothing else is said.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// What the guest gets beyond a command's deadline to report that it killed it.
const GRACE: Duration = Duration::from_secs(5);
/// Output kept if nothing else is said.
const DEFAULT_OUTPUT: usize = 64 << 20;
/// End of standard error that is put into errors, in bytes.
const TAIL: usize = 2000;

/// A command to run in the guest.
#[derive(Debug, Clone)]
pub struct Command {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    cwd: Option<String>,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
    output_limit: usize,
}

/// Which stream output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub status: Exit,
}

impl Output {
    /// Standard output as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text; what is not UTF-8 is replaced.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl Command {
    /// The program, looked up in the guest's PATH.
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            argv: vec![program.into()],
            env: Vec::new(),
            cwd: None,
            stdin: None,
            deadline: DEFAULT_DEADLINE,
            output_limit: DEFAULT_OUTPUT,
        }
    }

    /// A line for the guest's shell.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("/bin/sh").args(["-c".to_owned(), line.into()])
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// Adds arguments.
    pub fn args<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory (`/` otherwise).
    pub fn current_dir(mut self, path: impl Into<String>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Gives standard input: at most 32 KiB; put larger input into a file.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// After this long (60 s otherwise) the guest kills the command's process group.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Most bytes of output that are collected (64 MiB otherwise).
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// The command as a line, for messages.
    pub fn line(&self) -> String {
        match self.argv.as_slice() {
            [shell, flag, line] if shell == "/bin/sh" && flag == "-c" => line.clone(),
            words => words.join(" "),
        }
    }
}

/// A command that was started; see [`AgentClient::start`]. Dropping it does not end it.
pub struct RunningCommand<'a> {
    client: &'a AgentClient,
    pending: Pending<'a>,
    line: String,
    until: Instant,
    deadline: Duration,
}

impl RunningCommand<'_> {
    /// Waits for the end; `on_output` gets each piece of output as it comes.
    pub fn wait(&self, mut on_output: impl FnMut(Stream, &[u8])) -> Result<Exit, AgentError> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            match self.pending.next(left) {
                Ok(Reply::Started { .. }) => {}
                Ok(Reply::Stdout(Bytes(bytes))) => on_output(Stream::Stdout, &bytes),
                Ok(Reply::Stderr(Bytes(bytes))) => on_output(Stream::Stderr, &bytes),
                Ok(Reply::Exit(exit)) => return Ok(exit),
                Ok(other) => return Err(unexpected(&self.line, &other)),
                Err(AgentError::Deadline { what, .. }) => {
                    let after = self.deadline.saturating_add(GRACE);
                    return Err(AgentError::Deadline { what, after });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a signal to the command's process group.
    pub fn kill(&self, signal: i32) -> Result<(), AgentError> {
        let request = Request::Kill {
            target: self.pending.id,
            signal,
        };
        self.client.done(
            &format!("signal {signal} to `{}`", self.line),
            request,
            GRACE,
        )
    }
}

impl AgentClient {
    /// Starts a command and returns once it runs.
    pub fn start(&self, command: &Command) -> Result<RunningCommand<'_>, AgentError> {
        let line = command.line();
        let what = format!("command `{line}`");
        if command
            .stdin
            .as_ref()
            .is_some_and(|stdin| stdin.len() > MAX_CHUNK)
        {
            return Err(AgentError::Protocol {
                what: format!("{what}: more than {MAX_CHUNK} bytes of input; put it into a file"),
            });
        }
        let request = Request::Run(Run {
            argv: command.argv.clone(),
            env: command.env.clone(),
            cwd: command.cwd.clone(),
            stdin: command.stdin.clone().map(Bytes),
            deadline_ms: Some(u64::try_from(command.deadline.as_millis()).unwrap_or(u64::MAX)),
        });
        let wait = command.deadline.saturating_add(GRACE);
        let until = Instant::now().checked_add(wait);
        let until = until.unwrap_or_else(|| Instant::now() + Duration::from_secs(1 << 30));
        let pending = self.send(&what, request, b"", wait)?;
        match pending.next(wait)? {
            Reply::Started { .. } => {}
            other => return Err(unexpected(&what, &other)),
        }
        Ok(RunningCommand {
            client: self,
            pending,
            line,
            until,
            deadline: command.deadline,
        })
    }

    /// Runs a command to its end, whatever its status; a passed deadline is an error.
    pub fn run(&self, command: &Command) -> Result<Output, AgentError> {
        let running = self.start(command)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut too_much = false;
        let status = running.wait(|stream, bytes| {
            let held = stdout.len() + stderr.len();
            if bytes.len() > command.output_limit.saturating_sub(held) {
                if !too_much {
                    let _ = running.kill(9);
                }
                too_much = true;
            } else {
                match stream {
                    Stream::Stdout => stdout.extend_from_slice(bytes),
                    Stream::Stderr => stderr.extend_from_slice(bytes),
                }
            }
        })?;
        let line = command.line();
        if too_much {
            return Err(AgentError::TooMuchOutput {
                command: line,
                limit: command.output_limit,
            });
        }
        if status == Exit::Deadline {
            let what = format!("command `{line}` was killed{}", tail_of(&stdout, &stderr));
            return Err(AgentError::Deadline {
                what,
                after: command.deadline,
            });
        }
        Ok(Output {
            stdout,
            stderr,
            status,
        })
    }

    /// Runs a command that must exit with status 0.
    pub fn check(&self, command: &Command) -> Result<Output, AgentError> {
        let output = self.run(command)?;
        if output.status.success() {
            return Ok(output);
        }
        Err(AgentError::Failed {
            command: command.line(),
            exit: output.status,
            stderr: last_bytes(&output.stderr),
        })
    }

    /// Runs a command and hands over its output as it comes; a passed deadline is [`Exit::Deadline`].
    pub fn run_streaming(
        &self,
        command: &Command,
        on_output: impl FnMut(Stream, &[u8]),
    ) -> Result<Exit, AgentError> {
        self.start(command)?.wait(on_output)
    }
}

fn last_bytes(bytes: &[u8]) -> String {
    let tail = bytes
        .get(bytes.len().saturating_sub(TAIL)..)
        .unwrap_or_default();
    String::from_utf8_lossy(tail).into_owned()
}

fn tail_of(stdout: &[u8], stderr: &[u8]) -> String {
    let text = last_bytes(if stderr.is_empty() { stdout } else { stderr });
    let text = text.trim();
    if text.is_empty() {
        " (it wrote nothing)".to_owned()
    } else {
        format!("; it wrote: {text}")
    }
}
