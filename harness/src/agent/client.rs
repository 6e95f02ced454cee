//! The connection: requests out, replies to whoever waits for them.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use p2plab_guest::line::LineSplitter;
use p2plab_guest::protocol::{
    FromAgent, MAX_LINE, ModuleFailure, NO_ID, PROTOCOL_VERSION, Power, Reply, Request, Status,
    ToAgent, encode,
};

use super::error::AgentError;
use super::log::Log;

/// How often [`AgentClient::hello`] is repeated until it is answered: one that was sent while the guest
/// rebooted is lost.
const HELLO_AGAIN: Duration = Duration::from_millis(500);
/// Replies of one request that wait for their consumer before the reader does: bounds memory.
const QUEUED_REPLIES: usize = 256;

/// What the agent said of itself when the conversation began.
#[derive(Debug, Clone)]
pub struct Hello {
    /// The agent's state.
    pub status: Status,
}

/// A client of one guest's agent.
pub struct AgentClient {
    shared: Arc<Shared>,
    writer: Mutex<UnixStream>,
    next_id: AtomicU64,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    log: Option<Log>,
}

#[derive(Default)]
struct State {
    pending: HashMap<u64, SyncSender<Reply>>,
    /// Until the agent has answered this nonce, its lines belong to an earlier conversation.
    awaited_nonce: Option<String>,
    /// Why nothing can be asked at present.
    lost: Option<String>,
    /// The socket ended; a new hello does not help.
    closed: bool,
}

/// A request under way; dropping it forgets the replies to come.
pub(super) struct Pending<'a> {
    client: &'a AgentClient,
    pub id: u64,
    what: String,
    replies: Receiver<Reply>,
}

impl AgentClient {
    /// A client on a connected socket. Nothing is sent yet: see [`Self::hello`].
    pub fn new(stream: UnixStream) -> Result<Self, AgentError> {
        Self::connect(stream, None, || None)
    }

    /// As [`Self::new`], and records all traffic in the file `log`. When the port ends, `cause` is asked, on the
    /// reader's thread, for what ended it; it may wait a moment for the answer.
    pub fn with_log(
        stream: UnixStream,
        log: &Path,
        cause: impl FnOnce() -> Option<String> + Send + 'static,
    ) -> Result<Self, AgentError> {
        let file = Log::create(log).map_err(|error| {
            host(
                format!("cannot create the agent log {}", log.display()),
                &error,
            )
        })?;
        Self::connect(stream, Some(file), cause)
    }

    fn connect(
        stream: UnixStream,
        log: Option<Log>,
        cause: impl FnOnce() -> Option<String> + Send + 'static,
    ) -> Result<Self, AgentError> {
        let no_client =
            |error: std::io::Error| host("cannot start the agent client".into(), &error);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            log,
        });
        let (for_reader, reading) = (Arc::clone(&shared), stream.try_clone().map_err(no_client)?);
        let reader = std::thread::Builder::new()
            .name("agent reader".into())
            .spawn(move || for_reader.read(reading, cause))
            .map_err(no_client)?;
        Ok(Self {
            shared,
            writer: Mutex::new(stream),
            next_id: AtomicU64::new(NO_ID + 1),
            reader: Some(reader),
        })
    }

    /// Begins a conversation: needed first, after a restored snapshot, after a reboot of the guest, and
    /// after [`Self::fail`]. What was running for an earlier conversation is killed; requests still
    /// waiting fail. Waits up to `deadline` for the agent to come up.
    pub fn hello(&self, deadline: Duration) -> Result<Hello, AgentError> {
        self.hello_unless(deadline, || None)
    }

    /// As [`Self::hello`], but fails at once with [`AgentError::Lost`] if `lost` gives a reason. It is asked after
    /// an earlier [`Self::fail`] has been forgotten: whoever calls `fail` when a guest is lost, and may have done so
    /// before the conversation began, gives the reason here once more, or it is waited for in vain.
    pub fn hello_unless(
        &self,
        deadline: Duration,
        lost: impl FnOnce() -> Option<String>,
    ) -> Result<Hello, AgentError> {
        let nonce = fresh_nonce();
        {
            let mut state = self.shared.lock();
            if !state.closed {
                state.lost = None;
            }
            state.pending.clear();
            state.awaited_nonce = Some(nonce.clone());
        }
        if let Some(why) = lost() {
            self.fail(&why);
        }
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let patience = left.min(HELLO_AGAIN);
            let request = Request::Hello {
                nonce: nonce.clone(),
            };
            // The empty line ends whatever was left half-sent before.
            let outcome = self
                .send("hello", request, b"\n", patience)
                .and_then(|pending| pending.next(patience));
            match outcome {
                Ok(Reply::Hello {
                    protocol, status, ..
                }) if protocol == PROTOCOL_VERSION => {
                    return Ok(Hello { status });
                }
                Ok(Reply::Hello { protocol, .. }) => {
                    return Err(AgentError::Protocol {
                        what: format!(
                            "it speaks version {protocol}, the harness {PROTOCOL_VERSION}; build the \
                             guest image and the harness from the same tree"
                        ),
                    });
                }
                Ok(other) => return Err(unexpected("hello", &other)),
                Err(AgentError::Deadline { .. }) if left > patience => {}
                Err(AgentError::Deadline { what, .. }) => {
                    return Err(AgentError::Deadline {
                        what,
                        after: deadline,
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks whether the agent lives.
    pub fn ping(&self, deadline: Duration) -> Result<Status, AgentError> {
        match self.ask("ping", Request::Ping, deadline)? {
            Reply::Pong(status) => Ok(status),
            other => Err(unexpected("ping", &other)),
        }
    }

    /// Loads modules in the given order; with no paths, those that the image lists. Returns how many are
    /// loaded and which are not.
    pub fn load_modules(
        &self,
        paths: &[String],
        deadline: Duration,
    ) -> Result<(u32, Vec<ModuleFailure>), AgentError> {
        let request = Request::LoadModules {
            paths: paths.to_vec(),
        };
        match self.ask("load modules", request, deadline)? {
            Reply::Modules { loaded, failed } => Ok((loaded, failed)),
            other => Err(unexpected("load modules", &other)),
        }
    }

    /// Sets the guest's wall clock.
    pub fn set_clock(&self, time: SystemTime, deadline: Duration) -> Result<(), AgentError> {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.done("set the clock", Request::SetClock { nanoseconds }, deadline)
    }

    /// Tells the guest to power off or reboot; returns when the agent has begun to.
    pub fn shutdown(&self, power: Power, deadline: Duration) -> Result<(), AgentError> {
        self.done("shut down", Request::Shutdown(power), deadline)
    }

    /// Fails every request that waits, and every one to come until the next [`Self::hello`], with
    /// [`AgentError::Lost`] and this reason.
    pub fn fail(&self, why: &str) {
        self.shared.fail(why, false);
    }

    /// Sends a request that is answered by `Done`.
    pub(super) fn done(
        &self,
        what: &str,
        request: Request,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        match self.ask(what, request, deadline)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }

    /// Sends a request and waits for its one reply.
    pub(super) fn ask(
        &self,
        what: &str,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, AgentError> {
        self.send(what, request, b"", deadline)?.next(deadline)
    }

    /// Sends a request. `what` names it in errors.
    pub(super) fn send(
        &self,
        what: &str,
        request: Request,
        before: &[u8],
        deadline: Duration,
    ) -> Result<Pending<'_>, AgentError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut line = before.to_vec();
        line.extend(
            encode(&ToAgent { id, request }).map_err(|error| AgentError::Protocol {
                what: format!("{what}: {error}"),
            })?,
        );
        if line.len() > MAX_LINE {
            return Err(AgentError::Protocol {
                what: format!(
                    "{what}: the request has {} bytes, the most is {MAX_LINE}",
                    line.len()
                ),
            });
        }
        let (sender, replies) = sync_channel(QUEUED_REPLIES);
        {
            let mut state = self.shared.lock();
            if let Some(why) = &state.lost {
                return Err(AgentError::Lost { why: why.clone() });
            }
            state.pending.insert(id, sender);
        }
        let pending = Pending {
            client: self,
            id,
            what: what.to_owned(),
            replies,
        };
        self.write(what, &line, deadline)?;
        Ok(pending)
    }

    fn write(&self, what: &str, line: &[u8], deadline: Duration) -> Result<(), AgentError> {
        if let Some(log) = &self.shared.log {
            log.add("to", line);
        }
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = deadline.max(Duration::from_millis(1));
        let result = writer
            .set_write_timeout(Some(limit))
            .and_then(|()| writer.write_all(line));
        match result {
            Ok(()) => Ok(()),
            // The rest of a line cut short here is ended by the empty line of the next hello or merges
            // with the next request into a line that the agent rejects.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err(AgentError::Deadline {
                    what: format!("{what} (the guest does not read its port)"),
                    after: deadline,
                })
            }
            Err(error) => Err(self.shared.why_lost().unwrap_or(AgentError::Lost {
                why: error.to_string(),
            })),
        }
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        // First, so that the reader does not ask for the cause of what we do ourselves.
        self.shared.fail("the client was closed", true);
        let writer = self
            .writer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let _ = writer.shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Pending<'_> {
    /// Waits for the next reply.
    pub fn next(&self, deadline: Duration) -> Result<Reply, AgentError> {
        match self.replies.recv_timeout(deadline) {
            Ok(Reply::Error { kind, message }) => Err(AgentError::Guest { kind, message }),
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => Err(AgentError::Deadline {
                what: self.what.clone(),
                after: deadline,
            }),
            Err(RecvTimeoutError::Disconnected) => {
                let superseded = "a new conversation began before it was answered";
                Err(self.client.shared.why_lost().unwrap_or(AgentError::Lost {
                    why: format!("{}: {superseded}", self.what),
                }))
            }
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.client.shared.lock().pending.remove(&self.id);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why_lost(&self) -> Option<AgentError> {
        self.lock().lost.clone().map(|why| AgentError::Lost { why })
    }

    /// The first reason is kept: what follows is its consequence.
    fn fail(&self, why: &str, closed: bool) {
        let mut state = self.lock();
        state.lost.get_or_insert_with(|| why.to_owned());
        state.closed |= closed;
        state.pending.clear();
    }

    fn read(&self, mut stream: UnixStream, cause: impl FnOnce() -> Option<String>) {
        let mut splitter = LineSplitter::new(MAX_LINE);
        let mut buffer = vec![0; 64 * 1024];
        let why = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break "its port was closed".to_owned(),
                Ok(count) => {
                    splitter.feed(buffer.get(..count).unwrap_or_default(), |line| match line {
                        Ok(line) => self.take_line(line),
                        Err(error) => tracing::debug!("agent: {error}"),
                    });
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break format!("its port cannot be read: {error}"),
            }
        };
        if !self.lock().closed {
            // The port's end is the symptom; whoever knows the cause may need a moment longer.
            self.fail(&cause().unwrap_or(why), true);
        }
    }

    fn take_line(&self, line: &[u8]) {
        if let Some(log) = &self.log {
            log.add("from", line);
        }
        let message: FromAgent = match serde_json::from_slice(line) {
            Ok(message) => message,
            Err(error) => {
                // After a restore the first line may be the end of another one.
                tracing::debug!("agent: not a reply: {error}");
                return;
            }
        };
        let sender = {
            let mut state = self.lock();
            if let Some(awaited) = &state.awaited_nonce {
                match &message.reply {
                    Reply::Hello { nonce, .. } if nonce == awaited => state.awaited_nonce = None,
                    _ => return,
                }
            }
            state.pending.get(&message.id).cloned()
        };
        match sender {
            Some(sender) => self.deliver(message.id, &sender, message.reply),
            None => {
                if let Reply::Error { message, .. } = message.reply {
                    tracing::warn!("agent: {message}");
                }
            }
        }
    }
}

/// How long the reader waits before it offers a reply again to a consumer that is slow.
const OFFER_AGAIN: Duration = Duration::from_millis(1);

impl Shared {
    /// Hands `reply` to whoever waits for replies to request `id`. Waits while the consumer is slow, but not for one
    /// that a new conversation or the port's end has cut off: it would be waited for for ever.
    fn deliver(&self, id: u64, sender: &SyncSender<Reply>, reply: Reply) {
        let last = reply.is_last();
        let mut offer = sender.try_send(reply);
        while let Err(TrySendError::Full(reply)) = offer {
            if !self.lock().pending.contains_key(&id) {
                return;
            }
            std::thread::sleep(OFFER_AGAIN);
            offer = sender.try_send(reply);
        }
        if last {
            self.lock().pending.remove(&id);
        }
    }
}

/// The reply makes no sense here.
pub(super) fn unexpected(what: &str, reply: &Reply) -> AgentError {
    let mut text = format!("{reply:?}");
    text.truncate(text.floor_char_boundary(200));
    AgentError::Protocol {
        what: format!("it answered {what} with {text}"),
    }
}

/// A failure on the host's side.
pub(super) fn host(what: String, error: &std::io::Error) -> AgentError {
    AgentError::Host {
        what,
        error: error.to_string(),
    }
}

/// Differs between processes and between calls.
fn fresh_nonce() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let time = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    format!("{}-{time}-{count}", std::process::id())
}
