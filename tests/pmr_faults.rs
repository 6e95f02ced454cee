//! Persistent Memory Regions that are broken, and what the patched nvme driver makes of them.

use std::sync::Arc;

use p2plab::lab::{GuestNvme, Lab};
use p2plab::topology::{CmbOptions, MIB, PmrOptions};
use p2plab_nvme::{NvmeController, PmrCondition};
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{LOAD_P2PMEM, node};

use crate::pmr_kernel::{ENABLED, attribute, copy, disk, p2pmem, register, two_ssds};

const CMB: u64 = 8 * MIB;
const PMR: u64 = 16 * MIB;
/// PMRSTS.NRDY.
const NOT_READY: u64 = 1 << 8;
/// What takes memory that the CMB has no room for.
const THROUGH_THE_PMR: &str = "--size 16MiB --chunk 4MiB --depth 3";
/// What finds room in the CMB.
const THROUGH_THE_CMB: &str = "--size 4MiB --chunk 1MiB";

/// A lab whose `ssd0` has both, and the controller of it.
fn lab(name: &str) -> (TestLab, Arc<NvmeController>) {
    let cmb = CmbOptions::new(CMB).data_only();
    let ssd = disk().cmb_with(cmb).pmr(PmrOptions::memory(PMR));
    let mut topology = two_ssds("pmr-faults", ssd, "nvme");
    topology.guest.own_modules.push("p2pmem".into());
    let lab = TestLab::start(name, topology);
    let guest = lab.guest().unwrap();
    guest.nvme("ssd0").unwrap();
    guest.sh("rmmod p2pmem").unwrap();
    let controller = Arc::clone(lab.devices().device("ssd0").unwrap().nvme().unwrap());
    (lab, controller)
}

/// Unbinds `ssd0`, and binds it with its PMR in that condition.
fn bind_anew(lab: &Lab, controller: &NvmeController, condition: PmrCondition) -> GuestNvme {
    let guest = lab.guest().unwrap();
    let (address, driver) = (
        guest.nvme("ssd0").unwrap().address,
        "/sys/bus/pci/drivers/nvme",
    );
    let line = format!("dmesg -c > /dev/null; echo {address} > {driver}/unbind");
    guest.sh(&line).unwrap();
    controller.set_pmr_condition(condition);
    guest
        .sh(&format!("echo {address} > {driver}/bind"))
        .unwrap();
    guest.nvme("ssd0").unwrap()
}

/// Resets the function, which loses PMRCTL, and waits until the controller is live.
fn reset(lab: &Lab, ssd: &GuestNvme) {
    let function = format!("/sys/bus/pci/devices/{}", ssd.address);
    let line = format!(
        "echo flr > {function}/reset_method && echo 1 > {function}/reset && \
         until [ $(cat /sys/class/nvme/{}/state) = live ]; do usleep 10000; done",
        ssd.controller
    );
    lab.guest().unwrap().sh(&line).unwrap();
}

/// How often the kernel has said `text` since it was bound.
fn said(lab: &Lab, text: &str) -> usize {
    let log = lab.guest().unwrap().sh("dmesg").unwrap();
    log.matches(text).count()
}

/// A region that does not become ready in the time that it claims, or that says of itself that it is not fit for use,
/// is left alone: once, and not again at every reset. CMB and disk work without it.
#[test]
fn a_pmr_that_is_not_fit_for_use_is_left_alone() {
    let (lab, controller) = lab("a_pmr_that_is_not_fit_for_use_is_left_alone");
    for (condition, complaint) in [
        (PmrCondition::NeverReady, "PMR is not ready after 1000 ms"),
        (PmrCondition::ReadOnly, "PMR is read only"),
        (PmrCondition::Unreliable, "PMR is unreliable"),
    ] {
        let ssd = bind_anew(&lab, &controller, condition);
        for round in 0..2 {
            assert_eq!(said(&lab, complaint), 1, "{condition:?}, round {round}");
            assert_eq!(
                p2pmem(&lab, &ssd),
                format!("{CMB} 1 "),
                "{condition:?}, round {round}"
            );
            assert_eq!(attribute(&lab, &ssd, "pmrsize"), 0);
            assert_ne!(attribute(&lab, &ssd, "pmrsts") & NOT_READY, 0);
            assert_eq!(register(&lab, "PMRCTL"), 0, "{condition:?}, round {round}");
            copy(&lab, THROUGH_THE_CMB);
            reset(&lab, &ssd);
        }
    }
    // One that has lost what it held is good for new data.
    let ssd = bind_anew(&lab, &controller, PmrCondition::RestoreError);
    assert_eq!(said(&lab, "PMR may have lost its contents"), 1);
    assert_eq!(p2pmem(&lab, &ssd), format!("{} 1 ", CMB + PMR));
    copy(&lab, THROUGH_THE_PMR);
    lab.finish();
}

/// The driver takes it for the removal of the controller when a lock is held that a reset wants: who reads the region's
/// status all the time must not be able to make that so.
#[test]
fn who_reads_pmrsts_does_not_disturb_a_reset() {
    let (lab, _) = lab("who_reads_pmrsts_does_not_disturb_a_reset");
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    let controller = format!("/sys/class/nvme/{}", ssd.controller);
    guest
        .sh(&format!(
            "for reader in 1 2 3 4; do (while [ ! -e /tmp/stop ]; do cat {controller}/pmrsts; done > /tmp/read.$reader 2>&1) & \
             done; for round in 1 2 3 4 5 6 7 8; do echo 1 > {controller}/reset_controller || exit 1; done; \
             touch /tmp/stop; wait; [ $(cat {controller}/state) = live ] && [ -s /tmp/read.1 ]"
        ))
        .unwrap();
    assert_eq!(said(&lab, "reset failure"), 0);
    copy(&lab, THROUGH_THE_PMR);
    lab.finish();
}

/// A region that does not come back after a reset, when its pages are known and may be in use: nobody finds it any
/// more, and commands whose data is there fail at once. The disk works on, and the next reset brings the region back.
#[test]
fn a_pmr_that_is_lost_by_a_reset_is_not_published() {
    let (lab, controller) = lab("a_pmr_that_is_lost_by_a_reset_is_not_published");
    let guest = lab.guest().unwrap();
    let ssd = bind_anew(&lab, &controller, PmrCondition::Sound);
    copy(&lab, THROUGH_THE_PMR);
    for (condition, complaint) in [
        (PmrCondition::NeverReady, "PMR is not ready after 1000 ms"),
        (PmrCondition::Unreliable, "PMR is unreliable"),
    ] {
        controller.set_pmr_condition(condition);
        reset(&lab, &ssd);
        assert_eq!(said(&lab, complaint), 1);
        assert_eq!(p2pmem(&lab, &ssd), format!("{} 0 ", CMB + PMR));
        if condition == PmrCondition::NeverReady {
            let buffer = ssd.p2pmem.as_ref().unwrap();
            let line = format!(
                "p2pcopy {THROUGH_THE_PMR} --buffer {buffer} {} {}",
                guest.nvme("ssd1").unwrap().block_device,
                ssd.block_device
            );
            let failed = guest.try_sh(&line).unwrap();
            assert!(failed.error_text().contains("os error 5"), "{failed:?}");
        }
        let disk = &ssd.block_device;
        guest
            .sh(&format!(
                "p2pcopy --check --size 4MiB --destination-offset 8MiB {disk} {disk}"
            ))
            .unwrap();
        // p2pmem.ko finds nothing when it is loaded now, and what is published later when it is told to look.
        let node = node(&guest, "ssd0", 2).unwrap();
        guest
            .sh(&format!("{LOAD_P2PMEM} && [ ! -e {node} ]"))
            .unwrap();
        controller.set_pmr_condition(PmrCondition::Sound);
        reset(&lab, &ssd);
        assert_eq!(p2pmem(&lab, &ssd), format!("{} 1 ", CMB + PMR));
        assert_eq!(register(&lab, "PMRCTL"), ENABLED);
        let look = "echo 1 > /sys/class/p2pmem_dev/rescan";
        guest
            .sh(&format!(
                "[ ! -e {node} ] && {look} && [ -e {node} ] && rmmod p2pmem"
            ))
            .unwrap();
        copy(&lab, THROUGH_THE_PMR);
    }
    assert_eq!(
        said(&lab, "PMR is lost, p2pmem is not published any more"),
        2
    );
    lab.finish();
}
