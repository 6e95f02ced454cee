//! A write cache that forgets: what a loss of power takes, and what it must not.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::cell::RefCell;
use std::os::unix::fs::FileExt;

use driver::nvm::{command, format, plug, run};
use driver::{Driver, NAMESPACE_SIZE, Rig, pattern, wait_until};
use p2plab_nvme::spec::command::{Command, CopyRange, DatasetRange, NSID_ALL, admin, feature, io};
use p2plab_nvme::spec::registers::{Cc, offset, shst};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{
    Backing, Metadata, NamespaceConfig, NvmeConfig, NvmeController, NvmeError, WriteCacheConfig,
};
use p2plab_pcie::{Endpoint, ResetKind};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use zerocopy::{FromZeros, IntoBytes};

const FUA: u32 = 1 << 30;
const PRACT: u32 = 1 << 29;
const GUARD: u32 = 1 << 28;

fn cache(size: u64, survivors: Option<u64>) -> Option<WriteCacheConfig> {
    Some(WriteCacheConfig { size, survivors })
}

/// A controller with a cache that loses all, and two namespaces.
fn rig() -> (Rig, Driver) {
    let mut rig = Rig::new();
    let d = plug(&mut rig, |c| {
        c.write_cache = cache(1 << 20, None);
        c.namespaces.push(NamespaceConfig::memory(NAMESPACE_SIZE));
    });
    (rig, d)
}

/// Brings a controller back that has lost its state, with one pair of queues.
fn come_back(d: &mut Driver) {
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
}

fn cut(d: &mut Driver) {
    d.controller.power_cut();
    come_back(d);
}

fn on(nsid: u32, mut command: Command) -> Command {
    command.nsid = nsid.into();
    command
}

/// Writes `count` blocks of 512 bytes of `seed`, with `flags` in dword 12.
fn write(d: &mut Driver, nsid: u32, slba: u64, count: u32, seed: u64, flags: u32) {
    let first = d.pages(0);
    let buffer = d.pages(u64::from(count).div_ceil(8));
    d.store(buffer, &pattern(seed, count as usize * 512));
    let mut write = on(nsid, command(d, io::WRITE, slba, count, 9, buffer));
    write.cdw12 = (write.cdw12.get() | flags).into();
    run(d, write).unwrap();
    d.rewind(first);
}

fn read(d: &mut Driver, nsid: u32, slba: u64, count: u32) -> Vec<u8> {
    let first = d.pages(0);
    let buffer = d.pages(u64::from(count).div_ceil(8));
    let read = on(nsid, command(d, io::READ, slba, count, 9, buffer));
    run(d, read).unwrap();
    let data = d.load(buffer, count as usize * 512);
    d.rewind(first);
    data
}

fn flush(d: &mut Driver, nsid: u32) {
    let flush = Command {
        opcode: io::FLUSH,
        ..Command::default()
    };
    run(d, on(nsid, flush)).unwrap();
}

fn is_zero(data: &[u8]) -> bool {
    data.iter().all(|byte| *byte == 0)
}

#[test]
fn what_was_not_flushed_is_lost() {
    let (_rig, mut d) = rig();
    write(&mut d, 1, 0, 8, 1, 0);
    write(&mut d, 2, 0, 8, 2, 0);
    flush(&mut d, 1);
    write(&mut d, 1, 4, 8, 3, 0);
    // The host sees what it wrote for as long as there is power, over a reset, too.
    d.disable();
    come_back(&mut d);
    assert_eq!(read(&mut d, 1, 4, 8), pattern(3, 4096));
    cut(&mut d);
    assert_eq!(read(&mut d, 1, 0, 8), pattern(1, 4096));
    assert!(is_zero(&read(&mut d, 1, 8, 4)), "a block never flushed");
    assert!(is_zero(&read(&mut d, 2, 0, 8)), "another namespace's flush");
    // And what is lost is lost once.
    write(&mut d, 1, 0, 8, 4, 0);
    flush(&mut d, NSID_ALL);
    cut(&mut d);
    assert_eq!(read(&mut d, 1, 0, 8), pattern(4, 4096));
}

#[test]
fn force_unit_access_saves_its_own_blocks_only() {
    let (_rig, mut d) = rig();
    write(&mut d, 1, 0, 16, 1, 0);
    write(&mut d, 1, 4, 8, 2, FUA);
    // A read with FUA, too: what it returns is on the medium.
    let first = d.pages(0);
    let buffer = d.pages(1);
    let mut fua_read = command(&mut d, io::READ, 14, 1, 9, buffer);
    fua_read.cdw12 = FUA.into();
    run(&mut d, fua_read).unwrap();
    d.rewind(first);
    cut(&mut d);
    let (found, of_1) = (read(&mut d, 1, 0, 16), pattern(1, 8192));
    assert!(is_zero(&found[..2048]) && is_zero(&found[12 * 512..14 * 512]));
    assert_eq!(found[2048..2048 + 4096], pattern(2, 4096));
    assert_eq!(found[14 * 512..15 * 512], of_1[14 * 512..15 * 512]);
    assert!(is_zero(&found[15 * 512..]));
}

#[test]
fn shutdown_and_a_cache_turned_off_save_all() {
    for abrupt in [false, true] {
        let (_rig, mut d) = rig();
        write(&mut d, 1, 0, 8, 1, 0);
        let notification = 1 + u8::from(abrupt);
        let cc = Cc::from_bits(d.read32(offset::CC)).with_shn(notification);
        d.write32(offset::CC, cc.into_bits());
        d.wait_status("CSTS.SHST", |csts| csts.shst() == shst::COMPLETE);
        cut(&mut d);
        assert_eq!(read(&mut d, 1, 0, 8), pattern(1, 4096));
    }
    let (_rig, mut d) = rig();
    write(&mut d, 1, 0, 8, 1, 0);
    d.set_feature(feature::VOLATILE_WRITE_CACHE, 0).unwrap();
    write(&mut d, 1, 8, 8, 2, 0);
    d.controller.power_cut();
    come_back(&mut d);
    assert_eq!(read(&mut d, 1, 0, 8), pattern(1, 4096));
    assert_eq!(read(&mut d, 1, 8, 8), pattern(2, 4096));
    // The power brings the default back, which is on.
    write(&mut d, 1, 0, 8, 3, 0);
    cut(&mut d);
    assert_eq!(read(&mut d, 1, 0, 8), pattern(1, 4096));
}

/// Resets that leave the power on lose nothing; whatever takes the machine or the slot away does.
#[test]
fn power_is_lost_with_the_machine_and_not_with_a_reset() {
    let (mut rig, mut d) = rig();
    write(&mut d, 1, 0, 8, 1, 0);
    d.function.reset(ResetKind::Conventional);
    d.restore_config_space();
    come_back(&mut d);
    assert_eq!(read(&mut d, 1, 0, 8), pattern(1, 4096));
    d.controller.reset(ResetKind::ConnectionLost);
    come_back(&mut d);
    assert!(is_zero(&read(&mut d, 1, 0, 8)));

    write(&mut d, 1, 0, 8, 2, 0);
    write(&mut d, 1, 8, 8, 3, FUA);
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    come_back(&mut d);
    assert!(is_zero(&read(&mut d, 1, 0, 8)));
    assert_eq!(read(&mut d, 1, 8, 8), pattern(3, 4096));
}

#[test]
fn what_formats_deletes_and_detaches_leave_is_durable() {
    let (_rig, mut d) = rig();
    write(&mut d, 1, 0, 8, 1, FUA);
    write(&mut d, 1, 0, 8, 2, 0);
    format(&mut d, 1, 0).unwrap();
    cut(&mut d);
    assert!(is_zero(&read(&mut d, 1, 0, 8)));

    write(&mut d, 2, 0, 8, 3, 0);
    driver::nvm::attach(&mut d, 2, 1, &[0]).unwrap();
    cut(&mut d);
    driver::nvm::attach(&mut d, 2, 0, &[0]).unwrap();
    assert_eq!(read(&mut d, 2, 0, 8), pattern(3, 4096));

    // The namespace that is created in a deleted one's place has nothing of it, and a cache, too.
    write(&mut d, 2, 0, 8, 4, 0);
    driver::nvm::delete(&mut d, 2).unwrap();
    assert_eq!(driver::nvm::create(&mut d, 4096, 0, 0), Ok(2));
    driver::nvm::attach(&mut d, 2, 0, &[0]).unwrap();
    cut(&mut d);
    assert!(is_zero(&read(&mut d, 2, 0, 8)));
    write(&mut d, 2, 0, 8, 5, 0);
    cut(&mut d);
    assert!(is_zero(&read(&mut d, 2, 0, 8)));
}

#[test]
fn a_sanitize_operation_leaves_nothing_to_come_back() {
    let (_rig, mut d) = rig();
    write(&mut d, 1, 0, 8, 1, FUA);
    write(&mut d, 1, 0, 8, 2, 0);
    // Block erase; then the power goes in the middle, and it goes on.
    d.controller.hold_background(true);
    d.simple_admin(admin::SANITIZE, 0, [2, 0, 0]).unwrap();
    cut(&mut d);
    d.controller.hold_background(false);
    wait_until("the end of the operation", || {
        (d.log_page(0x81, 4)[2] & 7 == 1).then_some(())
    });
    cut(&mut d);
    assert!(is_zero(&read(&mut d, 1, 0, 8)));
}

/// A host that never flushes takes no more memory than the cache may have: what is older is on the medium.
#[test]
fn a_full_cache_writes_back_what_is_oldest() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| c.write_cache = cache(64 << 10, None));
    for i in 0..64 {
        write(&mut d, 1, i * 8, 8, i, 0);
    }
    let dump = d.controller.dump();
    assert_eq!(dump["write_cache"]["bytes"], 64 << 10);
    // More than it holds goes around it.
    write(&mut d, 1, 2048, 256, 100, 0);
    assert_eq!(
        d.controller.dump()["write_cache"],
        dump["write_cache"],
        "{dump:#}"
    );
    cut(&mut d);
    for i in 0..64 {
        let found = read(&mut d, 1, i * 8, 8);
        if i < 48 {
            assert_eq!(found, pattern(i, 4096), "{i}");
        } else {
            assert!(is_zero(&found), "{i}");
        }
    }
    assert_eq!(read(&mut d, 1, 2048, 256), pattern(100, 128 << 10));
    assert_eq!(d.controller.dump()["write_cache"]["blocks_lost"], 128);
}

#[test]
fn a_file_loses_blocks_and_metadata_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.write_cache = cache(1 << 20, None);
        c.namespaces[0] = NamespaceConfig {
            backing: Backing::File {
                path: path.clone(),
                size: Some(1 << 20),
                create: true,
            },
            metadata: Metadata::Plain,
            ..NamespaceConfig::memory(0)
        };
    });
    let (buffer, tuples) = (d.pages(1), d.pages(1));
    let write = |d: &mut Driver, seed, fua: u32| {
        d.store(buffer, &pattern(seed, 4096));
        d.store(tuples, &pattern(seed + 100, 64));
        let mut write = command(d, io::WRITE, 8, 8, 9, buffer);
        write.mptr = tuples.into();
        write.cdw12 = (7 | fua).into();
        run(d, write).unwrap();
    };
    write(&mut d, 1, FUA);
    write(&mut d, 2, 0);
    d.controller.power_cut();
    let mut found = vec![0; 4096];
    let file = std::fs::File::open(&path).unwrap();
    file.read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(found, pattern(1, 4096));
    let metadata = std::fs::read(dir.path().join("disk.meta")).unwrap();
    assert_eq!(metadata[64..128], pattern(101, 64));
}

/// Commands of several queues on the same blocks, flushes among them, and the power goes: every block is of one command.
#[test]
fn no_block_is_torn_by_a_cut_under_load() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.write_cache = cache(256 << 10, Some(7));
        c.namespaces[0].block_size = 4096;
    });
    let first = d.pages(0);
    for round in 0..40u8 {
        d.disable();
        d.rewind(first);
        d.enable_cmb();
        d.enable();
        for id in 1..=3 {
            d.create_queues(id, 64, None).unwrap();
        }
        for queue in 1..=3usize {
            for i in 0..12u8 {
                let buffer = d.pages(4);
                let fill = round.wrapping_mul(40) ^ (queue as u8) << 6 ^ i;
                d.store(buffer, &[fill; 4 << 12]);
                let mut write = command(&mut d, io::WRITE, u64::from(i % 6), 4, 12, buffer);
                if i % 4 == 3 {
                    write = on(
                        1,
                        Command {
                            opcode: io::FLUSH,
                            ..Command::default()
                        },
                    );
                }
                d.push(queue, write);
            }
            d.ring_doorbell(queue);
        }
        if round % 2 > 0 {
            d.complete(2);
        }
        d.controller.power_cut();
        let file = d.controller.namespace_file(1).unwrap();
        for block in 0..9 {
            let mut found = [0; 4096];
            file.read_exact_at(&mut found, block << 12).unwrap();
            assert!(found.iter().all(|b| *b == found[0]), "{round}: {block}");
        }
    }
}

#[test]
fn a_cache_of_nothing_is_refused() {
    let mut config = NvmeConfig::new("a");
    config.write_cache = cache(4096, None);
    let refused = NvmeController::new(config).err().unwrap();
    assert!(matches!(refused, NvmeError::BadWriteCache { .. }));
    assert!(refused.to_string().contains("at least 65536"));
}

#[derive(Clone, Debug)]
enum Op {
    Write {
        slba: u64,
        count: u32,
        seed: u64,
        fua: bool,
    },
    Zero {
        slba: u64,
        count: u32,
        fua: bool,
    },
    Deallocate {
        ranges: Vec<(u64, u32)>,
    },
    Copy {
        target: u64,
        from: (u64, u32),
    },
    Spoil {
        slba: u64,
        count: u32,
    },
    Flush {
        all: bool,
    },
    Cache {
        on: bool,
    },
    Disable,
    Cut,
}

fn op() -> impl Strategy<Value = (u32, Op)> {
    let range = || (0u64..48, 1u32..16);
    let op = prop_oneof![
        6 => (range(), any::<u64>(), prop::bool::weighted(0.2))
            .prop_map(|((slba, count), seed, fua)| Op::Write { slba, count, seed, fua }),
        2 => (range(), prop::bool::weighted(0.2))
            .prop_map(|((slba, count), fua)| Op::Zero { slba, count, fua }),
        2 => prop::collection::vec(range(), 1..4).prop_map(|ranges| Op::Deallocate { ranges }),
        2 => (0u64..48, range()).prop_map(|(target, from)| Op::Copy { target, from }),
        1 => range().prop_map(|(slba, count)| Op::Spoil { slba, count }),
        2 => any::<bool>().prop_map(|all| Op::Flush { all }),
        1 => prop::bool::weighted(0.7).prop_map(|on| Op::Cache { on }),
        1 => Just(Op::Disable),
        2 => Just(Op::Cut),
    ];
    (1u32..=2, op)
}

/// A block: `None` if Write Uncorrectable has marked it.
type Block = Option<Vec<u8>>;

/// What a host may rely on.
struct Model {
    /// By namespace.
    now: [Vec<Block>; 2],
    durable: [Vec<Block>; 2],
    /// All that blocks have been since the last cut.
    past: [Vec<Vec<Block>>; 2],
    cache_on: bool,
}

const BLOCKS: u64 = 64;
/// Block sizes of the two namespaces; the second has protection information.
const SHIFTS: [u32; 2] = [9, 12];

impl Model {
    fn new() -> Self {
        let zeros = SHIFTS.map(|shift| vec![Some(vec![0; 1 << shift]); BLOCKS as usize]);
        Self {
            now: zeros.clone(),
            durable: zeros,
            past: [
                vec![Vec::new(); BLOCKS as usize],
                vec![Vec::new(); BLOCKS as usize],
            ],
            cache_on: true,
        }
    }

    fn change(&mut self, nsid: u32, slba: u64, blocks: Vec<Block>, durable: bool) {
        let range = slba as usize..slba as usize + blocks.len();
        let index = nsid as usize - 1;
        if durable || !self.cache_on {
            self.durable[index][range.clone()].clone_from_slice(&blocks);
        }
        let past = self.past[index][range.clone()].iter_mut();
        past.zip(&blocks)
            .for_each(|(past, block)| past.push(block.clone()));
        self.now[index][range].clone_from_slice(&blocks);
    }
}

/// What a block may be after a cut, besides what it was when it was last durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Survive {
    Nothing,
    /// What was written last.
    Last,
    /// What was written at any time: a full cache had written it back.
    Any,
}

/// Enough of a block to tell it from others.
fn brief(block: &Block) -> Option<&[u8]> {
    block.as_ref().map(|data| &data[8..24])
}

/// Dword 12 of a command that writes, without the number of blocks.
fn dword12(nsid: u32, fua: bool) -> u32 {
    let fua = if fua { FUA } else { 0 };
    if nsid == 2 { fua | PRACT } else { fua }
}

/// One block as the host reads it, checked where there is protection information.
fn read_block(d: &mut Driver, nsid: u32, slba: u64, buffer: u64) -> Block {
    let shift = SHIFTS[nsid as usize - 1];
    let mut read = on(nsid, command(d, io::READ, slba, 1, shift, buffer));
    if nsid == 2 {
        read.cdw12 = (PRACT | GUARD).into();
    }
    match run(d, read) {
        Ok(()) => Some(d.load(buffer, 1 << shift)),
        Err(status) if status.0 == Status::UNRECOVERED_READ_ERROR.code() => None,
        Err(status) => panic!("{status:?} of block {slba} of namespace {nsid}"),
    }
}

fn apply(
    d: &mut Driver,
    model: &mut Model,
    nsid: u32,
    op: &Op,
    may_survive: Survive,
    survived: &mut u32,
) {
    let index = nsid as usize - 1;
    let shift = SHIFTS[index];
    let zeros = |count: u32| vec![Some(vec![0u8; 1 << shift]); count as usize];
    let first = d.pages(0);
    let buffer = d.pages(16);
    match op {
        Op::Write {
            slba,
            count,
            seed,
            fua,
        } => {
            let data = pattern(*seed, (*count as usize) << shift);
            d.store(buffer, &data);
            let mut write = on(nsid, command(d, io::WRITE, *slba, *count, shift, buffer));
            let flags = dword12(nsid, *fua);
            write.cdw12 = (write.cdw12.get() | flags).into();
            run(d, write).unwrap();
            let blocks = data.chunks(1 << shift).map(|b| Some(b.to_vec())).collect();
            model.change(nsid, *slba, blocks, *fua);
        }
        Op::Zero { slba, count, fua } => {
            let mut zero = on(nsid, command(d, io::WRITE_ZEROES, *slba, *count, shift, 0));
            let flags = dword12(nsid, *fua);
            zero.cdw12 = (zero.cdw12.get() | flags).into();
            run(d, zero).unwrap();
            model.change(nsid, *slba, zeros(*count), *fua);
        }
        Op::Deallocate { ranges } => {
            let mut list = vec![0u8; 0];
            for (slba, count) in ranges {
                let range = DatasetRange {
                    cattr: 0.into(),
                    nlb: (*count).into(),
                    slba: (*slba).into(),
                };
                list.extend(range.as_bytes());
            }
            d.store(buffer, &list);
            let command = Command {
                opcode: io::DATASET_MANAGEMENT,
                prp1: buffer.into(),
                cdw10: (ranges.len() as u32 - 1).into(),
                cdw11: (1 << 2).into(),
                ..Command::default()
            };
            run(d, on(nsid, command)).unwrap();
            for (slba, count) in ranges {
                model.change(nsid, *slba, zeros(*count), false);
            }
            if !model.cache_on {
                // It flushed.
                model.durable[index] = model.now[index].clone();
            }
        }
        Op::Copy {
            target,
            from: (slba, count),
        } => {
            let source = model.now[index][*slba as usize..][..*count as usize].to_vec();
            let mut range = CopyRange::new_zeroed();
            (range.slba, range.nlb_z) = ((*slba).into(), (*count as u16 - 1).into());
            d.store(buffer, range.as_bytes());
            let copy = Command {
                opcode: io::COPY,
                prp1: buffer.into(),
                cdw10: (*target as u32).into(),
                ..Command::default()
            };
            let result = run(d, on(nsid, copy));
            if source.iter().all(Option::is_some) {
                result.unwrap();
                model.change(nsid, *target, source, false);
            } else {
                result.unwrap_err();
            }
        }
        Op::Spoil { slba, count } => {
            let spoil = command(d, io::WRITE_UNCORRECTABLE, *slba, *count, shift, 0);
            run(d, on(nsid, spoil)).unwrap();
            model.change(nsid, *slba, vec![None; *count as usize], true);
        }
        Op::Flush { all } => {
            flush(d, if *all { NSID_ALL } else { nsid });
            for (i, now) in model.now.iter().enumerate() {
                if *all || i == index {
                    model.durable[i].clone_from(now);
                }
            }
        }
        Op::Cache { on } => {
            let value = u32::from(*on);
            d.set_feature(feature::VOLATILE_WRITE_CACHE, value).unwrap();
            model.cache_on = *on;
            if !on {
                model.durable = model.now.clone();
            }
        }
        Op::Disable => {
            d.disable();
            come_back(d);
            model.cache_on = true;
            // The queues are where they are.
            return;
        }
        Op::Cut => {
            cut(d);
            model.cache_on = true;
            let buffer = d.pages(1);
            let mut kept = 0;
            for nsid in 1..=2u32 {
                let index = nsid as usize - 1;
                for slba in 0..BLOCKS {
                    let found = read_block(d, nsid, slba, buffer);
                    let durable = &model.durable[index][slba as usize];
                    let now = &model.now[index][slba as usize];
                    let past = std::mem::take(&mut model.past[index][slba as usize]);
                    let fits = found == *durable
                        || match may_survive {
                            Survive::Nothing => false,
                            Survive::Last => found == *now,
                            Survive::Any => past.contains(&found),
                        };
                    assert!(
                        fits,
                        "block {slba} of namespace {nsid}: {:?} and not {:?}, now {:?}",
                        brief(&found),
                        brief(durable),
                        brief(now)
                    );
                    kept += u32::from(found != *durable);
                    model.durable[index][slba as usize] = found.clone();
                    model.now[index][slba as usize] = found;
                }
            }
            *survived += kept;
            return;
        }
    }
    d.rewind(first);
}

/// Random commands and cuts: with a cache that loses all, each block is what it was when it was last durable; with
/// survivors it is that or what was written last; in a cache that is too small, anything in between. Never is it
/// anything else, and its protection information fits.
#[test]
fn a_block_is_old_or_new_and_never_anything_else() {
    for (size, survivors, may_survive) in [
        (1 << 20, None, Survive::Nothing),
        (1 << 20, Some(3), Survive::Last),
        (64 << 10, None, Survive::Any),
    ] {
        let mut rig = Rig::new();
        let d = plug(&mut rig, |c| {
            c.write_cache = cache(size, survivors);
            c.namespaces[0] = NamespaceConfig::memory(BLOCKS << SHIFTS[0]);
            c.namespaces.push(NamespaceConfig {
                block_size: 4096,
                metadata: Metadata::Protection,
                ..NamespaceConfig::memory(BLOCKS << SHIFTS[1])
            });
        });
        let (d, survived) = (RefCell::new(d), RefCell::new(0));
        let first = d.borrow_mut().pages(0);
        let mut runner = TestRunner::new(ProptestConfig {
            cases: 48,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let ops = prop::collection::vec(op(), 1..40);
        let result = runner.run(&ops, |ops| {
            let d = &mut *d.borrow_mut();
            d.disable();
            d.rewind(first);
            come_back(d);
            for (nsid, index) in [(1, 0), (2, 3 | 1 << 5)] {
                format(d, nsid, index).unwrap();
            }
            let mut model = Model::new();
            d.set_feature(feature::VOLATILE_WRITE_CACHE, 1).unwrap();
            let survived = &mut *survived.borrow_mut();
            for (nsid, op) in ops.iter().chain([&(1, Op::Cut)]) {
                apply(d, &mut model, *nsid, op, may_survive, survived);
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
        // There was something to choose from.
        assert_eq!(survived.into_inner() > 0, may_survive != Survive::Nothing);
    }
}
