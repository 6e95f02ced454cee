//! A write cache that the power takes what it holds from, so that a host which forgets a flush is found out.
//!
//! Blocks go to the medium at once: there is one data path, with such a cache or without. What is kept here is what
//! each block held when it was last durable, from the first change after that; a loss of power puts it back. So an
//! entry is a block that a real cache would hold, and dropping it is what writing that block back would be.
//!
//! A block is lost or kept as a whole, which is what AWUPF promises. Changes of a namespace with such a cache take turns
//! (`Namespace::turn`), so that no entry is half of what another command writes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use serde_json::{Value, json};

use crate::config::WriteCacheConfig;
use crate::locks::lock;
use crate::namespaces::Namespaces;

/// A namespace's identity and a block of it.
type Place = (u64, u64);

/// What a block held when it was last durable.
#[derive(Debug)]
pub(crate) struct Durable {
    /// Its data; `None` for zeros.
    pub(crate) data: Option<Box<[u8]>>,
    /// Its metadata as its file has it, if it has any.
    pub(crate) metadata: Vec<u8>,
    /// Write Uncorrectable had marked it.
    pub(crate) uncorrectable: bool,
    /// Bytes that it takes of the cache, zeros or not.
    pub(crate) bytes: u64,
}

/// The cache of a controller, for all its namespaces.
#[derive(Debug)]
pub(crate) struct WriteCache {
    config: WriteCacheConfig,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    blocks: BTreeMap<Place, (u64, Durable)>,
    /// By age: the number of an entry.
    order: BTreeMap<u64, Place>,
    next: u64,
    bytes: u64,
    /// Losses of power, and the blocks that they took.
    cuts: u64,
    lost: u64,
}

impl State {
    fn remove(&mut self, place: Place) -> Option<Durable> {
        let (number, durable) = self.blocks.remove(&place)?;
        self.order.remove(&number);
        self.bytes = self.bytes.saturating_sub(durable.bytes);
        Some(durable)
    }

    fn remove_all(&mut self, identity: u64, blocks: Range<u64>) -> Vec<(u64, Durable)> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let range = (identity, blocks.start)..(identity, blocks.end);
        let places: Vec<_> = self.blocks.range(range).map(|(place, _)| *place).collect();
        let remove = |place: Place| Some((place.1, self.remove(place)?));
        places.into_iter().filter_map(remove).collect()
    }
}

impl WriteCache {
    pub(crate) fn new(config: WriteCacheConfig) -> Self {
        Self {
            config,
            state: Mutex::default(),
        }
    }

    /// Bytes of blocks that it holds at most.
    pub(crate) fn size(&self) -> u64 {
        self.config.size
    }

    /// Whether it holds all of `blocks`.
    pub(crate) fn holds(&self, identity: u64, blocks: Range<u64>) -> bool {
        let state = lock(&self.state);
        let held = state
            .blocks
            .range((identity, blocks.start)..(identity, blocks.end));
        held.count() as u64 == blocks.end.saturating_sub(blocks.start)
    }

    /// A block is about to change that was `durable`, unless the cache holds it already. The oldest blocks make room.
    pub(crate) fn hold(&self, identity: u64, block: u64, durable: Durable) {
        let state = &mut *lock(&self.state);
        let place = (identity, block);
        if state.blocks.contains_key(&place) {
            return;
        }
        state.bytes += durable.bytes;
        state.order.insert(state.next, place);
        state.blocks.insert(place, (state.next, durable));
        state.next += 1;
        while state.bytes > self.config.size
            && let Some((_, oldest)) = state.order.first_key_value()
        {
            let oldest = *oldest;
            state.remove(oldest);
        }
    }

    /// `blocks` are durable as they are.
    pub(crate) fn settle(&self, identity: u64, blocks: Range<u64>) {
        lock(&self.state).remove_all(identity, blocks);
    }

    /// The power is gone, and with it what the cache held. Nobody changes blocks meanwhile; who is about to erase them
    /// waits at the lock for what is put back.
    pub(crate) fn lose(&self, namespaces: &Namespaces) {
        let state = &mut *lock(&self.state);
        state.cuts += 1;
        for ns in namespaces.all_allocated() {
            for (block, durable) in state.remove_all(ns.identity, 0..u64::MAX) {
                if self.survives(state.cuts, (ns.identity, block)) {
                    continue;
                }
                state.lost += 1;
                if let Err(error) = ns.restore(block, &durable) {
                    tracing::error!(%error, nsid = ns.nsid, block, "a block keeps what it should have lost");
                }
            }
        }
        // Of namespaces that are gone.
        state.blocks.clear();
        state.order.clear();
        state.bytes = 0;
        tracing::debug!(state.cuts, state.lost, "the write cache has lost its power");
    }

    /// Whether a block had been written back before the power went. With a seed half of them had, in no order, and the
    /// same ones whenever the host does the same.
    fn survives(&self, cut: u64, (identity, block): Place) -> bool {
        let Some(seed) = self.config.survivors else {
            return false;
        };
        let words = [cut, identity, block];
        // The finalizer of SplitMix64, word by word.
        let hash = words.iter().fold(seed, |hash, word| {
            let mut mixed = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        });
        hash & 1 != 0
    }

    pub(crate) fn dump(&self) -> Value {
        let state = lock(&self.state);
        json!({
            "blocks": state.blocks.len(),
            "bytes": state.bytes,
            "power_losses": state.cuts,
            "blocks_lost": state.lost,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cache(size: u64, survivors: Option<u64>) -> WriteCache {
        WriteCache::new(WriteCacheConfig { size, survivors })
    }

    fn durable(bytes: u64) -> Durable {
        Durable {
            data: None,
            metadata: Vec::new(),
            uncorrectable: false,
            bytes,
        }
    }

    #[test]
    fn the_oldest_makes_room() {
        let cache = cache(2000, None);
        for block in [7, 3, 7, 5] {
            cache.hold(1, block, durable(512));
        }
        assert!(cache.holds(1, 7..8) && cache.holds(1, 3..4) && !cache.holds(1, 3..8));
        cache.hold(1, 9, durable(512));
        assert!(!cache.holds(1, 7..8) && cache.holds(1, 3..4) && cache.holds(1, 9..10));
        // Once written back it is the youngest when it changes again.
        cache.hold(1, 7, durable(512));
        assert!(!cache.holds(1, 3..4) && cache.holds(1, 7..8));
    }

    #[test]
    fn survivors_are_some_and_the_same_each_time() {
        let survivors = |seed| {
            let cache = cache(1, Some(seed));
            (0..1000)
                .filter(|block| cache.survives(1, (1, *block)))
                .collect::<Vec<_>>()
        };
        assert!((400..600).contains(&survivors(1).len()));
        assert_eq!(survivors(1), survivors(1));
        assert_ne!(survivors(1), survivors(2));
        let all = cache(1, None);
        assert!((0..1000).all(|block| !all.survives(1, (1, block))));
    }

    proptest! {
        /// Whatever happens, what it counts is what it holds, it holds no more than it may, and each block has one age.
        #[test]
        fn it_stays_within_its_size(steps in prop::collection::vec((0u8..3, 0u64..3, 0u64..40, 1u64..30), 0..200)) {
            let cache = cache(20 * 512, None);
            for (what, identity, block, count) in steps {
                match what {
                    0 | 1 => (block..block + count).for_each(|block| cache.hold(identity, block, durable(512))),
                    _ => cache.settle(identity, block..block + count),
                }
                let state = lock(&cache.state);
                prop_assert!(state.bytes <= 20 * 512);
                prop_assert_eq!(state.bytes, 512 * state.blocks.len() as u64);
                prop_assert_eq!(state.order.len(), state.blocks.len());
            }
        }
    }
}
