//! The Persistent Memory Region, as a guest uses it with its own hands: no driver of Linux enables one. Registers are
//! read and written through BAR 0, the region through BAR 2; the guest has the system image, which lets it map both
//! while the nvme driver has the SSD.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use p2plab::agent::{self, AgentClient};
use p2plab::lab::{Guest, Lab};
use p2plab::topology::{GIB, MIB, Nvme, PmrOptions};
use p2plab_guest::protocol::Exit;
use p2plab_nvme::spec::registers::{PmrCap, PmrSts, offset, pmrwbm};
use p2plab_pcie::TlpKind;
use p2plab_tests::reading::Watch;
use p2plab_tests::tools::with_tools;
use p2plab_tests::{HostShare, TestLab, p2plab};
use rustix::process::{Pid, Signal, kill_process};

use crate::patience::until;

/// Bytes of each region.
const SIZE: u64 = 16 * MIB;
/// What nobody answers.
const ALL_ONES: u64 = u64::MAX;
/// Length of what the guest writes between two barriers, and how many of them go round.
const BLOCK: usize = 1024;
const BLOCKS: usize = 8;

/// Enables the region of the SSD at `$d`, then writes block after block to it and reads PMRSTS after each, which is the
/// barrier that PMRCAP claims. The block's number is printed once that has said that all is well, and PMRCTL that the
/// region is still enabled; the writer ends when they do not. PMRSTS alone would not do: in the middle of a reset
/// nobody decodes its address, and QEMU then reads zero, where a bus has all ones. Block I of writer W is `W1000000+I`
/// again and again. Before all that it prints what the blocks hold, a dot for a zero.
const WRITER: &str = "until [ -b /dev/nvme0n1 ]; do usleep 10000; done; set -- $(cat $d/resource); \
    ctl=$(($1 + 0xe04)); sts=$(($1 + 0xe08)); pass() { p2pcopy --buffer $d/resource2 $@ > /dev/null; }; \
    devmem $ctl 32 1; until [ $(devmem $sts 32) = 0x00000000 ]; do usleep 1000; done; \
    touch /now; pass --skip-read --size 8KiB --chunk 8KiB /now /now && tr '\\0' . < /now && echo; \
    i=0; while :; do x=W$((1000000 + i)); for _ in 1 2 3 4 5 6 7; do x=$x$x; done; printf %s $x > /block; \
    pass --skip-write --chunk 1KiB --buffer-offset $((i % 8 * 1024)) /block /block \
    && [ $(devmem $sts 32) = 0x00000000 ] && [ $(devmem $ctl 32) = 0x00000001 ] || exit 3; echo $i; i=$((i + 1)); done";

/// The only SSD of a guest.
const ONLY: &str = "$(dirname $(grep -l 0x010802 /sys/bus/pci/devices/*/class))";

/// An SSD with `pmr`.
fn ssd(pmr: PmrOptions) -> Nvme {
    Nvme::memory(GIB / 4).pmr(pmr)
}

/// An SSD's registers and region in the guest's physical memory.
struct Region<'a> {
    guest: Guest<'a>,
    folder: String,
    registers: u64,
    memory: u64,
}

impl<'a> Region<'a> {
    /// That of `name`, once the driver has the SSD.
    fn of(lab: &'a Lab, name: &str) -> Self {
        let guest = lab.guest().unwrap();
        let folder = format!("/sys/bus/pci/devices/{}", guest.nvme(name).unwrap().address);
        let resources = guest.sh(&format!("cat {folder}/resource")).unwrap();
        let start = |bar: usize| number(resources.lines().nth(bar).unwrap());
        Self {
            registers: start(0),
            memory: start(2),
            guest,
            folder,
        }
    }

    /// Runs a line of shell with `CTL`, `STS` and `MEM` for the addresses of PMRCTL, PMRSTS and the region; what it
    /// prints.
    fn sh(&self, line: &str) -> Vec<u64> {
        let line = line
            .replace("CTL", &(self.registers + offset::PMRCTL).to_string())
            .replace("STS", &(self.registers + offset::PMRSTS).to_string())
            .replace("MEM", &self.memory.to_string());
        let said = self.guest.sh(&line).unwrap();
        said.lines().map(number).collect()
    }

    fn register(&self, at: u64) -> u32 {
        let said = self.sh(&format!("devmem {} 32", self.registers + at));
        said[0] as u32
    }

    /// Enables the region and waits until it is ready.
    fn enable(&self) {
        self.sh("devmem CTL 32 1; until [ $(devmem STS 32) = 0x00000000 ]; do usleep 1000; done");
    }

    /// Passes bytes between a file of the guest and the region: the CPU's loads or stores.
    fn pass(&self, options: &str, file: &str) {
        let line = format!(
            "p2pcopy --buffer {}/resource2 {options} {file} {file}",
            self.folder
        );
        self.guest.sh(&line).unwrap();
    }

    /// The blocks, as the guest sees them.
    fn blocks(&self) -> String {
        self.guest.sh("touch /now").unwrap();
        self.pass("--skip-read --size 8KiB --chunk 8KiB", "/now");
        self.guest.sh("tr '\\0' . < /now").unwrap()
    }
}

/// The first number in a line, hexadecimal with `0x`.
fn number(line: &str) -> u64 {
    let word = line.split_whitespace().next().unwrap();
    u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap()
}

/// Block `number` of writer `writer`.
fn block(writer: usize, number: usize) -> String {
    format!("{writer}{}", 1_000_000 + number).repeat(BLOCK / 8)
}

/// What the blocks must hold, by the writers' own words.
struct Expected(Vec<u8>);

impl Expected {
    /// Those of a new region.
    fn zeros() -> Self {
        Self(vec![b'.'; BLOCK * BLOCKS])
    }

    /// After a writer that has confirmed `said` blocks the file holds them, but for what the writer was busy with when
    /// it ended: a block or two of which each byte may be the old or the new one. Follows the file in that.
    fn check(&mut self, file: &Path, writer: usize, said: usize) {
        for number in 0..said {
            self.slot(number)
                .copy_from_slice(block(writer, number).as_bytes());
        }
        let mut found = vec![0; BLOCK * BLOCKS];
        File::open(file)
            .unwrap()
            .read_exact_at(&mut found, 0)
            .unwrap();
        found
            .iter_mut()
            .filter(|byte| **byte == 0)
            .for_each(|byte| *byte = b'.');
        for number in said..said + 2 {
            let new = block(writer, number);
            let at = number % BLOCKS * BLOCK;
            for (index, new) in (at..).zip(new.bytes()) {
                if found[index] == new {
                    self.0[index] = new;
                }
            }
        }
        let wrong = (0..found.len()).find(|index| found[*index] != self.0[*index]);
        if let Some(index) = wrong {
            let start = index / BLOCK * BLOCK;
            let show =
                |bytes: &[u8]| String::from_utf8_lossy(&bytes[start..start + 16]).into_owned();
            let (found, expected) = (show(&found), show(&self.0));
            panic!("writer {writer} said {said}; byte {index}: {found:?} instead of {expected:?}");
        }
    }

    fn slot(&mut self, number: usize) -> &mut [u8] {
        let at = number % BLOCKS * BLOCK;
        &mut self.0[at..at + BLOCK]
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// The line that runs a writer.
fn writer(number: usize, folder: &str) -> String {
    format!("d={folder}; {}", WRITER.replace('W', &number.to_string()))
}

/// Reads what a writer says; `enough` is called once so many blocks are confirmed. Returns what it found in the region,
/// and how many blocks it has confirmed.
#[derive(Default)]
struct Listener {
    pending: String,
    found: Option<String>,
    said: usize,
}

impl Listener {
    fn hear(&mut self, bytes: &[u8]) {
        self.pending.push_str(std::str::from_utf8(bytes).unwrap());
        while let Some((line, rest)) = self.pending.split_once('\n') {
            match self.found {
                None => self.found = Some(line.to_owned()),
                Some(_) => {
                    assert_eq!(line.parse(), Ok(self.said));
                    self.said += 1;
                }
            }
            self.pending = rest.to_owned();
        }
    }
}

/// Writes with a writer in the guest of `lab`; once it has confirmed `enough` blocks, does `then`, which ends it. How
/// many it has confirmed.
fn write_until(
    lab: &Lab,
    number: usize,
    folder: &str,
    enough: usize,
    then: impl FnOnce(),
) -> usize {
    let command = agent::Command::shell(writer(number, folder));
    let agent: &AgentClient = lab.agent().unwrap();
    let running = agent.start(&command).unwrap();
    let said = AtomicUsize::new(0);
    let so_far = &said;
    std::thread::scope(|scope| {
        let listener = scope.spawn(move || {
            let mut listener = Listener::default();
            // Ends with the writer, or with the guest.
            let exit = running.wait(|_, bytes| {
                listener.hear(bytes);
                so_far.store(listener.said, Ordering::Relaxed);
            });
            (listener.said, exit)
        });
        until("the writer", || {
            assert!(!listener.is_finished(), "the writer ended early");
            so_far.load(Ordering::Relaxed) >= enough
        });
        then();
        let (said, exit) = listener.join().unwrap();
        // Status 3: the barrier has said that the region is gone. Otherwise the guest is.
        let stopped = matches!(exit, Ok(Exit::Status(3) | Exit::Signal(_)) | Err(_));
        assert!(stopped, "{exit:?}");
        said
    })
}

/// The registers say what there is; a region that is not enabled, or not ready yet, answers nobody; it is ready within
/// the time that it claims, and keeps what was in it while it was off.
#[test]
fn a_region_answers_once_it_is_ready() {
    let time = Duration::from_secs(2);
    let topology = with_tools(
        "pmr-ready",
        [ssd(PmrOptions::memory(SIZE).ready_after(time))],
    );
    let lab = TestLab::start("a_region_answers_once_it_is_ready", topology);
    let region = Region::of(&lab, "ssd0");
    let cap = PmrCap::from_bits(region.register(offset::PMRCAP));
    assert_eq!((cap.bir(), cap.pmrwbm()), (2, pmrwbm::READ_PMRSTS));
    assert!(cap.rds() && cap.wds());
    let not_ready = u64::from(PmrSts::new().with_nrdy(true).into_bits());
    let seen = region.sh("devmem CTL 32; devmem STS 32; devmem MEM 64 1; devmem MEM 64");
    assert_eq!(seen, [0, not_ready, ALL_ONES]);

    let begun = Instant::now();
    let seen = region.sh("devmem CTL 32 1; devmem STS 32; devmem MEM 64 2; devmem MEM 64");
    assert_eq!(seen, [not_ready, ALL_ONES]);
    region.enable();
    let claimed = Duration::from_millis(500) * u32::from(cap.pmrto());
    assert!(
        begun.elapsed() >= time && claimed > time,
        "{:?}",
        begun.elapsed()
    );
    // Nothing of what was written meanwhile.
    let seen = region.sh(
        "devmem MEM 64; devmem MEM 64 0x1122334455667788; devmem MEM 64; devmem $((MEM + 3)) 8",
    );
    assert_eq!(seen, [0, 0x1122_3344_5566_7788, 0x55]);

    let seen = region
        .sh("devmem CTL 32 0; until [ $(devmem STS 32) != 0x00000000 ]; do :; done; devmem MEM 64");
    assert_eq!(seen, [ALL_ONES]);
    region.enable();
    assert_eq!(region.sh("devmem MEM 64"), [0x1122_3344_5566_7788]);
    lab.finish();
}

/// What the CPU loads and stores in a region crosses the switch and is counted, byte by byte; where the region is
/// mapped into the guest none of it is, and the report says so.
#[test]
fn the_cpus_accesses_to_a_region_are_counted() {
    let topology = with_tools(
        "pmr-counted",
        [
            ssd(PmrOptions::memory(SIZE)),
            ssd(PmrOptions::memory(SIZE).mapped()),
        ],
    );
    let lab = TestLab::start(
        "the_cpus_accesses_to_a_region_are_counted",
        topology.clone(),
    );
    for (name, counted) in [("ssd0", true), ("ssd1", false)] {
        let region = Region::of(&lab, name);
        region.enable();
        region
            .guest
            .sh("head -c 4096 /dev/urandom > /from; head -c 4096 /dev/zero > /to")
            .unwrap();
        let watch = Watch::begin(&lab, &topology).unwrap();
        region.sh(
            "devmem MEM 64 1; devmem $((MEM + 8)) 16 2; devmem $((MEM + 9)) 8 3; devmem STS 32",
        );
        region.pass("--skip-write --chunk 4KiB --buffer-offset 1MiB", "/from");
        region.pass(
            "--skip-read --chunk 4KiB --size 4KiB --buffer-offset 1MiB",
            "/to",
        );
        let seen = watch.end();
        region.guest.sh("cmp /from /to").unwrap();
        assert_eq!(
            region.sh("devmem MEM 64; devmem $((MEM + 8)) 16"),
            [1, 0x302]
        );

        let stored = seen.traffic.between("cpu", name, TlpKind::MWr);
        let loaded = seen.traffic.between("cpu", name, TlpKind::MRd);
        let observed = seen.traffic.port(name).unwrap().cpu_accesses_observed;
        assert_eq!(observed, counted, "{name}");
        if counted {
            assert_eq!(stored.payload_bytes, 8 + 2 + 1 + 4096);
            // Beside the barrier's; a load whose store then faults is done again.
            let loads = loaded.requested_bytes - 4;
            assert!((4096..=4096 + 64).contains(&loads), "{loads}");
        } else {
            // The barrier alone.
            assert_eq!((stored.payload_bytes, loaded.requested_bytes), (0, 4));
        }
        assert_eq!(seen.commands(), 0);
    }
    lab.finish();
}

/// The stock kernel has registered no region as peer memory, and takes no mapping of one for direct I/O.
#[test]
fn linux_has_no_use_for_a_region() {
    let topology = with_tools(
        "pmr-unknown",
        [ssd(PmrOptions::memory(SIZE)), Nvme::memory(GIB / 4)],
    );
    let lab = TestLab::start("linux_has_no_use_for_a_region", topology);
    let region = Region::of(&lab, "ssd0");
    region.enable();
    assert_eq!(region.guest.nvme("ssd0").unwrap().p2pmem, None);
    let disk = region.guest.nvme("ssd1").unwrap().block_device;
    for options in ["--skip-write", "--skip-read"] {
        let line = format!(
            "p2pcopy --size 64KiB --chunk 64KiB --buffer {}/resource2 {options} {disk} {disk}",
            region.folder
        );
        let output = region.guest.try_sh(&line).unwrap();
        assert_eq!(output.status, Exit::Status(1), "{output:?}");
        assert!(output.error_text().contains("Bad address"), "{output:?}");
    }
    lab.finish();
}

/// A function level reset in the middle of writing, and a reset of the controller: what a barrier has confirmed is
/// there, for the guest and in the file. The former disables the region, the latter does not.
#[test]
fn what_a_barrier_confirmed_survives_resets() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    let topology = with_tools(
        "pmr-resets",
        [
            ssd(PmrOptions::file(file("ssd0"), SIZE)),
            ssd(PmrOptions::file(file("ssd1"), SIZE).mapped()),
        ],
    );
    let lab = TestLab::start("what_a_barrier_confirmed_survives_resets", topology);
    for name in ["ssd0", "ssd1"] {
        let region = Region::of(&lab, name);
        let nvme = region.guest.nvme(name).unwrap();
        let mut expected = Expected::zeros();
        for round in 1..=2 {
            let said = write_until(&lab, round, &region.folder, 5 * round, || {
                region
                    .guest
                    .sh(&format!("echo 1 > {}/reset", region.folder))
                    .unwrap();
            });
            assert_eq!(region.register(offset::PMRCTL), 0);
            expected.check(&file(name), round, said);
            region.enable();
            assert_eq!(region.blocks(), expected.text());
        }
        let reset = format!(
            "echo 1 > /sys/class/nvme/{}/reset_controller",
            nvme.controller
        );
        region.guest.sh(&reset).unwrap();
        assert_eq!(region.register(offset::PMRCTL), 1);
        assert_eq!(region.blocks(), expected.text());
    }
    lab.finish();
}

/// A guest that reboots, and a QEMU that is killed, in the middle of writing: what a barrier has confirmed is there,
/// for the next guest and in the file.
#[test]
fn what_a_barrier_confirmed_survives_a_reboot_and_qemu() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("pmr");
    let topology = with_tools("pmr-reboot", [ssd(PmrOptions::file(&file, SIZE))]);
    let name = "what_a_barrier_confirmed_survives_a_reboot_and_qemu";
    let mut lab = TestLab::start(name, topology.clone());
    let mut expected = Expected::zeros();
    let folder = Region::of(&lab, "ssd0").folder;
    let said = write_until(&lab, 1, &folder, 5, || lab.reboot().unwrap());
    expected.check(&file, 1, said);
    let region = Region::of(&lab, "ssd0");
    assert_eq!(region.register(offset::PMRCTL), 0);
    region.enable();
    assert_eq!(region.blocks(), expected.text());

    let said = write_until(&lab, 2, &region.folder, BLOCKS + 3, || {
        let qemu = lab.qemu().unwrap().child.pid();
        let qemu = Pid::from_raw(i32::try_from(qemu).unwrap()).unwrap();
        kill_process(qemu, Signal::KILL).unwrap();
    });
    lab.kill_qemu().unwrap();
    expected.check(&file, 2, said);
    lab.finish();
    let lab = TestLab::start(name, topology);
    let region = Region::of(&lab, "ssd0");
    region.enable();
    assert_eq!(region.blocks(), expected.text());
    lab.finish();
}

/// The whole lab is killed while its guest writes, several times: what a barrier has confirmed is in the file, and the
/// next guest finds all that is in the file.
#[test]
fn what_a_barrier_confirmed_outlives_a_killed_lab() {
    let _share = HostShare::take();
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("pmr");
    let mut expected = Expected::zeros();
    // The first dies early, the last has been round.
    for (lab, enough) in [(1, 3), (2, BLOCKS / 2), (3, BLOCKS + 5)] {
        let pmr = PmrOptions::file(&file, SIZE);
        let pmr = if lab == 2 { pmr.mapped() } else { pmr };
        let topology = with_tools("pmr-killed", [ssd(pmr)]).to_toml();
        std::fs::write(place.path().join("topology.toml"), topology).unwrap();
        let listener = run_and_kill(place.path(), lab, enough);
        assert_eq!(listener.found, Some(expected.text()), "lab {lab}");
        assert!(listener.said >= enough);
        // QEMU has the region mapped, too, and so the file, until it has died after the lab.
        until("the lab to let go of the file", || {
            File::open(&file).unwrap().try_lock().is_ok()
        });
        expected.check(&file, lab, listener.said);
    }
}

/// Runs a lab whose guest writes, and kills it in the middle of a block after it has confirmed `enough`.
fn run_and_kill(place: &Path, lab: usize, enough: usize) -> Listener {
    let mut process = Command::new(p2plab())
        .args(["boot", "topology.toml", "--exec", &writer(lab, ONLY)])
        .current_dir(place)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut listener = Listener::default();
    let mut lines = BufReader::new(process.stdout.take().unwrap());
    let mut line = String::new();
    while lines.read_line(&mut line).unwrap() > 0 {
        let before = listener.said;
        listener.hear(line.as_bytes());
        line.clear();
        if (before, listener.said) == (enough - 1, enough) {
            std::thread::sleep(Duration::from_millis(7 * lab as u64));
            kill_process(Pid::from_child(&process), Signal::KILL).unwrap();
        }
    }
    until("the lab to end", || process.try_wait().unwrap().is_some());
    listener
}

/// A lab does not start on a file that another one has, be it a region or a disk; disks that nobody writes are shared.
/// The file is free when the lab has ended.
#[test]
fn two_labs_never_share_a_file() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str| place.path().join(name);
    let disk = |name: &str| Nvme::file(file(name), 16 * MIB).create();
    let pmr = || PmrOptions::file(file("pmr"), SIZE);
    let lab = TestLab::start(
        "two_labs_never_share_a_file",
        with_tools("first", [disk("disk").pmr(pmr()), disk("common")]),
    );
    for (ssd, named) in [
        (Nvme::memory(GIB / 4).pmr(pmr()), "pmr`"),
        (disk("disk"), "disk`"),
        (disk("disk").read_only(), "disk`"),
    ] {
        let second = Lab::options(with_tools("second", [ssd]));
        let second = second.run_directory(p2plab_tests::run_directory(
            "two_labs_never_share_a_file-second",
        ));
        let error = second.start().err().unwrap().to_string();
        assert!(
            error.contains(named) && error.contains("another lab"),
            "{error}"
        );
    }
    lab.finish();
    for name in ["pmr", "disk"] {
        File::open(file(name)).unwrap().try_lock().unwrap();
    }
}
