//! What outlives the card's process, and what outlives the host: a process with a card on a file is killed while it
//! writes, and flushes are held against what reached the medium.
//!
//! The end of a process loses nothing that it has written to a file, so this binary brings its own `fdatasync`, as the
//! NVMe crate's durability test does: it carries what the file has over to a second file, the medium, which is all that
//! a host keeps that loses its power.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::ffi::c_int;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use driver::{Driver, Rig, SIZE};
use p2plab_nvram::NvramConfig;
use p2plab_nvram::spec::offset;

const FILE: &str = "P2PLAB_TEST_FILE";
const ROUND: &str = "P2PLAB_TEST_ROUND";
/// How often the process is killed, but for `ci/durability.sh`, which says so here.
const KILLS: (u64, &str) = (12, "P2PLAB_KILLS");
/// Records, each with its own number in every word, from the start of the memory on.
const RECORD: usize = 256;
const RECORDS: u64 = 1000;
/// Bytes of the memory that the medium keeps.
const WATCHED: usize = 1 << 20;

/// Files whose syncs are carried over to a medium.
static MEDIA: Mutex<Vec<(PathBuf, PathBuf)>> = Mutex::new(Vec::new());

/// Files of which the next sync fails, once, as Linux tells of writes that it could not do.
static FAILING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// In the place of the C library's. Files without a medium need none.
// SAFETY: name and signature are the C library's (unistd.h), and whatever `fd` is, this only asks /proc for it.
#[unsafe(no_mangle)]
extern "C" fn fdatasync(fd: c_int) -> c_int {
    let link = format!("/proc/self/fd/{fd}");
    let Ok(path) = fs::read_link(&link) else {
        return -1;
    };
    let mut failing = FAILING.lock().unwrap();
    if let Some(at) = failing.iter().position(|file| *file == path) {
        failing.remove(at);
        return -1;
    }
    let media = MEDIA.lock().unwrap();
    if let Some((_, medium)) = media.iter().find(|(file, _)| *file == path) {
        let mut data = vec![0; WATCHED];
        File::open(&link)
            .unwrap()
            .read_exact_at(&mut data, 0)
            .unwrap();
        fs::write(medium, data).unwrap();
    }
    0
}

fn card(path: &Path) -> (Rig, Driver) {
    let mut rig = Rig::new();
    let d = rig.plug(NvramConfig::file("nv0", path, SIZE).create());
    (rig, d)
}

fn record(round: u64, number: u64) -> Vec<u8> {
    let word = (round << 32 | number).to_le_bytes();
    word.iter().copied().cycle().take(RECORD).collect()
}

/// Not a test of its own: the process that the next test kills.
#[test]
#[ignore = "run and killed by what_has_arrived_outlives_a_killed_process in a process of its own"]
fn helper_that_is_killed() {
    let Some(path) = std::env::var_os(FILE) else {
        return;
    };
    let round: u64 = std::env::var(ROUND).unwrap().parse().unwrap();
    let (mut rig, d) = card(Path::new(&path));
    let (_, mover) = rig.plug_mover();
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nup").unwrap();
    for number in 0.. {
        let at = number % RECORDS * RECORD as u64;
        let record = record(round, number);
        // By a peer's DMA and by the CPU, in turn.
        if number % 2 == 0 {
            mover.port().write(d.memory + at, &record).unwrap();
        } else {
            d.store(at, &record);
        }
        writeln!(out, "wrote {number}").unwrap();
    }
}

/// A write that has arrived is in the file after SIGKILL, whatever the process was doing; the next card has it.
#[test]
fn what_has_arrived_outlives_a_killed_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nv0");
    let mut expected = vec![None; RECORDS as usize];
    let (usual, variable) = KILLS;
    let kills = std::env::var(variable).map_or(usual, |kills| kills.parse().unwrap());
    let mut records = 0;
    for round in 1..=kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "helper_that_is_killed",
                "--nocapture",
            ])
            .env(FILE, &path)
            .env(ROUND, round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "up"));
        let last = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(7 * (round % usual + 1)));
                child.kill().unwrap();
            });
            let said = lines.map(Result::unwrap);
            let wrote = said.filter_map(|line| line.strip_prefix("wrote ")?.parse::<u64>().ok());
            wrote
                .inspect(|number| expected[(number % RECORDS) as usize] = Some((round, *number)))
                .last()
        });
        let last = last.expect("it was killed before it had written");
        records += last + 1;
        assert_eq!(child.wait().unwrap().signal(), Some(9));

        let (_rig, d) = card(&path);
        assert!(d.status().armed());
        for (index, expected) in (0..).zip(&mut expected) {
            let found = d.load(index * RECORD as u64, RECORD);
            // The one after the last may have arrived, too, or a part of it: nobody has said that it had.
            if index == (last + 1) % RECORDS {
                *expected = None;
            } else if let Some((round, number)) = *expected {
                assert_eq!(found, record(round, number), "record {index}, after {last}");
            }
        }
    }
    let known = expected.iter().flatten().count();
    assert!(known > RECORDS as usize / 2, "{known}");
    println!("{kills} kills, {records} records written to the card; none lost");
}

fn watch(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    let (path, medium) = (folder.join(name), folder.join(format!("{name}.medium")));
    fs::write(&medium, vec![0; WATCHED]).unwrap();
    let media = (path.canonicalize().unwrap(), medium.clone());
    MEDIA.lock().unwrap().push(media);
    (path, medium)
}

/// Something that flushes.
type Way = (&'static str, fn(&Driver));

/// Each point at which the card flushes takes what had arrived to the medium, and not before.
#[test]
fn each_way_to_flush_reaches_the_medium() {
    let ways: [Way; 6] = [
        ("FLUSH", |d| d.flush()),
        ("NvramCard::flush", |d| d.card.flush().unwrap()),
        ("disarmed", |d| d.arm(false)),
        ("armed", |d| d.arm(true)),
        ("power cut, armed", |d| d.card.power_cut()),
        ("the connection is lost", |d| {
            d.function.disconnect();
            driver::wait_until("a flush", || {
                let endpoint = &d.function.dump()["endpoint"]["registers"];
                endpoint["STS"].as_str() == Some("0x1")
            });
        }),
    ];
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    File::create(folder.join("nv0"))
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let (path, medium) = watch(folder, "nv0");
    let (mut rig, d) = card(&path);
    let on_medium = || fs::read(&medium).unwrap()[4096];
    for (number, (name, way)) in (1..).zip(ways) {
        d.store(4096, &[number; 8]);
        assert_eq!(on_medium(), number - 1, "before: {name}");
        way(&d);
        assert_eq!(on_medium(), number, "{name}");
    }
    d.function.connect();
    d.set_up();
    for (number, name) in [(7, "unplugged"), (8, "dropped")] {
        let (path, card) = (d.name.clone(), d.card.clone());
        if number == 7 {
            d.store(4096, &[number; 8]);
            assert_eq!(on_medium(), number - 1, "before: {name}");
            rig.fabric.unplug(&path).unwrap();
        } else {
            let again = rig.plug_card(card);
            again.store(4096, &[number; 8]);
            assert_eq!(on_medium(), number - 1, "before: {name}");
            rig.fabric.unplug_all();
        }
        assert_eq!(on_medium(), number, "{name}");
    }
}

/// So does what is lost: after the host's power is cut, too, nothing of it comes back.
#[test]
fn lost_contents_are_lost_on_the_medium() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    File::create(folder.join("nv1"))
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    let (path, medium) = watch(folder, "nv1");
    let (_rig, d) = card(&path);
    d.store(4096, &[3; 8]);
    d.arm(false);
    assert_eq!(fs::read(&medium).unwrap()[4096], 3);
    d.card.power_cut();
    assert_eq!(fs::read(&medium).unwrap()[4096], 0xff);
    assert_eq!(d.read64(offset::LOSSES), 1);
}

fn fail_next_sync(d: &Driver) {
    let link = format!("/proc/self/fd/{}", d.card.memory().file().as_raw_fd());
    let path = fs::read_link(link).unwrap();
    FAILING.lock().unwrap().push(path);
}

/// The host tells once of what it could not write. From then on every flush fails and nothing arms the card, until it is
/// made anew, whoever was told: the guest's flush, or the power cut that makes the loss of the contents last.
#[test]
fn what_the_host_lost_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let ways: [(u64, Way); 2] = [
        (
            0,
            ("FLUSH", |d| {
                fail_next_sync(d);
                d.flush();
                assert_eq!(d.read64(offset::FLUSH_ERRORS), 1);
            }),
        ),
        (
            1,
            ("lost contents", |d| {
                d.arm(false);
                fail_next_sync(d);
                d.card.power_cut();
            }),
        ),
    ];
    for (flushes, (name, way)) in ways {
        let path = folder.path().join(format!("nv{flushes}"));
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        let (_rig, d) = card(&path);
        way(&d);
        let errors = d.read64(offset::FLUSH_ERRORS);
        assert!(d.card.flush().is_err(), "{name}");
        d.flush();
        assert_eq!(d.read64(offset::FLUSH_ERRORS), errors + 2, "{name}");
        d.arm(false);
        d.arm(true);
        assert!(!d.status().armed(), "{name}");
        assert_eq!(d.read64(offset::FLUSHES), flushes, "{name}");
    }
}
