//! Physical Region Pages: from a command's two PRP entries to the ranges of memory that hold its data
//! (Base 4.1.1).
//!
//! The walk is bounded by the transfer's length, which the caller has checked against MDTS: no list, however
//! it loops, makes it longer. List pages are read exactly: only the entries that the transfer needs, with
//! one read a page, so that the traffic of a command can be computed from the command.

use p2plab_pcie::DmaRange;
use zerocopy::little_endian::U64;
use zerocopy::{FromZeros, IntoBytes};

use crate::spec::PAGE_SIZE;
use crate::spec::status::Status;
use crate::transfer::Transfer;

const ENTRY: u64 = 8;
const ENTRIES_PER_PAGE: usize = 512;
const _: () = assert!(ENTRIES_PER_PAGE as u64 * ENTRY == PAGE_SIZE);

/// Walks the PRPs of a transfer of `length` bytes and adds to `transfer` what it finds. `fetch` reads memory.
pub(crate) fn walk(
    prp1: u64,
    prp2: u64,
    length: u64,
    transfer: &mut Transfer,
    mut fetch: impl FnMut(u64, &mut [u8]) -> Result<(), Status>,
) -> Result<(), Status> {
    transfer.clear();
    if length == 0 {
        return Ok(());
    }
    if !prp1.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let first = (PAGE_SIZE - prp1 % PAGE_SIZE).min(length);
    transfer.push(prp1, first)?;
    let left = length - first;
    match left {
        0 => Ok(()),
        1..=PAGE_SIZE => push_page(prp2, left, transfer),
        _ => walk_list(prp2, left, transfer, &mut fetch),
    }
}

fn push_page(entry: u64, length: u64, transfer: &mut Transfer) -> Result<(), Status> {
    if !entry.is_multiple_of(PAGE_SIZE) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    transfer.push(entry, length)
}

/// The list at `list` describes `left` bytes. Only the first list of a transfer may start within a page.
fn walk_list(
    mut list: u64,
    mut left: u64,
    transfer: &mut Transfer,
    fetch: &mut impl FnMut(u64, &mut [u8]) -> Result<(), Status>,
) -> Result<(), Status> {
    if !list.is_multiple_of(ENTRY) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    let mut entries = [U64::new_zeroed(); ENTRIES_PER_PAGE];
    loop {
        let needed = left.div_ceil(PAGE_SIZE);
        let slots = (PAGE_SIZE - list % PAGE_SIZE) / ENTRY;
        let count = needed.min(slots);
        // The cast is of at most 512.
        let page = entries
            .get_mut(..count as usize)
            .ok_or(Status::INTERNAL_ERROR)?;
        let bytes = count * ENTRY;
        list.checked_add(bytes).ok_or(Status::DATA_TRANSFER_ERROR)?;
        transfer.lists.push(DmaRange {
            address: list,
            length: bytes,
        });
        fetch(list, page.as_mut_bytes())?;
        // Where the page has fewer slots than entries are needed, its last slot points to the next list.
        let (next, pages) = if needed > slots {
            page.split_last()
                .map(|(next, pages)| (Some(next.get()), pages))
        } else {
            Some((None, &*page))
        }
        .ok_or(Status::INTERNAL_ERROR)?;
        for entry in pages {
            let length = left.min(PAGE_SIZE);
            push_page(entry.get(), length, transfer)?;
            left -= length;
        }
        match next {
            None => return Ok(()),
            Some(next) if next.is_multiple_of(PAGE_SIZE) => list = next,
            Some(_) => return Err(Status::PRP_OFFSET_INVALID),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn no_lists(_: u64, _: &mut [u8]) -> Result<(), Status> {
        panic!("no list is needed")
    }

    fn ranges(transfer: &Transfer) -> Vec<(u64, u64)> {
        transfer
            .ranges
            .iter()
            .map(|r| (r.address, r.length))
            .collect()
    }

    #[test]
    fn one_and_two_pages_need_no_list() {
        let mut t = Transfer::default();
        walk(0x1000, 0, 512, &mut t, no_lists).unwrap();
        assert_eq!(ranges(&t), [(0x1000, 512)]);
        walk(0x1e00, 0x9000, 1024, &mut t, no_lists).unwrap();
        assert_eq!(ranges(&t), [(0x1e00, 512), (0x9000, 512)]);
        walk(0x1000, 0x2000, 8192, &mut t, no_lists).unwrap();
        assert_eq!(ranges(&t), [(0x1000, 8192)]);
    }

    #[test]
    fn offsets_are_checked() {
        let mut t = Transfer::default();
        let walk = |prp1, prp2, length, t: &mut Transfer| {
            walk(prp1, prp2, length, t, |_, data| {
                data.fill(0xff);
                Ok(())
            })
        };
        assert_eq!(
            walk(0x1002, 0, 512, &mut t),
            Err(Status::PRP_OFFSET_INVALID)
        );
        assert_eq!(
            walk(0x1000, 0x2004, 8192, &mut t),
            Err(Status::PRP_OFFSET_INVALID)
        );
        assert_eq!(
            walk(0x1000, 0x2004, 12288, &mut t),
            Err(Status::PRP_OFFSET_INVALID)
        );
        assert_eq!(
            walk(0x1000, 0x2000, 12288, &mut t),
            Err(Status::PRP_OFFSET_INVALID)
        );
        assert_eq!(
            walk(u64::MAX - 3, 0, 4, &mut t),
            Err(Status::DATA_TRANSFER_ERROR)
        );
    }

    #[test]
    fn a_list_that_points_to_itself_ends() {
        let mut t = Transfer::default();
        let mut fetches = 0;
        walk(0, 0x5000, 4096 * 2000, &mut t, |_, data| {
            fetches += 1;
            for entry in data.chunks_exact_mut(8) {
                entry.copy_from_slice(&0x5000u64.to_le_bytes());
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(fetches, 4);
    }

    /// A host's driver: lays the PRPs of pages `pages` out in a sparse memory of lists.
    fn lay_out(
        pages: &[u64],
        offset: u64,
        list_slot: u64,
        memory: &mut HashMap<u64, u64>,
    ) -> (u64, u64) {
        let prp1 = pages[0] + offset;
        match pages.len() {
            1 => return (prp1, 0xdead),
            2 => return (prp1, pages[1]),
            _ => {}
        }
        let mut next_list = 0x10_0000_0000;
        let prp2 = next_list + list_slot * 8;
        let mut at = prp2;
        for (i, page) in pages.iter().enumerate().skip(1) {
            let last_slot = at % 4096 == 4088;
            if last_slot && i + 1 < pages.len() {
                next_list += 0x1_0000;
                memory.insert(at, next_list);
                at = next_list;
            }
            memory.insert(at, *page);
            at += 8;
        }
        (prp1, prp2)
    }

    proptest! {
        #[test]
        fn finds_every_byte_that_the_driver_laid_out(
            numbers in prop::collection::vec(0u64..1 << 20, 1..1600),
            contiguous in any::<bool>(),
            offset in (0u64..1024).prop_map(|o| o * 4),
            tail in 1u64..=4096,
            list_slot in 0u64..512,
        ) {
            let pages: Vec<u64> = numbers.iter().enumerate()
                .map(|(i, n)| if contiguous { 0x4000_0000 + i as u64 * 4096 } else { n * 4096 })
                .collect();
            let length = if pages.len() == 1 {
                tail.min(4096 - offset)
            } else {
                (4096 - offset) + (pages.len() as u64 - 2) * 4096 + tail
            };
            let mut memory = HashMap::new();
            let (prp1, prp2) = lay_out(&pages, offset, list_slot, &mut memory);

            let mut t = Transfer::default();
            let mut used = 0;
            walk(prp1, prp2, length, &mut t, |address, data| {
                assert!(address / 4096 == (address + data.len() as u64 - 1) / 4096);
                for (i, entry) in data.chunks_exact_mut(8).enumerate() {
                    // Indexing panics where the walker asks for an entry that nobody wrote.
                    let value = memory[&(address + i as u64 * 8)];
                    entry.copy_from_slice(&value.to_le_bytes());
                    used += 1;
                }
                Ok(())
            }).unwrap();
            prop_assert_eq!(used, memory.len());
            prop_assert_eq!(t.lists.iter().map(|l| l.length).sum::<u64>(), 8 * memory.len() as u64);

            // The naive model: the page of every 4 bytes of the transfer.
            let found: Vec<u64> = t.ranges.iter()
                .flat_map(|r| (r.address..r.address + r.length).step_by(4)).collect();
            let expected: Vec<u64> = (0..length).step_by(4)
                .map(|at| pages[((at + offset) / 4096) as usize] + (at + offset) % 4096).collect();
            if length % 4 == 0 {
                prop_assert_eq!(found, expected);
            }
            prop_assert_eq!(t.ranges.iter().map(|r| r.length).sum::<u64>(), length);
            if contiguous {
                prop_assert_eq!(t.ranges.len(), 1);
            }
        }

        #[test]
        fn garbage_never_panics(prp1: u64, prp2: u64, length in 0u64..=4 << 20, seed: u64) {
            let mut t = Transfer::default();
            let _ = walk(prp1, prp2, length, &mut t, |address, data| {
                for (i, byte) in data.iter_mut().enumerate() {
                    *byte = (seed.rotate_left(i as u32) ^ address) as u8;
                }
                Ok(())
            });
        }
    }
}
