//! What a topology says of an SSD's namespaces and memory is what Linux finds, and acts on.

use std::fs::File;
use std::os::unix::fs::FileExt;

use p2plab::topology::{GIB, KIB, MIB, Metadata, NamespaceOptions, Nvme, PmrOptions};
use p2plab_tests::TestLab;
use p2plab_tests::tools::{Tools, number, with_tools};

use crate::disks::assert_pattern;

/// CRC-16/T10-DIF (NVM Command Set 1.0, section 5.2.1), bit by bit.
fn guard(data: &[u8]) -> u16 {
    data.iter().fold(0, |crc: u16, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
            let carry = crc & 0x8000 != 0;
            crc << 1 ^ if carry { 0x8bb7 } else { 0 }
        })
    })
}

/// Linux sees protection information of type 1, makes it for what it writes, and checks what it reads. What it made is
/// in the file beside the disk's. A bit that flips there is an error of the SSD that the kernel tells its reader of, and
/// only of that block; one in what Linux itself made would have been, too.
#[test]
fn linux_protects_its_blocks_end_to_end() {
    const BLOCK: u64 = 4096;
    let name = "linux_protects_its_blocks_end_to_end";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let ssd = Nvme::file(&path, 64 * MIB)
        .create()
        .block_size(4096)
        .metadata(Metadata::Protection);
    let lab = TestLab::start(name, with_tools("protection", [ssd]));
    let tools = Tools::new(&lab, "ssd0");
    let disk = tools.nvme.block_device.replace("/dev/", "");
    let line =
        format!("cd /sys/block/{disk}/integrity && cat format tag_size read_verify write_generate");
    let profile = tools.run(&line);
    assert!(profile.starts_with("T10-DIF-TYPE1-CRC\n"), "{profile}");
    assert!(profile.ends_with("\n1\n1\n"), "{profile}");
    let formatted = tools.json("nvme id-ns DISK -o json");
    assert_eq!(
        (number(&formatted["dps"]), number(&formatted["flbas"])),
        (1, 3)
    );

    let device = &tools.nvme.block_device;
    let copy = format!(
        "p2pcopy --check --seed 5 --size 1MiB --chunk 64KiB --destination-offset 8MiB {device} {device}"
    );
    tools.guest.sh(&copy).unwrap();
    let file = File::open(&path).unwrap();
    assert_pattern(&file, 5, 0, MIB);
    // Tuples are in the file as complements: a hole is FFh, which turns checks off.
    let metadata = File::options()
        .read(true)
        .write(true)
        .open(folder.path().join("disk.meta"))
        .unwrap();
    for block in [0, 7, 255] {
        let (mut data, mut tuple) = (vec![0; BLOCK as usize], [0; 8]);
        file.read_exact_at(&mut data, block * BLOCK).unwrap();
        metadata.read_exact_at(&mut tuple, block * 8).unwrap();
        let [high, low, _, _, reference @ ..] = tuple.map(|byte| !byte);
        assert_eq!(u16::from_be_bytes([high, low]), guard(&data), "{block}");
        assert_eq!(u64::from(u32::from_be_bytes(reference)), block);
    }

    let mut tuple = [0; 8];
    metadata.read_exact_at(&mut tuple, 7 * 8).unwrap();
    tuple[1] ^= 0x10;
    metadata.write_all_at(&tuple, 7 * 8).unwrap();
    let read = |block| format!("dd if=DISK of=/dev/null bs=4096 iflag=direct count=1 skip={block}");
    tools.run(&read(6));
    let said = tools.refused(&read(7));
    assert!(said.contains("Invalid or incomplete"), "EILSEQ: {said}");
    let log = tools.guest.sh("dmesg").unwrap();
    let told = format!("protection error, dev {disk}, sector 56");
    assert!(log.contains(&told), "{log}");
    // What is written is whole again.
    tools.run("dd if=/dev/urandom of=DISK bs=4096 oflag=direct count=1 seek=7");
    tools.run(&read(7));
    lab.finish();
}

/// A namespace that keeps nothing, one in memory that refuses writes, 8 bytes of metadata that mean nothing, and what a
/// PMR says of itself.
#[test]
fn what_a_topology_says_is_what_linux_finds() {
    let name = "what_a_topology_says_is_what_linux_finds";
    let pmr = PmrOptions {
        elasticity_buffer: 64 * KIB,
        sustained_throughput: 3 * GIB,
        ..PmrOptions::memory(16 * MIB)
    };
    let ssd = Nvme::null(64 * GIB)
        .namespace(NamespaceOptions::memory(64 * MIB))
        .read_only()
        .namespace(NamespaceOptions::memory(64 * MIB))
        .metadata(Metadata::Plain)
        .pmr(pmr);
    let lab = TestLab::start(name, with_tools("options", [ssd]));
    let tools = Tools::new(&lab, "ssd0");
    // The kernel counts namespaces as it finds them, which is in no order.
    let disks = [1, 2, 3].map(|nsid| {
        let line = format!("grep -lx {nsid} /sys/block/nvme*/nsid | cut -d/ -f4");
        format!("/dev/{}", tools.run(&line).trim())
    });
    let [null, read_only, plain] = &disks;

    tools.run(&format!(
        "dd if=/dev/urandom of={null} bs=1M count=8 oflag=direct conv=fsync"
    ));
    tools.run(&format!(
        "dd if={null} bs=1M count=8 iflag=direct | cmp -n 8388608 - /dev/zero"
    ));
    let flags = tools.run(&format!("blockdev --getro {}", disks.join(" ")));
    assert_eq!(flags, "0\n1\n0\n");
    let refused = tools.refused(&format!("dd if=/dev/zero of={read_only} bs=4096 count=1"));
    assert!(refused.contains("not permitted"), "{refused}");
    tools.run(&format!(
        "dd if={read_only} bs=1M | cmp -n 67108864 - /dev/zero"
    ));
    let line = format!("p2pcopy --check --size 1MiB --destination-offset 8MiB {plain} {plain}");
    tools.guest.sh(&line).unwrap();
    let formatted = tools.json(&format!("nvme id-ns {plain} -o json"));
    let formats = (number(&formatted["dps"]), number(&formatted["flbas"]));
    assert_eq!(formats, (0, 2));

    let registers = tools.json("nvme show-regs CTRL -o json");
    // A size unit or none, and a number of them.
    let scaled = |name: &str| {
        let value = number(&registers[name]);
        (value >> 8) << (10 * (value & 3))
    };
    assert_eq!((scaled("pmrebs"), scaled("pmrswtp")), (64 * KIB, 3 * GIB));
    lab.finish();
}
