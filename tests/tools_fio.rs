//! fio writes, reads back and compares, on raw disks, in files, and through a CMB.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use p2plab::topology::{CmbOptions, MIB, Nvme, Topology};
use p2plab_pcie::TlpKind;
use p2plab_tests::TestLab;
use p2plab_tests::tools::{Tools, number, parse, with_tools};

use crate::disks::medium;

/// All that one run of fio may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// What every job has: asynchronous direct I/O, each block with a checksum, the first wrong one ends the run.
const VERIFY: &str = "--ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --randrepeat=1";

/// Runs fio with `arguments` and returns what it says of each job; none has failed.
fn fio(tools: &Tools<'_>, arguments: &str) -> Vec<serde_json::Value> {
    let line = format!("fio --output-format=json --group_reporting {arguments}");
    let text = tools.guest.system_within(&line, DEADLINE).unwrap();
    let report = parse(&text);
    let jobs = report["jobs"].as_array().unwrap().clone();
    assert!(jobs.iter().all(|job| number(&job["error"]) == 0), "{text}");
    jobs
}

/// Bytes written and read in all of `jobs`.
fn moved(jobs: &[serde_json::Value]) -> (u64, u64) {
    let sum = |kind: &str| jobs.iter().map(|job| number(&job[kind]["io_bytes"])).sum();
    (sum("write"), sum("read"))
}

/// Four jobs, each with 16 commands under way, write blocks of mixed sizes in random order and read them back; on
/// an SSD with blocks of 512 bytes and one with blocks of 4096 at the same time. And fio would notice: one byte that
/// is changed in the medium fails the next run.
#[test]
fn raw_disks_of_both_formats_verify() {
    let name = "raw_disks_of_both_formats_verify";
    let ssds = [512, 4096].map(|bytes| Nvme::memory(128 * MIB).block_size(bytes));
    let lab = TestLab::start(name, with_tools("raw", ssds));
    let tools = Tools::new(&lab, "ssd0");
    let (small, large) = (tools.nvme.block_device.clone(), {
        lab.guest().unwrap().nvme("ssd1").unwrap().block_device
    });
    let each = "--thread --rw=randwrite --size=8m --offset_increment=16m --numjobs=4 --iodepth=16";
    let jobs = |verify: &str| {
        format!(
            "{VERIFY} {verify} {each} \
             --name=small --filename={small} --bssplit=512/20:1536/20:4k/20:24k/20:128k/20 \
             --name=large {verify} {each} --filename={large} --bsrange=4k-256k"
        )
    };
    let done = fio(&tools, &jobs("--new_group"));
    assert_eq!(done.len(), 2);
    assert_eq!(moved(&done), (64 * MIB, 64 * MIB));
    for ssd in ["ssd0", "ssd1"] {
        let dump = lab.devices().device(ssd).unwrap().function().dump();
        let written = number(&dump["endpoint"]["counters"]["bytes_written"]);
        assert_eq!(written, 32 * MIB, "{ssd}");
        let queues = &dump["endpoint"]["queues"]["submission"];
        assert!(queues.as_array().unwrap().len() > 2, "{queues}");
    }
    // The seventh byte of a block of the third job.
    let (file, place) = (medium(&lab, "ssd1"), 33 * MIB + 7);
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[!byte[0]], place).unwrap();
    let why = tools.refused(&format!("fio {}", jobs("--new_group --verify_only")));
    assert!(why.contains("verify"), "{why}");
    lab.finish();
}

/// Files on ext4 and on xfs, written through the page cache's back by two jobs each.
#[test]
fn files_on_ext4_and_xfs_verify() {
    let name = "files_on_ext4_and_xfs_verify";
    let ssds = [
        Nvme::memory(128 * MIB).block_size(4096),
        Nvme::memory(512 * MIB),
    ];
    let lab = TestLab::start(name, with_tools("files", ssds));
    let ext4 = Tools::new(&lab, "ssd0");
    ext4.run("mkfs.ext4 -q DISK && mkdir /mnt/ext4 && mount DISK /mnt/ext4");
    let xfs = Tools::new(&lab, "ssd1");
    xfs.run("mkfs.xfs -q DISK && mkdir /mnt/xfs && mount DISK /mnt/xfs");
    let each = "--new_group --thread --rw=randrw --size=6m --numjobs=2 --iodepth=8 --fsync=64";
    let done = fio(
        &ext4,
        &format!(
            "{VERIFY} {each} --name=ext4 --directory=/mnt/ext4 --bsrange=4k-64k \
             {each} --name=xfs --directory=/mnt/xfs --bssplit=512/30:4k/40:128k/30"
        ),
    );
    let (written, read) = moved(&done);
    assert!(written > 8 * MIB && read > 8 * MIB, "{written} {read}");
    ext4.run("umount /mnt/ext4 && e2fsck -fn DISK");
    xfs.run("umount /mnt/xfs && xfs_repair -n DISK");
    lab.finish();
}

/// ssd0 with `cmb`, and ssd1, which uses it.
fn with_cmb(name: &str, cmb: CmbOptions) -> Topology {
    with_tools(
        name,
        [
            Nvme::memory(128 * MIB).cmb_with(cmb),
            Nvme::memory(128 * MIB),
        ],
    )
}

/// `--iomem` for the CMB of ssd0, and the disk of ssd1.
fn cmb_and_disk(lab: &TestLab) -> (String, String) {
    let guest = lab.guest().unwrap();
    let cmb = guest.nvme("ssd0").unwrap().p2pmem.unwrap();
    let disk = guest.nvme("ssd1").unwrap().block_device;
    (format!("--iomem=mmapshared:{cmb}"), disk)
}

/// Blocks that four jobs fill and compare in the CMB of ssd0 go to ssd1 and back across the switch: none of their bytes
/// crosses the upstream port. The CPU's own accesses are not counted: its view of the CMB is mapped.
#[test]
fn a_cmb_as_fios_memory_verifies() {
    let name = "a_cmb_as_fios_memory_verifies";
    let cmb = CmbOptions::new(64 * MIB).data_only().mapped();
    let lab = TestLab::start(name, with_cmb("cmb-verify", cmb));
    let tools = Tools::new(&lab, "ssd0");
    let (memory, disk) = cmb_and_disk(&lab);
    let before = lab.traffic();
    let done = fio(
        &tools,
        &format!(
            // Not --thread: then fio 3.39 frees the file's name once for each job.
            "{VERIFY} {memory} --rw=randwrite --bsrange=4k-128k --size=4m --offset_increment=16m --numjobs=4 \
             --iodepth=8 --name=cmb --filename={disk}"
        ),
    );
    assert_eq!(moved(&done), (16 * MIB, 16 * MIB));
    let traffic = lab.traffic().since(&before);
    let fetched = traffic.between("ssd1", "ssd0", TlpKind::MRd);
    let stored = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    assert_eq!(fetched.requested_bytes, 16 * MIB, "{traffic}");
    assert_eq!(stored.payload_bytes, 16 * MIB, "{traffic}");
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    lab.finish();
}

/// The same with every access counted, the CPU's too: fio reads the blocks and does not look at them, so that
/// there are none.
#[test]
fn reads_into_a_cmb_stay_below_the_switch() {
    let name = "reads_into_a_cmb_stay_below_the_switch";
    let cmb = CmbOptions::new(64 * MIB).data_only();
    let lab = TestLab::start(name, with_cmb("cmb-read", cmb));
    let tools = Tools::new(&lab, "ssd0");
    let (memory, disk) = cmb_and_disk(&lab);
    let before = lab.traffic();
    let done = fio(
        &tools,
        &format!(
            // Not --thread: then fio 3.39 frees the file's name once for each job.
            "--ioengine=libaio --direct=1 {memory} --rw=randread --bs=64k --size=64m --iodepth=4 \
             --numjobs=2 --offset_increment=64m --name=cmb --filename={disk}"
        ),
    );
    assert_eq!(moved(&done), (0, 128 * MIB));
    let traffic = lab.traffic().since(&before);
    let stored = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    assert_eq!(stored.payload_bytes, 128 * MIB, "{traffic}");
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    lab.finish();
}
