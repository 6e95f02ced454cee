//! Where the patched nvme driver has its queues, and which CMBs share a pool with the PMR.

use p2plab::lab::Lab;
use p2plab::topology::{CmbOptions, MIB, PmrOptions};
use p2plab_tests::TestLab;

use crate::pmr_kernel::{
    ENABLED, MEMORY_SPACE_ENABLED, attribute, copy, disk, p2pmem, register, two_ssds,
};

const CMB: u64 = 2 * MIB;
const PMR: u64 = 16 * MIB;

/// Where `ssd0` has its I/O submission queues: how many are in the CMB, in the PMR, and elsewhere.
fn queues(lab: &Lab) -> [usize; 3] {
    let base = |name: &str| register(lab, name) & !0xfff;
    let (cmb, pmr) = (base("CMBMSC"), base("PMRMSC"));
    let is_in = |start: u64, size: u64, at: u64| start > 0 && (start..start + size).contains(&at);
    let dump = lab.devices().device("ssd0").unwrap().function().dump();
    let mut found = [0; 3];
    for queue in dump["endpoint"]["queues"]["submission"].as_array().unwrap() {
        let base = queue["base"].as_str().unwrap();
        let base = u64::from_str_radix(base.trim_start_matches("0x"), 16).unwrap();
        match queue["id"].as_u64() {
            Some(0) => {}
            _ if is_in(cmb, CMB, base) => found[0] += 1,
            _ if is_in(pmr, PMR, base) => found[1] += 1,
            _ => found[2] += 1,
        }
    }
    found
}

/// Resets the controller and waits until it is live.
fn reset(lab: &Lab, controller: &str) {
    let folder = format!("/sys/class/nvme/{controller}");
    let line = format!(
        "echo 1 > {folder}/reset_controller && until [ $(cat {folder}/state) = live ]; do usleep 10000; done"
    );
    lab.guest().unwrap().sh(&line).unwrap();
}

/// Beside a PMR, submission queues are in the CMB. One that is made when a user has left no room there is in host
/// memory, and none ever in the PMR, from which a controller fetches no commands.
#[test]
fn submission_queues_are_never_in_the_pmr() {
    let ssd = disk().cmb(CMB).pmr(PmrOptions::memory(PMR));
    // Two processors have a queue each; the third goes and comes with the parameter.
    let topology = two_ssds("pmr-queues", ssd, "nvme poll_queues=1");
    let lab = TestLab::start("submission_queues_are_never_in_the_pmr", topology);
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    assert_eq!(queues(&lab), [3, 0, 0]);
    assert_eq!(p2pmem(&lab, &ssd), format!("{} 1 ", CMB + PMR));

    let queue = 1024 * 64;
    let set = |count: u32| {
        let line = format!("echo {count} > /sys/module/nvme/parameters/poll_queues");
        guest.sh(&line).unwrap();
        reset(&lab, &ssd.controller);
    };
    set(0);
    assert_eq!(queues(&lab), [2, 0, 0]);
    // All that the CMB has left. A session of its own: what is stopped when its shell ends would be hung up.
    let (buffer, from) = (ssd.p2pmem.as_ref().unwrap(), guest.nvme("ssd1").unwrap());
    let available = format!("/sys/bus/pci/devices/{}/p2pmem/available", ssd.address);
    let hold = format!(
        "setsid p2pcopy --skip-write --chunk {} --buffer {buffer} {disk} {disk} > /dev/null 2>&1 < /dev/null & \
         until [ $(cat {available}) = {PMR} ]; do kill -0 $! && usleep 1000 || exit 1; done; kill -STOP $!; echo $!",
        CMB - 2 * queue,
        disk = from.block_device
    );
    let holder = guest.sh(&hold).unwrap();
    set(1);
    assert_eq!(queues(&lab), [2, 0, 1]);
    guest.sh(&format!("kill -9 {holder}")).unwrap();
    copy(&lab, "--size 4MiB --chunk 512KiB");
    lab.finish();
}

/// A CMB for queues only is not published, and would keep what shares its pool from being: beside a PMR it is left out.
#[test]
fn a_cmb_for_queues_only_does_not_hide_the_pmr() {
    let mut cmb = CmbOptions::new(CMB);
    (cmb.read_data, cmb.write_data) = (false, false);
    let ssd = || disk().cmb_with(cmb);
    let with_pmr = ssd().pmr(PmrOptions::memory(PMR));
    let lab = TestLab::start(
        "a_cmb_for_queues_only_does_not_hide_the_pmr",
        two_ssds("pmr-sqs", with_pmr, "nvme"),
    );
    let ssd0 = lab.guest().unwrap().nvme("ssd0").unwrap();
    assert_eq!(p2pmem(&lab, &ssd0), format!("{PMR} 1 "));
    let (written, _) = copy(&lab, "--size 4MiB");
    assert_eq!(written, 4 * MIB);
    reset(&lab, &ssd0.controller);
    assert_eq!(queues(&lab), [0, 0, 2]);
    lab.finish();

    // Without one, and with one that is not wanted, it has the queues, as ever.
    let unwanted = ssd().pmr(PmrOptions::memory(PMR));
    for (name, ssd, driver) in [
        ("alone", ssd(), "nvme"),
        ("unwanted", unwanted, "nvme use_pmr=0"),
    ] {
        let lab = TestLab::start(
            &format!("a_cmb_for_queues_only_does_not_hide_the_pmr_{name}"),
            two_ssds(name, ssd, driver),
        );
        let ssd0 = lab.guest().unwrap().nvme("ssd0").unwrap();
        assert_eq!(p2pmem(&lab, &ssd0), format!("{CMB} 0 "), "{name}");
        assert_eq!(queues(&lab), [2, 0, 0], "{name}");
        lab.finish();
    }
}

/// An SSD with a CMB alone is what it is to the stock driver; and a reset of the link, which loses CMBMSC, leaves it its
/// queues.
#[test]
fn a_cmb_alone_needs_no_pmr() {
    let lab = TestLab::start(
        "a_cmb_alone_needs_no_pmr",
        two_ssds("cmb-alone", disk().cmb(CMB), "nvme"),
    );
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    assert_eq!(p2pmem(&lab, &ssd), format!("{CMB} 1 "));
    assert_ne!(attribute(&lab, &ssd, "cmbsz"), 0);
    let attributes = format!("ls /sys/class/nvme/{}", ssd.controller);
    assert!(!guest.sh(&attributes).unwrap().contains("pmr"));
    let function = format!("/sys/bus/pci/devices/{}", ssd.address);
    for reset in ["flr", "bus"] {
        guest
            .sh(&format!(
                "echo {reset} > {function}/reset_method && echo 1 > {function}/reset"
            ))
            .unwrap();
        assert_eq!(queues(&lab), [2, 0, 0], "{reset}");
        assert_ne!(
            register(&lab, "CMBMSC") & MEMORY_SPACE_ENABLED,
            0,
            "{reset}"
        );
        let (written, upstream) = copy(&lab, "--size 4MiB --chunk 512KiB");
        assert_eq!((written, upstream < MIB), (4 * MIB, true), "{reset}");
    }
    assert_ne!(register(&lab, "PMRCTL"), ENABLED);
    lab.finish();
}
