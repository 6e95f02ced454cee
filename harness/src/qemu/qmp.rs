//! The QEMU Machine Protocol: one JSON object a line, requests and answers paired by id, events between
//! them (QEMU documentation, "QEMU Machine Protocol Specification").
//!
//! One thread reads. Everybody else waits on one condition variable, so that the end of the connection
//! fails all of them at once, with the cause.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, BufRead, BufReader, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::wait::{self, Deadline, DeadlineExceeded, lock};

/// Events kept for waiters that have not come yet. A lab sees a few dozen.
const EVENTS_KEPT: usize = 4096;
/// The longest line that is still taken for QMP. `query-qmp-schema`'s answer has about 200 kB.
const LONGEST_LINE: u64 = 16 << 20;
/// QEMU's monitor reads on its main loop; if it takes no bytes for this long, it is stuck.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a command or a wait failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// QEMU understood and refused.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        /// QEMU's sentence.
        description: String,
    },
    /// The connection ended before the answer; `reason` is the cause as far as it is known.
    #[error("QEMU is gone while {waiting_for} was awaited: {reason}")]
    Closed {
        /// What did not come any more.
        waiting_for: String,
        /// Exit status and last words, or the guest's fault that led to it.
        reason: String,
    },
    /// No answer in time.
    #[error(transparent)]
    Deadline(#[from] DeadlineExceeded),
    /// Something other than QMP came.
    #[error("the monitor does not speak QMP: {0}")]
    Protocol(String),
    /// A job that QEMU accepted failed afterwards.
    #[error("{what} failed: {reason}")]
    Failed {
        /// The job: a migration, an unplug.
        what: String,
        /// What QEMU said about it.
        reason: String,
    },
}

/// Something that QEMU said unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name: `DEVICE_DELETED`.
    pub name: String,
    /// Its data, [`Value::Null`] if it has none.
    pub data: Value,
}

#[derive(Default)]
struct State {
    greeting: Option<Value>,
    next_id: u64,
    /// `None` until the answer has come. An id that is not here is awaited by nobody any more.
    answers: HashMap<u64, Option<Value>>,
    events: VecDeque<Event>,
    /// The number of the first event in `events`, counted from the connection's start.
    first_event: u64,
    closed: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a request is written, so that requests do not interleave.
    writer: Mutex<UnixStream>,
}

/// Ends the reader thread when the last [`Qmp`] goes.
struct Connection {
    shared: Arc<Shared>,
    stream: UnixStream,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A connection to a monitor. Clones share it.
#[derive(Clone)]
pub struct Qmp {
    connection: Arc<Connection>,
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qmp").finish_non_exhaustive()
    }
}

/// A place in the stream of events. Take it *before* the command whose event is awaited.
#[derive(Debug, Clone)]
pub struct Events {
    qmp: Qmp,
    next: u64,
}

impl Qmp {
    /// Awaits the greeting and negotiates capabilities.
    ///
    /// `cause` is asked, on the reader thread, once the connection has ended: what it returns is the
    /// reason in every [`QmpError::Closed`]. It may wait a moment for the exit status.
    pub fn connect(
        stream: UnixStream,
        cause: impl FnOnce() -> String + Send + 'static,
        deadline: &Deadline,
    ) -> Result<Self, QmpError> {
        let broken = |error: io::Error| QmpError::Protocol(error.to_string());
        stream
            .set_write_timeout(Some(WRITE_PATIENCE))
            .map_err(broken)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            writer: Mutex::new(stream.try_clone().map_err(broken)?),
        });
        let (theirs, input) = (Arc::clone(&shared), stream.try_clone().map_err(broken)?);
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                let ended = read_all(&theirs, input);
                let cause = ended.map_or_else(|unexpected| unexpected, |()| cause());
                lock(&theirs.state).closed = Some(cause);
                theirs.changed.notify_all();
            })
            .map_err(broken)?;
        let qmp = Self {
            connection: Arc::new(Connection { shared, stream }),
        };
        qmp.wait("the monitor's greeting", deadline, |state| {
            state.greeting.take()
        })?;
        qmp.execute("qmp_capabilities", Value::Null, deadline)?;
        Ok(qmp)
    }

    /// Executes a command; `arguments` is an object, or [`Value::Null`] for none. Returns its `return`.
    pub fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: &Deadline,
    ) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None, deadline)
    }

    /// Hands QEMU a descriptor under a name (`getfd`), for `fd=NAME` in a later command.
    pub fn send_descriptor(
        &self,
        name: &str,
        descriptor: BorrowedFd<'_>,
        deadline: &Deadline,
    ) -> Result<(), QmpError> {
        self.execute_with(
            "getfd",
            json!({ "fdname": name }),
            Some(descriptor),
            deadline,
        )?;
        Ok(())
    }

    fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: &Deadline,
    ) -> Result<Value, QmpError> {
        let id = {
            let mut state = lock(&self.connection.shared.state);
            state.next_id += 1;
            let id = state.next_id;
            state.answers.insert(id, None);
            id
        };
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        tracing::debug!(%request, "qmp");
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        // A failed write means that QEMU has gone, and the reader will know why: the wait below tells.
        if let Err(error) = self.write(&line, descriptor) {
            tracing::debug!("cannot write to the monitor: {error}");
            let _ = self.connection.stream.shutdown(Shutdown::Both);
        }
        let what = format!("the answer to {command}");
        let answer = self.wait(&what, deadline, |state| state.answers.get_mut(&id)?.take());
        lock(&self.connection.shared.state).answers.remove(&id);
        let mut answer = answer?;
        tracing::debug!(%answer, "qmp");
        let Some(error) = answer.get("error") else {
            return Ok(answer["return"].take());
        };
        let text = |key| {
            error
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or("(no word)")
                .to_owned()
        };
        Err(QmpError::Refused {
            command: command.to_owned(),
            class: text("class"),
            description: text("desc"),
        })
    }

    fn write(&self, mut line: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let writer = lock(&self.connection.shared.writer);
        let mut descriptor = descriptor;
        while !line.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let carried;
            if let Some(descriptor) = descriptor.take() {
                carried = [descriptor];
                control.push(SendAncillaryMessage::ScmRights(&carried));
            }
            // NOSIGNAL: a dead QEMU is an error here, not our own death by SIGPIPE.
            match sendmsg(
                &*writer,
                &[IoSlice::new(line)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => line = line.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The events from now on.
    pub fn events(&self) -> Events {
        let state = lock(&self.connection.shared.state);
        let next = state.first_event.saturating_add(state.events.len() as u64);
        Events {
            qmp: self.clone(),
            next,
        }
    }

    /// All events since the connection's start (the last 4096).
    pub fn all_events(&self) -> Events {
        Events {
            qmp: self.clone(),
            next: 0,
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        lock(&self.connection.shared.state).closed.is_some()
    }

    fn wait<R>(
        &self,
        what: &str,
        deadline: &Deadline,
        mut found: impl FnMut(&mut State) -> Option<R>,
    ) -> Result<R, QmpError> {
        let Shared { state, changed, .. } = &*self.connection.shared;
        let deadline = deadline.part(format!("{what} ({})", deadline.what()));
        wait::wait_for(state, changed, &deadline, |state| match found(state) {
            Some(result) => Some(Ok(result)),
            None => state.closed.clone().map(|reason| {
                Err(QmpError::Closed {
                    waiting_for: what.to_owned(),
                    reason,
                })
            }),
        })?
    }
}

impl Events {
    /// Waits for the next event called `name` that `fits`; the events before it are passed over.
    pub fn wait(
        &mut self,
        name: &str,
        deadline: &Deadline,
        mut fits: impl FnMut(&Value) -> bool,
    ) -> Result<Event, QmpError> {
        self.wait_any(&format!("event {name}"), deadline, |event| {
            event.name == name && fits(&event.data)
        })
    }

    /// Waits for the next event that `fits`, whatever its name; `what` is for the error message.
    pub fn wait_any(
        &mut self,
        what: &str,
        deadline: &Deadline,
        mut fits: impl FnMut(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let Self { qmp, next } = self;
        qmp.wait(what, deadline, |state| {
            let skip = usize::try_from(next.saturating_sub(state.first_event)).ok()?;
            *next = (*next).max(state.first_event);
            state.events.iter().skip(skip).find_map(|event| {
                *next += 1;
                fits(event).then(|| event.clone())
            })
        })
    }
}

/// Reads until the end of the connection; the error says that what came was not QMP.
fn read_all(shared: &Shared, stream: UnixStream) -> Result<(), String> {
    let mut input = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut input).take(LONGEST_LINE).read_until(b'\n', &mut line) {
            // A reset is how the kernel tells of a peer that died with our bytes unread.
            Ok(0) | Err(_) => return Ok(()),
            Ok(_) if line.ends_with(b"\n") => {}
            Ok(length) if length as u64 == LONGEST_LINE => {
                return Err(format!("a line of more than {LONGEST_LINE} bytes"));
            }
            // A torn last line: QEMU died while it wrote.
            Ok(_) => return Ok(()),
        }
        let message: Value = match serde_json::from_slice(&line) {
            Ok(message) => message,
            Err(error) => {
                let line = String::from_utf8_lossy(&line);
                let start: String = line.chars().take(200).collect();
                return Err(format!("{error} in {start:?}"));
            }
        };
        let mut state = lock(&shared.state);
        state.take_message(message);
        drop(state);
        shared.changed.notify_all();
    }
}

impl State {
    fn take_message(&mut self, mut message: Value) {
        if message.get("QMP").is_some() {
            self.greeting = Some(message);
        } else if let Some(name) = message.get("event").and_then(Value::as_str) {
            tracing::debug!(%message, "qmp");
            let name = name.to_owned();
            if self.events.len() == EVENTS_KEPT {
                self.events.pop_front();
                self.first_event += 1;
            }
            self.events.push_back(Event {
                name,
                data: message["data"].take(),
            });
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            if let Some(answer) = self.answers.get_mut(&id) {
                *answer = Some(message);
            }
        } else {
            tracing::warn!(%message, "an answer to nothing from QEMU's monitor");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::thread::JoinHandle;

    fn soon() -> Deadline {
        Deadline::new("the test", Duration::from_secs(20))
    }

    struct Server {
        lines: BufReader<UnixStream>,
    }

    impl Server {
        fn say(&mut self, text: &str) {
            self.lines.get_mut().write_all(text.as_bytes()).unwrap();
        }

        fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.lines.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        }

        fn answer(&mut self, request: &Value, key: &str, value: Value) {
            let mut answer = json!({ "id": request["id"] });
            answer[key] = value;
            self.say(&format!("{answer}\r\n"));
        }
    }

    /// A monitor that greets, negotiates, then does what `script` says.
    fn monitor(script: impl FnOnce(Server) + Send + 'static) -> (Qmp, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let mut server = Server {
                lines: BufReader::new(theirs),
            };
            server.say("{\"QMP\": {\"version\": {}, ");
            server.say("\"capabilities\": [\"oob\"]}}\r\n");
            let request = server.hear();
            assert_eq!(request["execute"], "qmp_capabilities");
            server.answer(&request, "return", json!({}));
            script(server);
        });
        let qmp = Qmp::connect(ours, || "killed by signal 9".to_owned(), &soon()).unwrap();
        (qmp, server)
    }

    #[test]
    fn answers_find_their_requests_between_events() {
        let (qmp, server) = monitor(|mut server| {
            let (first, second) = (server.hear(), server.hear());
            server.say("{\"event\": \"STOP\", \"timestamp\": {}}\n");
            // Out of order, with an event between and an answer to nobody.
            server.answer(&second, "return", second["arguments"].clone());
            server.say(
                "{\"event\": \"RESUME\", \"data\": {\"n\": 1}}\n{\"id\": 999, \"return\": 0}\n",
            );
            server.answer(&first, "return", first["arguments"].clone());
            server.hear();
        });
        let mut events = qmp.events();
        let ask = |number: u64| {
            let qmp = qmp.clone();
            std::thread::spawn(move || qmp.execute("echo", json!({ "n": number }), &soon()))
        };
        let askers: Vec<_> = (0..2).map(ask).collect();
        for (number, asker) in askers.into_iter().enumerate() {
            assert_eq!(asker.join().unwrap().unwrap(), json!({ "n": number }));
        }
        let event = events
            .wait("RESUME", &soon(), |data| data["n"] == 1)
            .unwrap();
        assert_eq!(event.data, json!({ "n": 1 }));
        assert!(qmp.all_events().wait("STOP", &soon(), |_| true).is_ok());
        let none = Deadline::new("nothing", Duration::ZERO);
        assert!(matches!(
            events.wait("RESUME", &none, |_| true),
            Err(QmpError::Deadline(_))
        ));
        let _ = qmp.execute("end", Value::Null, &none);
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_is_qemus_sentence() {
        let (qmp, server) = monitor(|mut server| {
            let request = server.hear();
            assert!(request.get("arguments").is_none());
            let error = json!({ "class": "GenericError", "desc": "Bus 'dn9' not found" });
            server.answer(&request, "error", error);
        });
        let error = qmp.execute("device_add", Value::Null, &soon()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "QEMU refuses device_add: Bus 'dn9' not found"
        );
        server.join().unwrap();
    }

    #[test]
    fn a_death_fails_every_waiter_with_its_cause() {
        let (qmp, server) = monitor(|mut server| {
            server.hear();
            server.say("{\"torn");
        });
        let mut events = qmp.events();
        let waiter = std::thread::spawn(move || events.wait("NEVER", &soon(), |_| true));
        let error = qmp.execute("stop", Value::Null, &soon()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "QEMU is gone while the answer to stop was awaited: killed by signal 9"
        );
        assert!(matches!(
            waiter.join().unwrap(),
            Err(QmpError::Closed { .. })
        ));
        // And whoever comes later.
        let error = qmp.execute("stop", Value::Null, &soon()).unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }) && qmp.is_closed());
        server.join().unwrap();
    }

    #[test]
    fn a_late_answer_is_nobodys() {
        let (qmp, server) = monitor(|mut server| {
            let first = server.hear();
            let second = server.hear();
            server.answer(&first, "return", json!("late"));
            server.answer(&second, "return", json!("in time"));
        });
        let now = Deadline::new("at once", Duration::ZERO);
        assert!(matches!(
            qmp.execute("a", Value::Null, &now),
            Err(QmpError::Deadline(_))
        ));
        assert_eq!(
            qmp.execute("b", Value::Null, &soon()).unwrap(),
            json!("in time")
        );
        server.join().unwrap();
    }

    #[test]
    fn what_is_not_qmp_is_called_so() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"SSH-2.0\n").unwrap();
        let error = Qmp::connect(ours, String::new, &soon()).unwrap_err();
        assert!(error.to_string().contains("SSH-2.0"), "{error}");
    }

    #[test]
    fn a_descriptor_travels_with_its_command() {
        let (qmp, server) = monitor(|mut server| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 4096];
            let mut into = [std::io::IoSliceMut::new(&mut bytes)];
            let flags = rustix::net::RecvFlags::CMSG_CLOEXEC;
            let stream = server.lines.get_ref();
            let got = rustix::net::recvmsg(stream, &mut into, &mut control, flags).unwrap();
            let descriptors = control.drain().map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(list) => list.count(),
                _ => 0,
            });
            assert_eq!(descriptors.sum::<usize>(), 1);
            let request: Value = serde_json::from_slice(&bytes[..got.bytes]).unwrap();
            assert_eq!(request["arguments"]["fdname"], "disk");
            server.answer(&request, "return", json!({}));
        });
        qmp.send_descriptor("disk", std::io::stdin().as_fd(), &soon())
            .unwrap();
        server.join().unwrap();
    }

    #[test]
    fn unplugging_waits_for_the_guest() {
        let (qmp, server) = monitor(|mut server| {
            for outcome in ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"] {
                let request = server.hear();
                assert_eq!(request["execute"], "device_del");
                server.answer(&request, "return", json!({}));
                server.say("{\"event\": \"DEVICE_DELETED\", \"data\": {\"path\": \"/x\"}}\n");
                server.say(&format!(
                    "{{\"event\": \"{outcome}\", \"data\": {{\"device\": \"d\"}}}}\n"
                ));
            }
        });
        qmp.device_del("d", &soon()).unwrap();
        let error = qmp.device_del("d", &soon()).unwrap_err();
        assert!(
            error.to_string().contains("refuses to give it up"),
            "{error}"
        );
        server.join().unwrap();
    }
}
