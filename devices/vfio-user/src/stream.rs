//! Whole messages in and out of the socket, with their file descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::posted::Progress;
use crate::wire::{HEADER_SIZE, Header};

/// Descriptors that one message may carry; QEMU sends no more than 16 whatever we announce.
pub(crate) const MAX_FDS: usize = 16;

/// Most data of one REGION_READ or REGION_WRITE, in bytes.
pub(crate) const MAX_DATA: usize = 1 << 20;

/// Longest message that is kept; longer ones are read past and answered with E2BIG.
const MAX_MESSAGE: usize = MAX_DATA + 4096;

/// A message said to be longer than this is taken for a stream out of step: the connection closes.
pub(crate) const MAX_SKIPPED: usize = 16 << 20;

/// A received request. Its payload stays in the [`Inbox`].
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) header: Header,
    pub(crate) fds: Vec<OwnedFd>,
    /// What is wrong with it as a message, before anyone looks at its meaning.
    pub(crate) fault: Option<Errno>,
}

/// Why there is no next message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The peer closed the socket between two messages.
    #[error("the client closed the connection")]
    Closed,
    /// The peer closed the socket inside a message.
    #[error("the client closed the connection inside a message")]
    Truncated,
    /// A size that cannot be: from here on, nothing tells where a message begins.
    #[error(
        "the client sent a message size of {0} bytes, and the stream cannot be followed any further"
    )]
    OutOfStep(u32),
    /// The host's.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Bytes read ahead: QEMU's doorbell writes have 36 bytes with their header, and often come several at a time.
const AHEAD: usize = 4096;

/// Reads messages; the payload of the last one stays in a buffer that is used for all of them.
///
/// What has arrived is read at once, so that a short message costs one system call, or none.
#[derive(Debug)]
pub(crate) struct Inbox {
    buffer: Vec<u8>,
    length: usize,
    ahead: Vec<u8>,
    /// What of `ahead` has arrived and was not taken yet.
    waiting: Range<usize>,
    /// Bytes taken so far.
    taken: u64,
    arrivals: Arrivals,
}

impl Inbox {
    /// An empty one, which tells `progress` of what it takes.
    pub(crate) fn new(progress: Arc<Progress>) -> Self {
        Self {
            buffer: Vec::new(),
            length: 0,
            ahead: Vec::new(),
            waiting: 0..0,
            taken: 0,
            arrivals: Arrivals {
                received: 0,
                fds: Vec::new(),
                truncated: None,
                progress,
            },
        }
    }

    /// Where the last message received ends, in bytes since the beginning.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Payload of the last message received.
    pub(crate) fn payload(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    /// Waits for the next message and reads all of it. While there is none `idle` is called, again and again as long as
    /// it returns true; only then does the thread sleep.
    pub(crate) fn receive(
        &mut self,
        stream: &UnixStream,
        idle: &mut dyn FnMut() -> bool,
    ) -> Result<Received, Ended> {
        self.length = 0;
        let mut bytes = [0; HEADER_SIZE];
        if self.waiting.is_empty() {
            await_message(stream, idle)?;
        }
        self.take(stream, &mut bytes).map_err(|ended| match ended {
            Shortfall::None => Ended::Closed,
            Shortfall::Part => Ended::Truncated,
            Shortfall::Io(error) => Ended::Io(error),
        })?;
        let header = Header::read_from_bytes(&bytes).unwrap_or_default();
        let length = usize::try_from(header.message_size)
            .ok()
            .filter(|size| *size <= MAX_SKIPPED)
            .and_then(|size| size.checked_sub(HEADER_SIZE))
            .ok_or(Ended::OutOfStep(header.message_size))?;

        let kept = length <= MAX_MESSAGE;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut left = length;
        while left > 0 {
            // Too long a message passes through the buffer piece by piece.
            let piece = left.min(MAX_MESSAGE);
            if buffer.len() < piece {
                buffer.resize(piece.max(4096), 0);
            }
            let target = buffer.get_mut(..piece).unwrap_or_default();
            self.take(stream, target).map_err(|ended| match ended {
                Shortfall::Io(error) => Ended::Io(error),
                Shortfall::None | Shortfall::Part => Ended::Truncated,
            })?;
            left -= piece;
        }
        self.buffer = buffer;
        if kept {
            self.length = length;
        }
        let (fds, truncated) = self.arrivals.before(self.taken);
        let fault = match (kept, truncated) {
            (false, _) => Some(Errno::TOOBIG),
            (true, true) => Some(Errno::INVAL),
            (true, false) => None,
        };
        Ok(Received { header, fds, fault })
    }

    /// Fills `data`, from what was read ahead and then from the socket.
    fn take(&mut self, stream: &UnixStream, data: &mut [u8]) -> Result<(), Shortfall> {
        let mut filled = 0;
        while let Some(rest) = data.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let count = if self.waiting.is_empty() && rest.len() >= AHEAD {
                self.arrivals.read(stream, rest, filled > 0)?
            } else {
                if self.waiting.is_empty() {
                    self.ahead.resize(AHEAD, 0);
                    self.waiting = 0..self.arrivals.read(stream, &mut self.ahead, filled > 0)?;
                }
                let have = self.ahead.get(self.waiting.clone()).unwrap_or_default();
                let count = have.len().min(rest.len());
                if let (Some(to), Some(from)) = (rest.get_mut(..count), have.get(..count)) {
                    to.copy_from_slice(from);
                }
                self.waiting.start += count;
                count
            };
            filled += count;
            self.taken = self.taken.wrapping_add(count as u64);
        }
        Ok(())
    }
}

/// Returns when the socket has something to read, or its end, or when `idle` has nothing more to do.
fn await_message(stream: &UnixStream, idle: &mut dyn FnMut() -> bool) -> io::Result<()> {
    loop {
        match rustix::net::recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            // Whatever it is, the read that follows finds it, too.
            _ => return Ok(()),
        }
        if !idle() {
            return Ok(());
        }
        // The guest's processors need the host's.
        std::thread::yield_now();
    }
}

enum Shortfall {
    None,
    Part,
    Io(io::Error),
}

/// Descriptors that have arrived and whose message has not been read to its end.
///
/// Linux ends a read behind the piece that descriptors came with (unix(7), ancillary messages), so they belong to
/// the message that has the read's last byte.
#[derive(Debug)]
struct Arrivals {
    /// Bytes received so far.
    received: u64,
    /// Descriptors, each with the position of its message's byte.
    fds: Vec<(u64, OwnedFd)>,
    /// Position of a byte whose message came with more than it may.
    truncated: Option<u64>,
    progress: Arc<Progress>,
}

impl Arrivals {
    /// Reads what has arrived, and waits for something if nothing has. `inside` a message the end is another error.
    fn read(
        &mut self,
        stream: &UnixStream,
        data: &mut [u8],
        inside: bool,
    ) -> Result<usize, Shortfall> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(data)];
        let got = loop {
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let mut got = None;
            let taken = self.progress.take(|| {
                let received = rustix::net::recvmsg(stream, &mut parts, &mut control, flags)?;
                let count = received.bytes;
                got = Some(received);
                Ok(count)
            });
            match (taken, got) {
                (Ok(_), Some(got)) => break got,
                (Ok(_), None) | (Err(Errno::INTR), _) => {}
                (Err(Errno::AGAIN), _) => {
                    // Whatever it says, the next round finds it, too.
                    let _ = rustix::net::recv(stream, &mut [0; 1], RecvFlags::PEEK);
                }
                (Err(error), _) => return Err(Shortfall::Io(error.into())),
            }
        };
        if got.bytes == 0 {
            return Err(if inside {
                Shortfall::Part
            } else {
                Shortfall::None
            });
        }
        self.received = self.received.wrapping_add(got.bytes as u64);
        let last = self.received.wrapping_sub(1);
        if got.flags.contains(ReturnFlags::CTRUNC) {
            self.truncated = Some(last);
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                for fd in received {
                    // A message in many pieces, each with descriptors: what is too much is closed at once.
                    if self.fds.len() < 2 * MAX_FDS {
                        self.fds.push((last, fd));
                    } else {
                        self.truncated = Some(last);
                    }
                }
            }
        }
        Ok(got.bytes)
    }

    /// Takes the descriptors of the message that ends before position `end`, and whether there were too many.
    fn before(&mut self, end: u64) -> (Vec<OwnedFd>, bool) {
        let mut truncated = self.truncated.take_if(|at| *at < end).is_some();
        let (mine, others) = self.fds.drain(..).partition(|(at, _)| *at < end);
        self.fds = others;
        let mut mine: Vec<(u64, OwnedFd)> = mine;
        truncated |= mine.len() > MAX_FDS;
        mine.truncate(MAX_FDS);
        (mine.into_iter().map(|(_, fd)| fd).collect(), truncated)
    }
}

/// A reply under construction, in a buffer that is used for all of them.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    buffer: Vec<u8>,
}

impl Outbox {
    /// Starts an empty reply.
    pub(crate) fn clear(&mut self) {
        self.buffer.clear();
        self.buffer.resize(HEADER_SIZE, 0);
    }

    /// Appends a fixed part.
    pub(crate) fn push(&mut self, part: &(impl IntoBytes + zerocopy::Immutable)) {
        self.buffer.extend_from_slice(part.as_bytes());
    }

    /// Appends bytes.
    pub(crate) fn push_bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Appends `length` zero bytes and gives them to the caller to fill.
    pub(crate) fn extend(&mut self, length: usize) -> &mut [u8] {
        let start = self.buffer.len();
        self.buffer.resize(start.saturating_add(length), 0);
        self.buffer.get_mut(start..).unwrap_or_default()
    }

    /// Sends the reply, with `fd` if there is one.
    ///
    /// # Errors
    /// The host's: the client is gone.
    pub(crate) fn send(
        &mut self,
        stream: &UnixStream,
        mut header: Header,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        header.message_size = u32::try_from(self.buffer.len()).map_err(io::Error::other)?;
        if let Some(start) = self.buffer.get_mut(..HEADER_SIZE) {
            start.copy_from_slice(header.as_bytes());
        }
        let mut sent = 0;
        let mut fd = fd;
        while let Some(rest) = self.buffer.get(sent..).filter(|rest| !rest.is_empty()) {
            let result = match fd {
                None => rustix::net::send(stream, rest, SendFlags::NOSIGNAL),
                Some(fd) => {
                    let fds = [fd];
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                        return Err(io::Error::other("no room for a file descriptor"));
                    }
                    let parts = [IoSlice::new(rest)];
                    rustix::net::sendmsg(stream.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL)
                }
            };
            match result {
                Ok(count) => {
                    sent += count;
                    // It went with the first byte.
                    fd = None;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
