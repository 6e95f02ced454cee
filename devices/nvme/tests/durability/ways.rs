//! Each way to make something last, by itself: it is not on the medium before, and is there after.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use p2plab_nvme::Metadata;
use p2plab_nvme::spec::command::{Command, CopyRange, DatasetRange, NSID_ALL, ReadWriteCdw12, io};
use p2plab_nvme::spec::registers::{Cc, offset, shst};
use zerocopy::{FromZeros, IntoBytes};

use super::driver::nvm::{attach, command, run};
use super::driver::{Driver, Rig};
use super::load::{config, place_of_record, plug, pmr_status, set_cache};
use super::medium::{path_of_medium, watch};
use super::pattern::{PMR, fill, sequence};
use super::{NAMESPACES, PMR_FILE, RECORD, make_files};

/// The write that block `place` of namespace 1 comes from, on the medium.
fn on_medium(folder: &Path, place: u64) -> u64 {
    let file = File::open(path_of_medium(&folder.join(NAMESPACES[0].name))).unwrap();
    let mut block = [0; 512];
    file.read_exact_at(&mut block, place * 512).unwrap();
    sequence(&block, 1, place).unwrap()
}

/// Write `number` of block `place`.
fn write(d: &mut Driver, place: u64, number: u64) -> Command {
    let mut block = [0; 512];
    fill(&mut block, 1, place, number);
    let page = d.pages(1);
    d.store(page, &block);
    command(d, io::WRITE, place, 1, 9, page)
}

fn with_fua(command: Command) -> Command {
    let cdw12 = ReadWriteCdw12::from_bits(command.cdw12.get()).with_fua(true);
    Command {
        cdw12: cdw12.into_bits().into(),
        ..command
    }
}

fn flush(d: &mut Driver, nsid: u32) {
    let command = Command {
        opcode: io::FLUSH,
        nsid: nsid.into(),
        ..Command::default()
    };
    run(d, command).unwrap();
}

/// A copy of block `from` to block `to`.
fn copy(d: &mut Driver, from: u64, to: u64) -> Command {
    let page = d.pages(1);
    let mut range = CopyRange::new_zeroed();
    range.slba = from.into();
    d.store(page, range.as_bytes());
    let mut command = command(d, io::COPY, to, 1, 9, page);
    command.cdw12 = 0.into();
    command
}

fn deallocate(d: &mut Driver, place: u64) -> Command {
    let page = d.pages(1);
    let mut range = DatasetRange::new_zeroed();
    range.slba = place.into();
    range.nlb = 1.into();
    d.store(page, range.as_bytes());
    let mut command = command(d, io::DATASET_MANAGEMENT, 0, 1, 9, page);
    command.cdw11 = 4.into();
    command
}

fn shut_down(d: &mut Driver, notification: u8) {
    let cc = Cc::from_bits(d.read32(offset::CC)).with_shn(notification);
    d.write32(offset::CC, cc.into_bits());
    d.wait_status("CSTS.SHST", |csts| csts.shst() == shst::COMPLETE);
    d.disable();
    d.enable();
    d.create_queues(1, 16, None).unwrap();
}

/// A way to make what was written last; it may look at the block that was, or write it again.
type Way = (&'static str, fn(&mut Driver, Command));

const WAYS: [Way; 8] = [
    ("Flush", |d, _| flush(d, 1)),
    ("Flush of all namespaces", |d, _| flush(d, NSID_ALL)),
    ("Write with FUA", |d, write| {
        run(d, with_fua(write)).unwrap()
    }),
    ("Read with FUA", |d, write| {
        let opcode = io::READ;
        run(d, with_fua(Command { opcode, ..write })).unwrap();
    }),
    ("no write cache any more", |d, _| {
        set_cache(d, false);
        set_cache(d, true);
    }),
    ("normal shutdown", |d, _| shut_down(d, 1)),
    ("abrupt shutdown", |d, _| shut_down(d, 2)),
    ("detachment", |d, _| {
        attach(d, 1, 1, &[0]).unwrap();
        attach(d, 1, 0, &[0]).unwrap();
    }),
];

/// A command that changes a block, the block, and the write that it then comes from.
type Change = (&'static str, fn(&mut Driver) -> Command, u64, u64);

#[test]
fn each_way_to_make_a_block_last_reaches_the_medium() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make_files(folder);
    watch(folder);
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, folder, 1);
    for (place, (name, way)) in (0..).zip(WAYS) {
        let write = write(&mut d, place, 7);
        run(&mut d, write).unwrap();
        assert_eq!(on_medium(folder, place), 0, "before: {name}");
        way(&mut d, write);
        assert_eq!(on_medium(folder, place), 7, "{name}");
    }

    // All commands that change blocks, with FUA where they have it, and without the cache. A block has been written and
    // has lasted by now.
    let zeroes = command(&mut d, io::WRITE_ZEROES, 0, 1, 9, 0);
    run(&mut d, with_fua(zeroes)).unwrap();
    assert_eq!(on_medium(folder, 0), 0, "Write Zeroes with FUA");
    let copied = copy(&mut d, 0, 1);
    run(&mut d, with_fua(copied)).unwrap();
    assert_eq!(on_medium(folder, 1), 0, "Copy with FUA");
    set_cache(&mut d, false);
    let changes: [Change; 4] = [
        ("Write", |d| write(d, 2, 8), 2, 8),
        (
            "Write Zeroes",
            |d| command(d, io::WRITE_ZEROES, 2, 1, 9, 0),
            2,
            0,
        ),
        ("Copy", |d| copy(d, 1, 3), 3, 0),
        ("Dataset Management", |d| deallocate(d, 4), 4, 0),
    ];
    for (name, change, place, number) in changes {
        let change = change(&mut d);
        run(&mut d, change).unwrap();
        assert_eq!(on_medium(folder, place), number, "{name}, no cache");
    }
}

/// Metadata is in a file of its own.
#[test]
fn metadata_lasts_with_its_block() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make_files(folder);
    let mut rig = Rig::new();
    let mut config = config(folder);
    config.namespaces[0].metadata = Metadata::Protection;
    let mut d = rig.plug(config);
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    watch(folder);
    let metadata = folder.join(format!("{}.meta", NAMESPACES[0].name));
    // PRACT: the controller makes it.
    let write = write(&mut d, 0, 7);
    let cdw12 = ReadWriteCdw12::new().with_prinfo(8);
    let cdw12 = cdw12.into_bits().into();
    run(&mut d, Command { cdw12, ..write }).unwrap();
    let medium = || fs::read(path_of_medium(&metadata)).unwrap();
    assert!(medium().iter().all(|byte| *byte == 0));
    flush(&mut d, 1);
    assert_eq!(on_medium(folder, 0), 7);
    assert!(medium()[..8] != [0; 8] && medium() == fs::read(&metadata).unwrap());
}

#[test]
fn a_barrier_takes_the_pmr_to_the_medium() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make_files(folder);
    watch(folder);
    let mut rig = Rig::new();
    let d = plug(&mut rig, folder, 0);
    let (mut record, place) = ([0; RECORD as usize], place_of_record(1, 5));
    fill(&mut record, PMR, 1, 5);
    d.store(d.pmr_address + place, &record);
    let on_medium = || {
        let file = File::open(path_of_medium(&folder.join(PMR_FILE))).unwrap();
        let mut found = [0; RECORD as usize];
        file.read_exact_at(&mut found, place).unwrap();
        sequence(&found, PMR, 1)
    };
    assert_eq!(on_medium(), Some(0));
    assert_eq!(pmr_status(&d).into_bits(), 0);
    assert_eq!(on_medium(), Some(5));
}
