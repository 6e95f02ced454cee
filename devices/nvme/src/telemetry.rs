//! Telemetry (Base 8.24): the controller's state as JSON text, kept until the host has fetched it.

use std::fmt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::Shared;
use crate::events::Event;
use crate::locks::lock;
use crate::spec::log::{TELEMETRY_BLOCK, TelemetryHeader};

/// Data Area 1 is counted in 16 bits.
const MOST_BLOCKS: usize = u16::MAX as usize;

/// One capture.
#[derive(Default)]
struct Capture {
    /// Whole blocks.
    data: Vec<u8>,
    reason: String,
    generation: u8,
}

impl Capture {
    fn take(&mut self, reason: &str, state: String) {
        self.data = state.into_bytes();
        let blocks = self.data.len().div_ceil(TELEMETRY_BLOCK).min(MOST_BLOCKS);
        self.data.resize(blocks * TELEMETRY_BLOCK, 0);
        self.reason = reason.to_owned();
        self.generation = self.generation.wrapping_add(1);
    }
}

/// What the host asked for, and what the controller kept of its own accord.
#[derive(Default)]
pub(crate) struct Telemetry {
    host: Capture,
    controller: Capture,
    /// The controller's capture waits to be read.
    available: bool,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry")
            .field("available", &self.available)
            .finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Create Telemetry Host-Initiated Data.
    pub(crate) fn capture_for_host(&mut self, state: String) {
        self.host.take("asked for by the host", state);
    }

    /// Something happened that a vendor would want to see. What waits to be read is kept: the first failure
    /// explains more than those that follow.
    pub(crate) fn capture(&mut self, reason: &str, state: String) -> bool {
        let fresh = !self.available;
        if fresh {
            self.controller.take(reason, state);
            self.available = true;
        }
        fresh
    }

    /// The host has read the controller's capture, without Retain Asynchronous Event.
    pub(crate) fn was_read(&mut self) {
        self.available = false;
    }

    /// The log page `lid`, of the host's capture or else of the controller's.
    pub(crate) fn page(&self, lid: u8, of_host: bool) -> Vec<u8> {
        let capture = if of_host {
            &self.host
        } else {
            &self.controller
        };
        let mut header = TelemetryHeader::new_zeroed();
        header.lid = lid;
        let blocks = U16::new((capture.data.len() / TELEMETRY_BLOCK).min(MOST_BLOCKS) as u16);
        // Areas are nested: all of it is in the first, and so in the others.
        header.last_blocks = [blocks; 3];
        header.last_block_4 = U32::new(0);
        header.host_generation = self.host.generation;
        header.controller_available = self.available.into();
        header.controller_generation = self.controller.generation;
        for (slot, byte) in header.reason.iter_mut().zip(capture.reason.bytes()) {
            *slot = byte;
        }
        let mut page = header.as_bytes().to_vec();
        page.extend_from_slice(&capture.data);
        page
    }
}

impl Shared {
    /// Keeps the controller's state for the host to fetch: `why` is what a vendor would want to know of. Not
    /// to be called with a lock.
    pub(crate) fn keep_telemetry(&self, why: &str) {
        let state = self.dump().to_string();
        if lock(&self.telemetry).capture(why, state) {
            self.event(Event::TELEMETRY_CHANGED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_is_whole_blocks_and_bounded() {
        let mut telemetry = Telemetry::default();
        assert_eq!(telemetry.page(7, true).len(), 512);
        telemetry.capture_for_host("x".repeat(513));
        let page = telemetry.page(7, true);
        assert_eq!((page.len(), page[8], page[381]), (3 * 512, 2, 1));
        telemetry.capture_for_host("x".repeat(40 << 20));
        assert_eq!(telemetry.page(7, true).len(), 512 + 65535 * 512);
    }

    #[test]
    fn the_first_failure_is_kept_until_it_was_read() {
        let mut telemetry = Telemetry::default();
        assert!(telemetry.capture("one", "1".into()));
        assert!(!telemetry.capture("two", "2".into()));
        let page = telemetry.page(8, false);
        assert_eq!((page[382], page[383], &page[384..387]), (1, 1, &b"one"[..]));
        telemetry.was_read();
        assert!(telemetry.capture("two", "2".into()));
    }
}
