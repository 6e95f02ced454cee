//! Whole messages in and out of the socket, with their file descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use zerocopy::{FromBytes, IntoBytes};

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

/// The payload of the last message, in a buffer that is used for all of them.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    buffer: Vec<u8>,
    length: usize,
}

impl Inbox {
    /// Payload of the last message received.
    pub(crate) fn payload(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }

    /// Waits for the next message and reads all of it.
    pub(crate) fn receive(&mut self, stream: &UnixStream) -> Result<Received, Ended> {
        self.length = 0;
        let mut fds = Vec::new();
        let mut truncated = false;
        let mut bytes = [0; HEADER_SIZE];
        read_whole(stream, &mut bytes, &mut fds, &mut truncated).map_err(|ended| match ended {
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
        let mut left = length;
        while left > 0 {
            // Too long a message passes through the buffer piece by piece.
            let piece = left.min(MAX_MESSAGE);
            if self.buffer.len() < piece {
                self.buffer.resize(piece.max(4096), 0);
            }
            let target = self.buffer.get_mut(..piece).unwrap_or_default();
            read_whole(stream, target, &mut fds, &mut truncated).map_err(|ended| match ended {
                Shortfall::Io(error) => Ended::Io(error),
                Shortfall::None | Shortfall::Part => Ended::Truncated,
            })?;
            left -= piece;
        }
        if kept {
            self.length = length;
        }
        let fault = match (kept, truncated) {
            (false, _) => Some(Errno::TOOBIG),
            (true, true) => Some(Errno::INVAL),
            (true, false) => None,
        };
        Ok(Received { header, fds, fault })
    }
}

enum Shortfall {
    None,
    Part,
    Io(io::Error),
}

/// Fills `data`. Descriptors may come with any byte: they are collected, up to [`MAX_FDS`]; `truncated`
/// is set, and the rest closed, where there are more.
fn read_whole(
    stream: &UnixStream,
    data: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    truncated: &mut bool,
) -> Result<(), Shortfall> {
    let mut filled = 0;
    while let Some(rest) = data.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(rest)];
        let got =
            match rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => got,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(Shortfall::Io(error.into())),
            };
        *truncated |= got.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                for fd in received {
                    if fds.len() < MAX_FDS {
                        fds.push(fd);
                    } else {
                        *truncated = true;
                    }
                }
            }
        }
        if got.bytes == 0 {
            return Err(if filled == 0 {
                Shortfall::None
            } else {
                Shortfall::Part
            });
        }
        filled += got.bytes;
    }
    Ok(())
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
