//! What the load says of its progress, and what follows from it.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};

use p2plab_nvme::spec::command::NSID_ALL;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{BATCH, NAMESPACES, RECORDS, REGIONS};

/// The load has begun.
pub const READY: u32 = 1;
/// Blocks were written: the write has completed.
pub const WRITTEN: u32 = 2;
/// As [`WRITTEN`], and they must last: with FUA, or without the write cache.
pub const LASTING: u32 = 3;
/// Flush number `sequence` is about to be submitted.
pub const FLUSHING: u32 = 4;
/// Flush number `sequence` has completed.
pub const FLUSHED: u32 = 5;
/// Records of PMR region `target` were written, and the barrier behind them is over.
pub const BARRIER: u32 = 6;

/// A line of the report. Both ends are this binary, hence the byte order is its own. Pipes keep lines of several threads
/// apart and in order (PIPE_BUF): a line that is before [`FLUSHING`] was true when the flush was submitted.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Report {
    pub kind: u32,
    /// Namespace, [`NSID_ALL`], or region of the PMR.
    pub target: u32,
    /// First block.
    pub first: u64,
    /// Blocks, or records.
    pub count: u64,
    /// Which write, which flush, or the first record.
    pub sequence: u64,
}

impl Report {
    pub fn send(self, mut pipe: &File) {
        assert_eq!(pipe.write(self.as_bytes()).unwrap(), size_of::<Self>());
    }

    /// The next line; `None` where the other end is gone and nothing is left.
    pub fn receive(pipe: &mut impl Read) -> Option<Self> {
        let mut report = Self::new_zeroed();
        match pipe.read_exact(report.as_mut_bytes()) {
            Ok(()) => Some(report),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => None,
            Err(error) => panic!("the report: {error}"),
        }
    }
}

/// What must be there: of each block of each namespace the latest write that was acknowledged, or a later one.
pub type Blocks = [Vec<u64>; NAMESPACES.len()];

/// What follows from all reports so far.
pub struct Account {
    /// Completed, cached or not: what must survive the end of the process.
    pub written: Blocks,
    /// What must survive the end of the host.
    pub lasting: Blocks,
    /// Of each slot of each PMR region the record that must be there, and no other.
    pub records: [Vec<Option<u64>>; REGIONS as usize],
    /// The last record of each region behind a barrier.
    pub last_record: [u64; REGIONS as usize],
    /// Blocks that were acknowledged as lasting, by FUA, by a flush or without the write cache.
    pub blocks_acknowledged: u64,
    /// Records that were.
    pub records_acknowledged: u64,
    pub flushes: u64,
    /// Writes of this round in the order of their completion.
    log: Vec<Report>,
    /// How many of them each namespace's last flush covered.
    covered: [usize; NAMESPACES.len()],
    /// Flushes under way, with the length of the log when they were submitted.
    under_way: HashMap<u64, usize>,
}

impl Account {
    pub fn new() -> Self {
        let blocks = || NAMESPACES.map(|ns| vec![0; ns.blocks as usize]);
        Self {
            written: blocks(),
            lasting: blocks(),
            records: std::array::from_fn(|_| vec![None; RECORDS as usize]),
            last_record: [0; REGIONS as usize],
            blocks_acknowledged: 0,
            records_acknowledged: 0,
            flushes: 0,
            log: Vec::new(),
            covered: [0; NAMESPACES.len()],
            under_way: HashMap::new(),
        }
    }

    pub fn take(&mut self, report: Report) {
        match report.kind {
            READY => {}
            WRITTEN => {
                raise(&mut self.written, &report);
                self.log.push(report);
            }
            LASTING => {
                raise(&mut self.written, &report);
                self.blocks_acknowledged += raise(&mut self.lasting, &report);
            }
            FLUSHING => {
                self.under_way.insert(report.sequence, self.log.len());
            }
            FLUSHED => self.flushed(&report),
            BARRIER => self.barrier(&report),
            _ => panic!("{report:?}"),
        }
    }

    /// What had completed in its namespaces when a flush was submitted must last once it has completed (Base 7.1).
    fn flushed(&mut self, report: &Report) {
        let end = self.under_way.remove(&report.sequence).unwrap();
        self.flushes += 1;
        for (index, covered) in self.covered.iter_mut().enumerate() {
            let nsid = index as u32 + 1;
            if ![nsid, NSID_ALL].contains(&report.target) || *covered >= end {
                continue;
            }
            for write in self.log[*covered..end].iter().filter(|w| w.target == nsid) {
                self.blocks_acknowledged += raise(&mut self.lasting, write);
            }
            *covered = end;
        }
    }

    fn barrier(&mut self, report: &Report) {
        let region = report.target as usize;
        for record in report.sequence..report.sequence + report.count {
            self.records[region][(record % RECORDS) as usize] = Some(record);
        }
        self.last_record[region] = report.sequence + report.count - 1;
        self.records_acknowledged += report.count;
    }

    /// The process is gone. The records behind its last barrier may be whole or not, and so may what they replaced.
    pub fn killed(&mut self) {
        self.log.clear();
        self.covered = [0; NAMESPACES.len()];
        self.under_way.clear();
        for (records, last) in self.records.iter_mut().zip(self.last_record) {
            for record in last + 1..=last + BATCH {
                records[(record % RECORDS) as usize] = None;
            }
        }
    }

    /// Whether there was any of everything: a load that acknowledges nothing loses nothing.
    pub fn has_everything(&self) -> bool {
        self.flushes > 0 && self.blocks_acknowledged > 0 && self.records_acknowledged > 0
    }

    /// The host is gone: what was not to last may be.
    pub fn lost_power(&mut self) {
        self.written.clone_from(&self.lasting);
    }
}

impl Display for Account {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "acknowledged as lasting: {} blocks ({} flushes), {} PMR records",
            self.blocks_acknowledged, self.flushes, self.records_acknowledged
        )
    }
}

/// The blocks of `write` come from it or from a later one; how many were older.
fn raise(blocks: &mut Blocks, write: &Report) -> u64 {
    let (first, count) = (write.first as usize, write.count as usize);
    let blocks = &mut blocks[write.target as usize - 1][first..first + count];
    let mut raised = 0;
    for block in blocks.iter_mut().filter(|block| **block < write.sequence) {
        *block = write.sequence;
        raised += 1;
    }
    raised
}
