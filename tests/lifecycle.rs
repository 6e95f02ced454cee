//! Guests reboot, QEMUs die, endpoints go; what has not gone works on.

use p2plab::agent::Command;
use p2plab::lab::LabError;
use p2plab::topology::{GIB, MIB, Nvme, Topology};
use p2plab::wait;
use p2plab_tests::{TestLab, two_ssds};

use crate::disks::{assert_pattern, bytes_written, devices, medium};
use crate::patience::until;
use crate::surprise::unsafe_shutdowns;

/// A restored guest reboots: both SSDs are bound again, with their data.
#[test]
fn a_restored_guest_reboots() {
    let lab = TestLab::start("a_restored_guest_reboots", two_ssds("reboot-warm"));
    reboots(lab);
}

/// So does one that was booted from scratch, twice.
#[test]
fn a_booted_guest_reboots() {
    let lab = TestLab::start_cold("a_booted_guest_reboots", two_ssds("reboot-cold"));
    reboots(lab);
}

fn reboots(lab: TestLab) {
    let (from, to) = devices(&lab);
    let copy = "p2pcopy --check --chunk 1MiB --offset 8MiB --size 8MiB";
    lab.guest()
        .unwrap()
        .sh(&format!("{copy} --seed 1 {from} {to}"))
        .unwrap();
    for seed in 2..4 {
        let boot = lab
            .guest()
            .unwrap()
            .sh("cat /proc/sys/kernel/random/boot_id")
            .unwrap();
        lab.reboot().unwrap();
        let guest = lab.guest().unwrap();
        assert_ne!(
            guest.sh("cat /proc/sys/kernel/random/boot_id").unwrap(),
            boot
        );
        let (from, to) = devices(&lab);
        let before = seed - 1;
        guest
            .sh(&format!(
                "{copy} --seeded --seed {before} {from} {to} && {copy} --seed {seed} {from} {to}"
            ))
            .unwrap();
        assert_pattern(&medium(&lab, "ssd1"), seed, 8 * MIB, 8 * MIB);
        lab.traffic().check().unwrap();
    }
    lab.finish();
}

/// QEMU is killed while the guest writes; a new one on the same endpoints finds what was flushed before.
#[test]
fn qemu_is_killed_during_io_and_started_again() {
    let name = "qemu_is_killed_during_io_and_started_again";
    let mut lab = TestLab::start(name, two_ssds("killed"));
    let (from, to) = devices(&lab);
    let copy = "p2pcopy --check --chunk 1MiB --size 16MiB --seed 7";
    lab.guest()
        .unwrap()
        .sh(&format!("{copy} {from} {to} && sync"))
        .unwrap();
    let line = format!(
        "while p2pcopy --chunk 128KiB --depth 8 --offset 32MiB --size 200MiB {from} {to}; do :; done"
    );
    let before = bytes_written(&lab, "ssd1");
    drop(lab.agent().unwrap().start(&Command::shell(line)).unwrap());
    until("the guest to be in the middle of writing", || {
        bytes_written(&lab, "ssd1") > before + 4 * MIB
    });
    lab.kill_qemu().unwrap();
    for ssd in ["ssd0", "ssd1"] {
        assert_pattern(&medium(&lab, ssd), 7, 0, 16 * MIB);
    }
    lab.boot_again().unwrap();
    let (from, to) = devices(&lab);
    lab.guest()
        .unwrap()
        .sh(&format!(
            "{copy} --seeded {from} {to} && p2pcopy --check --offset 32MiB --size 16MiB {to} {from}"
        ))
        .unwrap();
    lab.finish();
}

/// An endpoint is unplugged in order and its server stopped; guest and the other SSD go on, over a reboot too.
/// Plugged in again, it says that it was shut down in order.
///
/// With INTx: QEMU 11.1.3 aborts when it lets go of a vfio-user device with MSI-X, before it says
/// DEVICE_DELETED (`memory_region_del_subregion: Assertion subregion->container == mr`). The lab refuses that.
#[test]
fn an_endpoint_is_detached_under_a_running_guest() {
    let name = "an_endpoint_is_detached_under_a_running_guest";
    let topology = Topology::builder("detached")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).intx())
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .build();
    let mut lab = TestLab::start(name, topology.unwrap());
    let refused = lab.detach("ssd1").unwrap_err();
    assert!(refused.to_string().contains("intx"), "{refused}");
    let gone = lab.guest().unwrap().nvme("ssd0").unwrap();
    lab.guest().unwrap().nvme("ssd1").unwrap();
    lab.detach("ssd0").unwrap();
    let guest = lab.guest().unwrap();
    let line = format!("[ ! -e /sys/bus/pci/devices/{} ]", gone.address);
    guest
        .wait_until("the kernel to forget the SSD", &line, wait::HOTPLUG)
        .unwrap();
    assert!(matches!(
        guest.nvme("ssd0"),
        Err(LabError::UnknownEndpoint { .. })
    ));
    for _ in 0..2 {
        let guest = lab.guest().unwrap();
        let kept = guest.nvme("ssd1").unwrap().block_device;
        let disks = guest.sh("ls -d /sys/class/nvme/*").unwrap();
        assert_eq!(disks.lines().count(), 1, "{disks}");
        guest
            .sh(&format!("p2pcopy --check --source-offset 0 --destination-offset 16MiB --size 16MiB {kept} {kept}"))
            .unwrap();
        lab.reboot().unwrap();
    }
    lab.attach("ssd0").unwrap();
    lab.guest().unwrap().nvme("ssd0").unwrap();
    assert_eq!(unsafe_shutdowns(&lab, "ssd0"), 0, "the driver was asked");
    lab.finish();
}

/// A server that stops under a running QEMU costs the guest at the next change of its memory map, here by a
/// reboot; the lab says whose server it was and what QEMU said, and not that something took too long.
#[test]
fn a_server_stopped_under_qemu_is_named_as_the_cause() {
    let name = "a_server_stopped_under_qemu_is_named_as_the_cause";
    let mut lab = TestLab::start(name, two_ssds("stopped"));
    devices(&lab);
    lab.stop_server("ssd1").unwrap();
    let error = lab.reboot().unwrap_err();
    assert!(matches!(error, LabError::Fault(_)), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("QEMU has ended (signal: 6 (SIGABRT)"),
        "{text}"
    );
    assert!(
        text.contains("the server of endpoint ssd1 was stopped"),
        "{text}"
    );
    // The lab is not lost with its QEMU.
    lab.kill_qemu().unwrap();
    lab.traffic().check().unwrap();
}
