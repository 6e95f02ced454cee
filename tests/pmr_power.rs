//! The patched nvme driver when the power goes, with warning and without: suspend, shutdown, unbind. The SSD's PMR forgets
//! here what no barrier has confirmed before a loss of power, as a region may (PMRCAP.PMRWBM).

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use p2plab::lab::Lab;
use p2plab::topology::{MIB, PmrOptions};
use p2plab_nvme::NvmeController;
use p2plab_tests::TestLab;

use crate::patience::until;
use crate::pmr_kernel::{ENABLED, MEMORY_SPACE_ENABLED, copy, disk, register, two_ssds};

const CMB: u64 = 4 * MIB;
const PMR: u64 = 16 * MIB;
/// What takes memory that the CMB, with queues in it, has no room for.
const THROUGH_THE_PMR: &str = "--size 16MiB --chunk 4MiB --depth 2";
/// What finds room in the CMB.
const THROUGH_THE_CMB: &str = "--size 4MiB --chunk 1MiB";

/// A lab whose `ssd0` has both, and forgets; and the controller of it.
fn lab(name: &str) -> (TestLab, Arc<NvmeController>) {
    let ssd = disk().cmb(CMB).pmr(PmrOptions::memory(PMR));
    let lab = TestLab::start(name, two_ssds("pmr-power", ssd, "nvme"));
    lab.guest().unwrap().nvme("ssd0").unwrap();
    let controller = Arc::clone(lab.devices().device("ssd0").unwrap().nvme().unwrap());
    controller.set_pmr_forgets(true).unwrap();
    (lab, controller)
}

/// All that the PMR holds, enabled or not.
fn content(controller: &NvmeController) -> Vec<u8> {
    let mut content = vec![0; PMR as usize];
    let file = controller.pmr().unwrap().file();
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

/// Has `ssd1` write into the PMR, and returns what is in it then, which is not what was in it before.
fn write_into_the_pmr(lab: &Lab, controller: &NvmeController) -> Vec<u8> {
    let before = content(controller);
    copy(lab, THROUGH_THE_PMR);
    let after = content(controller);
    assert!(after != before);
    after
}

/// The guest is suspended while a copy runs, and again while the SSD loses its power: the copy goes on, and both memories
/// are there again, with queues in the CMB, and in the PMR all that was written.
#[test]
fn cmb_and_pmr_survive_a_suspend() {
    let (lab, controller) = lab("cmb_and_pmr_survive_a_suspend");
    let guest = lab.guest().unwrap();
    let (ssd, from) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let buffer = ssd.p2pmem.unwrap();
    let (to, from) = (ssd.block_device, from.block_device);
    let line = format!(
        "touch /tmp/rounds; (until [ -e /tmp/enough ]; do \
         p2pcopy --check {THROUGH_THE_PMR} --buffer {buffer} {from} {to} || {{ echo failed; exit; }}; \
         echo round; done; echo ended) > /tmp/rounds 2>&1 < /dev/null & \
         until grep -q round /tmp/rounds; do usleep 1000; done"
    );
    guest.sh(&line).unwrap();
    let shut_down = || register(&lab, "CSTS") & 0b1100;
    assert_eq!(shut_down(), 0);
    let mut asleep = 0;
    lab.suspend(|| asleep = shut_down()).unwrap();
    // CSTS.SHST: shutdown processing complete.
    assert_eq!(asleep, 0b1000);
    let line = "n=$(grep -c round /tmp/rounds); \
        until [ $(grep -c round /tmp/rounds) -gt $n ] || grep -q failed /tmp/rounds; do usleep 1000; done; \
        touch /tmp/enough; until grep -q 'ended\\|failed' /tmp/rounds; do usleep 1000; done; cat /tmp/rounds";
    let said = guest.sh(line).unwrap();
    assert!(said.ends_with("ended\n"), "{said}");

    let written = write_into_the_pmr(&lab, &controller);
    lab.suspend(|| controller.power_cut()).unwrap();
    assert!(content(&controller) == written);
    let live = format!("[ $(cat /sys/class/nvme/{}/state) = live ]", ssd.controller);
    guest
        .sh(&format!("until {live}; do usleep 1000; done"))
        .unwrap();
    assert_eq!(register(&lab, "PMRCTL"), ENABLED);
    for name in ["PMRMSC", "CMBMSC"] {
        assert_ne!(register(&lab, name) & MEMORY_SPACE_ENABLED, 0, "{name}");
    }
    for arguments in [THROUGH_THE_CMB, THROUGH_THE_PMR] {
        let (_, upstream) = copy(&lab, arguments);
        assert!(upstream < MIB, "{arguments}: {upstream}");
    }
    lab.finish();
}

/// What was written to the PMR is persistent when the guest has powered itself off.
#[test]
fn a_shutdown_makes_the_pmr_persistent() {
    let (lab, controller) = lab("a_shutdown_makes_the_pmr_persistent");
    let written = write_into_the_pmr(&lab, &controller);
    lab.finish();
    assert!(content(&controller) == written);
}

/// And when the device is unbound: all that users have written until their memory was taken away. Without any of that, a
/// loss of power takes what was written.
#[test]
fn an_unbind_makes_the_pmr_persistent() {
    let (lab, controller) = lab("an_unbind_makes_the_pmr_persistent");
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    let buffer = ssd.p2pmem.unwrap();
    // Stores of the CPU, each other than the last, until the mapping is gone.
    let line = format!(
        "head -c 16777216 /dev/urandom > /tmp/random; (while p2pcopy --skip-write --chunk 512KiB --depth 12 \
         --buffer {buffer} /tmp/random /tmp/random; do :; done) > /tmp/writer 2>&1 < /dev/null &"
    );
    guest.sh(&line).unwrap();
    until("the guest to write", || {
        content(&controller).iter().any(|&byte| byte != 0)
    });
    let driver = "/sys/bus/pci/drivers/nvme";
    guest
        .sh(&format!("echo {} > {driver}/unbind", ssd.address))
        .unwrap();
    let written = content(&controller);
    assert_eq!(register(&lab, "PMRCTL"), 0);
    controller.power_cut();
    assert!(content(&controller) == written);

    guest
        .sh(&format!("echo {} > {driver}/bind", ssd.address))
        .unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    let before = content(&controller);
    let written = write_into_the_pmr(&lab, &controller);
    assert!(written != before);
    controller.power_cut();
    assert!(content(&controller) == before);
    let reset = format!("/sys/class/nvme/{}/reset_controller", ssd.controller);
    guest.sh(&format!("echo 1 > {reset}")).unwrap();
    copy(&lab, THROUGH_THE_PMR);
    lab.finish();
}
