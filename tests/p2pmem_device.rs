//! /dev/p2pmemN: what it says, does and refuses, and that what is copied through it goes from device to device.

use p2plab::lab::Guest;
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology, TopologyBuilder};
use p2plab_guest::protocol::Exit;
use p2plab_pcie::TlpKind;
use p2plab_tests::p2pmem::{CMB_BAR, complaints, node, start};

use crate::patience::until;

/// Two SSDs, the first with a CMB that the CPU reaches without being counted, or as `cmb` says.
fn two_ssds(name: &str, cmb: CmbOptions) -> TopologyBuilder {
    let ssd0 = Nvme::memory(GIB / 4).cmb_with(cmb);
    Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", ssd0)
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
}

/// A CMB for data alone: all of it is free.
fn cmb() -> CmbOptions {
    CmbOptions::new(64 * MIB).data_only()
}

/// What debugfs says of the device `node`, line by line.
fn stats(guest: &Guest<'_>, node: &str) -> Vec<(String, u64)> {
    let line = format!(
        "number=$(stat -c %T {node}); for d in /sys/class/p2pmem_dev/p2pmem[0-9]*; do \
         [ $(cut -d: -f2 $d/dev) = $((0x$number - 1)) ] && cat /sys/kernel/debug/p2pmem/${{d##*/}}/stats; done; :"
    );
    let text = guest.sh(&line).unwrap();
    let entry = |line: &str| {
        let (key, value) = line.rsplit_once(' ')?;
        Some((key.to_owned(), value.parse().ok()?))
    };
    text.lines().map(|line| entry(line).unwrap()).collect()
}

fn stat(stats: &[(String, u64)], key: &str) -> u64 {
    let found = stats.iter().find(|(k, _)| k == key);
    found.unwrap_or_else(|| panic!("no {key} in {stats:?}")).1
}

/// The CMB that the stock nvme driver has published, by both of its names; every ioctl, every refusal with its errno,
/// and nothing in the kernel's log. Afterwards all memory is free again.
#[test]
fn every_ioctl_and_every_refusal() {
    let name = "p2pmem_every_ioctl_and_every_refusal";
    let lab = start(
        name,
        two_ssds("p2pmem-check", cmb().mapped()),
        &["ssd0", "ssd1"],
    );
    let guest = lab.guest().unwrap();
    let address = guest.pci_address("ssd0").unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    let by_address = node(&guest, "ssd0", CMB_BAR).unwrap();
    let said = |node: &str| guest.sh(&format!("p2pmemtest info {node}")).unwrap();
    let ids = guest
        .sh(&format!(
            "cd /sys/bus/pci/devices/{address}; cat vendor device subsystem_vendor subsystem_device class"
        ))
        .unwrap();
    let ids: Vec<&str> = ids.lines().map(|id| id.trim_start_matches("0x")).collect();
    let expected = format!(
        "{address} bar 4 id {}:{} subsystem {}:{} class {} offset 0 size 67108864 free 67108864\n",
        ids[0], ids[1], ids[2], ids[3], ids[4]
    );
    assert_eq!(said(&by_address), expected);
    assert_eq!(said("/dev/p2pmem0"), expected);
    assert_eq!(guest.sh("ls /dev/p2pmem*[0-9]").unwrap(), "/dev/p2pmem0\n");

    let cases = guest
        .sh(&format!("p2pmemtest check {by_address} {disk}"))
        .unwrap();
    assert!(cases.contains("24 passed, 0 failed"), "{cases}");
    assert_eq!(said(&by_address), expected);
    let none: [String; 0] = [];
    assert_eq!(complaints(&guest, &[]).unwrap(), none);
    lab.finish();
}

/// A copy from one SSD to the other through /dev/p2pmem0: every byte is right, and crosses the switch once, from the
/// memory of the one to the other. The upstream port sees commands alone.
#[test]
fn a_copy_through_the_device_stays_below_the_switch() {
    let name = "p2pmem_a_copy_stays_below_the_switch";
    let lab = start(name, two_ssds("p2pmem-copy", cmb()), &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let (ssd0, ssd1) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let buffer = node(&guest, "ssd0", CMB_BAR).unwrap();
    let copy = |options: &str| {
        format!(
            "p2pcopy {options} --size 64MiB --chunk 256KiB --depth 4 --buffer {buffer} {} {}",
            ssd0.block_device, ssd1.block_device
        )
    };
    let before = lab.traffic();
    guest.sh(&copy("")).unwrap();
    let traffic = lab.traffic().since(&before);
    let taken = traffic.between("ssd1", "ssd0", TlpKind::MRd);
    assert_eq!(taken.requested_bytes, 64 * MIB, "{traffic}");
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    guest.sh(&copy("--check")).unwrap();
    // In the other direction the memory is the destination's: what ssd1 reads is written into it.
    let before = lab.traffic();
    guest
        .sh(&format!(
            "p2pcopy --size 64MiB --chunk 256KiB --depth 4 --buffer {buffer} {} {}",
            ssd1.block_device, ssd0.block_device
        ))
        .unwrap();
    let traffic = lab.traffic().since(&before);
    let given = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    assert_eq!(given.payload_bytes, 64 * MIB, "{traffic}");
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    lab.finish();
}

/// debugfs tells of memory that is held in all ways at once, and forgets it afterwards; totals stay.
#[test]
fn statistics_are_exact() {
    let name = "p2pmem_statistics_are_exact";
    let lab = start(
        name,
        two_ssds("p2pmem-stats", cmb().mapped()),
        &["ssd0", "ssd1"],
    );
    let guest = lab.guest().unwrap();
    let (ssd0, ssd1) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let (address, disk) = (&ssd1.address, &ssd1.block_device);
    let memory = node(&guest, "ssd0", CMB_BAR).unwrap();
    // Memory of another user's is not free, and not ours.
    let foreign = ssd0.p2pmem.unwrap();
    let holding = format!(
        "p2pmemtest hold {memory} {disk} {address} > /tmp/held & echo $! > /tmp/pid; \
         until grep -q ready /tmp/held; do usleep 10000; done; \
         setsid p2pcopy --size 128MiB --chunk 1MiB --buffer {foreign} {disk} {disk} > /dev/null 2>&1 < /dev/null & \
         until [ $(cat $(dirname {foreign})/available) -lt {left} ]; do kill -0 $! && usleep 1000 || exit 1; done; \
         kill -STOP $!; cat $(dirname {foreign})/available; echo $!",
        left = 64 * MIB - 24 * 4096
    );
    let others = guest.sh(&holding).unwrap();
    let (available, other) = others.trim().split_once('\n').unwrap();
    let held = stats(&guest, &memory);
    let expected = [
        ("size", 64 * MIB),
        ("allocated pages", 24),
        ("mapped pages", 16),
        ("open files", 1),
        ("buffers", 3),
        ("allocations", 3),
        ("failures", 0),
        ("exports", 2),
        ("dma-bufs", 2),
        ("mapped peers", 1),
    ];
    for (key, value) in expected {
        assert_eq!(stat(&held, key), value, "{key} of {held:?}");
    }
    assert_eq!(stat(&held, "free").to_string(), available, "{held:?}");
    assert!(stat(&held, "free") < 64 * MIB - 24 * 4096, "{held:?}");
    guest.sh(&format!("kill -CONT {other}")).unwrap();
    guest
        .sh("kill $(cat /tmp/pid); wait; killall p2pcopy; while pidof p2pcopy; do usleep 10000; done; :")
        .unwrap();
    until("the memory to be free", || {
        stat(&stats(&guest, &memory), "free") == 64 * MIB
    });
    guest
        .sh(&format!(
            "! p2pcopy --size 1MiB --chunk 128MiB --buffer {memory} {disk} {disk}"
        ))
        .unwrap();
    let after = stats(&guest, &memory);
    for key in [
        "allocated pages",
        "mapped pages",
        "open files",
        "buffers",
        "dma-bufs",
        "mapped peers",
    ] {
        assert_eq!(stat(&after, key), 0, "{key} of {after:?}");
    }
    for (key, value) in [("allocations", 3), ("failures", 1), ("exports", 2)] {
        assert_eq!(stat(&after, key), value, "{key} of {after:?}");
    }
    lab.finish();
}

/// Two switches below two root ports, an SSD with a CMB in the first, and one without in each.
fn two_switches(name: &str) -> TopologyBuilder {
    Topology::builder(name)
        .root_port("rp0")
        .root_port("rp1")
        .switch("sw0", "rp0", 2)
        .switch("sw1", "rp1", 2)
        .nvme(
            "ssd0",
            "sw0.0",
            Nvme::memory(GIB / 4).cmb_with(cmb().mapped()),
        )
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .nvme("ssd2", "sw1.0", Nvme::memory(GIB / 4))
}

fn distance(guest: &Guest<'_>, memory: &str, peers: &[&str]) -> String {
    let addresses = peers.iter().map(|peer| guest.pci_address(peer).unwrap());
    let addresses: Vec<String> = addresses.collect();
    let line = format!("p2pmemtest distance {memory} {}", addresses.join(" "));
    guest.sh(&line).unwrap().trim().to_owned()
}

/// Distances are the kernel's; a dma-buf is mapped for who can reach it, at the address of the BAR, and refused to who
/// cannot.
#[test]
fn who_cannot_reach_the_memory_is_refused() {
    let name = "p2pmem_who_cannot_reach_the_memory";
    // A CPU whose root complex Linux does not trust with peer-to-peer traffic.
    let topology = two_switches("p2pmem-far").guest_cpu("Skylake-Client,phys-bits=43");
    let lab = start(name, topology, &["ssd0", "ssd1", "ssd2"]);
    let guest = lab.guest().unwrap();
    let memory = node(&guest, "ssd0", CMB_BAR).unwrap();
    let hops = [
        &["ssd0"][..],
        &["ssd1"],
        &["ssd0", "ssd1"],
        &["ssd2"],
        &["ssd1", "ssd2"],
    ]
    .map(|peers| distance(&guest, &memory, peers));
    assert_eq!(hops, ["0", "4", "4", "-1", "-1"]);

    let [owner, near, far] = ["ssd0", "ssd1", "ssd2"].map(|ssd| guest.pci_address(ssd).unwrap());
    // The reason is in the kernel's log for those who ask for it, and only then.
    let reason = format!(
        "nvme {far}: cannot be used for peer-to-peer DMA as the client and provider ({owner}) do not share an upstream \
         bridge or whitelisted host bridge"
    );
    let reasons = || {
        guest
            .sh("dmesg | grep -o 'nvme .*peer-to-peer.*' || :")
            .unwrap()
    };
    assert_eq!(reasons(), "");
    let hops = guest.sh(&format!("p2pmemtest why {memory} {near} {far}"));
    assert_eq!(hops.unwrap().trim(), "-1");
    assert_eq!(reasons().trim(), reason);
    let text = guest
        .sh(&format!("p2pmemtest import {memory} {near}"))
        .unwrap();
    let (at, length) = text
        .trim()
        .strip_prefix("dma 0x")
        .and_then(|rest| rest.split_once(' '))
        .unwrap();
    assert_eq!(length, "8192", "{text}");
    let resource = guest
        .sh(&format!("sed -n 5p /sys/bus/pci/devices/{owner}/resource"))
        .unwrap();
    let bar = resource.split_whitespace().next().unwrap();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    // The second page of the first allocation of an empty pool.
    assert_eq!(hex(at), hex(bar) + 4096, "{text} in {resource}");

    let refused = guest
        .try_sh(&format!("p2pmemtest import {memory} {far}"))
        .unwrap();
    assert_eq!(refused.status, Exit::Status(1));
    assert!(refused.error_text().contains("os error 95"), "{refused:?}");
    lab.finish();
}

/// Any device by driver_override and by new_id, with the BAR that a parameter names: here an SSD's CMB without the nvme
/// driver. A BAR that cannot be such memory is refused in a sentence: one that is too small. None that is large enough is
/// misaligned, as a BAR's size is a power of two and its address a multiple of it.
#[test]
fn a_device_of_ones_own_choice() {
    let name = "p2pmem_a_device_of_ones_own_choice";
    let lab = start(name, two_ssds("p2pmem-new-id", cmb()), &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let address = guest.pci_address("ssd0").unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    let memory = node(&guest, "ssd0", CMB_BAR).unwrap();
    guest
        .sh(&format!(
            "echo {address} > /sys/bus/pci/drivers/nvme/unbind; [ ! -e {memory} ]; \
             cd /sys/bus/pci/devices/{address}; echo p2pmem > driver_override; \
             echo 0 > /sys/module/p2pmem/parameters/bar; ! echo {address} > /sys/bus/pci/drivers/p2pmem/bind"
        ))
        .unwrap();
    let resource = guest
        .sh(&format!("head -1 /sys/bus/pci/devices/{address}/resource"))
        .unwrap();
    let mut words = resource.split_whitespace();
    let (start, end) = (words.next().unwrap(), words.next().unwrap());
    let (start, end) = (&start[10..], &end[10..]);
    let small = |bar: &str| {
        format!(
            "p2pmem {address}: BAR {bar}, [mem 0x{start}-0x{end} 64bit], cannot be peer-to-peer memory: give it a size and \
             an address in multiples of 2 MiB"
        )
    };
    let last = |lines: usize| {
        let said = guest.sh(&format!(
            "dmesg | grep -o 'p2pmem 0000:.*' | grep -v probe | tail -{lines}"
        ));
        said.unwrap().trim().to_owned()
    };
    assert_eq!(last(1), small("0"));
    for bar in [1, 5, 6, 99] {
        guest
            .sh(&format!(
                "echo {bar} > /sys/module/p2pmem/parameters/bar; ! echo {address} > /sys/bus/pci/drivers/p2pmem/bind"
            ))
            .unwrap();
        let refusal = format!(
            "p2pmem {address}: BAR {bar} is no memory; name one by the parameter bar of the module"
        );
        assert_eq!(last(1), refusal);
    }
    // 4 by name, and by -1: it is the largest that is prefetchable.
    for bar in [4, -1] {
        guest
            .sh(&format!(
                "echo {bar} > /sys/module/p2pmem/parameters/bar; echo {address} > /sys/bus/pci/drivers/p2pmem/bind"
            ))
            .unwrap();
        let info = guest.sh(&format!("p2pmemtest info {memory}")).unwrap();
        assert!(
            info.contains("bar 4 ") && info.contains("size 67108864 free 67108864"),
            "{info}"
        );
        guest
            .sh(&format!(
                "echo {address} > /sys/bus/pci/drivers/p2pmem/unbind; [ ! -e {memory} ]"
            ))
            .unwrap();
    }
    // By ids: new_id binds what has them and no driver, at once. The other SSD, which has the same, stays nvme's.
    let ids = guest
        .sh(&format!(
            "cd /sys/bus/pci/devices/{address}; echo > driver_override; echo $(cut -c3- vendor) $(cut -c3- device)"
        ))
        .unwrap();
    let (ids, driver) = (ids.trim(), "/sys/bus/pci/drivers/p2pmem");
    let by_ids = |bar: i32, then: &str| {
        guest
            .sh(&format!(
                "echo {bar} > /sys/module/p2pmem/parameters/bar; echo {ids} > {driver}/new_id; {then}; \
                 echo {ids} > {driver}/remove_id"
            ))
            .unwrap()
    };
    by_ids(0, &format!("[ ! -e {driver}/{address} ]"));
    assert_eq!(last(1), small("0"));
    for bar in [4, -1] {
        let unbind = format!("echo {address} > {driver}/unbind; [ ! -e {memory} ]");
        let info = by_ids(bar, &format!("p2pmemtest info {memory}; {unbind}"));
        assert!(
            info.contains("bar 4 ") && info.contains("size 67108864 free 67108864"),
            "{info}"
        );
    }
    assert_eq!(guest.nvme("ssd1").unwrap().block_device, disk);
    // The nvme driver has the SSD again, and its CMB is where it was.
    guest
        .sh(&format!("echo > /sys/bus/pci/devices/{address}/driver_override; echo {address} > /sys/bus/pci/drivers/nvme/bind"))
        .unwrap();
    let from = guest.nvme("ssd0").unwrap().block_device;
    guest
        .sh(&format!(
            "p2pcopy --check --size 4MiB --buffer {memory} {from} {disk}"
        ))
        .unwrap();
    assert_eq!(
        complaints(
            &guest,
            &[
                "multiples of 2 MiB",
                "is no memory",
                "failed with error -22"
            ]
        )
        .unwrap(),
        Vec::<String>::new()
    );
    lab.finish();
}
