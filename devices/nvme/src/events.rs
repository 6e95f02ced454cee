//! Asynchronous events (Base 5.2) and the Error Information log that explains them.

use std::collections::VecDeque;

use zerocopy::FromZeros;
use zerocopy::little_endian::{U16, U64};

use crate::spec::command::Command;
use crate::spec::log::{ErrorEntry, lid};
use crate::spec::status::Status;

/// Asynchronous Event Requests that may be held, 0's based (AERL).
pub(crate) const AERL_Z: u8 = 3;

/// Entries of the Error Information log, 0's based (ELPE).
pub(crate) const ELPE_Z: u8 = 63;

/// An event, as dword 0 of its completion carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    kind: u8,
    info: u8,
    log: u8,
}

impl Event {
    /// Write to Invalid Doorbell Register.
    pub(crate) const INVALID_DOORBELL: Self = Self {
        kind: 0,
        info: 0,
        log: lid::ERROR_INFORMATION,
    };
    /// Invalid Doorbell Write Value.
    pub(crate) const INVALID_DOORBELL_VALUE: Self = Self {
        kind: 0,
        info: 1,
        log: lid::ERROR_INFORMATION,
    };

    pub(crate) fn dword(self) -> u32 {
        u32::from_le_bytes([self.kind, self.info, self.log, 0])
    }
}

/// Requests held and events that wait for one.
#[derive(Debug, Default)]
pub(crate) struct AsyncEvents {
    held: VecDeque<U16>,
    waiting: VecDeque<Event>,
    /// Types reported and not yet cleared by reading their log page: one bit each.
    masked: u8,
}

impl AsyncEvents {
    /// Holds a request.
    pub(crate) fn hold(&mut self, cid: U16) -> Result<(), Status> {
        if self.held.len() > usize::from(AERL_Z) {
            return Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED);
        }
        self.held.push_back(cid);
        Ok(())
    }

    /// Takes a held request out, to abort it.
    pub(crate) fn abort(&mut self, cid: U16) -> bool {
        let at = self.held.iter().position(|held| *held == cid);
        at.is_some_and(|at| self.held.remove(at).is_some())
    }

    /// An event happened. A type that is masked, or an event that waits already, is not reported twice.
    pub(crate) fn push(&mut self, event: Event) {
        if self.masked & (1 << event.kind) == 0 && !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }

    /// The namespace `nsid` was formatted, attached, detached or deleted.
    pub(crate) fn namespace_changed(&mut self, nsid: u32) {
        // Neither the event nor the log page is claimed (OAES).
        tracing::debug!(nsid, "namespace attribute changed");
    }

    /// The next request to complete, with its event.
    pub(crate) fn next(&mut self) -> Option<(U16, Event)> {
        if self.held.is_empty() {
            return None;
        }
        let event = self.waiting.pop_front()?;
        self.masked |= 1 << event.kind;
        self.waiting.retain(|other| other.kind != event.kind);
        Some((self.held.pop_front()?, event))
    }

    pub(crate) fn is_ready(&self) -> bool {
        !self.held.is_empty() && !self.waiting.is_empty()
    }

    /// The host read log page `log`: its events may be reported again.
    pub(crate) fn log_was_read(&mut self, log: u8) {
        if log == lid::ERROR_INFORMATION {
            self.masked &= !1;
        }
    }
}

/// The last errors, newest first.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    entries: VecDeque<ErrorEntry>,
    pub(crate) count: u64,
}

impl ErrorLog {
    pub(crate) fn command(&mut self, sqid: u16, command: &Command, status: Status) {
        let mut entry = ErrorEntry::new_zeroed();
        entry.sqid = sqid.into();
        entry.cid = command.cid;
        entry.status = U16::new(status.0 << 1);
        entry.parameter = U16::new(0xffff);
        entry.lba = U64::new(if sqid == 0 { 0 } else { command.slba() });
        entry.nsid = command.nsid;
        self.push(entry);
    }

    /// An error that belongs to no command.
    pub(crate) fn doorbell(&mut self, qid: u16) {
        let mut entry = ErrorEntry::new_zeroed();
        entry.sqid = qid.into();
        entry.cid = U16::new(0xffff);
        entry.parameter = U16::new(0xffff);
        self.push(entry);
    }

    fn push(&mut self, mut entry: ErrorEntry) {
        self.count += 1;
        entry.error_count = U64::new(self.count);
        self.entries.truncate(usize::from(ELPE_Z));
        self.entries.push_front(entry);
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &ErrorEntry> {
        self.entries.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_limited_and_events_reported_once_until_the_log_is_read() {
        let mut events = AsyncEvents::default();
        for cid in 0..4 {
            events.hold(U16::new(cid)).unwrap();
        }
        assert_eq!(
            events.hold(U16::new(4)),
            Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED)
        );
        events.push(Event::INVALID_DOORBELL);
        assert_eq!(events.next(), Some((U16::new(0), Event::INVALID_DOORBELL)));
        events.push(Event::INVALID_DOORBELL_VALUE);
        assert_eq!(events.next(), None);
        events.log_was_read(lid::ERROR_INFORMATION);
        events.push(Event::INVALID_DOORBELL_VALUE);
        assert_eq!(events.next().map(|(_, e)| e.dword()), Some(0x0001_0100));
        assert!(events.abort(U16::new(3)));
        assert!(!events.abort(U16::new(3)));
    }

    #[test]
    fn the_error_log_is_bounded() {
        let mut log = ErrorLog::default();
        (0..200).for_each(|q| log.doorbell(q));
        assert_eq!(log.entries().count(), 64);
        assert_eq!(log.entries().next().unwrap().error_count.get(), 200);
    }
}
