//! Where a command's data lies: what the walkers of PRPs and SGLs find, and all that the rest knows of them.

use p2plab_pcie::DmaRange;

use crate::spec::sgl::SglDescriptor;
use crate::spec::status::Status;

/// Where a command's data lies. Reused from command to command.
#[derive(Debug, Default)]
pub(crate) struct Transfer {
    /// The data, in order; contiguous pages or blocks are one range.
    pub(crate) ranges: Vec<DmaRange>,
    /// Reads of PRP lists or SGL segments that it took.
    pub(crate) lists: Vec<DmaRange>,
    /// Data that goes nowhere (SGL bit buckets of a read), in order.
    pub(crate) gaps: Vec<Gap>,
    /// The metadata, if the command moves any.
    pub(crate) metadata: Option<DmaRange>,
    /// Memory for an SGL segment, kept to be used again.
    pub(crate) segment: Vec<SglDescriptor>,
    /// Memory for the data of commands that must look at it, see [`with_bounce`](Self::with_bounce).
    bounce: Vec<u8>,
}

/// The largest bounce buffer that is kept from command to command.
const KEPT_BOUNCE: usize = 256 << 10;

/// Bytes of a command's data that are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// Ranges that lie before it.
    pub(crate) before: usize,
    /// Bytes.
    pub(crate) length: u64,
}

/// Consecutive ranges of a transfer with no gap between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Offset of its first byte in the command's data.
    pub(crate) at: u64,
    /// Index of its first range.
    pub(crate) first: usize,
    /// Index behind its last range.
    pub(crate) end: usize,
}

impl Transfer {
    pub(crate) fn clear(&mut self) {
        self.ranges.clear();
        self.lists.clear();
        self.gaps.clear();
        self.metadata = None;
    }

    /// Lends `work` a buffer of `length` bytes, whose content means nothing. For the few commands whose data the
    /// controller has to look at; all other data moves straight between file and memory.
    pub(crate) fn with_bounce(
        &mut self,
        length: u64,
        work: impl FnOnce(&mut Self, &mut [u8]) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let length = usize::try_from(length).map_err(|_| Status::INTERNAL_ERROR)?;
        let mut buffer = std::mem::take(&mut self.bounce);
        buffer.resize(length, 0);
        let result = work(self, &mut buffer);
        if buffer.capacity() <= KEPT_BOUNCE {
            self.bounce = buffer;
        }
        result
    }

    /// Adds data at `address`.
    pub(crate) fn push(&mut self, address: u64, length: u64) -> Result<(), Status> {
        // A range that wraps around reaches nothing, like any other address that nothing decodes.
        address
            .checked_add(length)
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        let gap_before = self
            .gaps
            .last()
            .is_some_and(|gap| gap.before == self.ranges.len());
        match self.ranges.last_mut() {
            Some(last) if !gap_before && last.address + last.length == address => {
                last.length += length;
            }
            _ => self.ranges.push(DmaRange { address, length }),
        }
        Ok(())
    }

    /// Adds data that goes nowhere. The caller bounds the sum of lengths.
    pub(crate) fn skip(&mut self, length: u64) {
        let before = self.ranges.len();
        match self.gaps.last_mut() {
            Some(gap) if gap.before == before => gap.length += length,
            _ => self.gaps.push(Gap { before, length }),
        }
    }

    /// The ranges between the gaps: one run where there is no gap.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        let (mut first, mut at) = (0, 0);
        let ends = self.gaps.iter().map(|gap| (gap.before, gap.length));
        let ends = ends.chain(std::iter::once((self.ranges.len(), 0)));
        ends.filter_map(move |(end, gap)| {
            let run = Run { at, first, end };
            let ranges = self.ranges.get(first..end).unwrap_or_default();
            at += ranges.iter().map(|range| range.length).sum::<u64>() + gap;
            first = end;
            (!ranges.is_empty()).then_some(run)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_lie_between_gaps() {
        let mut t = Transfer::default();
        assert_eq!(t.runs().count(), 0);
        t.skip(512);
        t.skip(512);
        t.push(0x1000, 100).unwrap();
        t.push(0x1064, 28).unwrap();
        t.skip(7);
        t.push(0x1080, 1).unwrap();
        t.push(0x9000, 1).unwrap();
        t.skip(9);
        let runs: Vec<_> = t.runs().map(|r| (r.at, r.first, r.end)).collect();
        assert_eq!(runs, [(1024, 0, 1), (1024 + 128 + 7, 1, 3)]);
        assert_eq!(t.ranges.len(), 3);
    }
}
