//! Resets and power states that the guest's kernel asks an endpoint for, and a working disk after each.

use p2plab_pcie::TlpKind;
use p2plab_tests::{TestLab, two_ssds};

/// Writes a pattern and reads it back.
fn use_disk(lab: &TestLab, disk: &str) {
    lab.guest()
        .unwrap()
        .sh(&format!(
            "p2pcopy --check --size 1MiB --chunk 64KiB --destination-offset 8MiB {disk} {disk}"
        ))
        .unwrap();
}

/// Function Level Reset, and hot reset through the port above: after each, the kernel finds the SSD as after power-on, sets it up again, and the data is there.
///
/// A Function Level Reset is survived by CMBMSC (NVMe Base 2.1, 3.7.2), and so by the queues that Linux has in the CMB. A
/// hot reset is not, and Linux 7.3 does not set it again (nvme_map_cmb returns early when it has mapped the CMB
/// before): that one is for an SSD without a CMB. With the patches of `guest-kernel/` it does, see `pmr_kernel`.
#[test]
fn every_reset_gives_the_disk_back() {
    let lab = TestLab::start("every_reset_gives_the_disk_back", two_ssds("resets"));
    let guest = lab.guest().unwrap();
    let log = || std::fs::read_to_string(lab.run_directory().join("device.log")).unwrap();
    for (name, method, seen) in [
        ("ssd0", "flr", "FunctionLevel"),
        ("ssd1", "bus", "Conventional"),
    ] {
        let ssd = guest.nvme(name).unwrap();
        let (address, disk) = (&ssd.address, &ssd.block_device);
        let function = format!("/sys/bus/pci/devices/{address}");
        guest
            .sh(&format!(
                "echo kept | dd of={disk} bs=512 seek=99999 conv=sync"
            ))
            .unwrap();
        use_disk(&lab, disk);
        let before = log().matches(seen).count();
        guest
            .sh(&format!(
                "echo {method} > {function}/reset_method && echo 1 > {function}/reset"
            ))
            .unwrap();
        use_disk(&lab, disk);
        let kept = guest
            .sh(&format!(
                "dd if={disk} bs=512 skip=99999 count=1 | head -c 4"
            ))
            .unwrap();
        assert_eq!(kept, "kept", "after {method}");
        assert!(
            log().matches(seen).count() > before,
            "{name} saw no {seen}:\n{}",
            log()
        );
    }
    lab.finish();
}

/// In D3hot the SSD answers to config requests only; back in D0 it goes on where it was (No_Soft_Reset).
#[test]
fn d3hot_stops_the_ssd_and_d0_lets_it_go_on() {
    let lab = TestLab::start("d3hot_stops_the_ssd", two_ssds("d3hot"));
    let guest = lab.guest().unwrap();
    let ssd = guest.nvme("ssd0").unwrap();
    use_disk(&lab, &ssd.block_device);
    let state = |value: u8| {
        // Power Management Control/Status (PCI Express Base 6.0, section 7.5.2.2), bits 1:0.
        let address = &ssd.address;
        guest
            .sh(&format!("setpci -s {address} CAP_PM+4.w={value}:3"))
            .unwrap();
        lab.devices().device("ssd0").unwrap().function().dump()["pcie"].clone()
    };
    assert_eq!(state(3)["power_state"], "D3Hot");
    let before = lab.traffic();
    // A peer that writes into its memory finds nobody there.
    let (buffer, peer) = (ssd.p2pmem.as_ref().unwrap(), guest.nvme("ssd1").unwrap());
    let disk = peer.block_device;
    let line =
        format!("p2pcopy --size 64KiB --chunk 64KiB --skip-write --buffer {buffer} {disk} {disk}");
    let output = guest.try_sh(&line).unwrap();
    assert!(output.error_text().contains("os error 5"), "{output:?}");
    let asleep = lab.traffic().since(&before);
    let refused = asleep.port("ssd0").unwrap().unsupported_requests;
    let sent = asleep.between("ssd1", "ssd0", TlpKind::MWr).tlps;
    assert!(sent > 0 && refused == sent, "{asleep}");
    assert_eq!(state(0)["power_state"], "D0");
    use_disk(&lab, &ssd.block_device);
    lab.finish();
}
