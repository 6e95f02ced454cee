//! What Linux allows and refuses beyond two_root_ports.rs: redirection by ACS, an IOMMU, and those of its own paths on
//! which the CPU would have to touch peers' memory.

use p2plab::agent::Output;
use p2plab::lab::{Guest, Lab};
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology, TopologyBuilder};
use p2plab_guest::protocol::Exit;
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem;
use p2plab_tests::reading::{Seen, Watch};

/// Bytes of each copy from peer to peer.
const SIZE: u64 = 2 * MIB;
/// ACS Control (PCI Express Base 6.0, section 7.7.11.3): P2P Request Redirect and P2P Completion Redirect.
const REDIRECT: u64 = 0xc;

fn ssd() -> Nvme {
    Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(64 * MIB).data_only())
}

/// Two root ports with a switch below each, two SSDs below the first, one below the second.
fn two_and_one(name: &str) -> TopologyBuilder {
    Topology::builder(name)
        .root_port("rp0")
        .root_port("rp1")
        .switch("sw0", "rp0", 2)
        .switch("sw1", "rp1", 2)
        .nvme("ssd0", "sw0.0", ssd())
        .nvme("ssd1", "sw0.1", ssd())
        .nvme("ssd2", "sw1.0", ssd())
}

/// Copies from `ssd0` through its CMB to `to`, or through host memory; what was seen has been held against the model.
fn copy(lab: &Lab, topology: &Topology, p2p: bool, to: &str) -> Seen {
    let guest = lab.guest().unwrap();
    let (from, to) = (guest.nvme("ssd0").unwrap(), guest.nvme(to).unwrap());
    let buffer = if p2p {
        from.p2pmem.unwrap()
    } else {
        "memory".to_owned()
    };
    let watch = Watch::begin(lab, topology).unwrap();
    let (from, to) = (from.block_device, to.block_device);
    guest
        .sh(&format!(
            "p2pcopy --check --size {SIZE} --depth 2 --buffer {buffer} {from} {to}"
        ))
        .unwrap();
    watch.end()
}

/// ACS Control of the PCI device at `address`, where it has ACS.
fn acs(guest: &Guest<'_>, address: &str) -> Option<u64> {
    let output = guest
        .try_sh(&format!("setpci -s {address} ECAP_ACS+6.w"))
        .unwrap();
    u64::from_str_radix(output.text().trim(), 16).ok()
}

/// What the kernel says where it lets no peer-to-peer DMA pass.
const NO_WAY: &str = "cannot be used for peer-to-peer DMA as the client and provider";

/// What the kernel has refused endpoint `name` of peer-to-peer DMA.
fn refusals(guest: &Guest<'_>, name: &str) -> String {
    let address = guest.pci_address(name).unwrap();
    let line = format!("dmesg | grep '{address}: .*\\(cannot be used\\|ACS\\)' || :");
    guest.sh(&line).unwrap()
}

/// Bytes that peer `to` took out of `ssd0`'s CMB, and the payload at root port `port`.
fn peer_bytes(seen: &Seen, to: &str, port: &str) -> (u64, u64) {
    let taken = seen
        .traffic
        .between("ssd0", to, TlpKind::CplD)
        .payload_bytes;
    (taken, seen.traffic.port(port).unwrap().payload_bytes())
}

/// A root port that redirects peers' requests concerns none that turn at a switch below it, and none that cross the
/// root complex anyway: Linux allows both on a CPU that it trusts, and the first stay below the switch. The switch's
/// own ports have no ACS in QEMU.
#[test]
fn redirection_at_a_root_port_concerns_no_peers_below_a_switch() {
    let topology = two_and_one("acs").guest_cpu("EPYC").build().unwrap();
    let lab = TestLab::start("redirection_at_a_root_port", topology.clone());
    let guest = lab.guest().unwrap();
    guest.nvme("ssd0").unwrap();
    for root_port in ["00:08.0", "00:09.0"] {
        guest
            .sh(&format!(
                "setpci -s {root_port} ECAP_ACS+6.w={REDIRECT:x}:{REDIRECT:x}"
            ))
            .unwrap();
        assert_eq!(acs(&guest, root_port), Some(REDIRECT));
    }
    let ports = guest.sh("lspci -n -d 104c:8233 | cut -d' ' -f1").unwrap();
    assert_eq!(ports.lines().count(), 4);
    assert!(
        ports.lines().all(|port| acs(&guest, port).is_none()),
        "{ports}"
    );

    let (taken, passed) = peer_bytes(&copy(&lab, &topology, true, "ssd1"), "ssd1", "rp0");
    // Beside queues, what fills the source and what reads the copy back.
    assert_eq!(taken, SIZE);
    assert!(
        (2 * SIZE..2 * SIZE + SIZE / 50).contains(&passed),
        "{passed}"
    );
    let (taken, passed) = peer_bytes(&copy(&lab, &topology, true, "ssd2"), "ssd2", "rp1");
    assert_eq!(taken, SIZE);
    assert!(
        (2 * SIZE..2 * SIZE + SIZE / 50).contains(&passed),
        "{passed}"
    );
    lab.finish();
}

/// With an IOMMU, what passes through host memory goes by I/O virtual addresses, and Linux has root ports redirect by
/// ACS but for the one that its command line spares. Peers' traffic inside a switch goes by bus addresses and does not
/// meet the IOMMU.
#[test]
fn an_iommu_does_not_see_what_turns_at_a_switch() {
    let topology = two_and_one("iommu")
        .iommu()
        .kernel_argument("pci=disable_acs_redir=0000:00:08.0")
        .build()
        .unwrap();
    let lab = TestLab::start("an_iommu_does_not_see", topology.clone());
    let guest = lab.guest().unwrap();
    guest.sh("dmesg | grep 'DMAR: IOMMU enabled'").unwrap();
    let redirects = |address| acs(&guest, address).unwrap() & REDIRECT;
    assert_eq!((redirects("00:08.0"), redirects("00:09.0")), (0, REDIRECT));

    let data = |seen: &Seen, name: &str| -> Vec<u64> {
        let io = seen
            .trace(name)
            .entries
            .iter()
            .filter(|entry| entry.queue > 0);
        io.flat_map(|entry| entry.data.iter().map(|range| range.address))
            .collect()
    };
    let classic = copy(&lab, &topology, false, "ssd1");
    // The guest has no memory there.
    let virtual_only = |addresses: &[u64]| addresses.iter().all(|at| *at >= topology.guest.memory);
    for name in ["ssd0", "ssd1"] {
        let addresses = data(&classic, name);
        assert!(
            !addresses.is_empty() && virtual_only(&addresses),
            "{addresses:x?}"
        );
    }
    // Each page under way is a mapping, and all of these are at once.
    let disk = guest.nvme("ssd0").unwrap().block_device;
    guest
        .sh(&format!(
            "p2pcopy --skip-write --size 32MiB --chunk 4MiB --depth 8 {disk} {disk}"
        ))
        .unwrap();

    let seen = copy(&lab, &topology, true, "ssd1");
    let (taken, passed) = peer_bytes(&seen, "ssd1", "rp0");
    assert_eq!(taken, SIZE);
    assert!(
        (2 * SIZE..2 * SIZE + SIZE / 50).contains(&passed),
        "{passed}"
    );
    let bars = &lab.devices().device("ssd0").unwrap().function().dump()["pcie"]["bars"];
    let cmb = bars[4].as_u64().unwrap();
    let taken_from = data(&seen, "ssd1")
        .into_iter()
        .filter(|at| (cmb..cmb + 64 * MIB).contains(at));
    assert!(taken_from.count() > 0);

    // Across the root complex they would meet it, on a CPU that Linux does not trust with that.
    let (from, to) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd2").unwrap());
    let (buffer, from, to) = (from.p2pmem.unwrap(), from.block_device, to.block_device);
    let output = guest
        .try_sh(&format!(
            "p2pcopy --size {SIZE} --buffer {buffer} {from} {to}"
        ))
        .unwrap();
    assert_eq!(output.status, Exit::Status(1), "{output:?}");
    let refusal = "writing at byte 0 failed: Invalid argument";
    assert!(output.error_text().contains(refusal), "{output:?}");
    let said = refusals(&guest, "ssd2");
    assert!(said.contains(NO_WAY), "{said}");
    // None of the two that the switch connects is refused anything.
    assert_eq!(refusals(&guest, "ssd1"), "");
    let run = lab.run_directory().to_owned();
    lab.finish();
    let said = std::fs::read_to_string(run.join("qemu.log")).unwrap();
    assert_eq!(said, "", "QEMU has nothing to complain about");
}

/// What p2pmem.ko gives works behind an IOMMU, too, inside a switch: transfers to and from a mapping stay below it, and
/// a dma-buf is mapped at the BAR's bus address, not at an I/O virtual one. Beyond the switch both are refused.
#[test]
fn p2pmem_works_behind_an_iommu() {
    let name = "p2pmem_works_behind_an_iommu";
    let topology = two_and_one(name)
        .iommu()
        .kernel_argument("pci=disable_acs_redir=0000:00:08.0");
    let lab = p2pmem::start(name, topology, &["ssd0", "ssd1", "ssd2"]);
    let guest = lab.guest().unwrap();
    let memory = p2pmem::node(&guest, "ssd0", 4).unwrap();
    let [from, near, far] = ["ssd0", "ssd1", "ssd2"].map(|ssd| guest.nvme(ssd).unwrap());
    let copy = |to: &str, options: &str| {
        let from = &from.block_device;
        let line = format!("p2pcopy {options} --size {SIZE} --buffer {memory} {from} {to}");
        guest.try_sh(&line).unwrap()
    };
    let before = lab.traffic();
    let output = copy(&near.block_device, "--depth 2");
    assert!(output.status.success(), "{output:?}");
    let traffic = lab.traffic().since(&before);
    let taken = traffic.between("ssd0", "ssd1", TlpKind::CplD);
    assert_eq!(taken.payload_bytes, SIZE);
    assert!(traffic.upstream_payload_bytes() < SIZE / 10, "{traffic}");
    let output = copy(&near.block_device, "--check");
    assert!(output.status.success(), "{output:?}");

    let import = |to: &str| {
        let line = format!("p2pmemtest import {memory} {to}");
        guest.try_sh(&line).unwrap()
    };
    let mapped = import(&near.address);
    assert!(mapped.status.success(), "{mapped:?}");
    let state = lab.devices().device("ssd0").unwrap().function().dump();
    let cmb = state["pcie"]["bars"][4].as_u64().unwrap();
    // The second and third page of the first allocation of an empty pool.
    assert_eq!(mapped.text().trim(), format!("dma {:#x} 8192", cmb + 4096));

    let refused = import(&far.address);
    assert_eq!(refused.status, Exit::Status(1), "{refused:?}");
    assert!(refused.error_text().contains("os error 95"), "{refused:?}");
    let refused = copy(&far.block_device, "");
    assert_eq!(refused.status, Exit::Status(1), "{refused:?}");
    assert!(refused.error_text().contains("os error 22"), "{refused:?}");
    // An importer's refusal says nothing in the log, as anybody's may be refused; root can ask for the reason.
    assert_eq!(refusals(&guest, "ssd2"), "");
    let why = guest.sh(&format!("p2pmemtest why {memory} {}", far.address));
    assert_eq!(why.unwrap().trim(), "-1");
    assert!(refusals(&guest, "ssd2").contains(NO_WAY));
    lab.finish();
}

/// Four SSDs below one switch, `ssd0` with a CMB that the CPU reaches fast, and a guest with what stacks upon disks.
fn stacked(name: &str) -> TestLab {
    let mut topology = Topology::builder("stacked")
        .root_port("rp0")
        .switch("sw0", "rp0", 4);
    for package in ["btrfs-progs", "dmsetup", "mdadm"] {
        topology = topology.package(package);
    }
    for module in ["btrfs", "dm_crypt", "raid456", "xts"] {
        topology = topology.load_module(module);
    }
    let cmb = CmbOptions::new(64 * MIB).mapped();
    topology = topology.nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).cmb_with(cmb));
    topology = topology.own_module("p2pmem");
    for number in 1..4 {
        topology = topology.nvme(
            format!("ssd{number}"),
            format!("sw0.{number}"),
            Nvme::memory(GIB / 4),
        );
    }
    TestLab::start(name, topology.build().unwrap())
}

/// The CMB as the kernel gives it to user space, and as p2pmem.ko does.
fn buffers(lab: &Lab) -> [String; 2] {
    let guest = lab.guest().unwrap();
    let stock = guest.nvme("ssd0").unwrap().p2pmem.unwrap();
    [stock, p2pmem::node(&guest, "ssd0", 4).unwrap()]
}

/// Block device of SSD `number`.
fn disk(lab: &Lab, number: usize) -> String {
    let ssd = lab.guest().unwrap().nvme(&format!("ssd{number}")).unwrap();
    ssd.block_device
}

fn copy_through(lab: &Lab, buffer: &str, from: &str, to: &str) -> Output {
    let line = format!("p2pcopy --check --size {SIZE} --chunk 64KiB --buffer {buffer} {from} {to}");
    lab.guest().unwrap().try_sh(&line).unwrap()
}

/// What direct reads of `place` give, as a checksum.
fn sum(lab: &Lab, place: &str) -> String {
    let line = format!("dd if={place} bs=1M count=2 iflag=direct 2>/dev/null | md5sum");
    lab.guest().unwrap().sh(&line).unwrap()
}

/// Whether `output` is that of a copy that was made and found right. Otherwise it was refused in so many words.
fn is_right(output: &Output) -> bool {
    if output.status.success() {
        assert!(output.text().contains("verified"), "{output:?}");
        return true;
    }
    let said = output.error_text();
    let words = ["Remote I/O error", "Invalid argument", "Input/output error"];
    assert!(words.iter().any(|word| said.contains(word)), "{output:?}");
    false
}

/// Peers' memory, by either of its nodes, as source and as target of direct I/O on `place`, which takes ordinary memory:
/// it is copied right, or refused with nothing changed. Whether it is copied.
fn takes_peer_memory(lab: &Lab, place: &str) -> bool {
    let ssd0 = disk(lab, 0);
    assert!(is_right(&copy_through(lab, "memory", &ssd0, place)));
    let mut taken = Vec::new();
    for buffer in buffers(lab) {
        // The buffer is good, for who takes such.
        assert!(is_right(&copy_through(lab, &buffer, &ssd0, &ssd0)));
        for (from, to) in [(ssd0.as_str(), place), (place, ssd0.as_str())] {
            let before = sum(lab, to);
            let right = is_right(&copy_through(lab, &buffer, from, to));
            assert!(right || sum(lab, to) == before, "{from} to {to}");
            taken.push(right);
        }
    }
    assert!(taken.iter().all(|right| *right == taken[0]), "{taken:?}");
    taken[0]
}

/// Encryption reads what is written with the CPU: Linux refuses peers' memory.
#[test]
fn dm_crypt_refuses_peer_memory() {
    let lab = stacked("dm_crypt_refuses_peer_memory");
    let (guest, below) = (lab.guest().unwrap(), disk(&lab, 1));
    let key = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210";
    let table = format!(
        "0 $(cat /sys/block/{}/size) crypt aes-xts-plain64 {key} 0 {below} 0",
        below.trim_start_matches("/dev/")
    );
    guest
        .system(&format!(
            "dmsetup create --noudevsync --table \"{table}\" secret"
        ))
        .unwrap();
    assert!(!takes_peer_memory(&lab, "/dev/dm-0"));
    // It does encrypt.
    assert_ne!(sum(&lab, "/dev/dm-0"), sum(&lab, &below));
    guest.system("dmsetup remove --noudevsync secret").unwrap();
    lab.finish();
}

/// Parity is calculated by the CPU: Linux refuses peers' memory, and the parity on the disks is right.
#[test]
fn software_raid_refuses_peer_memory() {
    let lab = stacked("software_raid_refuses_peer_memory");
    let guest = lab.guest().unwrap();
    let disks = [1, 2, 3].map(|number| disk(&lab, number)).join(" ");
    let create = "mdadm --create /dev/md5 --level=5 --raid-devices=3 --run --assume-clean";
    guest.system(&format!("{create} {disks}")).unwrap();
    assert!(!takes_peer_memory(&lab, "/dev/md5"));
    // All of it would take long; what was written is at the beginning.
    let check = "cd /sys/block/md5/md && echo 16384 > sync_max && echo check > sync_action \
        && until grep -q 16384 sync_completed; do usleep 10000; done; echo idle > sync_action; cat mismatch_cnt";
    assert_eq!(guest.sh(check).unwrap().trim(), "0");
    guest.system("mdadm --stop /dev/md5").unwrap();
    lab.finish();
}

/// A file system with checksums of data has the CPU read it: btrfs copies from and to peers' memory, and its checksums
/// hold.
#[test]
fn btrfs_copies_peer_memory() {
    let lab = stacked("btrfs_copies_peer_memory");
    let (guest, below) = (lab.guest().unwrap(), disk(&lab, 1));
    guest.system(&format!("mkfs.btrfs -q {below}")).unwrap();
    let mount = format!("mount -t btrfs {below} /btrfs");
    guest
        .sh(&format!(
            "mkdir /btrfs && {mount} && dd if=/dev/zero of=/btrfs/file bs=1M count=2"
        ))
        .unwrap();
    let taken = takes_peer_memory(&lab, "/btrfs/file");
    let before = sum(&lab, "/btrfs/file");
    guest.sh("umount /btrfs").unwrap();
    guest
        .system(&format!("btrfs check --check-data-csum {below}"))
        .unwrap();
    guest.sh(&mount).unwrap();
    assert_eq!(sum(&lab, "/btrfs/file"), before);
    guest.sh("umount /btrfs").unwrap();
    assert!(taken);
    lab.finish();
}

/// Pages of peers' memory do not get into a pipe (vmsplice); what the CPU copies out of it is right.
#[test]
fn a_pipe_takes_no_pages_of_peer_memory() {
    let lab = stacked("a_pipe_takes_no_pages_of_peer_memory");
    let guest = lab.guest().unwrap();
    let disk = disk(&lab, 1);
    let fio = |engine: &str, memory: &str| {
        let line = format!(
            "fio --name=pipe --filename={disk} --ioengine={engine} --direct=0 --rw=write --bs=64k --size=1m \
             --verify=crc32c --iomem={memory} --minimal"
        );
        guest.try_system(&line).unwrap()
    };
    for buffer in buffers(&lab) {
        let peer = format!("mmapshared:{buffer}");
        let refused = fio("splice", &peer);
        assert!(!refused.status.success(), "{refused:?}");
        let said = refused.text() + &refused.error_text();
        assert!(said.contains("Remote I/O error"), "{said}");
        for (engine, memory) in [("splice", "malloc"), ("psync", peer.as_str())] {
            let output = fio(engine, memory);
            assert!(output.status.success(), "{engine}, {memory}: {output:?}");
        }
    }
    lab.finish();
}
