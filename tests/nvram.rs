//! The NVRAM card in a guest: found, reached by the CPU and counted, and what its contents survive.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use p2plab::agent::Command as GuestCommand;
use p2plab::lab::{GuestNvram, Lab};
use p2plab::topology::{GIB, MIB, Nvme, Nvram, NvramFault, Topology};
use p2plab::wait;
use p2plab_nvram::NvramCard;
use p2plab_nvram::spec::{Event, Health, ID, Sts, offset, outcome};
use p2plab_pcie::TlpKind;
use p2plab_tests::{HostShare, TestLab, p2plab};
use rustix::process::{Pid, Signal, kill_process};

use crate::patience::until;

const SIZE: u64 = 256 * MIB;

/// One switch of the usual shape with one SSD and the card.
fn with_card(name: &str, card: Nvram) -> Topology {
    Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4))
        .nvram("nv0", "sw0.2", card)
        .build()
        .unwrap()
}

fn card(lab: &Lab) -> &NvramCard {
    lab.devices().device("nv0").unwrap().nvram().unwrap()
}

/// The card in the guest, enabled, and the bus addresses of its two BARs.
struct InGuest<'a> {
    lab: &'a Lab,
    nvram: GuestNvram,
    registers: u64,
    memory: u64,
}

impl<'a> InGuest<'a> {
    fn find(lab: &'a Lab) -> Self {
        let guest = lab.guest().unwrap();
        let nvram = guest.nvram("nv0").unwrap();
        let folder = &nvram.folder;
        guest.sh(&format!("echo 1 > {folder}/enable")).unwrap();
        let lines = guest.sh(&format!("cat {folder}/resource")).unwrap();
        let start = |bar: usize| {
            let line = lines.lines().nth(bar).unwrap();
            let word = line.split_whitespace().next().unwrap();
            u64::from_str_radix(word.strip_prefix("0x").unwrap(), 16).unwrap()
        };
        let (registers, memory) = (start(0), start(4));
        Self {
            lab,
            nvram,
            registers,
            memory,
        }
    }

    fn sh(&self, line: &str) -> String {
        self.lab.guest().unwrap().sh(line).unwrap()
    }

    /// One access of the CPU each.
    fn read(&self, address: u64, bits: u32) -> u64 {
        let text = self.sh(&format!("devmem {address:#x} {bits}"));
        u64::from_str_radix(text.trim().strip_prefix("0x").unwrap(), 16).unwrap()
    }

    fn write(&self, address: u64, bits: u32, value: u64) {
        self.sh(&format!("devmem {address:#x} {bits} {value:#x}"));
    }

    fn register(&self, at: u64) -> u32 {
        u32::try_from(self.read(self.registers + at, 32)).unwrap()
    }

    fn set(&self, at: u64, value: u32) {
        self.write(self.registers + at, 32, value.into());
    }

    fn armed(&self) -> bool {
        Sts::from_bits(self.register(offset::STS)).armed()
    }

    /// Words that tell where they are, at the start, in the middle and at the end of the memory.
    fn fill(&self, seed: u64) {
        for at in PLACES {
            self.write(self.memory + at, 64, seed << 32 | at);
        }
    }

    fn assert_filled(&self, seed: u64, when: &str) {
        for at in PLACES {
            let found = self.read(self.memory + at, 64);
            assert_eq!(found, seed << 32 | at, "at {at:#x}, {when}");
        }
    }
}

const PLACES: [u64; 3] = [0, SIZE / 2 + 8, SIZE - 8];

fn lspci_shows_the_card(lab: &TestLab) {
    let guest = lab.guest().unwrap();
    let nvram = guest.nvram("nv0").unwrap();
    let text = guest
        .sh(&format!("lspci -nvvv -s {}", nvram.address))
        .unwrap();
    let state = lab.devices().device("nv0").unwrap().function().dump();
    let bar = |index: usize| state["pcie"]["bars"][index].as_u64().unwrap();
    let serial = state["endpoint"]["registers"]["SN"].as_str().unwrap();
    let serial = u64::from_str_radix(&serial[2..], 16).unwrap().to_be_bytes();
    let serial = serial.map(|byte| format!("{byte:02x}")).join("-");
    for what in [
        "0580: 11f8:f117".to_owned(),
        format!(
            "Region 0: Memory at {:x} (64-bit, non-prefetchable)",
            bar(0)
        ),
        "[size=16K]".to_owned(),
        format!("Region 4: Memory at {:x} (64-bit, prefetchable)", bar(4)),
        "[size=256M]".to_owned(),
        "Express (v2) Endpoint".to_owned(),
        "FLReset+".to_owned(),
        "Interrupt: pin A".to_owned(),
        format!("Device Serial Number {serial}"),
    ] {
        assert!(text.contains(&what), "no `{what}` in\n{text}");
    }
    assert!(!text.contains("MSI-X"), "{text}");
    // p2pmem wants as much: Linux takes peer-to-peer memory in units of 2 MiB.
    assert_eq!(bar(4) % (2 * MIB), 0);
    // It does not stand in the SSD's way.
    let disk = guest.nvme("ssd0").unwrap().block_device;
    guest
        .sh(&format!("dd if={disk} of=/dev/null bs=64k count=4"))
        .unwrap();
}

#[test]
fn lspci_shows_a_hot_added_card() {
    let name = "lspci_shows_a_hot_added_card";
    let lab = TestLab::start(name, with_card("warm", Nvram::memory(SIZE)));
    lspci_shows_the_card(&lab);
    lab.finish();
}

#[test]
fn lspci_shows_a_cold_plugged_card() {
    let name = "lspci_shows_a_cold_plugged_card";
    let lab = TestLab::start_cold(name, with_card("cold", Nvram::memory(SIZE)));
    lspci_shows_the_card(&lab);
    lab.finish();
}

/// The CPU reads and writes registers and memory. The switch counts each access of a trapped card, and says that it
/// does not see those of a mapped one's memory.
#[test]
fn the_cpu_reaches_registers_and_memory() {
    for (name, options, observed) in [
        ("nvram-trapped", Nvram::memory(SIZE), true),
        ("nvram-mapped", Nvram::memory(SIZE).mapped(), false),
    ] {
        let lab = TestLab::start(name, with_card(name, options));
        let nv = InGuest::find(&lab);
        let counted = |kind| {
            let tally = lab.traffic().between("cpu", "nv0", kind);
            (tally.tlps, tally.payload_bytes + tally.requested_bytes)
        };
        let (written, read) = (counted(TlpKind::MWr), counted(TlpKind::MRd));
        assert_eq!(nv.register(offset::ID), ID);
        assert_eq!(nv.read(nv.registers + offset::SIZE, 64), SIZE);
        nv.set(offset::INTEN, u32::MAX);
        assert_eq!(nv.register(offset::INTEN), Event::ALL);
        // One write and three reads of registers, three of each of memory.
        nv.fill(1);
        nv.assert_filled(1, "just written");
        let mut word = [0; 8];
        assert!(card(&lab).memory().read(SIZE - 8, &mut word));
        assert_eq!(u64::from_le_bytes(word), 1 << 32 | (SIZE - 8));
        let seen = u64::from(observed);
        assert_eq!(
            counted(TlpKind::MWr),
            (written.0 + 1 + 3 * seen, written.1 + 4 + 24 * seen),
            "{name}"
        );
        assert_eq!(
            counted(TlpKind::MRd),
            (read.0 + 3 + 3 * seen, read.1 + 4 + 8 + 4 + 24 * seen),
            "{name}"
        );
        let port = lab.traffic().port("nv0").unwrap().cpu_accesses_observed;
        assert_eq!(port, observed);
        lab.finish();
    }
}

/// Contents in a file: there after a Function Level Reset, a reboot, a killed QEMU, and for the next lab.
#[test]
fn contents_survive_resets_reboots_and_qemus() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("nv0.img");
    let topology = with_card("survive", Nvram::file(&file, SIZE));
    let name = "contents_survive_resets_reboots_and_qemus";
    let mut lab = TestLab::start(name, topology.clone());
    {
        let nv = InGuest::find(&lab);
        nv.fill(1);
        let folder = &nv.nvram.folder;
        for method in ["flr", "bus"] {
            let resets = nv.read(nv.registers + offset::RESETS, 64);
            nv.sh(&format!(
                "echo {method} > {folder}/reset_method && echo 1 > {folder}/reset"
            ));
            nv.assert_filled(1, method);
            let more = nv.read(nv.registers + offset::RESETS, 64) - resets;
            assert_eq!(more, 1, "{method}");
        }
        // Power Management Control/Status, bits 1:0: D3hot and D0.
        let state = |state: u8| {
            nv.sh(&format!(
                "setpci -s {} CAP_PM+4.w={state}:3",
                nv.nvram.address
            ));
        };
        state(3);
        // QEMU takes the BAR of a function that is not in D0 out of the guest's memory.
        assert_ne!(nv.read(nv.memory, 64), 1 << 32);
        state(0);
        nv.assert_filled(1, "after D3hot");
        nv.fill(2);
    }
    lab.reboot().unwrap();
    {
        let nv = InGuest::find(&lab);
        nv.assert_filled(2, "after a reboot");
        nv.fill(3);
    }
    lab.kill_qemu().unwrap();
    lab.boot_again().unwrap();
    {
        let nv = InGuest::find(&lab);
        nv.assert_filled(3, "after a killed QEMU");
        assert_eq!(nv.register(offset::PFAIL), u32::from(outcome::NONE));
        nv.fill(4);
    }
    lab.finish();
    let lab = TestLab::start(&format!("{name}_next"), topology);
    InGuest::find(&lab).assert_filled(4, "in the next lab");
    lab.finish();
}

/// The guest arms and disarms the card; what a power cut leaves is as STS.ARMED said, and PFAIL tells.
#[test]
fn a_power_cut_leaves_what_the_card_was_armed_for() {
    for options in [Nvram::memory(SIZE), Nvram::memory(SIZE).mapped()] {
        let name = "a_power_cut_leaves_what_the_card_was_armed_for";
        let lab = TestLab::start(name, with_card("cut", options));
        let nv = InGuest::find(&lab);
        nv.fill(1);
        assert!(nv.armed());
        card(&lab).power_cut();
        nv.assert_filled(1, "armed");
        assert_eq!(nv.register(offset::PFAIL), u32::from(outcome::RESTORED));
        nv.set(offset::CTRL, 0);
        assert!(!nv.armed());
        card(&lab).power_cut();
        for at in PLACES {
            assert_eq!(nv.read(nv.memory + at, 64), u64::MAX, "disarmed");
        }
        assert_eq!(nv.register(offset::PFAIL), u32::from(outcome::DISARMED));
        assert!(nv.armed(), "as configured");
        nv.fill(2);
        card(&lab).inject(NvramFault::Capacitor);
        let health = Health::from_bits(nv.register(offset::HEALTH));
        assert!(health.cap() && !nv.armed());
        card(&lab).power_cut();
        assert_eq!(nv.read(nv.memory, 64), u64::MAX);
        assert_eq!(nv.register(offset::PFAIL), u32::from(outcome::FAILED));
        card(&lab).repair(NvramFault::Capacitor);
        // Disarmed and armed again by the guest.
        nv.set(offset::CTRL, 0);
        nv.set(offset::CTRL, 1);
        let line = format!(
            "[ $(devmem {:#x} 32) = 0x00000001 ]",
            nv.registers + offset::STS
        );
        let guest = lab.guest().unwrap();
        guest
            .wait_until("the card to be armed", &line, wait::AGENT_COMMAND)
            .unwrap();
        lab.finish();
    }
}

/// The words 0, 1, 2... go to the memory, round and round in a page, and each is said when its store has been read back.
const WRITER: &str = "d=$(dirname $(grep -l 0xf117 /sys/bus/pci/devices/*/device)); echo 1 > $d/enable; \
    a=$(sed -n 5p $d/resource | cut -d' ' -f1); i=0; while :; do w=$((a + 8 * (i % 512))); \
    devmem $w 64 $((FROM + i)) && devmem $w 64 > /dev/null && echo $i; i=$((i + 1)); done";

/// A guest writes to a card on a file, and says what it has written. The whole lab is killed meanwhile, and all of it is
/// in the file. Mapped and trapped.
#[test]
fn what_was_written_outlives_a_killed_lab() {
    const FROM: u64 = 0x1234_0000;
    let _share = HostShare::take();
    for (options, enough) in [
        (Nvram::file("nv0.img", SIZE), 40),
        (Nvram::file("nv0.img", SIZE).mapped(), 60),
    ] {
        let place = tempfile::tempdir().unwrap();
        let topology = with_card("killed", options);
        fs::write(place.path().join("topology.toml"), topology.to_toml()).unwrap();
        let mut process = Command::new(p2plab())
            .args(["boot", "topology.toml", "--exec"])
            .arg(WRITER.replace("FROM", &FROM.to_string()))
            .current_dir(place.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = 0;
        for line in BufReader::new(process.stdout.take().unwrap()).lines() {
            assert_eq!(line.unwrap().parse(), Ok(said));
            said += 1;
            if said == enough {
                std::thread::sleep(Duration::from_millis(9));
                kill_process(Pid::from_child(&process), Signal::KILL).unwrap();
            }
        }
        until("the lab to end", || process.try_wait().unwrap().is_some());
        assert!(said >= enough, "{said}");
        let file = File::open(place.path().join("nv0.img")).unwrap();
        for number in 0..said.min(512) {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, 8 * number).unwrap();
            assert_eq!(
                u64::from_le_bytes(word),
                FROM + number,
                "{number} of {said}"
            );
        }
    }
}

/// A driver that waits for the card's interrupt gets it when the capacitor fails.
#[test]
fn a_failed_capacitor_interrupts_the_guest() {
    let mut topology = with_card("interrupt", Nvram::memory(SIZE));
    topology.guest.load_modules = vec!["uio_pci_generic".to_owned()];
    let lab = TestLab::start("a_failed_capacitor_interrupts_the_guest", topology);
    let nv = InGuest::find(&lab);
    nv.sh("echo 11f8 f117 > /sys/bus/pci/drivers/uio_pci_generic/new_id");
    let guest = lab.guest().unwrap();
    guest
        .wait_until("the driver", "[ -c /dev/uio0 ]", wait::AGENT_COMMAND)
        .unwrap();
    // A read of /dev/uio0 returns when there was an interrupt since it was opened.
    let line =
        "exec 3</dev/uio0; touch /tmp/open; dd bs=4 count=1 <&3 >/tmp/count && touch /tmp/came";
    let waits = GuestCommand::shell(line).deadline(wait::AGENT_COMMAND);
    let running = lab.agent().unwrap().start(&waits).unwrap();
    guest
        .wait_until(
            "the device to be open",
            "[ -e /tmp/open ]",
            wait::AGENT_COMMAND,
        )
        .unwrap();
    let health = Event::new().with_health(true).into_bits();
    nv.set(offset::INTEN, health);
    assert!(!guest.try_sh("[ -e /tmp/came ]").unwrap().status.success());
    card(&lab).inject(NvramFault::Capacitor);
    guest
        .wait_until("the interrupt", "[ -e /tmp/came ]", wait::AGENT_COMMAND)
        .unwrap();
    drop(running);
    assert_eq!(nv.register(offset::EVENT) & health, health);
    nv.set(offset::EVENT, u32::MAX);
    lab.finish();
}

/// The card is unplugged in order, and the SSD beside it works on.
#[test]
fn a_card_is_detached_under_a_running_guest() {
    let name = "a_card_is_detached_under_a_running_guest";
    let mut lab = TestLab::start(name, with_card("detached", Nvram::memory(SIZE)));
    let address = lab.guest().unwrap().nvram("nv0").unwrap().address;
    lab.detach("nv0").unwrap();
    let guest = lab.guest().unwrap();
    let line = format!("[ ! -e /sys/bus/pci/devices/{address} ]");
    guest
        .wait_until("the kernel to forget the card", &line, wait::HOTPLUG)
        .unwrap();
    let disk = guest.nvme("ssd0").unwrap().block_device;
    guest
        .sh(&format!(
            "p2pcopy --check --size 1MiB --destination-offset 8MiB {disk} {disk}"
        ))
        .unwrap();
    lab.finish();
}

/// The card is pulled out, and is without power until it is back: an armed one has what it held, and one that the guest
/// had disarmed has lost it.
#[test]
fn a_card_that_is_pulled_out_loses_its_power() {
    let name = "a_card_that_is_pulled_out_loses_its_power";
    let mut lab = TestLab::start(name, with_card("pulled", Nvram::memory(SIZE).mapped()));
    for (arm, expected) in [(1, outcome::RESTORED), (0, outcome::DISARMED)] {
        let nv = InGuest::find(&lab);
        nv.set(offset::CTRL, arm);
        assert_eq!(nv.armed(), arm == 1);
        nv.fill(3 + u64::from(arm));
        lab.surprise_remove("nv0").unwrap();
        lab.attach("nv0").unwrap();
        let nv = InGuest::find(&lab);
        assert_eq!(nv.register(offset::PFAIL), u32::from(expected));
        assert!(nv.armed(), "as configured");
        if arm == 1 {
            nv.assert_filled(4, "armed");
        } else {
            assert_eq!(nv.read(nv.memory + PLACES[0], 64), u64::MAX);
        }
    }
    lab.finish();
}
