//! Guests boot and restore as they should.

use p2plab::lab::Lab;
use p2plab::topology::{GIB, MIB, Nvme, PmrOptions, Topology};
use p2plab_tests::{TestLab, two_ssds};

use crate::lspci::assert_lspci_shows;

/// A lab starts from its base image and its agent answers.
#[test]
fn warm_start_reaches_the_agent() {
    let lab = TestLab::start("warm_start_reaches_the_agent", two_ssds("warm"));
    let guest = lab.guest().unwrap();
    assert!(guest.sh("uname -r").unwrap().starts_with("7."));
    lab.finish();
}

/// A guest boots from scratch with its endpoints plugged in, and sees what a restored one sees.
#[test]
fn cold_start_finds_the_endpoints() {
    let topology = Topology::builder("cold")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).cmb(64 * MIB))
        .nvme(
            "ssd1",
            "sw0.1",
            Nvme::memory(GIB / 4).pmr(PmrOptions::memory(64 * MIB)),
        )
        .nvme(
            "ssd2",
            "sw0.2",
            Nvme::memory(GIB / 4)
                .cmb(2 * MIB)
                .pmr(PmrOptions::memory(16 * MIB)),
        )
        .build()
        .unwrap();
    let lab = TestLab::start_cold("cold_start_finds_the_endpoints", topology.clone());
    assert_lspci_shows(&lab, &topology);
    let guest = lab.guest().unwrap();
    assert!(guest.nvme("ssd0").unwrap().p2pmem.is_some());
    assert_eq!(guest.nvme("ssd1").unwrap().p2pmem, None);
    lab.finish();
}

/// SeaBIOS drives every NVMe controller that it finds, and remaps low memory while their queues are live. Two
/// controllers come through that several times in a row, with plain shared memory for guest RAM.
#[test]
fn the_firmware_does_not_confuse_two_controllers() {
    let name = "the_firmware_does_not_confuse_two_controllers";
    let mut lab = TestLab::start_cold(name, two_ssds("firmware"));
    assert_both_work(&lab);
    lab.reboot().unwrap();
    assert_both_work(&lab);
    for _ in 0..2 {
        lab.kill_qemu().unwrap();
        lab.boot_again().unwrap();
        assert_both_work(&lab);
    }
    let log = std::fs::read_to_string(lab.run_directory().join("qemu.log")).unwrap();
    assert_eq!(log, "", "QEMU has nothing to complain about");
    let console = std::fs::read_to_string(lab.run_directory().join("console.log")).unwrap();
    assert_eq!(console.matches("Linux version").count(), 4, "four boots");
    lab.finish();
}

/// Both SSDs are bound, copy to each other, and have seen no error.
fn assert_both_work(lab: &Lab) {
    let guest = lab.guest().unwrap();
    let (from, to) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let (from, to) = (from.block_device, to.block_device);
    guest
        .sh(&format!(
            "p2pcopy --check --chunk 64KiB --size 1MiB {from} {to}"
        ))
        .unwrap();
    for device in lab.devices().iter() {
        let dump = device.function().dump();
        let counters = &dump["endpoint"]["counters"];
        assert_eq!(counters["media_errors"], 0, "{}: {dump:#}", device.name());
        assert_eq!(
            dump["endpoint"]["registers"]["CSTS"], "0x1",
            "ready, not fatal: {dump:#}"
        );
        assert_eq!(dump["pcie"]["bus_master_enabled"], true);
    }
    for port in lab.traffic().ports {
        let refused = (port.unsupported_requests, port.blocked_requests);
        assert_eq!(refused, (0, 0), "{}", port.name);
    }
}
