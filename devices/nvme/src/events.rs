//! Asynchronous events (Base 5.2): who hears of what, when, and how often.
//!
//! An event that was reported masks its type until the host reads the event's log page. What happens meanwhile
//! waits, and is dropped if the page that the host reads tells of it already.

use std::collections::{BTreeMap, VecDeque};

use zerocopy::little_endian::U16;

use crate::controller::Shared;
use crate::locks::lock;
use crate::spec::log::{critical_warning, lid};
use crate::spec::status::Status;

/// Asynchronous Event Requests that may be held, 0's based (AERL).
pub(crate) const AERL_Z: u8 = 3;

/// Optional Asynchronous Events Supported (OAES): namespace attributes, firmware activation.
pub(crate) const OAES: u32 = NAMESPACE_NOTICES | FIRMWARE_NOTICES;

/// Bits of the Asynchronous Event Configuration feature. Its low byte enables the bits of Critical Warning.
const NAMESPACE_NOTICES: u32 = 1 << 8;
const FIRMWARE_NOTICES: u32 = 1 << 9;
const TELEMETRY_NOTICES: u32 = 1 << 10;
const SMART_EVENTS: u32 = (critical_warning::SPARE
    | critical_warning::TEMPERATURE
    | critical_warning::RELIABILITY
    | critical_warning::READ_ONLY
    | critical_warning::BACKUP_FAILED) as u32;

/// All bits that the Asynchronous Event Configuration feature takes.
pub(crate) const CONFIGURABLE: u32 = OAES | TELEMETRY_NOTICES | SMART_EVENTS;

/// Namespaces that the Changed Namespace List has room for.
const CHANGED_NAMESPACES: usize = 1024;

/// An event, as dword 0 of its completion carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    kind: Kind,
    info: u8,
    log: u8,
}

/// Asynchronous Event Type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Error = 0,
    Smart = 1,
    Notice = 2,
    IoCommandSpecific = 6,
}

impl Event {
    /// Write to Invalid Doorbell Register.
    pub(crate) const INVALID_DOORBELL: Self = Self::new(Kind::Error, 0, lid::ERROR_INFORMATION);
    /// Invalid Doorbell Write Value.
    pub(crate) const INVALID_DOORBELL_VALUE: Self =
        Self::new(Kind::Error, 1, lid::ERROR_INFORMATION);
    /// Diagnostic Failure.
    pub(crate) const DIAGNOSTIC_FAILURE: Self = Self::new(Kind::Error, 2, lid::ERROR_INFORMATION);
    /// NVM subsystem Reliability.
    const RELIABILITY: Self = Self::new(Kind::Smart, 0, lid::SMART);
    /// Temperature Threshold.
    const TEMPERATURE: Self = Self::new(Kind::Smart, 1, lid::SMART);
    /// Spare Below Threshold.
    const SPARE: Self = Self::new(Kind::Smart, 2, lid::SMART);
    /// Namespace Attribute Changed.
    const NAMESPACE_CHANGED: Self = Self::new(Kind::Notice, 0, lid::CHANGED_NAMESPACES);
    /// Firmware Activation Starting.
    pub(crate) const FIRMWARE_ACTIVATION: Self = Self::new(Kind::Notice, 1, lid::FIRMWARE_SLOT);
    /// Telemetry Log Changed.
    pub(crate) const TELEMETRY_CHANGED: Self =
        Self::new(Kind::Notice, 3, lid::TELEMETRY_CONTROLLER);
    /// Sanitize Operation Completed.
    pub(crate) const SANITIZE_COMPLETED: Self =
        Self::new(Kind::IoCommandSpecific, 1, lid::SANITIZE_STATUS);
    /// Sanitize Operation Completed With Unexpected Deallocation.
    pub(crate) const SANITIZE_DEALLOCATED: Self =
        Self::new(Kind::IoCommandSpecific, 2, lid::SANITIZE_STATUS);

    const fn new(kind: Kind, info: u8, log: u8) -> Self {
        Self { kind, info, log }
    }

    pub(crate) fn dword(self) -> u32 {
        u32::from_le_bytes([self.kind as u8, self.info, self.log, 0])
    }

    /// The configuration bit without which the host does not hear of it. Those of SMART are looked at before,
    /// one by one.
    fn needs(self) -> u32 {
        match self {
            Self::NAMESPACE_CHANGED => NAMESPACE_NOTICES,
            Self::FIRMWARE_ACTIVATION => FIRMWARE_NOTICES,
            Self::TELEMETRY_CHANGED => TELEMETRY_NOTICES,
            _ => 0,
        }
    }
}

/// Requests held and events that wait for one.
#[derive(Debug, Default)]
pub(crate) struct AsyncEvents {
    /// The Asynchronous Event Configuration feature.
    config: u32,
    held: VecDeque<U16>,
    waiting: VecDeque<(u64, Event)>,
    /// Events reported and not yet cleared by reading their log page; each masks its type.
    reported: Vec<Event>,
    /// Critical warnings that an event was raised for and that persist.
    raised: u8,
    /// The Changed Namespace List, with the time of each change.
    changed: BTreeMap<u32, u64>,
    /// A number for each thing that happens: what is read is what happened before.
    now: u64,
}

impl AsyncEvents {
    /// As after a reset, with the Asynchronous Event Configuration that the host has saved.
    pub(crate) fn new(config: u32) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Takes a new Asynchronous Event Configuration.
    pub(crate) fn configure(&mut self, config: u32) {
        self.config = config;
        self.waiting
            .retain(|(_, event)| config & event.needs() == event.needs());
    }

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

    /// An event happened. One that waits already is not reported twice.
    pub(crate) fn push(&mut self, event: Event) {
        if self.config & event.needs() != event.needs() {
            return;
        }
        self.now = self.now.wrapping_add(1);
        match self.waiting.iter_mut().find(|(_, other)| *other == event) {
            Some((when, _)) => *when = self.now,
            None => self.waiting.push_back((self.now, event)),
        }
    }

    /// The Critical Warning field is `warning` now: a bit that became set is an event if the host wants it.
    pub(crate) fn health(&mut self, warning: u8) {
        let [enabled, ..] = self.config.to_le_bytes();
        let wanted = warning & enabled;
        let fresh = wanted & !self.raised;
        self.raised = wanted;
        if fresh & critical_warning::SPARE != 0 {
            self.push(Event::SPARE);
        }
        if fresh & critical_warning::TEMPERATURE != 0 {
            self.push(Event::TEMPERATURE);
        }
        if fresh & !(critical_warning::SPARE | critical_warning::TEMPERATURE) != 0 {
            self.push(Event::RELIABILITY);
        }
    }

    /// Identify data of namespace `nsid` changed, or it came or went: it goes to the Changed Namespace List.
    pub(crate) fn namespace_changed(&mut self, nsid: u32) {
        self.now = self.now.wrapping_add(1);
        // One more than the page has room for says that there were too many.
        if self.changed.len() <= CHANGED_NAMESPACES || self.changed.contains_key(&nsid) {
            self.changed.insert(nsid, self.now);
        }
        self.push(Event::NAMESPACE_CHANGED);
    }

    /// The Changed Namespace List (Base 5.16.1.5).
    pub(crate) fn changed_namespaces(&self) -> Vec<u8> {
        let mut page: Vec<u8> = if self.changed.len() > CHANGED_NAMESPACES {
            u32::MAX.to_le_bytes().to_vec()
        } else {
            self.changed
                .keys()
                .flat_map(|nsid| nsid.to_le_bytes())
                .collect()
        };
        page.resize(4 * CHANGED_NAMESPACES, 0);
        page
    }

    fn is_masked(&self, kind: Kind) -> bool {
        self.reported.iter().any(|event| event.kind == kind)
    }

    fn next_waiting(&self) -> Option<usize> {
        let mut waiting = self.waiting.iter();
        waiting.position(|(_, event)| !self.is_masked(event.kind))
    }

    /// The next request to complete, with its event.
    pub(crate) fn next(&mut self) -> Option<(U16, Event)> {
        let at = self.next_waiting()?;
        let cid = self.held.pop_front()?;
        let (_, event) = self.waiting.remove(at)?;
        self.reported.push(event);
        Some((cid, event))
    }

    pub(crate) fn is_ready(&self) -> bool {
        !self.held.is_empty() && self.next_waiting().is_some()
    }

    /// To be called before a log page is made, for [`log_was_read`](Self::log_was_read).
    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    /// The host has read log page `log` as it was at `then`, without Retain Asynchronous Event.
    pub(crate) fn log_was_read(&mut self, log: u8, then: u64) {
        self.reported.retain(|event| event.log != log);
        self.waiting
            .retain(|(when, event)| event.log != log || *when > then);
        if log == lid::CHANGED_NAMESPACES {
            self.changed.retain(|_, when| *when > then);
        }
    }
}

impl Shared {
    /// An event for the host to hear of.
    pub(crate) fn event(&self, event: Event) {
        lock(&self.events).push(event);
        self.wake.notify();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_requests(config: u32, count: u16) -> AsyncEvents {
        let mut events = AsyncEvents::new(config);
        for cid in 0..count {
            events.hold(U16::new(cid)).unwrap();
        }
        events
    }

    fn next(events: &mut AsyncEvents) -> Option<u32> {
        assert_eq!(
            events.is_ready(),
            events.next_waiting().is_some() && !events.held.is_empty()
        );
        events.next().map(|(_, event)| event.dword())
    }

    fn read(events: &mut AsyncEvents, log: u8) {
        let then = events.now();
        events.log_was_read(log, then);
    }

    #[test]
    fn requests_are_limited_and_events_reported_once_until_the_log_is_read() {
        let mut events = with_requests(0, 4);
        assert_eq!(
            events.hold(U16::new(4)),
            Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED)
        );
        events.push(Event::INVALID_DOORBELL);
        assert_eq!(events.next(), Some((U16::new(0), Event::INVALID_DOORBELL)));
        events.push(Event::INVALID_DOORBELL_VALUE);
        assert_eq!(next(&mut events), None);
        // The page that the host reads has it already.
        read(&mut events, lid::ERROR_INFORMATION);
        assert_eq!(next(&mut events), None);
        events.push(Event::INVALID_DOORBELL_VALUE);
        assert_eq!(next(&mut events), Some(0x0001_0100));
        assert!(events.abort(U16::new(3)));
        assert!(!events.abort(U16::new(3)));
    }

    #[test]
    fn what_happens_while_a_page_is_read_is_not_lost() {
        let mut events = with_requests(CONFIGURABLE, 4);
        events.namespace_changed(7);
        assert_eq!(next(&mut events), Some(0x0004_0002));
        let then = events.now();
        events.namespace_changed(7);
        events.namespace_changed(9);
        events.log_was_read(lid::CHANGED_NAMESPACES, then);
        assert_eq!(
            events.changed_namespaces()[..12],
            [7, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(next(&mut events), Some(0x0004_0002));
    }

    #[test]
    fn types_are_masked_apart_and_notices_wait_for_each_other() {
        let mut events = with_requests(CONFIGURABLE, 4);
        events.namespace_changed(1);
        events.push(Event::TELEMETRY_CHANGED);
        events.push(Event::INVALID_DOORBELL);
        assert_eq!(next(&mut events), Some(0x0004_0002));
        assert_eq!(next(&mut events), Some(0x0001_0000));
        assert_eq!(next(&mut events), None);
        // Another page of the same type says nothing of the one reported.
        read(&mut events, lid::SMART);
        assert_eq!(next(&mut events), None);
        read(&mut events, lid::CHANGED_NAMESPACES);
        assert_eq!(next(&mut events), Some(0x0008_0302));
    }

    #[test]
    fn the_configuration_masks() {
        let mut events = with_requests(0, 4);
        events.namespace_changed(1);
        events.health(critical_warning::TEMPERATURE);
        assert_eq!(next(&mut events), None);
        // A condition that persists is reported once the host wants to hear of it.
        events.configure(u32::from(critical_warning::TEMPERATURE));
        events.health(critical_warning::TEMPERATURE | critical_warning::SPARE);
        assert_eq!(next(&mut events), Some(0x0002_0101));
        events.health(critical_warning::TEMPERATURE);
        read(&mut events, lid::SMART);
        events.health(critical_warning::TEMPERATURE);
        assert_eq!(next(&mut events), None, "nothing has crossed a threshold");
        events.health(0);
        events.health(critical_warning::TEMPERATURE);
        assert_eq!(next(&mut events), Some(0x0002_0101));
    }

    #[test]
    fn too_many_changed_namespaces_are_all() {
        let mut events = AsyncEvents::default();
        (1..=2000).for_each(|nsid| events.namespace_changed(nsid));
        assert_eq!(
            events.changed_namespaces()[..8],
            [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
        );
        read(&mut events, lid::CHANGED_NAMESPACES);
        assert_eq!(events.changed_namespaces(), vec![0; 4096]);
    }
}
