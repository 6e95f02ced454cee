//! The serial console: recorded from the first byte, scanned for kernel reports, and written to.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendFlags, send};

use super::fault::{Fault, Faults};
use super::scan::Scanner;
use crate::wait::{self, Deadline, DeadlineExceeded, lock};

/// Text kept in memory for [`Console::wait_for`] and for a terminal that has fallen behind; all of it
/// is in console.log.
const TEXT_KEPT: usize = 256 << 10;
/// How long the reader sleeps when nothing is due. It wakes for bytes; this only bounds the unforeseen.
const IDLE: Duration = Duration::from_secs(3600);

/// Why a wait on the console failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConsoleError {
    /// The text did not come in time.
    #[error("{exceeded}; the console's last lines:\n{}", indent(tail))]
    Deadline {
        /// What was awaited.
        exceeded: DeadlineExceeded,
        /// The console's last lines.
        tail: Vec<String>,
    },
    /// The guest is in no state to say it any more.
    #[error("waited for {what}: {fault}")]
    Fault {
        /// What was awaited.
        what: String,
        /// What happened instead.
        fault: Arc<Fault>,
    },
    /// The console ended first.
    #[error(
        "waited for {what}, and the console has ended; its last lines:\n{}",
        indent(tail)
    )]
    Closed {
        /// What was awaited.
        what: String,
        /// The console's last lines.
        tail: Vec<String>,
    },
}

fn indent(lines: &[String]) -> String {
    lines
        .iter()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// What the reader thread has made of the console so far.
#[derive(Default)]
pub(super) struct State {
    scanner: Scanner,
    /// The newest bytes; `end` counts all there ever were.
    text: Vec<u8>,
    end: u64,
    pub(super) closed: bool,
    /// Woken, by a byte, for new text and for the end.
    pub(super) attached: Option<UnixStream>,
}

impl State {
    /// The kept bytes from offset `since` on, and how many before them are no longer kept.
    pub(super) fn text_since(&self, since: u64) -> (&[u8], u64) {
        let kept = self.end.saturating_sub(self.text.len() as u64);
        let lost = kept.saturating_sub(since);
        let skip = usize::try_from(since.saturating_sub(kept)).unwrap_or(usize::MAX);
        (self.text.get(skip..).unwrap_or_default(), lost)
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn wake_attached(&self) {
        if let Some(attached) = &self.attached {
            // A full pipe has woken it already.
            let _ = send(attached, b"!", SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    changed: Condvar,
    pub(super) stream: UnixStream,
    faults: Faults,
    writer: Mutex<()>,
}

/// The console of one guest. Clones share it; the reader thread ends when QEMU closes its end.
#[derive(Clone)]
pub struct Console {
    pub(super) shared: Arc<Shared>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// Starts to record `stream` into `log` (created, or appended to). Kernel reports go to `faults`.
    pub fn start(stream: UnixStream, log: &Path, faults: Faults) -> io::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            stream,
            faults: faults.clone(),
            writer: Mutex::new(()),
        });
        let console = Self {
            shared: Arc::clone(&shared),
        };
        // A fault ends every wait on the console. Weak: the board may outlive the console.
        let weak = Arc::downgrade(&shared);
        faults.subscribe(move |_| {
            if let Some(shared) = weak.upgrade() {
                drop(lock(&shared.state));
                shared.changed.notify_all();
            }
        });
        std::thread::Builder::new()
            .name("console".into())
            .spawn(move || shared.record(log))?;
        Ok(console)
    }

    /// The place behind everything that has been printed so far, for [`Console::wait_for_since`].
    pub fn mark(&self) -> u64 {
        lock(&self.shared.state).end
    }

    /// Waits until `text` has been printed, at any time since the start (within the last 256 KiB).
    ///
    /// A fault on the board ends the wait as what it is.
    pub fn wait_for(&self, text: &str, deadline: &Deadline) -> Result<(), ConsoleError> {
        self.wait_for_since(0, text, deadline)
    }

    /// Waits until `text` has been printed behind `mark`.
    pub fn wait_for_since(
        &self,
        mark: u64,
        text: &str,
        deadline: &Deadline,
    ) -> Result<(), ConsoleError> {
        let what = format!("{text:?} on the console ({})", deadline.what());
        let deadline = deadline.part(what.clone());
        let Shared {
            state,
            changed,
            faults,
            ..
        } = &*self.shared;
        let waited = wait::wait_for(state, changed, &deadline, |state| {
            if contains(state.text_since(mark).0, text.as_bytes()) {
                return Some(Ok(()));
            }
            if let Some(fault) = faults.first() {
                return Some(Err(ConsoleError::Fault {
                    what: what.clone(),
                    fault,
                }));
            }
            let closed = || ConsoleError::Closed {
                what: what.clone(),
                tail: state.scanner.tail(),
            };
            state.closed.then(|| Err(closed()))
        });
        waited.map_err(|exceeded| ConsoleError::Deadline {
            exceeded,
            tail: self.tail(),
        })?
    }

    /// What has been printed behind `mark` (of the last 256 KiB).
    pub fn printed_since(&self, mark: u64) -> String {
        let state = lock(&self.shared.state);
        String::from_utf8_lossy(state.text_since(mark).0).into_owned()
    }

    /// Waits until QEMU has closed the console and all of it has been recorded and scanned.
    pub fn wait_closed(&self, deadline: &Deadline) -> Result<(), DeadlineExceeded> {
        let Shared { state, changed, .. } = &*self.shared;
        wait::wait_for(state, changed, deadline, |state| state.closed.then_some(()))
    }

    /// Types `bytes`. The guest's serial port takes them as fast as its driver reads.
    pub fn write(&self, bytes: &[u8], deadline: &Deadline) -> Result<(), ConsoleError> {
        let _one_at_a_time = lock(&self.shared.writer);
        let mut left = bytes;
        while !left.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.shared.stream, left, flags) {
                Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let exceeded = |exceeded| ConsoleError::Deadline {
                        exceeded,
                        tail: self.tail(),
                    };
                    let patience = deadline.check().map_err(exceeded)?;
                    let mut fds = [PollFd::new(&self.shared.stream, PollFlags::OUT)];
                    if wait::poll_for(&mut fds, patience).is_err() {
                        return Err(self.closed(deadline));
                    }
                }
                Err(_) => return Err(self.closed(deadline)),
            }
        }
        Ok(())
    }

    fn closed(&self, deadline: &Deadline) -> ConsoleError {
        ConsoleError::Closed {
            what: deadline.what().to_owned(),
            tail: self.tail(),
        }
    }

    /// The console's last lines (up to 100).
    pub fn tail(&self) -> Vec<String> {
        lock(&self.shared.state).scanner.tail()
    }

    /// The kernel's warnings so far (up to 100): no faults, but worth a look.
    pub fn warnings(&self) -> Vec<String> {
        lock(&self.shared.state).scanner.warnings().to_vec()
    }
}

impl Shared {
    fn record(&self, mut log: File) {
        let mut buffer = [0; 16 << 10];
        let mut log_works = true;
        loop {
            let patience = lock(&self.state)
                .scanner
                .patience(Instant::now())
                .unwrap_or(IDLE);
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
            let length = match wait::poll_for(&mut fds, patience) {
                Ok(0) => None,
                // A reset means that QEMU died with our typing unread.
                _ => Some((&self.stream).read(&mut buffer).unwrap_or(0)),
            };
            let bytes = buffer.get(..length.unwrap_or(0)).unwrap_or_default();
            if let Err(error) = log.write_all(bytes)
                && std::mem::take(&mut log_works)
            {
                tracing::error!("console.log is incomplete from here on: {error}");
            }
            let closed = length == Some(0);
            let fault = lock(&self.state).take(bytes, closed);
            // Not under our own lock: the board's subscribers include this console.
            if let Some(fault) = fault {
                self.faults.raise(Fault::Guest(fault));
            }
            if closed {
                lock(&self.state).closed = true;
            }
            lock(&self.state).wake_attached();
            self.changed.notify_all();
            if closed {
                let _ = self.stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

impl State {
    fn take(&mut self, bytes: &[u8], closed: bool) -> Option<super::fault::GuestFault> {
        let now = Instant::now();
        self.text.extend_from_slice(bytes);
        self.end = self.end.saturating_add(bytes.len() as u64);
        // Twice the size before anything moves, so that a byte costs a byte on average.
        if self.text.len() > 2 * TEXT_KEPT {
            self.text.drain(..self.text.len() - TEXT_KEPT);
        }
        self.scanner.feed(bytes, now);
        self.scanner.due(now, closed)
    }
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || text.windows(wanted.len()).any(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::fault::FaultKind;
    use std::os::fd::OwnedFd;

    fn console() -> (Console, UnixStream, Faults, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let faults = Faults::new();
        let console =
            Console::start(ours, &folder.path().join("console.log"), faults.clone()).unwrap();
        (console, theirs, faults, folder)
    }

    fn soon(what: &'static str) -> Deadline {
        Deadline::new(what, Duration::from_secs(20))
    }

    #[test]
    fn everything_is_recorded_and_found() {
        let (console, mut guest, _, folder) = console();
        guest.write_all(b"hello \xff\xfe wor").unwrap();
        guest.write_all(b"ld\r\nlogin: ").unwrap();
        console.wait_for("login: ", &soon("login")).unwrap();
        let mark = console.mark();
        assert_eq!(console.printed_since(mark), "");
        assert!(console.printed_since(0).ends_with("world\r\nlogin: "));
        guest.write_all(b"login: ").unwrap();
        console
            .wait_for_since(mark, "login: ", &soon("second login"))
            .unwrap();
        drop(guest);
        console.wait_closed(&soon("the end")).unwrap();
        let log = std::fs::read(folder.path().join("console.log")).unwrap();
        assert_eq!(log, b"hello \xff\xfe world\r\nlogin: login: ");
        let error = console.wait_for("more", &soon("more")).unwrap_err();
        assert!(matches!(error, ConsoleError::Closed { .. }), "{error}");
    }

    #[test]
    fn a_panic_ends_a_wait_as_a_panic() {
        let (console, mut guest, faults, _folder) = console();
        let waiting = std::thread::spawn(move || console.wait_for("never", &soon("boot")));
        let began = Instant::now();
        guest
            .write_all(
                b"[1.000000] Kernel panic - not syncing: why\n[1.000000] CPU: 0\n\
                  [1.000000] ---[ end Kernel panic - not syncing: why ]---\n",
            )
            .unwrap();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(10));
        let ConsoleError::Fault { fault, .. } = error else {
            panic!("{error}")
        };
        let Fault::Guest(guest_fault) = &*fault else {
            panic!("{fault}")
        };
        assert_eq!(guest_fault.kind, FaultKind::Panic);
        assert_eq!(guest_fault.tail.len(), 3);
        assert!(faults.first().is_some());
    }

    #[test]
    fn a_deadline_shows_the_last_lines() {
        let (console, mut guest, _, _folder) = console();
        guest.write_all(b"stuck here\n").unwrap();
        console.wait_for("stuck here\n", &soon("the line")).unwrap();
        let error = console
            .wait_for("x", &Deadline::new("boot", Duration::ZERO))
            .unwrap_err();
        assert!(error.to_string().contains("stuck here"), "{error}");
    }

    #[test]
    fn a_guest_that_does_not_read_ends_in_a_deadline() {
        let (console, guest, _, _folder) = console();
        let much = vec![b'x'; 4 << 20];
        let deadline = Deadline::new("the guest to read", Duration::from_millis(50));
        let error = console.write(&much, &deadline).unwrap_err();
        assert!(matches!(error, ConsoleError::Deadline { .. }), "{error}");
        drop(OwnedFd::from(guest));
    }

    #[test]
    fn the_kept_text_is_bounded_and_offsets_stay_true() {
        let mut state = State::default();
        for _ in 0..100 {
            state.take(&[b'x'; 16 << 10], false);
        }
        state.take(b"end", false);
        assert!(state.text.len() <= 2 * TEXT_KEPT + 3);
        assert_eq!(state.text_since(state.end - 3), (&b"end"[..], 0));
        assert!(state.text_since(0).1 > 0);
        assert_eq!(state.text_since(state.end + 5).0, b"");
    }
}
