//! The agent's request loop.
//!
//! One thread reads requests ([`Server::serve`]); it answers what it can at once. Each command has a
//! thread that moves its output (`run`), and one more does file work (`files`) in order. All write
//! replies through one lock. When the port is full, or nobody is connected to it, a writer blocks there
//! and its command with it, so output never piles up in memory.

mod files;
mod run;

use std::collections::HashMap;
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::children::Children;
use crate::line::LineSplitter;
use crate::modules;
use crate::protocol::{
    ErrorKind, FromAgent, MAX_LINE, ModuleFailure, NO_ID, PROTOCOL_VERSION, Power, Reply, Request,
    Status, decode_request, encode,
};

/// Most commands at once.
const MAX_COMMANDS: usize = 64;
/// Most file requests that wait.
const MAX_FILE_JOBS: usize = 64;

/// Called when the guest shall end; it runs on a thread of its own after the reply was sent.
pub type OnShutdown = Box<dyn Fn(Power) + Send + Sync>;

/// The agent; serves one connection after the other.
pub struct Server {
    shared: Arc<Shared>,
    files: SyncSender<files::Job>,
    nonce: Mutex<Option<String>>,
}

/// What the request loop and the threads of commands share.
struct Shared {
    children: Children,
    /// Number of the conversation; a reply of an earlier one is dropped.
    session: AtomicU64,
    out: Mutex<Option<Box<dyn Write + Send>>>,
    commands: Mutex<HashMap<u64, Option<i32>>>,
    failed_modules: Vec<ModuleFailure>,
    on_shutdown: OnShutdown,
}

/// The reply was not sent: the conversation is over or the connection is gone.
#[derive(Debug)]
struct Stale;

impl Shared {
    fn commands(&self) -> MutexGuard<'_, HashMap<u64, Option<i32>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, session: u64, id: u64, reply: Reply) -> Result<(), Stale> {
        let last_resort = |error: serde_json::Error| {
            format!("{{\"id\":{id},\"reply\":{{\"error\":{{\"kind\":\"system\",\"message\":\"{}\"}}}}}}\n",
                error.to_string().replace(['"', '\\'], "'")).into_bytes()
        };
        let line = encode(&FromAgent { id, reply }).unwrap_or_else(last_resort);
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        if self.session.load(Ordering::SeqCst) != session {
            return Err(Stale);
        }
        let writer = out.as_mut().ok_or(Stale)?;
        if writer
            .write_all(&line)
            .and_then(|()| writer.flush())
            .is_err()
        {
            *out = None;
            return Err(Stale);
        }
        Ok(())
    }

    fn error(&self, session: u64, id: u64, kind: ErrorKind, message: impl Display) {
        let _ = self.send(
            session,
            id,
            Reply::Error {
                kind,
                message: message.to_string(),
            },
        );
    }

    fn status(&self) -> Status {
        let read = |path| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let uptime = read("/proc/uptime");
        let seconds = uptime
            .split(' ')
            .next()
            .and_then(|text| text.parse::<f64>().ok());
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            kernel: read("/proc/sys/kernel/osrelease"),
            uptime_ms: (seconds.unwrap_or_default() * 1000.0) as u64,
            running: u32::try_from(self.commands().len()).unwrap_or(u32::MAX),
            failed_modules: self.failed_modules.clone(),
        }
    }
}

impl Server {
    /// An agent that starts its commands through `children`.
    pub fn new(
        children: Children,
        failed_modules: Vec<ModuleFailure>,
        on_shutdown: OnShutdown,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            children,
            session: AtomicU64::new(0),
            out: Mutex::new(None),
            commands: Mutex::default(),
            failed_modules,
            on_shutdown,
        });
        let (files, jobs) = sync_channel::<files::Job>(MAX_FILE_JOBS);
        let worker = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("files".into())
            .spawn(move || {
                for job in jobs {
                    files::work(&worker, job);
                }
            })?;
        Ok(Self {
            shared,
            files,
            nonce: Mutex::new(None),
        })
    }

    /// Replaces the stream that replies go to.
    pub fn set_writer(&self, writer: Box<dyn Write + Send>) {
        *self
            .shared
            .out
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(writer);
    }

    /// Serves requests from `reader` until it ends; commands go on running.
    pub fn serve(&self, mut reader: impl Read) -> io::Result<()> {
        let mut splitter = LineSplitter::new(MAX_LINE);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            splitter.feed(buffer.get(..count).unwrap_or_default(), |line| match line {
                Ok(line) => self.handle_line(line),
                Err(error) => self.error(NO_ID, ErrorKind::BadRequest, error),
            });
        }
    }

    fn session(&self) -> u64 {
        self.shared.session.load(Ordering::SeqCst)
    }

    fn reply(&self, id: u64, reply: Reply) {
        let _ = self.shared.send(self.session(), id, reply);
    }

    fn error(&self, id: u64, kind: ErrorKind, message: impl Display) {
        self.shared.error(self.session(), id, kind, message);
    }

    fn handle_line(&self, line: &[u8]) {
        let message = match decode_request(line) {
            Ok(message) => message,
            Err((id, why)) => return self.error(id, ErrorKind::BadRequest, why),
        };
        let id = message.id;
        if id == NO_ID {
            return self.error(id, ErrorKind::BadRequest, "id 0 is reserved");
        }
        match message.request {
            Request::Hello { nonce } => self.hello(id, nonce),
            Request::Ping => self.reply(id, Reply::Pong(self.shared.status())),
            Request::Run(run) => self.run(id, run),
            Request::Kill { target, signal } => self.kill(id, target, signal),
            Request::SetClock { nanoseconds } => match crate::sys::set_clock(nanoseconds) {
                Ok(()) => self.reply(id, Reply::Done),
                Err(error) => {
                    let why = format!("cannot set the clock: {error}");
                    self.error(id, ErrorKind::System, why);
                }
            },
            Request::Shutdown(power) => self.shutdown(id, power),
            request @ (Request::Write { .. }
            | Request::Read { .. }
            | Request::List { .. }
            | Request::LoadModules { .. }) => {
                let job = files::Job {
                    session: self.session(),
                    id,
                    request,
                };
                match self.files.try_send(job) {
                    Ok(()) => {}
                    Err(TrySendError::Full(_)) => {
                        let why = format!("{MAX_FILE_JOBS} file requests wait already");
                        self.error(id, ErrorKind::Busy, why);
                    }
                    Err(TrySendError::Disconnected(_)) => {
                        self.error(id, ErrorKind::System, "the agent's file thread has ended");
                    }
                }
            }
        }
    }

    /// A new nonce ends the conversation before; the empty line ends whatever the last one left.
    fn hello(&self, id: u64, nonce: String) {
        {
            let mut last = self.nonce.lock().unwrap_or_else(PoisonError::into_inner);
            if last.as_ref() != Some(&nonce) {
                *last = Some(nonce.clone());
                self.shared.session.fetch_add(1, Ordering::SeqCst);
                for (_, pid) in self.shared.commands().drain() {
                    if let Some(pid) = pid {
                        let _ = self.shared.children.kill_group(pid, libc::SIGKILL);
                    }
                }
                let mut out = self
                    .shared
                    .out
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if let Some(writer) = out.as_mut() {
                    let _ = writer.write_all(b"\n");
                }
            }
        }
        let status = self.shared.status();
        self.reply(
            id,
            Reply::Hello {
                nonce,
                protocol: PROTOCOL_VERSION,
                status,
            },
        );
    }

    fn run(&self, id: u64, run: crate::protocol::Run) {
        {
            let mut commands = self.shared.commands();
            if commands.len() >= MAX_COMMANDS {
                drop(commands);
                let why = format!("{MAX_COMMANDS} commands are running already");
                return self.error(id, ErrorKind::Busy, why);
            }
            if commands.contains_key(&id) {
                drop(commands);
                return self.error(id, ErrorKind::BadRequest, format!("id {id} is in use"));
            }
            commands.insert(id, None);
        }
        let shared = Arc::clone(&self.shared);
        let session = self.session();
        let thread = std::thread::Builder::new()
            .name(format!("run {id}"))
            .spawn(move || run::run(&shared, session, id, run));
        if let Err(error) = thread {
            self.shared.commands().remove(&id);
            self.error(
                id,
                ErrorKind::System,
                format!("no thread for the command: {error}"),
            );
        }
    }

    fn kill(&self, id: u64, target: u64, signal: i32) {
        let pid = self.shared.commands().get(&target).copied().flatten();
        let Some(pid) = pid else {
            return self.error(
                id,
                ErrorKind::NotFound,
                format!("no command {target} is running"),
            );
        };
        match self.shared.children.kill_group(pid, signal) {
            Ok(()) => self.reply(id, Reply::Done),
            Err(error) => {
                let kind = match error.kind() {
                    io::ErrorKind::NotFound => ErrorKind::NotFound,
                    io::ErrorKind::InvalidInput => ErrorKind::BadRequest,
                    _ => ErrorKind::System,
                };
                self.error(
                    id,
                    kind,
                    format!("signal {signal} to command {target}: {error}"),
                );
            }
        }
    }

    fn shutdown(&self, id: u64, power: Power) {
        self.reply(id, Reply::Done);
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("shutdown".into());
        if let Err(error) = thread.spawn(move || (shared.on_shutdown)(power)) {
            self.error(
                id,
                ErrorKind::System,
                format!("no thread to shut down: {error}"),
            );
        }
    }
}

/// Loads the modules in `paths`, or those of the list.
fn load_modules(paths: Vec<String>) -> Reply {
    let paths = if paths.is_empty() {
        modules::listed()
    } else {
        paths
    };
    let outcome = modules::load(&paths);
    Reply::Modules {
        loaded: outcome.loaded,
        failed: outcome.failed,
    }
}
