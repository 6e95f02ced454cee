//! Error Information (Base 5.16.1.2).

use std::collections::VecDeque;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::spec::command::Command;
use crate::spec::log::ErrorEntry;
use crate::spec::status::Status;

/// Entries of the page, 0's based (ELPE).
pub(crate) const ELPE_Z: u8 = 63;

const ENTRIES: usize = ELPE_Z as usize + 1;

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

    /// A block that could not be read, though no command asked for it.
    pub(crate) fn medium(&mut self, nsid: u32, lba: u64, status: Status) {
        let mut entry = ErrorEntry::new_zeroed();
        entry.sqid = U16::new(0xffff);
        entry.cid = U16::new(0xffff);
        entry.status = U16::new(status.0 << 1);
        entry.parameter = U16::new(0xffff);
        entry.lba = U64::new(lba);
        entry.nsid = nsid.into();
        self.push(entry);
    }

    fn push(&mut self, mut entry: ErrorEntry) {
        self.count = self.count.saturating_add(1);
        entry.error_count = U64::new(self.count);
        self.entries.truncate(ENTRIES - 1);
        self.entries.push_front(entry);
    }

    pub(crate) fn page(&self) -> Vec<u8> {
        let entries = self.entries.iter();
        let mut page: Vec<u8> = entries.flat_map(|e| e.as_bytes().to_vec()).collect();
        page.resize(size_of::<ErrorEntry>() * ENTRIES, 0);
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_log_is_bounded_and_newest_first() {
        let mut log = ErrorLog::default();
        (0..200).for_each(|q| log.doorbell(q));
        let page = log.page();
        assert_eq!(page.len(), 64 * 64);
        assert_eq!(page[..10], [200, 0, 0, 0, 0, 0, 0, 0, 199, 0]);
        assert_eq!(page[63 * 64], 137);
    }
}
