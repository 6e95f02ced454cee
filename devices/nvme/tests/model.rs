//! Random commands against a plain model of what blocks are, in every format.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::cell::RefCell;

use driver::nvm::{code, command, format, fused, plug, run};
use driver::{Driver, Rig, pattern};
use p2plab_nvme::NamespaceConfig;
use p2plab_nvme::spec::command::{Command, CopyRange, DatasetRange, io};
use p2plab_nvme::spec::status::Status;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use zerocopy::{FromZeros, IntoBytes};

const SIZE: u64 = 256 << 10;
const PRACT: u32 = 1 << 29;
const GUARD: u32 = 1 << 28;

#[derive(Clone, Debug)]
enum Op {
    Write {
        slba: u64,
        count: u32,
        seed: u64,
    },
    Zero {
        slba: u64,
        count: u32,
    },
    Deallocate {
        ranges: Vec<(u64, u32)>,
    },
    Spoil {
        slba: u64,
        count: u32,
    },
    Copy {
        target: u64,
        ranges: Vec<(u64, u32)>,
    },
    Compare {
        slba: u64,
        count: u32,
        differs: bool,
    },
    CompareAndWrite {
        slba: u64,
        count: u32,
        differs: bool,
        seed: u64,
    },
    Verify {
        slba: u64,
        count: u32,
    },
    Format {
        index: u32,
    },
}

/// A range that often leaves the namespace: it has 64 or 512 blocks.
fn range() -> impl Strategy<Value = (u64, u32)> {
    (0u64..80, 1u32..24)
}

fn op() -> impl Strategy<Value = Op> {
    let ranges = || prop::collection::vec(range(), 1..5);
    prop_oneof![
        4 => (range(), any::<u64>()).prop_map(|((slba, count), seed)| Op::Write { slba, count, seed }),
        2 => range().prop_map(|(slba, count)| Op::Zero { slba, count }),
        2 => ranges().prop_map(|ranges| Op::Deallocate { ranges }),
        2 => range().prop_map(|(slba, count)| Op::Spoil { slba, count }),
        4 => (0u64..80, ranges()).prop_map(|(target, ranges)| Op::Copy { target, ranges }),
        2 => (range(), any::<bool>())
            .prop_map(|((slba, count), differs)| Op::Compare { slba, count, differs }),
        2 => (range(), any::<bool>(), any::<u64>()).prop_map(|((slba, count), differs, seed)| {
            Op::CompareAndWrite { slba, count, differs, seed }
        }),
        1 => range().prop_map(|(slba, count)| Op::Verify { slba, count }),
        1 => (0u32..4).prop_map(|index| Op::Format { index }),
    ]
}

/// Blocks by address; `None` cannot be read.
struct Model {
    shift: u32,
    prinfo: u32,
    blocks: Vec<Option<Vec<u8>>>,
}

impl Model {
    fn new(index: u32) -> Self {
        let shift = [9, 12, 9, 12][index as usize];
        Self {
            shift,
            prinfo: if index < 2 { 0 } else { PRACT },
            blocks: vec![Some(vec![0; 1 << shift]); (SIZE >> shift) as usize],
        }
    }

    /// Addresses, if all are there.
    fn range(&self, slba: u64, count: u32) -> Result<std::ops::Range<usize>, Status> {
        let range = slba as usize..slba as usize + count as usize;
        if range.end <= self.blocks.len() {
            Ok(range)
        } else {
            Err(Status::LBA_OUT_OF_RANGE)
        }
    }

    fn read(&self, slba: u64, count: u32) -> Result<Vec<u8>, Status> {
        let blocks = self.blocks[self.range(slba, count)?].iter().cloned();
        let blocks: Option<Vec<_>> = blocks.collect();
        Ok(blocks.ok_or(Status::UNRECOVERED_READ_ERROR)?.concat())
    }

    fn write(&mut self, slba: u64, data: &[u8]) -> Result<(), Status> {
        let range = self.range(slba, (data.len() >> self.shift) as u32)?;
        for (block, data) in self.blocks[range]
            .iter_mut()
            .zip(data.chunks(1 << self.shift))
        {
            *block = Some(data.to_vec());
        }
        Ok(())
    }

    fn fill(&self, seed: u64, count: u32) -> Vec<u8> {
        pattern(seed, (count as usize) << self.shift)
    }

    /// What the host believes to be there.
    fn believed(&self, slba: u64, count: u32, differs: bool) -> Vec<u8> {
        let mut data = self
            .read(slba, count)
            .unwrap_or_else(|_| self.fill(0, count));
        if differs {
            let last = data.len() - 1;
            data[last] ^= 1;
        }
        data
    }
}

/// Where the host keeps data.
struct Buffers {
    old: u64,
    new: u64,
    list: u64,
}

fn apply(d: &mut Driver, model: &mut Model, at: &Buffers, op: Op) {
    let (shift, prinfo) = (model.shift, model.prinfo);
    let make = |d: &mut Driver, opcode, slba: u64, count, address| {
        let mut command = command(d, opcode, slba, count, shift, address);
        command.cdw12 = (command.cdw12.get() | prinfo).into();
        command.cdw14 = ((slba & 0xffff_ffff) as u32).into();
        command
    };
    let (result, expected) = match op {
        Op::Write { slba, count, seed } => {
            let data = model.fill(seed, count);
            d.store(at.new, &data);
            let write = make(d, io::WRITE, slba, count, at.new);
            (run(d, write), model.write(slba, &data))
        }
        Op::Zero { slba, count } => {
            let zero = make(d, io::WRITE_ZEROES, slba, count, at.new);
            let zeros = vec![0; (count as usize) << shift];
            (run(d, zero), model.write(slba, &zeros))
        }
        Op::Deallocate { ranges } => {
            let list: Vec<DatasetRange> = ranges
                .iter()
                .map(|(slba, count)| {
                    let mut range = DatasetRange::new_zeroed();
                    (range.slba, range.nlb) = ((*slba).into(), (*count).into());
                    range
                })
                .collect();
            d.store(at.list, list.as_bytes());
            let command = Command {
                opcode: io::DATASET_MANAGEMENT,
                nsid: 1.into(),
                prp1: at.list.into(),
                cdw10: (ranges.len() as u32 - 1).into(),
                cdw11: 4.into(),
                ..Command::default()
            };
            let inside = ranges
                .iter()
                .try_for_each(|(s, c)| model.range(*s, *c).map(|_| ()));
            if inside.is_ok() {
                for (slba, count) in ranges {
                    let zeros = vec![0; (count as usize) << shift];
                    model.write(slba, &zeros).unwrap();
                }
            }
            (run(d, command), inside)
        }
        Op::Spoil { slba, count } => {
            let spoil = command(d, io::WRITE_UNCORRECTABLE, slba, count, shift, at.new);
            let range = model.range(slba, count);
            let expected = range.map(|range| model.blocks[range].fill(None));
            (run(d, spoil), expected)
        }
        Op::Copy { target, ranges } => copy(d, model, at, target, &ranges),
        Op::Compare {
            slba,
            count,
            differs,
        } => {
            d.store(at.old, &model.believed(slba, count, differs));
            let mut compare = make(d, io::COMPARE, slba, count, at.old);
            // The host makes nothing that could be checked.
            compare.cdw12 = (compare.cdw12.get() & !GUARD).into();
            let equal = if differs {
                Err(Status::COMPARE_FAILURE)
            } else {
                Ok(())
            };
            (run(d, compare), model.read(slba, count).and(equal))
        }
        Op::CompareAndWrite {
            slba,
            count,
            differs,
            seed,
        } => {
            let data = model.fill(seed, count);
            d.store(at.old, &model.believed(slba, count, differs));
            d.store(at.new, &data);
            let compare = make(d, io::COMPARE, slba, count, at.old);
            let write = make(d, io::WRITE, slba, count, at.new);
            let [first, second] = fused(d, 1, compare, write);
            let equal = if differs {
                Err(Status::COMPARE_FAILURE)
            } else {
                Ok(())
            };
            let expected = model.read(slba, count).and(equal);
            if expected.is_ok() {
                assert_eq!(second, Status::SUCCESS);
                model.write(slba, &data).unwrap();
            } else {
                assert_eq!(second, code(Status::FAILED_FUSED_COMMAND));
            }
            let result = if first.is_success() {
                Ok(())
            } else {
                Err(first)
            };
            (result, expected)
        }
        Op::Verify { slba, count } => {
            let verify = make(d, io::VERIFY, slba, count, at.new);
            (run(d, verify), model.read(slba, count).map(|_| ()))
        }
        Op::Format { index } => {
            // Where there is metadata it is protection information.
            let protection = if index < 2 { 0 } else { 1 << 5 };
            *model = Model::new(index);
            (format(d, 1, index | protection).map(|_| ()), Ok(()))
        }
    };
    assert_eq!(result, expected.map_err(code));
}

fn copy(
    d: &mut Driver,
    model: &mut Model,
    at: &Buffers,
    target: u64,
    ranges: &[(u64, u32)],
) -> (Result<(), Status>, Result<(), Status>) {
    let list: Vec<CopyRange> = ranges
        .iter()
        .map(|(slba, count)| {
            let mut range = CopyRange::new_zeroed();
            (range.slba, range.nlb_z) = ((*slba).into(), (*count as u16 - 1).into());
            range
        })
        .collect();
    d.store(at.list, list.as_bytes());
    let command = Command {
        opcode: io::COPY,
        nsid: 1.into(),
        prp1: at.list.into(),
        cdw10: (target as u32).into(),
        cdw12: ((ranges.len() as u32 - 1) | model.prinfo | model.prinfo >> 14).into(),
        cdw14: (target as u32).into(),
        ..Command::default()
    };
    let sources: Result<Vec<_>, _> = ranges.iter().map(|(s, c)| model.read(*s, *c)).collect();
    let expected = sources.and_then(|data| model.write(target, &data.concat()));
    (run(d, command), expected)
}

#[test]
fn blocks_are_what_the_model_says() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.namespaces[0] = NamespaceConfig::memory(SIZE);
    });
    let at = Buffers {
        old: d.pages(64),
        new: d.pages(64),
        list: d.pages(1),
    };
    let first = d.next_free_page();
    let d = RefCell::new(d);
    TestRunner::new(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })
    .run(
        &(0u32..4, prop::collection::vec(op(), 1..40)),
        |(index, ops)| {
            let d = &mut *d.borrow_mut();
            d.rewind(first);
            let mut model = Model::new(index);
            apply(d, &mut model, &at, Op::Format { index });
            for op in ops {
                apply(d, &mut model, &at, op);
                d.rewind(first);
            }
            // All that is there, block by block, with its protection information checked.
            for (slba, block) in (0u64..).zip(&model.blocks) {
                let mut read = command(d, io::READ, slba, 1, model.shift, at.new);
                let checked = if model.prinfo == 0 { 0 } else { PRACT | GUARD };
                read.cdw12 = checked.into();
                let expected = block.as_ref().ok_or(code(Status::UNRECOVERED_READ_ERROR));
                prop_assert_eq!(run(d, read).err(), expected.err(), "block {}", slba);
                if let Some(block) = block {
                    prop_assert!(d.load(at.new, block.len()) == *block, "block {}", slba);
                }
                d.rewind(first);
            }
            Ok(())
        },
    )
    .unwrap();
}
