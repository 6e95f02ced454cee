//! The Persistent Memory Region as peer memory of the kernel: the nvme driver with the patches of `guest-kernel/`.

use std::path::Path;
use std::time::Duration;

use p2plab::lab::{GuestNvme, Lab};
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, PmrOptions, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;

pub(crate) const PMR: u64 = 64 * MIB;
/// PMRCTL.EN.
pub(crate) const ENABLED: u64 = 1;
/// PMRMSC.CMSE.
pub(crate) const MEMORY_SPACE_ENABLED: u64 = 1 << 1;

/// Two SSDs below one switch; the nvme driver is the patched one, with these words after its name.
pub(crate) fn two_ssds(name: &str, first: Nvme, driver: &str) -> Topology {
    Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", first)
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .own_module(driver)
        .build()
        .unwrap()
}

pub(crate) fn disk() -> Nvme {
    Nvme::memory(GIB / 4)
}

/// A register of `ssd0`, as the device has it.
pub(crate) fn register(lab: &Lab, name: &str) -> u64 {
    let device = lab.devices().device("ssd0").unwrap();
    let registers = device.function().dump()["endpoint"]["registers"].clone();
    let text = registers[name].as_str().unwrap();
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

/// An attribute of the controller, of which the driver makes a number.
pub(crate) fn attribute(lab: &Lab, ssd: &GuestNvme, name: &str) -> u64 {
    let line = format!("cat /sys/class/nvme/{}/{name}", ssd.controller);
    lab.guest()
        .unwrap()
        .sh(&line)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// Size of the p2pmem of an SSD, and whether it is published.
pub(crate) fn p2pmem(lab: &Lab, ssd: &GuestNvme) -> String {
    let folder = format!("/sys/bus/pci/devices/{}/p2pmem", ssd.address);
    let line = format!("cat {folder}/size {folder}/published");
    lab.guest().unwrap().sh(&line).unwrap().replace('\n', " ")
}

/// Copies from `ssd1` to `ssd0` through `ssd0`'s p2pmem and compares; returns what `ssd1` wrote into `ssd0`, and what
/// crossed the upstream port.
pub(crate) fn copy(lab: &Lab, arguments: &str) -> (u64, u64) {
    let guest = lab.guest().unwrap();
    let (to, from) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let buffer = to.p2pmem.unwrap();
    let (from, to) = (from.block_device, to.block_device);
    let before = lab.traffic();
    // The comparison reads both through host memory, so it is a copy of its own that is counted.
    guest
        .sh(&format!(
            "p2pcopy {arguments} --buffer {buffer} {from} {to}"
        ))
        .unwrap();
    let traffic = lab.traffic().since(&before);
    guest
        .sh(&format!(
            "p2pcopy --check {arguments} --buffer {buffer} {from} {to}"
        ))
        .unwrap();
    let writes = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    (writes.payload_bytes, traffic.upstream_payload_bytes())
}

/// The driver enables a region, waits for it, and registers all of it; data goes through it below the switch, by the
/// controller's own commands, too.
#[test]
fn a_pmr_is_peer_memory() {
    let pmr = PmrOptions::memory(PMR).ready_after(Duration::from_millis(700));
    let topology = two_ssds("pmr", disk().pmr(pmr), "nvme");
    let lab = TestLab::start("a_pmr_is_peer_memory", topology);
    let ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
    assert_eq!(p2pmem(&lab, &ssd), format!("{PMR} 1 "));
    assert_eq!(attribute(&lab, &ssd, "pmrsize"), PMR);
    assert_eq!(attribute(&lab, &ssd, "pmrsts"), 0);
    assert_eq!(attribute(&lab, &ssd, "pmrcap"), register(&lab, "PMRCAP"));
    assert_eq!(register(&lab, "PMRCTL"), ENABLED);
    assert_ne!(register(&lab, "PMRMSC") & MEMORY_SPACE_ENABLED, 0);

    let (written, upstream) = copy(&lab, "--size 16MiB");
    assert_eq!(written, 16 * MIB);
    assert!(upstream < MIB, "{upstream}");
    lab.finish();
}

/// With both, the pool has both: a user without a wish gets the CMB, and what the CMB has no room for comes from the
/// PMR, whose file then holds the data.
#[test]
fn cmb_and_pmr_are_both_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pmr");
    let ssd = disk().cmb(8 * MIB).pmr(PmrOptions::file(&file, PMR));
    let lab = TestLab::start("cmb_and_pmr_are_both_there", two_ssds("both", ssd, "nvme"));
    let ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
    assert_eq!(p2pmem(&lab, &ssd), format!("{} 1 ", 8 * MIB + PMR));
    assert_eq!(attribute(&lab, &ssd, "pmrsize"), PMR);

    let (written, upstream) = copy(&lab, "--size 16MiB --chunk 1MiB --depth 2");
    assert_eq!((written, upstream < MIB), (16 * MIB, true));
    assert!(!has_data(&file), "2 MiB have their place in the CMB");
    let (written, upstream) = copy(&lab, "--size 32MiB --chunk 4MiB --depth 4");
    assert_eq!((written, upstream < MIB), (32 * MIB, true));
    assert!(has_data(&file), "16 MiB have their place in the PMR only");
    lab.finish();
}

fn has_data(file: &Path) -> bool {
    std::fs::read(file).unwrap().iter().any(|&byte| byte != 0)
}

/// A Controller Reset keeps what the driver set; a Function Level Reset loses the PMR's, and a reset of the link above the
/// CMB's, too. After each, both regions serve the controller's own commands and the neighbour's.
#[test]
fn cmb_and_pmr_survive_resets() {
    let cmb = CmbOptions::new(8 * MIB).data_only();
    let ssd = disk().cmb_with(cmb).pmr(PmrOptions::memory(PMR));
    let lab = TestLab::start(
        "cmb_and_pmr_survive_resets",
        two_ssds("resets", ssd, "nvme"),
    );
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    let function = format!("/sys/bus/pci/devices/{}", ssd.address);
    let by =
        |method| format!("echo {method} > {function}/reset_method && echo 1 > {function}/reset");
    let resets = [
        format!(
            "echo 1 > /sys/class/nvme/{}/reset_controller",
            ssd.controller
        ),
        by("flr"),
        by("bus"),
    ];
    let state = format!("/sys/class/nvme/{}/state", ssd.controller);
    for reset in resets {
        guest.sh(&reset).unwrap();
        guest
            .sh(&format!(
                "until [ $(cat {state}) = live ]; do sleep 0.1; done"
            ))
            .unwrap();
        assert_eq!(register(&lab, "PMRCTL"), ENABLED, "{reset}");
        assert_ne!(
            register(&lab, "PMRMSC") & MEMORY_SPACE_ENABLED,
            0,
            "{reset}"
        );
        assert_ne!(
            register(&lab, "CMBMSC") & MEMORY_SPACE_ENABLED,
            0,
            "{reset}"
        );
        for arguments in [
            "--size 4MiB --chunk 1MiB --depth 2",
            "--size 16MiB --chunk 4MiB --depth 4",
        ] {
            let (written, upstream) = copy(&lab, arguments);
            assert!(
                written >= 4 * MIB && upstream < MIB,
                "{reset}: {written}, {upstream}"
            );
        }
    }
    lab.finish();
}

/// Unbound, the region is off; bound again, it is there with what it held.
#[test]
fn unbinding_disables_the_pmr() {
    let ssd = disk().pmr(PmrOptions::memory(PMR));
    let lab = TestLab::start(
        "unbinding_disables_the_pmr",
        two_ssds("unbind", ssd, "nvme"),
    );
    let guest = lab.guest().unwrap();
    let address = guest.nvme("ssd0").unwrap().address;
    copy(&lab, "--size 4MiB");
    let driver = "/sys/bus/pci/drivers/nvme";
    guest
        .sh(&format!("echo {address} > {driver}/unbind"))
        .unwrap();
    assert_eq!(register(&lab, "PMRCTL"), 0);
    assert_eq!(register(&lab, "PMRMSC") & MEMORY_SPACE_ENABLED, 0);
    let gone = guest.try_sh(&format!("ls /sys/bus/pci/devices/{address}/p2pmem"));
    assert!(!gone.unwrap().status.success());
    guest
        .sh(&format!("echo {address} > {driver}/bind"))
        .unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    assert_eq!(p2pmem(&lab, &ssd), format!("{PMR} 1 "));
    let (written, _) = copy(&lab, "--size 4MiB");
    assert_eq!(written, 4 * MIB);
    lab.finish();
}

/// A device whose PMR was used may be unplugged; the driver lets go of all of it. (`p2pmem_surprise` pulls one out in use.)
#[test]
fn an_ssd_with_a_pmr_is_unplugged() {
    let ssd = disk().pmr(PmrOptions::memory(PMR)).intx();
    let mut lab = TestLab::start(
        "an_ssd_with_a_pmr_is_unplugged",
        two_ssds("unplug", ssd, "nvme"),
    );
    copy(&lab, "--size 4MiB");
    lab.detach("ssd0").unwrap();
    let complaints = "dmesg | grep -E 'WARNING|BUG|Oops|refused|leak' || true";
    assert_eq!(lab.guest().unwrap().sh(complaints).unwrap(), "");
    lab.finish();
}

/// What is not wanted, or does not do for data, is left alone.
#[test]
fn a_pmr_that_is_not_used_stays_disabled() {
    let mut read_only = PmrOptions::memory(PMR);
    read_only.write_data = false;
    for (name, pmr, driver) in [
        ("parameter", PmrOptions::memory(PMR), "nvme use_pmr=0"),
        ("no-data", read_only, "nvme"),
    ] {
        let lab = TestLab::start(
            &format!("a_pmr_that_is_not_used_stays_disabled_{name}"),
            two_ssds(name, disk().pmr(pmr), driver),
        );
        let ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
        assert_eq!(ssd.p2pmem, None, "{name}");
        assert_eq!(register(&lab, "PMRCTL"), 0, "{name}");
        lab.finish();
    }
}
