//! Files of the guest.

use std::collections::VecDeque;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use p2plab_guest::protocol::{Bytes, Entry, MAX_CHUNK, Reply, Request};

use super::client::{AgentClient, Pending, host, unexpected};
use super::error::AgentError;

/// Chunks under way at once: hides the latency of the port, and stays below what the agent queues.
const WINDOW: usize = 8;

impl AgentClient {
    /// Writes `bytes` to a file of the guest, which is made (with its directories) or replaced.
    /// `deadline` is for the whole file.
    pub fn put(
        &self,
        bytes: &[u8],
        guest_path: &str,
        mode: u32,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        self.put_reader(bytes, "bytes of the caller", guest_path, mode, deadline)
    }

    /// Copies a file of the host to the guest; see [`Self::put`].
    pub fn put_file(
        &self,
        host_path: &Path,
        guest_path: &str,
        mode: u32,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        let name = host_path.display().to_string();
        let file = std::fs::File::open(host_path).map_err(|error| {
            host(
                format!("cannot open {name} to put it into the guest"),
                &error,
            )
        })?;
        self.put_reader(file, &name, guest_path, mode, deadline)
    }

    fn put_reader(
        &self,
        mut source: impl Read,
        name: &str,
        guest_path: &str,
        mode: u32,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        let what = format!("put {guest_path}");
        let until = Instant::now() + deadline;
        let mut under_way: VecDeque<Pending<'_>> = VecDeque::new();
        let mut offset = 0u64;
        loop {
            let mut chunk = Vec::with_capacity(MAX_CHUNK);
            source
                .by_ref()
                .take(MAX_CHUNK as u64)
                .read_to_end(&mut chunk)
                .map_err(|error| host(format!("cannot read {name}"), &error))?;
            let length = chunk.len() as u64;
            let done = chunk.len() < MAX_CHUNK;
            if offset == 0 || length > 0 {
                let request = Request::Write {
                    path: guest_path.to_owned(),
                    offset,
                    data: Bytes(chunk),
                    create: (offset == 0).then_some(mode),
                };
                under_way.push_back(self.send(&what, request, b"", left(until))?);
                offset = offset.saturating_add(length);
            }
            while under_way.len() >= if done { 1 } else { WINDOW } {
                let Some(pending) = under_way.pop_front() else {
                    break;
                };
                match pending.next(left(until)) {
                    Ok(Reply::Done) => {}
                    Ok(other) => return Err(unexpected(&what, &other)),
                    Err(AgentError::Deadline { what, .. }) => {
                        return Err(AgentError::Deadline {
                            what,
                            after: deadline,
                        });
                    }
                    Err(error) => return Err(error),
                }
            }
            if done {
                return Ok(());
            }
        }
    }

    /// Writes a few bytes to a file of the guest that exists, at its start and in one piece: an attribute of
    /// sysfs, say.
    pub fn write_attribute(
        &self,
        bytes: &[u8],
        guest_path: &str,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        self.write_at(bytes, guest_path, 0, deadline)
    }

    /// Has an empty file made, and waits for no answer: the guest is about to do what none gets out of.
    pub fn touch_unanswered(&self, guest_path: &str, deadline: Duration) -> Result<(), AgentError> {
        let request = Request::Write {
            path: guest_path.to_owned(),
            offset: 0,
            data: Bytes(Vec::new()),
            create: Some(0o600),
        };
        self.send(&format!("touch {guest_path}"), request, b"", deadline)
            .map(drop)
    }

    /// Writes a few bytes to a file of the guest that exists, at `offset` and in one piece: registers in a function's
    /// configuration space, say.
    pub fn write_at(
        &self,
        bytes: &[u8],
        guest_path: &str,
        offset: u64,
        deadline: Duration,
    ) -> Result<(), AgentError> {
        let request = Request::Write {
            path: guest_path.to_owned(),
            offset,
            data: Bytes(bytes.to_vec()),
            create: None,
        };
        self.done(&format!("write {guest_path}"), request, deadline)
    }

    /// Reads a file of the guest, at most `limit` bytes of it. `deadline` is for the whole file.
    pub fn get(
        &self,
        guest_path: &str,
        limit: usize,
        deadline: Duration,
    ) -> Result<Vec<u8>, AgentError> {
        let what = format!("get {guest_path}");
        let until = Instant::now() + deadline;
        let mut bytes = Vec::new();
        while bytes.len() < limit {
            let wanted = (limit - bytes.len()).min(MAX_CHUNK);
            let request = Request::Read {
                path: guest_path.to_owned(),
                offset: bytes.len() as u64,
                length: u32::try_from(wanted).unwrap_or(u32::MAX),
            };
            match self.ask(&what, request, left(until)) {
                Ok(Reply::Data {
                    data: Bytes(data),
                    eof,
                }) => {
                    if data.len() > wanted || (data.is_empty() && !eof) {
                        return Err(AgentError::Protocol {
                            what: format!("{what}: bad length"),
                        });
                    }
                    bytes.extend_from_slice(&data);
                    if eof {
                        break;
                    }
                }
                Ok(other) => return Err(unexpected(&what, &other)),
                Err(AgentError::Deadline { what, .. }) => {
                    return Err(AgentError::Deadline {
                        what,
                        after: deadline,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Lists a directory of the guest, at most 100,000 entries, sorted by name.
    pub fn list(&self, guest_path: &str, deadline: Duration) -> Result<Vec<Entry>, AgentError> {
        const MOST: usize = 100_000;
        let what = format!("list {guest_path}");
        let until = Instant::now() + deadline;
        let request = Request::List {
            path: guest_path.to_owned(),
        };
        let pending = self.send(&what, request, b"", deadline)?;
        let mut all = Vec::new();
        loop {
            match pending.next(left(until))? {
                Reply::Entries { entries, last } => {
                    all.extend(entries);
                    if last || all.len() > MOST {
                        break;
                    }
                }
                other => return Err(unexpected(&what, &other)),
            }
        }
        all.truncate(MOST);
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}
