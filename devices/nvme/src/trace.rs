//! A record of the commands executed, for tests that compute the traffic which those commands must cause.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use p2plab_pcie::DmaRange;

use crate::dma::Dma;
use crate::locks::lock;
use crate::spec::command::{Command, io};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Commands that a trace holds before it stops recording.
pub const TRACE_CAPACITY: usize = 1 << 20;

/// A range of memory that the controller read or wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRange {
    /// First bus address.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
    /// In the controller's own CMB or PMR: no transaction left the controller.
    pub internal: bool,
}

/// One executed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// Submission queue; 0 is the admin queue.
    pub queue: u16,
    /// Opcode.
    pub opcode: u8,
    /// Namespace.
    pub nsid: u32,
    /// Command dwords 10 and 11: the first block of commands that address blocks.
    pub slba: u64,
    /// Number of blocks of the commands that address blocks by dwords 10 to 12, else 0.
    pub blocks: u32,
    /// The read of the command itself.
    pub fetch: TraceRange,
    /// Reads of PRP lists or SGL segments, in order.
    pub lists: Vec<TraceRange>,
    /// Memory of the data, in order, without what bit buckets drop; empty if the command failed before the data's place was known.
    pub data: Vec<TraceRange>,
    /// Memory of the metadata, if the command moved any; it goes the way of the data.
    pub metadata: Option<TraceRange>,
    /// The write of the completion. An Asynchronous Event Request, completed later, has none (length 0).
    pub completion: TraceRange,
    /// Status as in [`Status`]. Data has moved if it is 0.
    pub status: u16,
}

/// A look at a shadow doorbell, or a write to a doorbell or event index in the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceDoorbell {
    /// Its place.
    pub range: TraceRange,
    /// Written, not read.
    pub write: bool,
}

/// What was recorded since the trace was enabled or last taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceLog {
    /// Commands, in order of completion for each queue.
    pub entries: Vec<TraceEntry>,
    /// Accesses to shadow doorbells.
    pub doorbells: Vec<TraceDoorbell>,
    /// Commands and accesses that found the trace full and are missing.
    pub lost: u64,
}

/// The sink; off until enabled.
#[derive(Debug, Default)]
pub struct Trace {
    enabled: AtomicBool,
    log: Mutex<TraceLog>,
}

impl Trace {
    /// Starts or stops recording.
    pub fn enable(&self, on: bool) {
        self.enabled.store(on, Ordering::Release);
    }

    /// Takes what was recorded.
    pub fn take(&self) -> TraceLog {
        std::mem::take(&mut *lock(&self.log))
    }

    /// Records an access to a shadow doorbell, before it happens.
    pub(crate) fn doorbell(&self, dma: &Dma, range: DmaRange, write: bool) {
        if !self.enabled.load(Ordering::Acquire) {
            return;
        }
        let range = mark(dma, &range);
        let mut log = lock(&self.log);
        if log.doorbells.len() < TRACE_CAPACITY {
            log.doorbells.push(TraceDoorbell { range, write });
        } else {
            log.lost += 1;
        }
    }

    pub(crate) fn record(
        &self,
        dma: &Dma,
        queue: u16,
        command: &Command,
        fetch: DmaRange,
        transfer: &Transfer,
        done: Option<(DmaRange, Status)>,
    ) {
        if !self.enabled.load(Ordering::Acquire) {
            return;
        }
        let mark = |range: &DmaRange| mark(dma, range);
        let blocks = match (queue, command.opcode) {
            (
                1..,
                io::READ
                | io::WRITE
                | io::WRITE_UNCORRECTABLE
                | io::COMPARE
                | io::WRITE_ZEROES
                | io::VERIFY,
            ) => (command.cdw12.get() & 0xffff) + 1,
            _ => 0,
        };
        let none = DmaRange {
            address: 0,
            length: 0,
        };
        let (completion, status) = done.unwrap_or((none, Status::SUCCESS));
        let entry = TraceEntry {
            queue,
            opcode: command.opcode,
            nsid: command.nsid.get(),
            slba: command.slba(),
            blocks,
            fetch: mark(&fetch),
            lists: transfer.lists.iter().map(mark).collect(),
            data: transfer.ranges.iter().map(mark).collect(),
            metadata: transfer.metadata.as_ref().map(mark),
            completion: mark(&completion),
            status: status.0,
        };
        let mut log = lock(&self.log);
        if log.entries.len() < TRACE_CAPACITY {
            log.entries.push(entry);
        } else {
            log.lost += 1;
        }
    }
}

fn mark(dma: &Dma, range: &DmaRange) -> TraceRange {
    TraceRange {
        address: range.address,
        length: range.length,
        internal: dma.place(*range).is_inside(),
    }
}
