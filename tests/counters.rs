//! The counters of every port equal an independent calculation from the commands that the SSDs executed and from
//! what the guest programmed into their registers.

use p2plab::lab::Lab;
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::reading::{Seen, Watch, program, settings};
use p2plab_tests::traffic::{Settings, between};

use crate::patience::until;

/// Bytes of each copy.
const SIZE: u64 = 4 * MIB;

/// One switch, two SSDs; submission queues in host memory, so that CPU writes are doorbells only.
fn two_ssds(name: &str) -> Topology {
    Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme(
            "ssd0",
            "sw0.0",
            Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(64 * MIB).data_only()),
        )
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .build()
        .unwrap()
}

/// Copies from ssd0 to ssd1 with further `options` of p2pcopy; what was seen has been held against the model.
fn copy(lab: &Lab, topology: &Topology, p2p: bool, options: &str) -> Seen {
    let guest = lab.guest().unwrap();
    let (from, to) = (guest.nvme("ssd0").unwrap(), guest.nvme("ssd1").unwrap());
    let buffer = if p2p {
        from.p2pmem.unwrap()
    } else {
        "memory".to_owned()
    };
    let watch = Watch::begin(lab, topology).unwrap();
    let (from, to) = (from.block_device, to.block_device);
    guest
        .sh(&format!("p2pcopy --buffer {buffer} {options} {from} {to}"))
        .unwrap();
    watch.end()
}

/// What depends on timing has bounds: 4-byte doorbells, at most two and at least one for each command; no more
/// interrupts than completions, and as many as the devices say.
fn check_timing(lab: &Lab, seen: &Seen) {
    for (name, log) in &seen.traces {
        let commands = log.entries.len() as u64;
        let doorbells = seen.traffic.between("cpu", name, TlpKind::MWr);
        assert!(
            (1..=2 * commands).contains(&doorbells.tlps),
            "{name}: {doorbells:?}, {commands} commands"
        );
        assert_eq!(doorbells.payload_bytes, 4 * doorbells.tlps, "{name}");
        let interrupts = seen.traffic.between(name, "interrupts", TlpKind::MWr);
        assert!(
            (1..=commands).contains(&interrupts.tlps),
            "{name}: {interrupts:?}, {commands} commands"
        );
        assert_eq!(interrupts.payload_bytes, 4 * interrupts.tlps);
        let device = lab.devices().device(name).unwrap();
        // The device counts before it signals and the switch afterwards, so the last one may be under way.
        until("the switch to count the last interrupt", || {
            let dump = device.function().dump();
            let says = dump
                .pointer("/endpoint/counters/interrupts")
                .and_then(serde_json::Value::as_u64);
            says == Some(lab.traffic().between(name, "interrupts", TlpKind::MWr).tlps)
        });
    }
}

/// In both modes, DMA is counted exactly at every port, from and to whom it went.
#[test]
fn both_modes_count_what_their_commands_ask_for() {
    let topology = two_ssds("counters");
    let lab = TestLab::start("both_modes_count", topology.clone());
    for p2p in [false, true] {
        let seen = copy(&lab, &topology, p2p, &format!("--size {SIZE} --depth 4"));
        let payload = |from, to, kind| seen.traffic.between(from, to, kind).payload_bytes;
        let through_memory = if p2p { 0 } else { SIZE };
        assert!(payload("ssd0", "memory", TlpKind::MWr) >= through_memory);
        assert_eq!(
            payload("ssd0", "ssd1", TlpKind::CplD),
            SIZE - through_memory
        );
        assert!(payload("ssd0", "memory", TlpKind::MWr) < through_memory + SIZE / 100);
        check_timing(&lab, &seen);
    }
    lab.finish();
}

/// Programming other packet sizes into the SSDs changes the counts as calculated. The buffer begins at an odd
/// address, so that boundaries matter.
#[test]
fn packets_follow_what_the_guest_programs() {
    let topology = two_ssds("settings");
    let lab = TestLab::start("packets_follow_what_the_guest_programs", topology.clone());
    let guest = lab.guest().unwrap();
    let mut completions = Vec::new();
    for (mps, mrrs, rcb) in [
        (128, 512, 64),
        (256, 4096, 64),
        (256, 4096, 128),
        (512, 128, 128),
    ] {
        let wanted = Settings { mps, mrrs, rcb };
        for name in ["ssd0", "ssd1"] {
            program(&guest, name, wanted).unwrap();
            assert_eq!(settings(&guest, name).unwrap(), wanted);
        }
        let seen = copy(
            &lab,
            &topology,
            false,
            "--size 1MiB --chunk 64KiB --buffer-offset 68",
        );
        let write_log = seen.trace("ssd1");
        assert_eq!(write_log.entries[0].data[0].address % 128, 68);
        // Those of the data: how many lists describe it is the kernel's choice.
        let mut without_data = write_log.clone();
        without_data.entries.iter_mut().for_each(|e| e.data.clear());
        let other = seen.model.dma("ssd1", &without_data);
        let all = seen.traffic.between("memory", "ssd1", TlpKind::CplD).tlps;
        let other = between(&other, "memory", "ssd1", TlpKind::CplD).tlps;
        completions.push(all - other);
        copy(
            &lab,
            &topology,
            true,
            "--size 1MiB --chunk 64KiB --buffer-offset 68",
        );
    }
    // That both agree is no accident: the sizes have changed the count. The boundary has not: it moves where
    // completions are cut, but whole blocks take as many.
    completions.dedup();
    assert_eq!(completions.len(), 3, "{completions:?}");
    lab.finish();
}

/// A peer completes reads in packets of its own Max_Payload_Size, and on boundaries of 128 bytes.
#[test]
fn a_peer_completes_with_its_own_settings() {
    let topology = two_ssds("peers");
    let lab = TestLab::start("a_peer_completes_with_its_own_settings", topology.clone());
    let guest = lab.guest().unwrap();
    let (ours, theirs) = (
        Settings {
            mps: 128,
            mrrs: 1024,
            rcb: 64,
        },
        Settings {
            mps: 512,
            mrrs: 128,
            rcb: 64,
        },
    );
    program(&guest, "ssd1", ours).unwrap();
    program(&guest, "ssd0", theirs).unwrap();
    let seen = copy(&lab, &topology, true, "--size 1MiB --chunk 64KiB");
    assert_eq!(
        seen.traffic.between("ssd1", "ssd0", TlpKind::MRd).tlps,
        MIB / 1024
    );
    assert_eq!(
        seen.traffic.between("ssd0", "ssd1", TlpKind::CplD).tlps,
        MIB / 512
    );
    lab.finish();
}
