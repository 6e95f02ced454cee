//! Blocks that Write Uncorrectable has marked (NVM 3.2.7): reading one fails until it is written.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::locks::lock;

/// Ranges of marked blocks that a namespace remembers. A host that scatters more is refused, so that it cannot
/// take memory without bound.
const MAX_RANGES: usize = 4096;

/// There is no room for another range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// The marked blocks.
#[derive(Debug, Default)]
pub(crate) struct Uncorrectable {
    /// Whether there are any: commands on a sound namespace look at this, and do not lock.
    any: AtomicBool,
    /// Disjoint ranges: first block, and the block behind the last.
    ranges: Mutex<BTreeMap<u64, u64>>,
}

impl Uncorrectable {
    /// Whether one of the blocks from `start` to before `end` is marked.
    pub(crate) fn overlaps(&self, start: u64, end: u64) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let ranges = lock(&self.ranges);
        let last = ranges.range(..end).next_back();
        last.is_some_and(|(_, marked_end)| *marked_end > start)
    }

    /// Marks the blocks from `start` to before `end`.
    pub(crate) fn mark(&self, start: u64, end: u64) -> Result<(), Full> {
        let mut ranges = lock(&self.ranges);
        // Ranges that touch become one.
        let (mut first, mut last) = (start, end);
        let touching: Vec<u64> = ranges
            .range(..=end)
            .rev()
            .take_while(|(_, marked_end)| **marked_end >= start)
            .map(|(marked, _)| *marked)
            .collect();
        if touching.is_empty() && ranges.len() >= MAX_RANGES {
            return Err(Full);
        }
        for marked in touching {
            if let Some(marked_end) = ranges.remove(&marked) {
                (first, last) = (first.min(marked), last.max(marked_end));
            }
        }
        ranges.insert(first, last);
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    /// The blocks from `start` to before `end` were written.
    pub(crate) fn clear(&self, start: u64, end: u64) {
        if start >= end || !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut ranges = lock(&self.ranges);
        let hit: Vec<(u64, u64)> = ranges
            .range(..end)
            .rev()
            .take_while(|(_, marked_end)| **marked_end > start)
            .map(|(marked, marked_end)| (*marked, *marked_end))
            .collect();
        for (marked, marked_end) in hit {
            ranges.remove(&marked);
            let (before, behind) = (start.saturating_sub(marked), marked_end.saturating_sub(end));
            // A write in the middle of a range cuts it in two. With no room for both the shorter one is forgotten:
            // its blocks read as what they held, and what was written stays readable.
            let both = ranges.len() + 1 < MAX_RANGES;
            if before > 0 && (both || before >= behind) {
                ranges.insert(marked, start);
            }
            if behind > 0 && (both || behind > before) {
                ranges.insert(end, marked_end);
            }
        }
        self.any.store(!ranges.is_empty(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the plain model: a flag for each block.
        #[test]
        fn marks_are_exact(steps in prop::collection::vec((any::<bool>(), 0usize..64, 1usize..16), 0..60)) {
            let set = Uncorrectable::default();
            let mut model = [false; 80];
            for (mark, start, count) in steps {
                let (from, to) = (start as u64, (start + count) as u64);
                if mark {
                    set.mark(from, to).unwrap();
                } else {
                    set.clear(from, to);
                }
                model[start..start + count].fill(mark);
                for (i, marked) in model.iter().enumerate() {
                    prop_assert_eq!(set.overlaps(i as u64, i as u64 + 1), *marked, "block {}", i);
                }
                prop_assert_eq!(set.overlaps(3, 70), model[3..70].contains(&true));
            }
        }
    }

    #[test]
    fn scattered_marks_are_bounded() {
        let set = Uncorrectable::default();
        for i in 0..MAX_RANGES as u64 {
            set.mark(i * 2, i * 2 + 1).unwrap();
        }
        assert_eq!(set.mark(u64::MAX - 1, u64::MAX), Err(Full));
        // What touches a range that is there needs no room.
        set.mark(1, 2).unwrap();
        set.clear(0, u64::MAX);
        assert!(!set.overlaps(0, u64::MAX));
        set.mark(7, 8).unwrap();
    }

    /// Cutting holes into one long range must not grow it without bound either.
    #[test]
    fn holes_are_bounded() {
        let set = Uncorrectable::default();
        set.mark(0, 1 << 40).unwrap();
        for i in 0..3 * MAX_RANGES as u64 {
            set.clear(i * 10, i * 10 + 1);
            assert!(!set.overlaps(i * 10, i * 10 + 1));
        }
        assert!(lock(&set.ranges).len() <= MAX_RANGES);
        assert!(!set.overlaps(0, 1) && set.overlaps(1 << 39, 1 << 40));
    }
}
