//! What the bus refuses: DMA of a function that may not be bus master, and accesses to a peer that does not decode.

use std::time::{Duration, Instant};

use p2plab::agent::Command;
use p2plab_guest::protocol::Exit;
use p2plab_pcie::{MatrixEntry, PortTraffic, TlpKind, Traffic};
use p2plab_tests::reading::register;
use p2plab_tests::{TestLab, two_ssds};

/// How soon a refusal must be counted.
const SOON: Duration = Duration::from_secs(20);
/// Patience with the nvme driver's recovery.
const RECOVERY: Duration = Duration::from_secs(120);
/// Bits of the Command register in the configuration header.
const MEMORY_SPACE: u64 = 2;
const BUS_MASTER: u64 = 4;

/// Requests that `name` sent: its completions for the CPU's own accesses are none.
fn requests(traffic: &Traffic, name: &str) -> u64 {
    let sent = |e: &&MatrixEntry| e.source == name && matches!(e.kind, TlpKind::MRd | TlpKind::MWr);
    let entries = traffic.matrix.iter().filter(sent);
    entries.map(|e| e.tally.tlps).sum()
}

/// The port of endpoint `name`.
fn port<'a>(traffic: &'a Traffic, name: &str) -> &'a PortTraffic {
    traffic.port(name).unwrap()
}

/// Clears or sets `bits` of the Command register of `name`.
fn command_register(lab: &TestLab, name: &str, bits: u64, on: bool) {
    let guest = lab.guest().unwrap();
    let address = guest.pci_address(name).unwrap();
    let value = if on { bits } else { 0 };
    let line =
        format!("setpci -s {address} COMMAND={value:x}:{bits:x}; setpci -s {address} COMMAND");
    let now = guest.sh(&line).unwrap();
    let now = u64::from_str_radix(now.trim(), 16).unwrap();
    assert_eq!(now & bits, value);
}

/// The traffic since `before`, as soon as `condition` holds.
fn traffic_when(
    lab: &TestLab,
    before: &Traffic,
    what: &str,
    condition: impl Fn(&Traffic) -> bool,
) -> Traffic {
    let deadline = Instant::now() + SOON;
    loop {
        let traffic = lab.traffic().since(before);
        if condition(&traffic) {
            return traffic;
        }
        assert!(Instant::now() < deadline, "waiting for {what}:\n{traffic}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// With Bus Master Enable off, not a packet leaves a busy SSD, and its attempts are counted. The driver finds a
/// controller that has given up, resets it and sets the bit again; no data is lost.
#[test]
fn without_bus_mastering_no_dma_leaves_the_ssd() {
    let lab = TestLab::start("without_bus_mastering", two_ssds("bme"));
    let guest = lab.guest().unwrap();
    let (ssd0, ssd1) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let (from, to) = (ssd1.block_device, ssd0.block_device);
    // The default, 30 s, would make this test as long; much less, and a slow guest's driver sets the bit again
    // before it was looked at.
    guest
        .sh("for q in /sys/block/nvme*/queue; do echo 12000 > $q/io_timeout; done")
        .unwrap();

    let idle = lab.traffic();
    let line = format!("p2pcopy --check --size 128MiB --chunk 64KiB --depth 8 {from} {to}");
    let copy = guest
        .agent()
        .start(&Command::shell(line).deadline(RECOVERY))
        .unwrap();
    traffic_when(&lab, &idle, "the copy to write", |traffic| {
        traffic
            .between("memory", "ssd0", TlpKind::CplD)
            .payload_bytes
            > 1 << 20
    });
    command_register(&lab, "ssd0", BUS_MASTER, false);
    let off = lab.traffic();
    traffic_when(&lab, &idle, "a blocked request", |t| {
        port(t, "ssd0").blocked_requests > 0
    });
    let meanwhile = lab.traffic().since(&off);
    assert_eq!(requests(&meanwhile, "ssd0"), 0, "{meanwhile}");
    // The driver had not noticed yet when the traffic was read.
    let dump = lab.devices().device("ssd0").unwrap().function().dump();
    assert_eq!(dump["pcie"]["bus_master_enabled"], false, "{dump:#}");

    let exit = copy.wait(|_, _| ()).unwrap();
    drop(copy);
    assert!(exit.success(), "{exit:?}");
    assert_eq!(
        register(&guest, "ssd0", "COMMAND").unwrap() & BUS_MASTER,
        BUS_MASTER
    );
    let said = guest
        .sh("dmesg | grep -i 'controller is down; will reset'")
        .unwrap();
    assert!(said.contains(&ssd0.controller), "{said}");
    lab.finish();
}

/// An SSD that reads into, or writes from, the CMB of a peer with Memory Space Enable off gets Unsupported Request,
/// and user space an I/O error. With the bit set again, the copy and both disks work.
#[test]
fn a_peer_that_does_not_decode_gives_an_io_error() {
    let lab = TestLab::start("a_peer_that_does_not_decode", two_ssds("mse"));
    let guest = lab.guest().unwrap();
    let (peer, disk) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let (buffer, disk) = (peer.p2pmem.unwrap(), disk.block_device);
    let copy = |options: &str, from: &str, to: &str| {
        let line =
            format!("p2pcopy --size 1MiB --chunk 64KiB {options} --buffer {buffer} {from} {to}");
        guest.try_sh(&line).unwrap()
    };

    command_register(&lab, "ssd0", MEMORY_SPACE, false);
    let off = lab.traffic();
    for options in ["--skip-write", "--skip-read"] {
        let output = copy(options, &disk, &disk);
        assert_eq!(output.status, Exit::Status(1), "{output:?}");
        assert!(output.error_text().contains("os error 5"), "{output:?}");
    }
    let refused = lab.traffic().since(&off);
    let writes = refused.between("ssd1", "ssd0", TlpKind::MWr).tlps;
    let reads = refused.between("ssd1", "ssd0", TlpKind::MRd).tlps;
    assert!(writes > 0 && reads > 0, "{refused}");
    // Writes are posted and get no answer; each read gets a completion without data.
    assert_eq!(refused.between("ssd0", "ssd1", TlpKind::Cpl).tlps, reads);
    assert_eq!(refused.between("ssd0", "ssd1", TlpKind::CplD).tlps, 0);
    assert_eq!(port(&refused, "ssd0").unsupported_requests, writes + reads);
    let said = guest.sh("dmesg | grep 'I/O error, dev'").unwrap();
    assert!(said.contains(disk.trim_start_matches("/dev/")), "{said}");

    command_register(&lab, "ssd0", MEMORY_SPACE, true);
    let on = lab.traffic();
    let output = copy("--check", &peer.block_device, &disk);
    assert_eq!(output.status, Exit::Status(0), "{output:?}");
    let copied = lab.traffic().since(&on);
    assert_eq!(port(&copied, "ssd0").unsupported_requests, 0);
    assert_eq!(
        copied.between("ssd0", "ssd1", TlpKind::CplD).payload_bytes,
        1 << 20
    );
    lab.finish();
}
