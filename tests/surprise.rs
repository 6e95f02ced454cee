//! Surprise removal: an endpoint is gone before the guest hears of it, and comes back.

use p2plab::lab::LabError;
use p2plab::topology::{GIB, Nvme, Topology};
use p2plab::wait::{self, Deadline};
use p2plab_tests::TestLab;
use serde_json::json;

/// Losses of power that an SSD was not told of before (SMART / Health Information log).
pub fn unsafe_shutdowns(lab: &TestLab, name: &str) -> u64 {
    let dump = lab.devices().device(name).unwrap().function().dump();
    let count = &dump["endpoint"]["health"]["unsafe_shutdowns"];
    count.as_u64().unwrap_or_else(|| panic!("{dump:#}"))
}

/// Linux calls it a card that is not present; its driver could not shut the SSD down, as it does when the slot's button is
/// pressed (`an_endpoint_is_detached_under_a_running_guest`). The slot is usable again, and the SSD has what it had.
#[test]
fn an_ssd_is_pulled_out_of_a_switch_and_comes_back() {
    let topology = Topology::builder("surprise")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).intx())
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4));
    let name = "an_ssd_is_pulled_out_of_a_switch_and_comes_back";
    let mut lab = TestLab::start(name, topology.build().unwrap());
    let refused = lab.surprise_remove("ssd1").unwrap_err();
    assert!(refused.to_string().contains("intx"), "{refused}");
    let refused = lab.attach("ssd0").unwrap_err();
    assert!(refused.to_string().contains("plugged in"), "{refused}");
    pulled_out_and_back(lab, 2);
}

/// The same in a slot of the root complex, whose ports, unlike the switch's, say when their link is active.
#[test]
fn an_ssd_is_pulled_out_of_a_root_port_and_comes_back() {
    let topology = Topology::builder("surprise-root-port")
        .root_port("rp0")
        .root_port("rp1")
        .nvme("ssd0", "rp0", Nvme::memory(GIB / 4).intx());
    let name = "an_ssd_is_pulled_out_of_a_root_port_and_comes_back";
    let lab = TestLab::start(name, topology.build().unwrap());
    pulled_out_and_back(lab, 2);
}

/// A removal that has failed in the middle is done by the next call, wherever it was; an endpoint that QEMU refuses is
/// attached by the next call, when QEMU takes it.
#[test]
fn what_was_interrupted_can_be_repeated() {
    let topology = Topology::builder("surprise-again")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).intx());
    let name = "what_was_interrupted_can_be_repeated";
    let mut lab = TestLab::start(name, topology.build().unwrap());
    let sh = |lab: &TestLab, line: &str| lab.guest().unwrap().sh(line).unwrap();
    let id = lab.devices().device("ssd0").unwrap().qemu_id();
    let squatter =
        json!({"driver": "virtserialport", "bus": "serial.0", "id": id, "name": "squatter"});
    for qemu_was_told in [false, true] {
        let ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
        let disk = &ssd.block_device;
        sh(
            &lab,
            &format!(
                "p2pcopy --check --size 1MiB {disk} {disk} --destination-offset 32MiB && dmesg -c > /dev/null"
            ),
        );
        let port = sh(
            &lab,
            &format!(
                "basename $(dirname $(readlink -f /sys/bus/pci/devices/{}))",
                ssd.address
            ),
        );
        let port = port.trim();
        // As `surprise_remove` does first: power and its indicator are on when pciehp is done with the arrival.
        let control = format!("setpci -s {port} CAP_EXP+18.w");
        sh(
            &lab,
            &format!("until [ $((0x$({control}) & 0x700)) = 256 ]; do usleep 10000; done"),
        );
        lab.devices().fabric().unplug("ssd0").unwrap();
        if qemu_was_told {
            // No hot-plug interrupt, and both off, as it leaves them for a moment.
            sh(&lab, &format!("{control}=0700:0720"));
        }
        lab.surprise_remove("ssd0").unwrap();
        let line = "until dmesg | grep 'Card not present'; do usleep 10000; done";
        sh(&lab, line);

        let deadline = Deadline::new("QEMU to add a port", wait::HOTPLUG);
        let monitor = &lab.qemu().unwrap().qmp;
        monitor.device_add(squatter.clone(), &deadline).unwrap();
        let refused = lab.attach("ssd0").unwrap_err();
        assert!(
            refused.to_string().contains("QEMU refuses device_add"),
            "{refused}"
        );
        let monitor = &lab.qemu().unwrap().qmp;
        monitor.device_del(&id, &deadline).unwrap();
        lab.attach("ssd0").unwrap();
    }
    lab.guest().unwrap().nvme("ssd0").unwrap();
    lab.finish();
}

/// SSD `ssd0`, that many times, with reads on their way.
fn pulled_out_and_back(mut lab: TestLab, times: u64) {
    let sh = |lab: &TestLab, line: &str| lab.guest().unwrap().sh(line).unwrap();
    let mut ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
    for time in 1..=times {
        let disk = &ssd.block_device;
        // Another pattern each time, so that neither zeros nor what was there before pass.
        let copy = format!("p2pcopy --check --seed {time} --size 8MiB");
        let read = format!("dd if={disk} of=/dev/null bs=1M iflag=direct");
        sh(
            &lab,
            &format!(
                "{copy} {disk} {disk} --destination-offset 16MiB && dmesg -c > /dev/null && ((while {read}; do :; done; touch /tmp/ended) 2> /tmp/dd &)"
            ),
        );
        lab.surprise_remove("ssd0").unwrap();
        let guest = lab.guest().unwrap();
        assert!(matches!(
            guest.nvme("ssd0"),
            Err(LabError::UnknownEndpoint { .. })
        ));
        let forgotten = format!("[ ! -e /sys/bus/pci/devices/{} ]", ssd.address);
        let forgets = "the kernel to forget the SSD";
        guest
            .wait_until(forgets, &forgotten, wait::HOTPLUG)
            .unwrap();
        sh(
            &lab,
            "until rm /tmp/ended 2> /dev/null; do usleep 10000; done",
        );
        let log = sh(&lab, "dmesg -c");
        assert!(log.contains("Card not present"), "{log}");
        assert!(!log.contains("Button press"), "{log}");

        lab.attach("ssd0").unwrap();
        ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
        assert_eq!(unsafe_shutdowns(&lab, "ssd0"), time);
        let disk = &ssd.block_device;
        sh(
            &lab,
            &format!(
                "{copy} --seeded {disk} {disk} --destination-offset 32MiB && cmp -n 8388608 {disk} {disk} 0 16777216"
            ),
        );
    }
    lab.finish();
}
