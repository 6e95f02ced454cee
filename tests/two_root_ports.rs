//! Peers below different root ports, and below switches at different levels: where their traffic turns.

use p2plab::topology::{GIB, MIB, Nvme, Topology, TopologyBuilder};
use p2plab_guest::protocol::Exit;
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::reading::{Seen, Watch};

/// Bytes of each copy.
const SIZE: u64 = 4 * MIB;

/// An SSD with a CMB, whose submission queues stay in host memory.
fn ssd() -> Nvme {
    Nvme::memory(GIB / 4).cmb_with(p2plab::topology::CmbOptions::new(64 * MIB).data_only())
}

/// Two root ports with a switch below each, and an SSD below each switch.
fn two_switches(name: &str) -> TopologyBuilder {
    Topology::builder(name)
        .root_port("rp0")
        .root_port("rp1")
        .switch("sw0", "rp0", 2)
        .switch("sw1", "rp1", 2)
        .nvme("ssd0", "sw0.0", ssd())
        .nvme("ssd1", "sw1.0", ssd())
}

/// Copies from endpoint `from` through its CMB to `to`; what was seen has been held against the model.
fn copy(lab: &TestLab, topology: &Topology, from: &str, to: &str) -> Seen {
    let guest = lab.guest().unwrap();
    let (from, to) = (guest.nvme(from).unwrap(), guest.nvme(to).unwrap());
    let (buffer, size) = (from.p2pmem.unwrap(), SIZE);
    let watch = Watch::begin(lab, topology).unwrap();
    let (from, to) = (from.block_device, to.block_device);
    guest
        .sh(&format!(
            "p2pcopy --size {size} --depth 2 --buffer {buffer} {from} {to}"
        ))
        .unwrap();
    watch.end()
}

/// Payload that port `name` has passed in both directions.
fn payload(seen: &Seen, name: &str) -> u64 {
    seen.traffic.port(name).unwrap().payload_bytes()
}

/// On a CPU that Linux trusts with it, peers below two root ports reach each other across the root complex: the
/// data crosses both root ports and both switches once.
#[test]
fn peers_below_two_root_ports_meet_in_the_root_complex() {
    let topology = two_switches("two-root-ports")
        .guest_cpu("EPYC")
        .build()
        .unwrap();
    let lab = TestLab::start("peers_below_two_root_ports", topology.clone());
    let seen = copy(&lab, &topology, "ssd0", "ssd1");
    assert_eq!(
        seen.traffic
            .between("ssd0", "ssd1", TlpKind::CplD)
            .payload_bytes,
        SIZE
    );
    for port in ["rp0", "sw0", "sw0.0", "rp1", "sw1", "sw1.0"] {
        let passed = payload(&seen, port);
        assert!(
            (SIZE..SIZE + SIZE / 100).contains(&passed),
            "{port}: {passed}"
        );
    }
    lab.finish();
}

/// The same with the SSDs in the root ports themselves.
#[test]
fn peers_in_root_ports_meet_in_the_root_complex() {
    let topology = Topology::builder("in-root-ports")
        .root_port("rp0")
        .root_port("rp1")
        .nvme("ssd0", "rp0", ssd())
        .nvme("ssd1", "rp1", ssd())
        .guest_cpu("EPYC")
        .build()
        .unwrap();
    let lab = TestLab::start("peers_in_root_ports", topology.clone());
    let seen = copy(&lab, &topology, "ssd0", "ssd1");
    for port in ["rp0", "rp1"] {
        let passed = payload(&seen, port);
        assert!(
            (SIZE..SIZE + SIZE / 100).contains(&passed),
            "{port}: {passed}"
        );
    }
    lab.finish();
}

/// On any other CPU the kernel refuses and says so, user space gets an error, and nothing passes from peer to
/// peer: neither on an AMD CPU older than Zen (what `max` reports) nor on Intel's.
#[test]
fn linux_refuses_two_root_ports_on_other_cpus() {
    for (cpu, vendor) in [("max", "AuthenticAMD"), ("Skylake-Server", "GenuineIntel")] {
        let topology = two_switches("refused").guest_cpu(cpu).build().unwrap();
        let lab = TestLab::start("linux_refuses_two_root_ports", topology.clone());
        let guest = lab.guest().unwrap();
        assert!(guest.sh("cat /proc/cpuinfo").unwrap().contains(vendor));
        let (from, to) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
        // In one sentence, which names both.
        let reason = format!(
            "nvme {}: cannot be used for peer-to-peer DMA as the client and provider ({}) do not share an upstream bridge \
             or whitelisted host bridge",
            to.address, from.address
        );
        let (buffer, from, to) = (from.p2pmem.unwrap(), from.block_device, to.block_device);
        let watch = Watch::begin(&lab, &topology).unwrap();
        // What ssd0 puts into its own memory leaves it on no port; ssd1 must not fetch it.
        let output = guest.try_sh(&format!(
            "p2pcopy --size 1MiB --buffer {buffer} {from} {to}"
        ));
        let output = output.unwrap();
        assert_eq!(output.status, Exit::Status(1), "{output:?}");
        assert!(
            output
                .error_text()
                .contains("writing at byte 0 failed: Invalid argument"),
            "{output:?}"
        );
        let said = guest
            .sh("dmesg | grep -o 'nvme .*cannot be used for peer-to-peer DMA.*'")
            .unwrap();
        assert_eq!(said.trim(), reason);
        let seen = watch.end();
        assert!(seen.trace("ssd1").entries.is_empty());
        assert_eq!(seen.traffic.between("ssd1", "ssd0", TlpKind::MRd).tlps, 0);
        lab.finish();
    }
}

/// Below cascaded switches, peers' traffic turns at the lowest switch that both are below.
#[test]
fn cascaded_switches_turn_traffic_at_the_lowest() {
    let topology = Topology::builder("cascaded")
        .root_port("rp0")
        .switch("top", "rp0", 3)
        .switch("low", "top.2", 2)
        .nvme("ssd0", "top.0", ssd())
        .nvme("ssd1", "low.0", ssd())
        .nvme("ssd2", "low.1", ssd())
        .build()
        .unwrap();
    let lab = TestLab::start("cascaded_switches", topology.clone());
    let queues_only = 0..SIZE / 100;
    for (from, to, used, spared) in [
        (
            "ssd0",
            "ssd1",
            ["top.0", "top.2", "low", "low.0"].as_slice(),
            ["top", "rp0", "low.1"].as_slice(),
        ),
        (
            "ssd1",
            "ssd0",
            &["top.0", "top.2", "low", "low.0"],
            &["top", "rp0", "low.1"],
        ),
        (
            "ssd1",
            "ssd2",
            &["low.0", "low.1"],
            &["low", "top.2", "top", "rp0", "top.0"],
        ),
    ] {
        let seen = copy(&lab, &topology, from, to);
        for port in used {
            let passed = payload(&seen, port);
            assert!(
                (SIZE..SIZE + SIZE / 100).contains(&passed),
                "{from} to {to}: {port}: {passed}"
            );
        }
        for port in spared {
            let passed = payload(&seen, port);
            assert!(
                queues_only.contains(&passed),
                "{from} to {to}: {port}: {passed}"
            );
        }
    }
    lab.finish();
}
