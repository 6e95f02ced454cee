//! Nothing acknowledged is lost: a process with a controller on files is killed while it writes, again and again.
//!
//! What it says was acknowledged is held against the files after each kill: against the files themselves, which are what
//! the end of the process leaves, and against their media, which are what the end of the host leaves. A few kills here,
//! hundreds with `ci/durability.sh`.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

#[path = "../driver/mod.rs"]
mod driver;
mod load;
mod medium;
mod pattern;
mod report;
mod ways;

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::{BufReader, PipeReader};
use std::ops::AddAssign;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use driver::{Driver, Rig};
use load::{Orders, place_of_record, plug};
use p2plab_nvme::spec::command::{Command as NvmeCommand, io};
use pattern::{PMR, Random, sequence};
use report::{Account, Blocks, READY, Report};

/// A namespace, its file and its blocks.
pub struct Shape {
    name: &'static str,
    shift: u32,
    blocks: u64,
}

/// NSID 1 and 2.
const NAMESPACES: [Shape; 2] = [
    Shape {
        name: "ns1",
        shift: 9,
        blocks: 4096,
    },
    Shape {
        name: "ns2",
        shift: 12,
        blocks: 1024,
    },
];

const PMR_FILE: &str = "pmr";
const PMR_SIZE: u64 = REGIONS * RECORDS * RECORD;

/// Parts of the PMR, each a log that one thread writes round and round.
const REGIONS: u64 = 2;
/// Records of a region.
const RECORDS: u64 = 256;
/// Bytes of a record.
const RECORD: u64 = 256;
/// Most records between two barriers.
const BATCH: u64 = 16;

/// The kills of a run in which this is one test of many.
const FEW: u64 = 10;

/// A load lives no longer than this, in microseconds.
const LONGEST: u64 = 120_000;

const FOLDER: &str = "P2PLAB_TEST_FOLDER";
const ORDERS: &str = "P2PLAB_TEST_ORDERS";

/// Not a test of its own: the process that the next test kills.
#[test]
#[ignore = "run and killed by nothing_acknowledged_is_lost in a process of its own"]
fn helper_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let orders = std::env::var(ORDERS).unwrap();
    let numbers: Vec<u64> = orders.split(' ').map(|n| n.parse().unwrap()).collect();
    let [round, seed, last_record @ ..] = &*numbers else {
        panic!("{orders}");
    };
    load::run(&Orders {
        folder: Path::new(&folder),
        round: *round,
        seed: *seed,
        last_record: last_record.try_into().unwrap(),
    });
}

/// Every block that was acknowledged with FUA, before a flush, or without the write cache, and every PMR record before a
/// barrier, is there after SIGKILL at a random moment and after the power cut that goes with it, whole, as acknowledged
/// or as a later write left it.
///
/// `P2PLAB_KILLS` says how many kills, `P2PLAB_SEED` repeats the choices of a run, though not its timing.
#[test]
fn nothing_acknowledged_is_lost() {
    let number = |name| Some(std::env::var(name).ok()?.parse::<u64>().unwrap());
    let kills = number("P2PLAB_KILLS").unwrap_or(FEW);
    let seed = number("P2PLAB_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_millis() as u64 % 1_000_000
    });
    println!("seed {seed}");
    let start = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    make_files(folder);
    medium::make(folder);
    let mut random = Random(seed);
    let mut account = Account::new();
    let mut checked = Checked::default();
    for round in 1..=kills {
        let what = format!("seed {seed}, kill {round}");
        run_and_kill(folder, round, &mut random, &mut account);
        checked += check(folder, &account.written, &account, round, &what);
        let (media, what) = (folder.join("medium"), format!("{what}, media"));
        checked += check(&media, &account.lasting, &account, round, &what);
        // Half of the loads begin with what a power cut has left.
        if random.below(2) == 0 {
            medium::cut_power(folder);
            account.lost_power();
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{kills} kills in {seconds:.1} s, seed {seed}\n{account}\n{checked}");
    assert!(account.has_everything());
}

/// Empty files for the controller.
fn make_files(folder: &Path) {
    let make = |name, size| File::create_new(folder.join(name)).unwrap().set_len(size);
    for ns in &NAMESPACES {
        make(ns.name, ns.blocks << ns.shift).unwrap();
    }
    make(PMR_FILE, PMR_SIZE).unwrap();
}

/// A load, killed at a random moment, and what it had said by then.
fn run_and_kill(folder: &Path, round: u64, random: &mut Random, account: &mut Account) {
    let (mut pipe, child) = spawn(folder, round, random.next() >> 1, account);
    // Some die while their controller still comes up.
    if random.below(8) != 0 {
        let first = Report::receive(&mut pipe).map(|report| report.kind);
        assert_eq!(first, Some(READY), "the load does not come up");
    }
    let time = Duration::from_micros(random.below(LONGEST));
    let status = std::thread::scope(|scope| {
        let killer = scope.spawn(move || {
            let mut child = child;
            std::thread::sleep(time);
            child.kill().unwrap();
            child.wait().unwrap()
        });
        while let Some(report) = Report::receive(&mut pipe) {
            account.take(report);
        }
        killer.join().unwrap()
    });
    assert_eq!(status.signal(), Some(9), "the load ended by itself");
    account.killed();
}

fn spawn(
    folder: &Path,
    round: u64,
    seed: u64,
    account: &Account,
) -> (BufReader<PipeReader>, Child) {
    let (reader, writer) = std::io::pipe().unwrap();
    let [a, b] = account.last_record;
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "helper_that_is_killed",
            "--nocapture",
        ])
        .env(FOLDER, folder)
        .env(ORDERS, format!("{round} {seed} {a} {b}"))
        .stdin(writer)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    (BufReader::new(reader), child)
}

/// What was acknowledged, looked for and found.
#[derive(Default)]
struct Checked {
    blocks: u64,
    records: u64,
}

impl AddAssign for Checked {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.records += other.records;
    }
}

impl Display for Checked {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { blocks, records } = self;
        write!(
            f,
            "found in files and media: {blocks} blocks, {records} PMR records"
        )
    }
}

/// Holds what a new controller on the files in `folder` reads against `blocks` and the records of `account`.
fn check(folder: &Path, blocks: &Blocks, account: &Account, round: u64, what: &str) -> Checked {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, folder, 1);
    let mut checked = Checked::default();
    for ((nsid, ns), expected) in (1..).zip(&NAMESPACES).zip(blocks) {
        let data = read_all(&mut d, nsid, ns);
        let found = (0..).zip(data.chunks_exact(1 << ns.shift)).zip(expected);
        for ((place, block), expected) in found {
            let found = sequence(block, nsid, place);
            let as_acknowledged =
                found.is_some_and(|found| found >= *expected && found >> 32 <= round);
            assert!(
                as_acknowledged,
                "{what}: block {place} of namespace {nsid} comes from write {found:x?}, {expected:x} was acknowledged"
            );
            checked.blocks += u64::from(*expected > 0);
        }
    }
    for (region, records) in (0..).zip(&account.records) {
        for expected in records.iter().flatten() {
            let place = place_of_record(region, *expected);
            let data = d.load(d.pmr_address + place, RECORD as usize);
            let found = sequence(&data, PMR, region);
            assert_eq!(found, Some(*expected), "{what}: PMR, {place:#x}");
            checked.records += 1;
        }
    }
    checked
}

/// All blocks of a namespace, by Read commands.
fn read_all(d: &mut Driver, nsid: u32, ns: &Shape) -> Vec<u8> {
    const PIECE: u64 = 512 << 10;
    let blocks = PIECE >> ns.shift;
    let free = d.next_free_page();
    let buffer = d.pages(PIECE / 4096);
    let mut data = Vec::new();
    for slba in (0..ns.blocks).step_by(blocks as usize) {
        let command = driver::nvm::command(d, io::READ, slba, blocks as u32, ns.shift, buffer);
        let nsid = nsid.into();
        d.execute(1, NvmeCommand { nsid, ..command }).unwrap();
        data.extend(d.load(buffer, PIECE as usize));
    }
    d.rewind(free);
    data
}
