//! The NVRAM card by the driver that it was written for: found by its ids, copied through, taken away, unloaded.

use std::os::unix::fs::MetadataExt as _;

use p2plab::topology::{GIB, MIB, Nvme, Nvram, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{LOAD_P2PMEM, NVRAM_BAR, assert_quiet, complaints, node, start};

/// Bytes of it.
const SIZE: u64 = 128 * MIB;

/// The largest card and the smallest: each is offered whole, and an SSD's DMA reaches its first and its last page. Of the
/// guest's memory, which is of the usual size, the kernel takes an 8 GiB card 128 MiB for its account of the pages; of the
/// host's, a card takes what has been written.
#[test]
fn cards_of_8_gib_and_of_64_mib() {
    let name = "p2pmem_cards_of_8_gib_and_of_64_mib";
    let cards = [("nv0", 8 * GIB), ("nv1", 64 * MIB)];
    let mut topology = Topology::builder("p2pmem-sizes")
        .window(8 * GIB)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(16 * MIB));
    for ((card, size), port) in cards.into_iter().zip(["sw0.1", "sw0.2"]) {
        topology = topology.nvram(card, port, Nvram::memory(size));
    }
    let lab = start(name, topology, &["ssd0"]);
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd0").unwrap().block_device;
    for (card, size) in cards {
        let memory = node(&guest, card, NVRAM_BAR).unwrap();
        let info = guest.sh(&format!("p2pmemtest info {memory}")).unwrap();
        let whole = format!("offset 0 size {size} free {size}\n");
        assert!(info.ends_with(&whole), "{info}");

        let before = lab.traffic();
        let filled = guest.sh(&format!("p2pmemtest ends {memory} {disk}"));
        let (filled, traffic) = (filled.unwrap(), lab.traffic().since(&before));
        for (from, to, kind) in [("ssd0", card, TlpKind::MWr), (card, "ssd0", TlpKind::CplD)] {
            let bytes = traffic.between(from, to, kind).payload_bytes;
            assert_eq!(bytes, 4 * 4096, "{from} to {to}: {traffic}");
        }
        // Seen by the CPU in the NVRAM_BAR, too, which it may look at without the driver: at the last word of each page.
        let address = guest.pci_address(card).unwrap();
        let unbind = format!(
            "echo {address} > /sys/bus/pci/drivers/p2pmem/unbind; echo 1 > /sys/bus/pci/devices/{address}/enable"
        );
        guest.sh(&unbind).unwrap();
        let state = lab.devices().device(card).unwrap().function().dump();
        let bar = state["pcie"]["bars"][usize::from(NVRAM_BAR)]
            .as_u64()
            .unwrap();
        assert_eq!(filled.lines().count(), 4, "{filled}");
        for line in filled.lines() {
            let (place, content) = line.split_once(' ').unwrap();
            let word = bar + place.parse::<u64>().unwrap() + 4088;
            let byte = content.trim_start_matches("0x").to_uppercase();
            let read = guest.sh(&format!("devmem {word:#x} 64")).unwrap();
            assert_eq!(read.trim(), format!("0x{}", byte.repeat(8)), "at {place}");
        }
        assert!(
            filled.contains(&format!("{} 0xe3", size - 4096)),
            "{filled}"
        );
    }
    let card = lab.devices().device("nv0").unwrap().nvram().unwrap();
    let held = card.memory().file().metadata().unwrap().blocks() * 512;
    // Four pages were written, or four huge ones, where the host gives those.
    assert!((4 * 4096..=4 * 2 * MIB).contains(&held), "{held} bytes");
    assert_eq!(complaints(&guest, &[]).unwrap(), Vec::<String>::new());
    lab.finish();
}

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
    let memory = node(&guest, "nv0", NVRAM_BAR).unwrap();
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
    assert_quiet(&lab, &[]);
    lab.finish();
}
