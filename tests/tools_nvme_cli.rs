//! nvme-cli finds an SSD as it finds a real one, and what it asks of it happens.

use std::os::unix::fs::{FileExt, MetadataExt};

use p2plab::topology::{MIB, Nvme};
use p2plab_tests::TestLab;
use p2plab_tests::tools::{Tools, number, with_tools};

use crate::disks::medium;

const SIZE: u64 = 128 * MIB;

/// Format of the namespace's blocks that is in use: `log2(bytes)` (NVM 1.0, figure 97, FLBAS and LBAF).
fn block_shift(id_ns: &serde_json::Value) -> u64 {
    let index = number(&id_ns["flbas"]) & 0xf;
    number(&id_ns["lbafs"][usize::try_from(index).unwrap()]["ds"])
}

/// `list`, `id-ctrl`, `id-ns`, `list-ns` and `ns-descs` say what the topology says, and agree with the kernel.
#[test]
fn identify_says_what_the_topology_says() {
    let name = "identify_says_what_the_topology_says";
    let ssds = [
        Nvme::memory(SIZE).serial("FIRST"),
        Nvme::memory(2 * SIZE).block_size(4096),
    ];
    let lab = TestLab::start(name, with_tools("identify", ssds));
    for (ssd, serial, size, block) in [
        ("ssd0", "FIRST", SIZE, 512),
        ("ssd1", "ssd1", 2 * SIZE, 4096),
    ] {
        let tools = Tools::new(&lab, ssd);
        let list = tools.json("nvme list -o json");
        let disk = &*tools.nvme.block_device;
        let mut entries = list["Devices"].as_array().unwrap().iter();
        let entry = entries.find(|e| e["DevicePath"] == disk).unwrap();
        assert_eq!(entry["SerialNumber"], serial);
        assert_eq!(number(&entry["SectorSize"]), block);
        assert_eq!(number(&entry["PhysicalSize"]), size);

        let id = tools.json("nvme id-ctrl CTRL -o json");
        assert_eq!(id["sn"].as_str().unwrap().trim_end(), serial);
        assert_eq!(number(&id["ver"]), 2 << 16, "NVMe 2.0");
        assert_eq!(number(&id["sqes"]), 0x66);
        let sysfs = format!("cat /sys/class/nvme/{}/", tools.nvme.controller);
        let nqn = tools.guest.sh(&format!("{sysfs}subsysnqn")).unwrap();
        assert_eq!(id["subnqn"], nqn.trim());

        let ns = tools.json("nvme id-ns DISK -o json");
        assert_eq!(1 << block_shift(&ns), block);
        assert_eq!(number(&ns["nsze"]) * block, size);
        let list = tools.json("nvme list-ns CTRL -o json");
        assert_eq!(list["nsid_list"], serde_json::json!([{ "nsid": 1 }]));
        let descriptors = tools.json("nvme ns-descs DISK -o json");
        let descriptors = descriptors["ns-descs"].as_array().unwrap();
        let find = |kind: &str| descriptors.iter().find(|d| d["Type"] == kind).unwrap();
        for kind in ["eui64", "nguid"] {
            assert_eq!(find(kind)[kind], ns[kind], "{kind}");
        }
    }
    lab.finish();
}

/// `show-regs` reads what the controller holds; it is enabled and ready, and stays so over `reset`, which makes
/// settings that were not saved those of before.
#[test]
fn registers_features_and_reset() {
    let name = "registers_features_and_reset";
    let ssds = [Nvme::memory(SIZE).cmb(64 * MIB), Nvme::memory(SIZE)];
    let lab = TestLab::start(name, with_tools("registers", ssds));
    let tools = Tools::new(&lab, "ssd0");
    assert_registers(&lab, &tools);
    let threshold = |select: u32| {
        let feature = tools.json(&format!("nvme get-feature CTRL -f 4 -s {select} -o json"));
        let attributes = feature["feature: 0x04"][0].as_object().unwrap();
        number(attributes.iter().find(|(key, _)| *key != "name").unwrap().1)
    };
    let (current, default) = (threshold(0), threshold(1));
    assert_eq!(current, default);
    tools.run(&format!("nvme set-feature CTRL -f 4 -V {}", default - 1));
    assert_eq!((threshold(0), threshold(1)), (default - 1, default));
    tools.run("nvme reset CTRL");
    assert_eq!(threshold(0), default, "a reset ends what was not saved");
    assert_registers(&lab, &tools);

    let queues = tools.run("nvme get-feature CTRL -f 7");
    let queues = number(&queues.rsplit("value:").next().unwrap().trim().into());
    let cpus = tools.guest.sh("nproc").unwrap().trim().parse::<u64>();
    assert_eq!(
        queues,
        (cpus.clone().unwrap() - 1) << 16 | (cpus.unwrap() - 1)
    );
    let why = tools.refused("nvme get-feature CTRL -f 0x7f");
    assert!(why.contains("Invalid Field"), "{why}");
    lab.finish();
}

/// What `show-regs` maps and reads is what the device model holds.
fn assert_registers(lab: &TestLab, tools: &Tools<'_>) {
    let shown = tools.json("nvme show-regs CTRL -o json");
    let dump = lab.devices().device("ssd0").unwrap().function().dump();
    let held = |register: &str| number(&dump["endpoint"]["registers"][register]);
    for (shown_as, register) in [
        ("cap", "CAP"),
        ("vs", "VS"),
        ("cc", "CC"),
        ("csts", "CSTS"),
        ("aqa", "AQA"),
        ("asq", "ASQ"),
        ("acq", "ACQ"),
        ("cmbloc", "CMBLOC"),
        ("cmbsz", "CMBSZ"),
        ("cmbmsc", "CMBMSC"),
    ] {
        assert_eq!(number(&shown[shown_as]), held(register), "{register}");
    }
    assert_eq!((held("CC") & 1, held("CSTS") & 1), (1, 1));
    assert_ne!(held("CMBSZ"), 0);
}

/// `effects-log`, `fw-log` and `smart-log`: the log pages exist, and the counts are those of what was done.
#[test]
fn log_pages_tell_what_was_done() {
    let name = "log_pages_tell_what_was_done";
    let lab = TestLab::start(name, with_tools("logs", [Nvme::memory(SIZE)]));
    let tools = Tools::new(&lab, "ssd0");
    let effects = tools.json("nvme effects-log CTRL -o json");
    let io = effects[0]["io_cmd_set"].as_object().unwrap();
    let effect = |opcode: u32| {
        let prefix = format!("IOCS_{opcode} ");
        let found = io.iter().find(|(key, _)| key.starts_with(&prefix));
        found.map_or(0, |(_, value)| number(value))
    };
    // CSUPP, and LBCC for those that change blocks (Base 2.0, figure 211).
    assert_eq!((effect(0) & 3, effect(1) & 3, effect(2) & 3), (1, 3, 1));
    assert_eq!((effect(8) & 3, effect(9) & 3), (3, 3));
    let firmware = tools.json("nvme fw-log CTRL -o json");
    let firmware = firmware[&*tools.nvme.controller].as_object().unwrap();
    let id = tools.json("nvme id-ctrl CTRL -o json");
    assert_eq!(number(&firmware["Active Firmware Slot (afi)"]) & 7, 1);
    let slot = firmware["Firmware Rev Slot 1"].as_str().unwrap();
    assert!(slot.contains(id["fr"].as_str().unwrap().trim()), "{slot}");

    let before = tools.json("nvme smart-log CTRL -o json");
    tools.run("dd if=/dev/zero of=DISK oflag=direct bs=64k count=160");
    tools.run("dd if=DISK of=/dev/null iflag=direct bs=64k count=320");
    let after = tools.json("nvme smart-log CTRL -o json");
    let gained = |field: &str| number(&after[field]) - number(&before[field]);
    assert_eq!(gained("host_write_commands"), 160);
    assert_eq!(gained("host_read_commands"), 320);
    // Thousands of units of 512 bytes, rounded up (Base 2.0, figure 207): 10 MiB and 20 MiB.
    assert!((20..=21).contains(&gained("data_units_written")));
    assert!((40..=41).contains(&gained("data_units_read")));
    assert_eq!(number(&after["critical_warning"]), 0);
    assert_eq!(gained("num_err_log_entries"), 0);
    lab.finish();
}

/// `write`, `read`, `io-passthru`, `write-zeroes`, `dsm` and `flush`: the host finds in the medium what they did.
#[test]
fn commands_change_the_medium() {
    let name = "commands_change_the_medium";
    let lab = TestLab::start(name, with_tools("medium", [Nvme::memory(SIZE)]));
    let tools = Tools::new(&lab, "ssd0");
    let file = medium(&lab, "ssd0");
    let blocks = |lba: u64, count: u64| {
        let mut data = vec![0; usize::try_from(count * 512).unwrap()];
        file.read_exact_at(&mut data, lba * 512).unwrap();
        data
    };
    let data = tools.bytes("head -c 1048576 /dev/urandom > /tmp/data && cat /tmp/data");
    tools.run("nvme write DISK -s 1000 -c 2047 -z 1048576 -d /tmp/data");
    assert!(blocks(1000, 2048) == data);
    assert!(tools.read(1000, 2048, MIB) == data);

    // Opcodes of NVM 1.0, section 3: Write 01h and Read 02h; block 9000, 8 blocks, zero-based.
    tools.run(
        "nvme io-passthru DISK --opcode=1 -n 1 -l 4096 --cdw10=9000 --cdw12=7 -w -i /tmp/data",
    );
    assert!(blocks(9000, 8) == data[..4096]);
    let read = "nvme io-passthru DISK --opcode=2 -n 1 -l 4096 --cdw10=9000 --cdw12=7 -r -b";
    assert!(tools.bytes(read) == data[..4096]);

    tools.run("nvme write-zeroes DISK -s 1000 -c 15");
    assert!(blocks(1000, 16).iter().all(|byte| *byte == 0));
    assert!(blocks(1016, 8) == data[16 * 512..24 * 512]);
    let allocated = file.metadata().unwrap().blocks();
    tools.run("nvme dsm DISK --ad -s 1024,2040 -b 1000,1000");
    assert!(blocks(1024, 1000).iter().all(|byte| *byte == 0));
    assert!(blocks(2040, 1000).iter().all(|byte| *byte == 0));
    assert!(blocks(2024, 16) == data[1024 * 512..1040 * 512]);
    let freed = allocated - file.metadata().unwrap().blocks();
    assert!(freed > 1000, "of 2000 deallocated blocks {freed} are free");
    tools.run("nvme flush DISK -n 1");
    lab.finish();
}

/// What is refused gets the status that the specification names, and an entry in `error-log`.
#[test]
fn refusals_are_logged() {
    let name = "refusals_are_logged";
    let lab = TestLab::start(name, with_tools("refusals", [Nvme::memory(SIZE)]));
    let tools = Tools::new(&lab, "ssd0");
    let logged = || tools.json("nvme error-log CTRL -e 1 -o json")["errors"][0].clone();
    let before = number(&logged()["error_count"]);
    let end = SIZE / 512;
    for (count, (command, status, said, lba)) in (1..).zip([
        // Status: LBA Out of Range 80h, Invalid Command Opcode 01h, Invalid Namespace or Format 0Bh.
        (
            format!("read DISK -s {} -c 8 -z 4608", end - 8),
            0x80,
            "LBA Out of Range",
            end - 8,
        ),
        (
            "io-passthru DISK --opcode=0x83 -n 1".to_owned(),
            0x01,
            "Invalid Command Opcode",
            0,
        ),
        (
            "id-ns CTRL -n 0xfffffffe".to_owned(),
            0x0b,
            "Invalid Namespace",
            0,
        ),
    ]) {
        let why = tools.refused(&format!("nvme {command}"));
        assert!(why.contains(said), "{why}");
        let entry = logged();
        assert_eq!(number(&entry["error_count"]), before + count);
        // Status Field of the completion, with the phase tag left out of it (Base 2.0, figure 205).
        assert_eq!(number(&entry["status_field"]) & 0x7ff, status, "{entry}");
        if lba > 0 {
            assert_eq!(number(&entry["lba"]), lba, "{entry}");
            assert_ne!(number(&entry["sqid"]), 0, "{entry}");
        }
    }
    let smart = tools.json("nvme smart-log CTRL -o json");
    assert_eq!(number(&smart["num_err_log_entries"]), before + 3);
    lab.finish();
}
