//! A client that packs its bytes by hand, so that it can send what no client should.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::Fake;
use crate::Server;

pub(super) const VERSION: u16 = 1;
pub(super) const DMA_MAP: u16 = 2;
pub(super) const DMA_UNMAP: u16 = 3;
pub(super) const GET_INFO: u16 = 4;
pub(super) const GET_REGION_INFO: u16 = 5;
pub(super) const GET_IRQ_INFO: u16 = 7;
pub(super) const SET_IRQS: u16 = 8;
pub(super) const REGION_READ: u16 = 9;
pub(super) const REGION_WRITE: u16 = 10;
pub(super) const RESET: u16 = 13;
pub(super) const WRITE_MULTI: u16 = 15;

pub(super) const NO_REPLY: u32 = 0x10;

pub(super) const E2BIG: i32 = 7;
pub(super) const EINVAL: i32 = 22;
pub(super) const EPROTO: i32 = 71;
pub(super) const EPROTONOSUPPORT: i32 = 93;
pub(super) const EOPNOTSUPP: i32 = 95;

/// Longest wait for a reply that must come.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Little-endian bytes of a list of u32 (the tests' machines are little-endian).
pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two u32, then u64 each.
pub(super) fn mixed(first: u32, second: u32, rest: &[u64]) -> Vec<u8> {
    let mut bytes = words(&[first, second]);
    bytes.extend(rest.iter().flat_map(|long| long.to_le_bytes()));
    bytes
}

pub(super) fn access(offset: u64, region: u32, count: u32) -> Vec<u8> {
    let mut bytes = offset.to_le_bytes().to_vec();
    bytes.extend(words(&[region, count]));
    bytes
}

pub(super) struct Raw {
    pub(super) stream: UnixStream,
    pub(super) target: Arc<Fake>,
    pub(super) server: Server,
    next_id: u16,
}

impl Raw {
    /// A client that has said nothing yet.
    pub(super) fn silent() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(REPLY_TIMEOUT)).unwrap();
        let target = Arc::new(Fake::new());
        let server = Server::serve_stream_target(theirs, target.clone()).unwrap();
        Raw {
            stream,
            target,
            server,
            next_id: 100,
        }
    }

    /// A client that has agreed on a version.
    pub(super) fn new() -> Self {
        let mut raw = Self::silent();
        let reply = raw.call(VERSION, &[0, 0, 1, 0]).unwrap();
        assert_eq!(reply[..4], [0, 0, 1, 0]);
        assert_eq!(raw.target.take_log(), ["connect"]);
        raw
    }

    pub(super) fn header(&mut self, command: u16, size: usize, flags: u32) -> Vec<u8> {
        self.next_id = self.next_id.wrapping_add(1);
        let mut bytes = self.next_id.to_le_bytes().to_vec();
        bytes.extend(command.to_le_bytes());
        bytes.extend(words(&[size as u32, flags, 0]));
        bytes
    }

    pub(super) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let parts = [IoSlice::new(&bytes[sent..])];
            sent += rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)
                .unwrap();
            control.clear();
        }
    }

    pub(super) fn send(
        &mut self,
        command: u16,
        payload: &[u8],
        flags: u32,
        fds: &[BorrowedFd<'_>],
    ) {
        let mut bytes = self.header(command, 16 + payload.len(), flags);
        bytes.extend(payload);
        self.send_bytes(&bytes, fds);
    }

    /// The next reply: its payload, or its errno. It must be the last request's.
    pub(super) fn reply(&mut self, command: u16) -> Result<Vec<u8>, i32> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(
            header[0..2],
            self.next_id.to_le_bytes(),
            "reply to another message"
        );
        assert_eq!(
            header[2..4],
            command.to_le_bytes(),
            "reply to another command"
        );
        let mut payload = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        match word(8) {
            1 => {
                assert_eq!(word(12), 0);
                Ok(payload)
            }
            0x21 => {
                assert!(payload.is_empty());
                Err(word(12) as i32)
            }
            flags => panic!("flags {flags:#x}"),
        }
    }

    pub(super) fn call_with(
        &mut self,
        command: u16,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, i32> {
        self.send(command, payload, 0, fds);
        self.reply(command)
    }

    pub(super) fn call(&mut self, command: u16, payload: &[u8]) -> Result<Vec<u8>, i32> {
        self.call_with(command, payload, &[])
    }

    /// Whatever was sent before, the next request is understood.
    pub(super) fn assert_in_step(&mut self) {
        let reply = self.call(GET_INFO, &words(&[16, 0, 0, 0])).unwrap();
        assert_eq!(reply, words(&[16, 3, 9, 5]));
    }
}
