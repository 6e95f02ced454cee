//! The NVRAM card by the driver that it was written for: found by its ids, copied through, taken away, unloaded.

use p2plab::topology::{GIB, MIB, Nvme, Nvram, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{LOAD_P2PMEM, complaints, node, start};

/// BAR of the card's memory.
const BAR: u8 = 4;
/// Bytes of it.
const SIZE: u64 = 128 * MIB;

/// Two plain SSDs copy through the card: its memory gets every byte once and gives it once, below the switch. Unbound and
/// removed under a copy, found again, and after the driver was loaded again, all of it is free and works.
#[test]
fn the_card_is_bound_copied_through_and_taken_away() {
    let name = "p2pmem_the_card_is_bound_copied_through";
    let topology = Topology::builder("p2pmem-nvram")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4))
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .nvram("nv0", "sw0.2", Nvram::memory(SIZE));
    let lab = start(name, topology, &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let [from, to] = ["ssd0", "ssd1"].map(|ssd| guest.nvme(ssd).unwrap().block_device);
    let card = guest.pci_address("nv0").unwrap();
    let memory = node(&guest, "nv0", BAR).unwrap();
    let whole = format!(
        "{card} bar 4 id 11f8:f117 subsystem 11f8:f117 class 058000 offset 0 size {SIZE} free {SIZE}\n"
    );
    let copy = format!("--size 64MiB --chunk 256KiB --depth 4 --buffer {memory} {from} {to}");
    let check = || {
        let there = format!("[ -e {memory} ]");
        guest
            .wait_until("the memory to be there", &there, p2plab::wait::HOTPLUG)
            .unwrap();
        assert_eq!(
            guest.sh(&format!("p2pmemtest info {memory}")).unwrap(),
            whole
        );
        guest.sh(&format!("p2pcopy --check {copy}")).unwrap();
    };
    check();
    let before = lab.traffic();
    guest.sh(&format!("p2pcopy {copy}")).unwrap();
    let traffic = lab.traffic().since(&before);
    assert_eq!(
        traffic.between("ssd0", "nv0", TlpKind::MWr).payload_bytes,
        64 * MIB
    );
    assert_eq!(
        traffic.between("nv0", "ssd1", TlpKind::CplD).payload_bytes,
        64 * MIB
    );
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");

    let driver = "/sys/bus/pci/drivers/p2pmem";
    for (away, again) in [
        (
            format!("echo {card} > {driver}/unbind"),
            format!("echo {card} > {driver}/bind"),
        ),
        (
            format!("echo 1 > /sys/bus/pci/devices/{card}/remove"),
            "echo 1 > /sys/bus/pci/rescan".to_owned(),
        ),
    ] {
        guest
            .sh(&format!(
                "(while p2pcopy {copy}; do :; done) > /tmp/copy 2>&1 & echo $! > /tmp/pid; \
                 until grep -q copied /tmp/copy; do usleep 10000; done; {away}; [ ! -e {memory} ]; \
                 while kill -0 $(cat /tmp/pid) 2> /dev/null; do usleep 10000; done; {again}"
            ))
            .unwrap();
        check();
    }
    guest
        .sh(&format!(
            "rmmod p2pmem && [ ! -e {memory} ] && {LOAD_P2PMEM}"
        ))
        .unwrap();
    check();
    let loading = ["loading out-of-tree module", "module verification failed"];
    assert_eq!(complaints(&guest, &loading).unwrap(), Vec::<String>::new());
    lab.finish();
}
