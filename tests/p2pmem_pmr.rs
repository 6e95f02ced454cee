//! CMB and PMR of one controller, with the patched nvme driver: two devices, one pool.

use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, PmrOptions, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{CMB_BAR, PMR_BAR, complaints, node, start};

/// A user chooses between them by the device: memory comes from that BAR until it is full, though the kernel would give
/// that of the other; every ioctl works on both; and data passes through each without a way up.
#[test]
fn a_user_chooses_between_cmb_and_pmr() {
    let name = "p2pmem_a_user_chooses_between_cmb_and_pmr";
    let ssd0 = Nvme::memory(GIB / 4)
        .cmb_with(CmbOptions::new(16 * MIB).data_only().mapped())
        .pmr(PmrOptions::memory(32 * MIB).mapped());
    let topology = Topology::builder("p2pmem-pmr")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", ssd0)
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .own_module("nvme");
    let lab = start(name, topology, &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    let owner = guest.pci_address("ssd0").unwrap();
    let peer = guest.pci_address("ssd1").unwrap();
    for (bar, size) in [(CMB_BAR, 16 * MIB), (PMR_BAR, 32 * MIB)] {
        let memory = node(&guest, "ssd0", bar).unwrap();
        let info = guest.sh(&format!("p2pmemtest info {memory}")).unwrap();
        assert!(info.contains(&format!("bar {bar} ")), "{info}");
        assert!(
            info.contains(&format!("size {size} free {size}\n")),
            "{info}"
        );
        // Among the cases: all of this memory, and not a page more.
        let cases = guest
            .sh(&format!("p2pmemtest check {memory} {disk}"))
            .unwrap();
        assert!(cases.contains("24 passed, 0 failed"), "{cases}");
        // Where a peer sees it: in that BAR.
        let seen = guest
            .sh(&format!("p2pmemtest import {memory} {peer}"))
            .unwrap();
        let line = bar + 1;
        let resource = guest
            .sh(&format!(
                "sed -n {line}p /sys/bus/pci/devices/{owner}/resource"
            ))
            .unwrap();
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let mut ends = resource.split_whitespace().map(hex);
        let (first, last) = (ends.next().unwrap(), ends.next().unwrap());
        for segment in seen.lines() {
            let at = hex(segment.split(' ').nth(1).unwrap());
            assert!((first..=last).contains(&at), "{seen} not in {resource}");
        }

        let before = lab.traffic();
        guest
            .sh(&format!(
                "p2pcopy --size 32MiB --chunk 256KiB --depth 4 --buffer {memory} {disk} {disk} --destination-offset 64MiB"
            ))
            .unwrap();
        let traffic = lab.traffic().since(&before);
        for kind in [TlpKind::MWr, TlpKind::MRd] {
            let moved = traffic.between("ssd1", "ssd0", kind);
            assert_eq!(
                moved.payload_bytes + moved.requested_bytes,
                32 * MIB,
                "{traffic}"
            );
        }
        assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    }
    assert_eq!(complaints(&guest, &[]).unwrap(), Vec::<String>::new());
    lab.finish();
}
