//! The device of /dev/p2pmemN is pulled out: nobody was asked, and the hardware is dead when its driver is unbound.

use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Nvram, PmrOptions, Topology, TopologyBuilder};
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{CMB_BAR, Memory, NVRAM_BAR, PMR_BAR, assert_quiet, start, user};

/// Bytes of each memory.
const SIZE: u64 = 64 * MIB;
/// A switch with SSD `ssd1`, which uses the memory.
fn topology() -> TopologyBuilder {
    Topology::builder("p2pmem-surprise")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd1", "sw0.3", user())
}

/// An NVRAM card, whose driver is p2pmem. Its memory is not mapped for the CPU as the SSDs' is: each access is a message.
#[test]
fn a_card_is_pulled_out_while_in_use() {
    let card = topology().nvram("nv0", "sw0.0", Nvram::memory(SIZE));
    let lab = start("p2pmem_a_card_is_pulled_out", card, &["ssd1"]);
    pulled_out(lab, "nv0", NVRAM_BAR);
}

/// An SSD with a CMB.
#[test]
fn an_ssd_with_a_cmb_is_pulled_out_while_in_use() {
    let cmb = CmbOptions::new(SIZE).data_only().mapped();
    let ssd = topology().nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).cmb_with(cmb).intx());
    let lab = start("p2pmem_an_ssd_with_a_cmb_is_pulled_out", ssd, &["ssd0"]);
    pulled_out(lab, "ssd0", CMB_BAR);
}

/// An SSD with a PMR.
#[test]
fn an_ssd_with_a_pmr_is_pulled_out_while_in_use() {
    let pmr = PmrOptions::memory(SIZE).mapped();
    let ssd = topology().nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).pmr(pmr).intx());
    let ssd = ssd.own_module("nvme");
    let lab = start("p2pmem_an_ssd_with_a_pmr_is_pulled_out", ssd, &["ssd0"]);
    pulled_out(lab, "ssd0", PMR_BAR);
}

/// The memory is mapped, touched and not, exported and imported, and copied through. Users get SIGBUS, EFAULT, ENODEV,
/// a revoked import; the copy an error, as the peer's requests found nobody. When the device is back, all of its memory is
/// free, and the modules unload.
fn pulled_out(mut lab: TestLab, name: &str, bar: u8) {
    let memory = Memory::of(&lab, name, bar, SIZE);
    memory.back(&lab);
    memory.hold(&lab);
    let before_copy = memory.copy(&lab);
    let before = lab.traffic();
    lab.surprise_remove(name).unwrap();
    memory.released(&lab);
    memory.copy_failed(&lab, &before_copy);
    memory.gone(&lab);
    let traffic = lab.traffic().since(&before);
    let nobody = traffic.port("rp0").unwrap().unsupported_requests;
    assert!(nobody > 0, "{traffic}");
    memory.sh(&lab, "dmesg | grep 'Card not present'");
    lab.attach(name).unwrap();
    memory.back(&lab);
    memory.sh(&lab, "rmmod p2pmem && rmmod dmabuf_importer");
    assert_quiet(
        &lab,
        &memory.lost_transfers().each_ref().map(String::as_str),
    );
    lab.finish();
}
