//! Surprise removal: an endpoint is gone before the guest hears of it, and comes back.

use p2plab::lab::LabError;
use p2plab::topology::{GIB, Nvme, Topology};
use p2plab::wait;
use p2plab_tests::TestLab;

/// Losses of power that an SSD was not told of before (SMART / Health Information log).
pub fn unsafe_shutdowns(lab: &TestLab, name: &str) -> u64 {
    let dump = lab.devices().device(name).unwrap().function().dump();
    let count = &dump["endpoint"]["health"]["unsafe_shutdowns"];
    count.as_u64().unwrap_or_else(|| panic!("{dump:#}"))
}

/// Linux calls it a card that is not present; its driver could not shut the SSD down, as it does when the slot's button is
/// pressed (`an_endpoint_is_detached_under_a_running_guest`). The slot is usable again, and the SSD has what it had.
#[test]
fn an_ssd_is_removed_by_surprise_and_comes_back() {
    let name = "an_ssd_is_removed_by_surprise_and_comes_back";
    let topology = Topology::builder("surprise")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).intx())
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4));
    let mut lab = TestLab::start(name, topology.build().unwrap());
    let refused = lab.surprise_remove("ssd1").unwrap_err();
    assert!(refused.to_string().contains("intx"), "{refused}");
    let refused = lab.attach("ssd0").unwrap_err();
    assert!(refused.to_string().contains("plugged in"), "{refused}");

    let mut ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
    let sh = |lab: &TestLab, line: &str| lab.guest().unwrap().sh(line).unwrap();
    for round in 1..=2 {
        let disk = &ssd.block_device;
        let copy = "p2pcopy --check --size 8MiB --destination-offset 16MiB";
        sh(&lab, &format!("{copy} {disk} {disk}; dmesg -c > /dev/null"));
        // Under load: reads are on their way.
        sh(
            &lab,
            &format!(
                "(while dd if={disk} of=/dev/null bs=1M iflag=direct; do :; done; touch /tmp/ended) 2> /tmp/dd &"
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
            "until rm /tmp/ended; do usleep 10000; done; cat /tmp/dd",
        );
        let log = sh(&lab, "dmesg -c");
        assert!(log.contains("Card not present"), "{log}");
        assert!(!log.contains("Button press"), "{log}");

        lab.attach("ssd0").unwrap();
        ssd = lab.guest().unwrap().nvme("ssd0").unwrap();
        assert_eq!(unsafe_shutdowns(&lab, "ssd0"), round);
        let disk = &ssd.block_device;
        sh(
            &lab,
            &format!(
                "p2pcopy --check --size 8MiB {disk} {disk} --source-offset 16MiB --destination-offset 32MiB"
            ),
        );
    }
    lab.finish();
}
