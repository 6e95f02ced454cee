//! What is written: blocks and records that say what they are, so that a half of one is none.

/// Who stands in for a namespace where a record of the PMR is meant: no namespace has this NSID.
pub const PMR: u32 = 0;

/// Small, and the same for the same seed.
pub struct Random(pub u64);

impl Random {
    /// SplitMix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Fills `block`, number `place` of namespace `nsid`, as write `sequence` leaves it. Every word depends on all three.
pub fn fill(block: &mut [u8], nsid: u32, place: u64, sequence: u64) {
    let mut words = Random(sequence ^ place << 40 ^ u64::from(nsid) << 60);
    let mut next = sequence;
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&next.to_le_bytes());
        next = words.next();
    }
}

/// The write that `block` comes from, if it is one write's from its first byte to its last; 0: never written.
pub fn sequence(block: &[u8], nsid: u32, place: u64) -> Option<u64> {
    let sequence = u64::from_le_bytes(*block.first_chunk()?);
    let mut expected = vec![0; block.len()];
    if sequence != 0 {
        fill(&mut expected, nsid, place, sequence);
    }
    (expected == block).then_some(sequence)
}
