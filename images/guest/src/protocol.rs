//! The JSON lines between the harness and the guest agent.
//!
//! One JSON object a line, both ways, over a virtio-serial port named [`PORT_NAME`]. The harness sends
//! [`ToAgent`] with an id of its choice; everything that the agent says about it carries that id. Requests
//! may overlap. [`Reply::is_last`] tells whether more replies to the same id follow.
//!
//! A conversation begins with [`Request::Hello`] and a fresh nonce. The agent then forgets the
//! conversation before it: it kills the commands of that one and drops their output. So the harness
//! can discard every line up to the matching [`Reply::Hello`], which is how it gets into step after a
//! snapshot was restored, with whatever bytes were under way when it was taken.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Raised when an older peer would misunderstand.
pub const PROTOCOL_VERSION: u32 = 1;
/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.p2plab.agent";
/// Most bytes of data (before base64) in one message.
pub const MAX_CHUNK: usize = 32 * 1024;
/// Longest line in bytes, newline not counted; longer ones are dropped and answered with an error.
pub const MAX_LINE: usize = 256 * 1024;
/// Id of errors that belong to no request, because its id could not be read.
pub const NO_ID: u64 = 0;

/// Bytes, base64 in JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let bytes = STANDARD
            .decode(text.as_bytes())
            .map_err(de::Error::custom)?;
        if bytes.len() > MAX_CHUNK {
            return Err(de::Error::custom(format!(
                "{} bytes of data in one message, the most is {MAX_CHUNK}",
                bytes.len()
            )));
        }
        Ok(Self(bytes))
    }
}

/// A line from the harness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToAgent {
    /// Chosen by the harness, not [`NO_ID`], not in use.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// A line from the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromAgent {
    /// Id of the request, or [`NO_ID`].
    pub id: u64,
    /// What is said about it.
    pub reply: Reply,
}

/// What the harness can ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Begins a conversation; answered by [`Reply::Hello`]. Repeating it with the same nonce is harmless.
    Hello {
        /// Anything not used before.
        nonce: String,
    },
    /// Answered by [`Reply::Pong`].
    Ping,
    /// Starts a command: [`Reply::Started`], any number of `Stdout` and `Stderr`, then `Exit`.
    Run(Run),
    /// Sends a signal to the process group of a running command; answered by `Done`.
    Kill {
        /// Id of the [`Request::Run`].
        target: u64,
        /// Signal number.
        signal: i32,
    },
    /// Writes one chunk of a file at `offset`; answered by `Done`.
    Write {
        /// Absolute path.
        path: String,
        /// Byte position.
        offset: u64,
        /// At most [`MAX_CHUNK`] bytes.
        data: Bytes,
        /// Given with the first chunk: creates the file with this mode, empties it and, where
        /// missing, makes its parent directories. Absent: the file must exist.
        create: Option<u32>,
    },
    /// Reads up to `length` (at most [`MAX_CHUNK`]) bytes at `offset`; answered by `Data`.
    Read {
        /// Absolute path.
        path: String,
        /// Byte position.
        offset: u64,
        /// Most bytes wanted.
        length: u32,
    },
    /// Lists a directory; answered by `Entries`, repeated until its `last` is true.
    List {
        /// Absolute path.
        path: String,
    },
    /// Loads kernel modules in the given order; answered by `Modules`.
    LoadModules {
        /// Paths of .ko or .ko.xz files; empty: those listed in /etc/p2plab/modules.
        paths: Vec<String>,
    },
    /// Sets the wall clock; answered by `Done`.
    SetClock {
        /// Nanoseconds since 1970-01-01 00:00:00 UTC.
        nanoseconds: u64,
    },
    /// Ends the guest; answered by `Done` before it begins.
    Shutdown(Power),
}

/// A command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Program (looked up in PATH) and arguments; at least one.
    pub argv: Vec<String>,
    /// Added to the agent's own environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// Working directory; `/` if absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Standard input, then end of file; /dev/null if absent.
    #[serde(default)]
    pub stdin: Option<Bytes>,
    /// Milliseconds after which the command's process group is killed; none if absent.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
}

/// How the guest shall end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// Power off.
    Poweroff,
    /// Reset and boot again.
    Reboot,
}

/// What the agent can say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The conversation has begun.
    Hello {
        /// As sent.
        nonce: String,
        /// [`PROTOCOL_VERSION`] of the agent.
        protocol: u32,
        /// The agent's state, as in `Pong`.
        status: Status,
    },
    /// The agent lives.
    Pong(Status),
    /// The command runs.
    Started {
        /// Its process id and process group in the guest.
        pid: i32,
    },
    /// What the command wrote to standard output.
    Stdout(Bytes),
    /// What the command wrote to standard error.
    Stderr(Bytes),
    /// The command ended. What processes that it left behind write later is not sent.
    Exit(Exit),
    /// Done as asked.
    Done,
    /// Part of a file.
    Data {
        /// The bytes; fewer than asked for only at the end of the file.
        data: Bytes,
        /// Nothing follows these bytes.
        eof: bool,
    },
    /// Part of a directory.
    Entries {
        /// Without `.` and `..`, in the order of the file system.
        entries: Vec<Entry>,
        /// No further entries follow.
        last: bool,
    },
    /// What became of the modules.
    Modules {
        /// Loaded now or before.
        loaded: u32,
        /// Not loaded.
        failed: Vec<ModuleFailure>,
    },
    /// The request failed.
    Error {
        /// What kind of failure.
        kind: ErrorKind,
        /// One sentence.
        message: String,
    },
}

impl Reply {
    /// Whether no further reply to the same id follows.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Started { .. } | Self::Stdout(_) | Self::Stderr(_) => false,
            Self::Entries { last, .. } => *last,
            _ => true,
        }
    }
}

/// The agent's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// The kernel's boot id: another one after each boot, the same after a restored snapshot.
    pub boot_id: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Milliseconds since the kernel booted.
    pub uptime_ms: u64,
    /// Commands that are running.
    pub running: u32,
    /// Modules that failed to load at boot.
    #[serde(default)]
    pub failed_modules: Vec<ModuleFailure>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// A signal ended it.
    Signal(i32),
    /// It ran past its deadline and was killed with its process group.
    Deadline,
}

impl Exit {
    /// Whether it exited with status 0.
    pub fn success(self) -> bool {
        self == Self::Status(0)
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Deadline => write!(f, "killed at its deadline"),
        }
    }
}

/// A directory entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// What it is; links are not followed.
    pub kind: EntryKind,
    /// Size in bytes as stat says.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum EntryKind {
    File,
    Directory,
    Symlink,
    BlockDevice,
    CharacterDevice,
    Fifo,
    Socket,
    Other,
}

/// A module that did not load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFailure {
    /// Path of the module.
    pub path: String,
    /// Why.
    pub error: String,
}

/// What kind of failure an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The line was not a request: not JSON, unknown, too long, or out of bounds.
    BadRequest,
    /// No such command is running.
    NotFound,
    /// Too much is running already.
    Busy,
    /// The guest's system refused it.
    System,
}

/// A request as a line with its newline.
pub fn encode<T: Serialize>(message: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Reads a request; on failure the id it bears, if that much can be read, and a sentence.
pub fn decode_request(line: &[u8]) -> Result<ToAgent, (u64, String)> {
    #[derive(Deserialize)]
    struct IdOnly {
        id: u64,
    }
    serde_json::from_slice::<ToAgent>(line).map_err(|error| {
        let id = serde_json::from_slice::<IdOnly>(line).map_or(NO_ID, |found| found.id);
        (
            id,
            format!("not a request of protocol {PROTOCOL_VERSION}: {error}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_request_survives_the_line() {
        let requests = [
            Request::Hello {
                nonce: "n\"1".into(),
            },
            Request::Ping,
            Request::Run(Run {
                argv: vec!["sh".into(), "-c".into(), "echo \n ü".into()],
                env: vec![("A".into(), "b".into())],
                cwd: Some("/tmp".into()),
                stdin: Some(Bytes(vec![0, 255, 10])),
                deadline_ms: Some(5),
            }),
            Request::Kill {
                target: 3,
                signal: 9,
            },
            Request::Write {
                path: "/a".into(),
                offset: u64::MAX,
                data: Bytes(vec![7; MAX_CHUNK]),
                create: Some(0o644),
            },
            Request::Read {
                path: "/a".into(),
                offset: 1,
                length: 2,
            },
            Request::List { path: "/".into() },
            Request::LoadModules { paths: vec![] },
            Request::SetClock {
                nanoseconds: u64::MAX,
            },
            Request::Shutdown(Power::Reboot),
        ];
        for (id, request) in (1u64..).zip(requests) {
            let message = ToAgent { id, request };
            let line = encode(&message).unwrap();
            assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            assert!(line.len() <= MAX_LINE);
            assert_eq!(decode_request(&line).unwrap(), message);
        }
    }

    #[test]
    fn replies_survive_the_line_and_say_whether_they_are_last() {
        let replies = [
            (Reply::Started { pid: 4 }, false),
            (Reply::Stdout(Bytes(vec![1; MAX_CHUNK])), false),
            (Reply::Exit(Exit::Signal(9)), true),
            (Reply::Exit(Exit::Deadline), true),
            (Reply::Pong(Status::default()), true),
            (
                Reply::Entries {
                    entries: vec![],
                    last: false,
                },
                false,
            ),
            (
                Reply::Error {
                    kind: ErrorKind::System,
                    message: "no".into(),
                },
                true,
            ),
        ];
        for (reply, last) in replies {
            assert_eq!(reply.is_last(), last, "{reply:?}");
            let message = FromAgent { id: 9, reply };
            let line = encode(&message).unwrap();
            assert_eq!(serde_json::from_slice::<FromAgent>(&line).unwrap(), message);
        }
    }

    #[test]
    fn a_bad_request_keeps_its_id() {
        assert_eq!(
            decode_request(br#"{"id":7,"request":{"fly":{}}}"#)
                .unwrap_err()
                .0,
            7
        );
        assert_eq!(decode_request(b"nonsense").unwrap_err().0, NO_ID);
        let (_, why) = decode_request(
            &encode(&serde_json::json!({"id": 1, "request": {"write": {
                "path": "/a", "offset": 0, "create": null,
                "data": STANDARD.encode(vec![0; MAX_CHUNK + 1])}}}))
            .unwrap(),
        )
        .unwrap_err();
        assert!(why.contains("32769 bytes"), "{why}");
    }

    proptest! {
        #[test]
        fn garbage_is_an_error_and_not_a_panic(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode_request(&line).is_err());
        }

        #[test]
        fn a_damaged_request_does_not_panic(at in 0usize..100, with in any::<u8>()) {
            let mut line = encode(&ToAgent { id: 1, request: Request::Run(Run {
                argv: vec!["true".into()], deadline_ms: Some(1), ..Run::default() }) }).unwrap();
            let at = at % line.len();
            line[at] = with;
            let _ = decode_request(&line);
        }
    }
}
