use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

/// Segments by address.
type Memory = HashMap<u64, Vec<SglDescriptor>>;

fn block(address: u64, length: u32) -> SglDescriptor {
    SglDescriptor::new(kind::DATA_BLOCK, address, length)
}

fn bucket(length: u32) -> SglDescriptor {
    SglDescriptor::new(kind::BIT_BUCKET, 0xdead, length)
}

fn chain(identifier: u8, address: u64, count: u32) -> SglDescriptor {
    SglDescriptor::new(identifier, address, count * 16)
}

/// Walks a read of `length` bytes. What lies behind a segment's end in `memory` panics if it is asked for.
fn walk_in(
    memory: &Memory,
    inline: SglDescriptor,
    length: u64,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    walk(
        inline,
        length,
        Direction::FromController,
        transfer,
        |address, data| {
            let segment = memory.get(&address).ok_or(Status::DATA_TRANSFER_ERROR)?;
            data.copy_from_slice(&segment.as_bytes()[..data.len()]);
            Ok(())
        },
    )
}

fn ranges(transfer: &Transfer) -> Vec<(u64, u64)> {
    transfer
        .ranges
        .iter()
        .map(|r| (r.address, r.length))
        .collect()
}

const SEG: u8 = kind::SEGMENT;
const LAST: u8 = kind::LAST_SEGMENT;

#[test]
fn one_block_in_the_command_needs_no_segment() {
    let mut t = Transfer::default();
    walk_in(&Memory::new(), block(0x1003, 1 << 20), 1 << 20, &mut t).unwrap();
    assert_eq!((ranges(&t), t.lists.len()), (vec![(0x1003, 1 << 20)], 0));
    walk_in(&Memory::new(), block(0x1003, 0), 0, &mut t).unwrap();
    assert_eq!(ranges(&t), []);
}

#[test]
fn what_a_bad_list_gets() {
    const MAX: u64 = u64::MAX - 7;
    let memory = Memory::from([
        (
            0x1000,
            vec![block(0x10_0000, 256), block(0, 0), block(0x20_0000, 256)],
        ),
        // Segment descriptors that are not the last of theirs.
        (0x2000, vec![chain(LAST, 0x1000, 3), block(0, 512)]),
        (
            0x3000,
            vec![block(0, 256), chain(SEG, 0x3000, 2), block(0, 256)],
        ),
        // Chains of two.
        (0x4000, vec![block(0x30_0000, 512), chain(LAST, 0x1000, 3)]),
        (0x5000, vec![chain(SEG, 0x4000, 2)]),
        // A chain that comes back to itself.
        (0x6000, vec![chain(SEG, 0x6000, 1)]),
        (0x7000, vec![block(0, 0), chain(SEG, 0x7000, 2)]),
        (
            0x8000,
            vec![SglDescriptor::new(kind::KEYED_DATA_BLOCK, 0, 512)],
        ),
        (0x9000, vec![block(u64::MAX - 100, 512)]),
        (0xa000, vec![block(0, 0); MAX_DESCRIPTORS + 1]),
        // It describes the data, and goes on.
        (0xb000, vec![block(0, 512), chain(LAST, 0xc000, 1)]),
        (0xc000, vec![block(0, 1)]),
    ]);
    let segment = Status::INVALID_SGL_SEGMENT_DESCRIPTOR;
    let number = Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS;
    let (size, kind) = (
        Status::DATA_SGL_LENGTH_INVALID,
        Status::SGL_DESCRIPTOR_TYPE_INVALID,
    );
    let transfer = Status::DATA_TRANSFER_ERROR;
    let cases = [
        (chain(LAST, 0x1000, 3), 512, Ok(())),
        (chain(LAST, 0x4000, 1), 512, Ok(())),
        (chain(SEG, 0x4000, 2), 1024, Ok(())),
        (chain(SEG, 0x5000, 1), 1024, Ok(())),
        // Lengths.
        (block(0, 511), 512, Err(size)),
        (block(0, 513), 512, Err(size)),
        (chain(LAST, 0x1000, 3), 511, Err(size)),
        (chain(LAST, 0x1000, 3), 513, Err(size)),
        (chain(LAST, 0x1000, 2), 512, Err(size)),
        (chain(SEG, 0xb000, 2), 512, Err(size)),
        // Segments.
        (chain(LAST, 0x1000, 0), 512, Err(segment)),
        (chain(LAST, 0x1004, 3), 512, Err(segment)),
        (SglDescriptor::new(LAST, 0x1000, 40), 512, Err(segment)),
        (chain(SEG, 0x1000, 3), 512, Err(segment)),
        (chain(LAST, 0x4000, 2), 1024, Err(segment)),
        (chain(LAST, 0x2000, 2), 512, Err(number)),
        (chain(SEG, 0x3000, 3), 512, Err(number)),
        (chain(SEG, 0x6000, 1), 512, Err(number)),
        (chain(SEG, 0x7000, 2), 512, Err(number)),
        (
            chain(LAST, 0xa000, MAX_DESCRIPTORS as u32 + 1),
            0,
            Err(number),
        ),
        (
            SglDescriptor::new(LAST, 0x1000, u32::MAX - 15),
            512,
            Err(number),
        ),
        // Types, and sub types.
        (SglDescriptor::new(0x40, 0, 512), 512, Err(kind)),
        (SglDescriptor::new(0x50, 0, 512), 512, Err(kind)),
        (SglDescriptor::new(0xf0, 0, 512), 512, Err(kind)),
        (SglDescriptor::new(0x01, 0, 512), 512, Err(kind)),
        (SglDescriptor::new(0x31, 0x1000, 48), 512, Err(kind)),
        (chain(LAST, 0x8000, 1), 512, Err(kind)),
        // Addresses.
        (block(u64::MAX - 510, 512), 512, Err(transfer)),
        (chain(LAST, 0x9000, 1), 512, Err(transfer)),
        (chain(LAST, MAX, 1), 512, Err(transfer)),
        (chain(LAST, 0xd000, 1), 512, Err(transfer)),
    ];
    let mut t = Transfer::default();
    for (inline, length, expected) in cases {
        let result = walk_in(&memory, inline, length, &mut t);
        assert_eq!(result, expected, "{inline:x?} for {length} bytes");
        assert!(t.lists.len() <= MAX_SEGMENTS);
    }
}

#[test]
fn buckets_drop_what_is_read_and_nothing_that_is_written() {
    let memory = Memory::from([(
        0x1000,
        vec![
            bucket(100),
            block(0x5000, 200),
            bucket(0),
            block(0x50c8, 12),
            bucket(200),
        ],
    )]);
    let inline = chain(LAST, 0x1000, 5);
    let mut t = Transfer::default();
    walk_in(&memory, inline, 512, &mut t).unwrap();
    assert_eq!(ranges(&t), [(0x5000, 212)]);
    let runs: Vec<_> = t.runs().map(|run| run.at).collect();
    assert_eq!(runs, [100]);
    walk(
        inline,
        212,
        Direction::ToController,
        &mut t,
        |address, data| {
            data.copy_from_slice(memory[&address].as_bytes());
            Ok(())
        },
    )
    .unwrap();
    assert_eq!((ranges(&t), t.gaps.len()), (vec![(0x5000, 212)], 0));
    walk_in(&memory, bucket(512), 512, &mut t).unwrap();
    assert_eq!((ranges(&t), t.runs().count()), (vec![], 0));
}

proptest! {
    /// A host lays `blocks` out in segments of the sizes `cuts`; the naive model is a list of bytes.
    #[test]
    fn finds_every_byte_that_the_driver_laid_out(
        blocks in prop::collection::vec((0u64..1 << 40, 0u32..3000, any::<bool>()), 1..200),
        cuts in prop::collection::vec(1usize..40, 200),
        contiguous in any::<bool>(),
    ) {
        let mut next = 0x10_0000u64;
        let descriptors: Vec<_> = blocks.iter().map(|(address, length, is_bucket)| {
            let address = if contiguous { next } else { *address };
            next += u64::from(*length);
            if *is_bucket { bucket(*length) } else { block(address, *length) }
        }).collect();

        let mut memory = Memory::new();
        let mut segments: Vec<Vec<SglDescriptor>> = Vec::new();
        let mut rest = descriptors.as_slice();
        for cut in cuts {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            segments.push(now.to_vec());
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        let mut link = None;
        for (i, mut segment) in segments.into_iter().enumerate().rev() {
            let identifier = if link.is_none() { LAST } else { SEG };
            segment.extend(link);
            let address = 0x8000_0000 + i as u64 * 0x1_0000;
            link = Some(chain(identifier, address, segment.len() as u32));
            memory.insert(address, segment);
        }

        // The address of every byte of the data, or none where it is dropped.
        let model: Vec<Option<u64>> = descriptors.iter().flat_map(|d| {
            let (start, dropped) = (d.address.get(), d.identifier == kind::BIT_BUCKET);
            (0..u64::from(d.length.get())).map(move |i| (!dropped).then_some(start + i))
        }).collect();
        let mut t = Transfer::default();
        walk_in(&memory, link.unwrap(), model.len() as u64, &mut t).unwrap();
        let mut found = vec![None; model.len()];
        for run in t.runs() {
            let mut at = run.at as usize;
            for range in &t.ranges[run.first..run.end] {
                for i in 0..range.length {
                    found[at] = Some(range.address + i);
                    at += 1;
                }
            }
        }
        prop_assert_eq!(found, model);
        prop_assert_eq!(t.lists.len(), memory.len());
        let described: usize = memory.values().map(|segment| segment.len() * 16).sum();
        prop_assert_eq!(t.lists.iter().map(|l| l.length).sum::<u64>(), described as u64);
    }

    #[test]
    fn garbage_never_panics(
        address: u64,
        length: u32,
        identifier in prop_oneof![any::<u8>(), (0u8..6).prop_map(|kind| kind << 4)],
        wanted in 0u64..=4 << 20,
        seed: u64,
        write: bool,
    ) {
        let direction = if write { Direction::ToController } else { Direction::FromController };
        let inline = SglDescriptor::new(identifier, address & !7, length & !15);
        let mut t = Transfer::default();
        let mut fetches = 0;
        let _ = walk(inline, wanted, direction, &mut t, |address, data| {
            fetches += 1;
            for (i, chunk) in data.chunks_exact_mut(16).enumerate() {
                let random = seed.rotate_left(i as u32) ^ address;
                let d = SglDescriptor::new((random >> 3) as u8 & 0x30, random & !7, (random >> 20) as u32 & 0xff0);
                chunk.copy_from_slice(d.as_bytes());
            }
            Ok(())
        });
        prop_assert!(fetches <= MAX_SEGMENTS);
    }
}
