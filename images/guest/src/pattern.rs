//! Seeded data: every 8-byte word is a function of the seed and of its place, so any part can be made
//! or checked alone, and a block in the wrong place is found as surely as a damaged one.

const WORD: usize = 8;
/// Bytes compared at once before looking for the exact place; large enough to vectorise well.
const BLOCK: usize = 512;

/// The finaliser of splitmix64 over seed and word index.
#[inline(always)]
fn word(key: u64, index: u64) -> u64 {
    let mut z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ key;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Neighbouring seeds must not give shifted copies of the same data.
fn key(seed: u64) -> u64 {
    word(0x6a09_e667_f3bc_c909, seed.wrapping_add(1))
}

/// Fills `out` with the pattern of `seed` for the bytes from `offset` on. Words are little-endian.
pub fn fill(seed: u64, offset: u64, out: &mut [u8]) {
    let key = key(seed);
    let (head, index) = head(offset, out.len());
    if head > 0 {
        let bytes = word(key, index.wrapping_sub(1)).to_le_bytes();
        out[..head].copy_from_slice(&bytes[skip(offset)..skip(offset) + head]);
    }
    let mut index = index;
    let mut words = out[head..].chunks_exact_mut(WORD);
    for chunk in &mut words {
        chunk.copy_from_slice(&word(key, index).to_le_bytes());
        index = index.wrapping_add(1);
    }
    let tail = words.into_remainder();
    let bytes = word(key, index).to_le_bytes();
    let length = tail.len();
    tail.copy_from_slice(&bytes[..length]);
}

/// Compares `data`, which begins at `offset`, with the pattern of `seed`; returns the offset (counted
/// as `offset` is) of the first byte that differs.
pub fn verify(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    let key = key(seed);
    let (head, mut index) = head(offset, data.len());
    let mut at = head;
    if mismatch(seed, offset, &data[..head]).is_some() {
        return mismatch(seed, offset, &data[..head]);
    }
    for block in data[head..].chunks(BLOCK) {
        let mut differs = 0u64;
        let mut words = block.chunks_exact(WORD);
        for chunk in &mut words {
            let mut bytes = [0; WORD];
            bytes.copy_from_slice(chunk);
            differs |= u64::from_le_bytes(bytes) ^ word(key, index);
            index = index.wrapping_add(1);
        }
        if differs != 0 || !words.remainder().is_empty() {
            let found = mismatch(seed, offset.wrapping_add(at as u64), block);
            if found.is_some() {
                return found;
            }
        }
        at += block.len();
    }
    None
}

/// Byte by byte, for the little that the fast path leaves.
fn mismatch(seed: u64, offset: u64, data: &[u8]) -> Option<u64> {
    let key = key(seed);
    let mut at = offset;
    for byte in data {
        if *byte != word(key, at / WORD as u64).to_le_bytes()[skip(at)] {
            return Some(at);
        }
        at = at.wrapping_add(1);
    }
    None
}

fn skip(offset: u64) -> usize {
    (offset % WORD as u64) as usize
}

/// How many bytes of an area of `length` bytes come before the first word boundary, and the index of the
/// first word after them.
fn head(offset: u64, length: usize) -> (usize, u64) {
    let head = (WORD - skip(offset)) % WORD;
    (head.min(length), offset.div_ceil(WORD as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_words_do_not_change() {
        // Backing files seeded by an older build must stay readable: change these on purpose only.
        let mut first = [0; 16];
        fill(1, 0, &mut first);
        let mut again = [0; 8];
        fill(1, 8, &mut again);
        assert_eq!(first[8..], again);
        assert_ne!(first[..8], again);
        let mut other = [0; 8];
        fill(2, 0, &mut other);
        assert_ne!(first[..8], other);
    }

    #[test]
    fn a_large_area_is_found_clean_and_one_flipped_bit_is_found() {
        let mut data = vec![0; 1 << 20];
        fill(42, 4096, &mut data);
        assert_eq!(verify(42, 4096, &data), None);
        assert!(verify(43, 4096, &data).is_some());
        assert!(verify(42, 8192, &data).is_some());
        data[777_777] ^= 0x10;
        assert_eq!(verify(42, 4096, &data), Some(4096 + 777_777));
    }

    proptest! {
        #[test]
        fn any_part_equals_the_whole(
            seed: u64, base in 0u64..64, start in 0usize..100, length in 0usize..1500, at in 0usize..1500,
        ) {
            let mut whole = vec![0; 2000];
            fill(seed, base, &mut whole);
            let mut part = vec![0; length];
            let offset = base + start as u64;
            fill(seed, offset, &mut part);
            prop_assert_eq!(&whole[start..start + length], &part[..]);
            prop_assert_eq!(verify(seed, offset, &part), None);
            if length > 0 {
                let at = at % length;
                part[at] = !part[at];
                prop_assert_eq!(verify(seed, offset, &part), Some(offset + at as u64));
            }
        }
    }
}
