//! How /dev/p2pmemN gets its memory: out of a pool that several BARs share and that may be in pieces, cleared or not.

use std::time::Duration;

use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, PmrOptions, Topology};
use p2plab_tests::p2pmem::{CMB_BAR, PMR_BAR, assert_quiet, node, start};

/// A search that went through the other BAR again for each page would take minutes.
const SOON: Duration = Duration::from_secs(60);

/// Memory in single pages is found at once, in either BAR; and memory is cleared for whoever comes next, where the
/// module is told to.
#[test]
fn single_pages_are_found_and_cleared_where_that_is_asked_for() {
    let ssd0 = Nvme::memory(GIB / 4)
        .cmb_with(CmbOptions::new(16 * MIB).data_only().mapped())
        .pmr(PmrOptions::memory(256 * MIB).mapped());
    let topology = Topology::builder("p2pmem-pool")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", ssd0)
        .own_module("nvme");
    let name = "p2pmem_single_pages_are_found_and_cleared_where_that_is_asked_for";
    let lab = start(name, topology, &["ssd0"]);
    let guest = lab.guest().unwrap();
    for bar in [CMB_BAR, PMR_BAR] {
        let memory = node(&guest, "ssd0", bar).unwrap();
        let pieces = guest
            .sh_within(&format!("p2pmemtest scattered {memory} {}", 16 * MIB), SOON)
            .unwrap();
        // Every other page of 16 MiB; in the larger BAR there is room for it in one piece.
        let expected = if bar == CMB_BAR { "2048" } else { "1" };
        assert_eq!(pieces.trim(), expected, "BAR {bar}");
    }

    let memory = node(&guest, "ssd0", CMB_BAR).unwrap();
    let dirty = || {
        let pages = guest.sh(&format!("p2pmemtest dirty {memory} 255")).unwrap();
        pages.trim().parse::<u64>().unwrap()
    };
    dirty();
    assert_eq!(dirty(), 16 * MIB / 4096);
    guest
        .sh("echo 1 > /sys/module/p2pmem/parameters/clear")
        .unwrap();
    assert_eq!(dirty(), 0);
    assert_quiet(&lab, &[]);
    lab.finish();
}
