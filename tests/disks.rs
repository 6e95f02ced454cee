//! The SSDs are disks: what is written is read back, by the guest and by the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use p2plab::lab::Lab;
use p2plab::topology::{MIB, Nvme, Topology};
use p2plab::wait;
use p2plab_guest::pattern;
use p2plab_tests::TestLab;

const SIZE: u64 = 128 * MIB;

/// Blocks of 512 bytes, transfers down to one of them, at offsets that no page begins at.
#[test]
fn disks_with_blocks_of_512_bytes_keep_data() {
    let transfers = [
        // chunk, offset, count
        (512, 512, 64),
        (4096, 1536, 64),
        (128 << 10, 7 << 9, 24),
        (MIB + 512, 3 * MIB + 512, 7),
    ];
    keep_data("disks_with_blocks_of_512_bytes_keep_data", 512, &transfers);
}

/// The same with blocks of 4096 bytes.
#[test]
fn disks_with_blocks_of_4096_bytes_keep_data() {
    let transfers = [
        (4096, 4096, 64),
        (12 << 10, 20 << 10, 64),
        (MIB, 5 * MIB, 8),
        (4 * MIB + 4096, 64 * MIB - 4096, 3),
    ];
    keep_data(
        "disks_with_blocks_of_4096_bytes_keep_data",
        4096,
        &transfers,
    );
}

/// The guest copies with the pattern of a seed from one SSD to the other and checks; the host checks both files.
fn keep_data(name: &str, block_size: u32, transfers: &[(u64, u64, u64)]) {
    let topology = pair(|| Nvme::memory(SIZE).block_size(block_size));
    let lab = TestLab::start(name, topology);
    let guest = lab.guest().unwrap();
    let (from, to) = devices(&lab);
    let disk = from.trim_start_matches("/dev/");
    let line = format!("cat /sys/block/{disk}/queue/logical_block_size /sys/block/{disk}/size");
    let expected = format!("{block_size}\n{}\n", SIZE / 512);
    assert_eq!(guest.sh(&line).unwrap(), expected);
    for (seed, &(chunk, offset, count)) in (1..).zip(transfers) {
        for depth in [1, 4] {
            guest
                .sh(&format!(
                    "p2pcopy --check --seed {seed} --chunk {chunk} --offset {offset} --count {count} \
                     --threads 2 --depth {depth} {from} {to}"
                ))
                .unwrap();
        }
        for name in ["ssd0", "ssd1"] {
            assert_pattern(&medium(&lab, name), seed, offset, chunk * count);
        }
    }
    assert_no_errors(&lab);
    lab.finish();
}

/// Jobs on every processor at once, through a queue of each, do not disturb each other.
#[test]
fn jobs_on_all_processors_use_queues_of_their_own() {
    let name = "jobs_on_all_processors_use_queues_of_their_own";
    let lab = TestLab::start(name, pair(|| Nvme::memory(SIZE)));
    let guest = lab.guest().unwrap();
    let (from, to) = devices(&lab);
    let processors: u64 = guest.sh("nproc").unwrap().trim().parse().unwrap();
    assert!(processors > 1, "nothing to see with one processor");
    let job = |cpu: u64| {
        format!(
            "taskset -c {cpu} p2pcopy --check --seed {cpu} --chunk 64KiB --offset {} --size 8MiB --depth 8 \
             {from} {to} & jobs=\"$jobs $!\"\n",
            cpu * 8 * MIB
        )
    };
    let jobs: String = (0..processors).map(job).collect();
    let line = format!("{jobs}for job in $jobs; do wait $job || exit 1; done");
    guest.sh(&line).unwrap();
    for cpu in 0..processors {
        assert_pattern(&medium(&lab, "ssd1"), cpu, cpu * 8 * MIB, 8 * MIB);
    }
    for device in lab.devices().iter() {
        let dump = device.function().dump();
        let queues = dump["endpoint"]["queues"]["submission"]
            .as_array()
            .unwrap()
            .len() as u64;
        assert!(
            queues > processors,
            "the admin queue and one for each CPU: {dump:#}"
        );
    }
    lab.finish();
}

/// What the guest writes and flushes to an SSD on a file is in the file, after the lab and in the next one.
#[test]
fn a_file_keeps_data_across_labs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ssd.img");
    let topology = || {
        let file = Nvme::file(&path, SIZE).create();
        let builder = Topology::builder("file")
            .root_port("rp0")
            .nvme("ssd0", "rp0", file);
        builder.build().unwrap()
    };
    let lab = TestLab::start("a_file_keeps_data_across_labs", topology());
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd0").unwrap().block_device;
    let before = flushes(&lab, "ssd0");
    let write = "dd if=/dev/urandom of=/tmp/data bs=1M count=3 && sha256sum < /tmp/data";
    let sum = guest.sh(write).unwrap();
    let line = format!("dd if=/tmp/data of={disk} bs=1M seek=17 conv=fsync");
    guest.sh(&line).unwrap();
    assert!(flushes(&lab, "ssd0") > before, "fsync is a Flush command");
    let data = guest
        .agent()
        .get("/tmp/data", 4 << 20, wait::AGENT_COMMAND)
        .unwrap();
    lab.finish();
    let mut found = vec![0; 3 << 20];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut found, 17 * MIB)
        .unwrap();
    assert!(
        found == data,
        "the host sees other data in {}",
        path.display()
    );

    let lab = TestLab::start("a_file_keeps_data_across_labs", topology());
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd0").unwrap().block_device;
    let line = format!("dd if={disk} bs=1M skip=17 count=3 | sha256sum");
    assert_eq!(guest.sh(&line).unwrap(), sum);
    lab.finish();
}

/// Flush commands (NVM Command Set 1.0, opcode 00h) that SSD `name` has executed.
fn flushes(lab: &Lab, name: &str) -> u64 {
    let dump = lab.devices().device(name).unwrap().function().dump();
    let commands = &dump["endpoint"]["counters"]["io_commands"];
    commands["0x00"].as_u64().unwrap_or(0)
}

/// Bytes that the guest has written to SSD `name`.
pub fn bytes_written(lab: &Lab, name: &str) -> u64 {
    let dump = lab.devices().device(name).unwrap().function().dump();
    dump["endpoint"]["counters"]["bytes_written"]
        .as_u64()
        .unwrap()
}

fn assert_no_errors(lab: &Lab) {
    for device in lab.devices().iter() {
        let dump = device.function().dump();
        let errors = &dump["endpoint"]["counters"]["media_errors"];
        assert_eq!(*errors, 0, "{}: {dump:#}", device.name());
    }
}

/// The file behind SSD `name`.
pub fn medium(lab: &Lab, name: &str) -> Arc<File> {
    let device = lab.devices().device(name).unwrap();
    device.nvme().unwrap().namespace_file(1).unwrap()
}

/// `length` bytes of `file` from `offset` on are the pattern of `seed`.
pub fn assert_pattern(file: &File, seed: u64, offset: u64, length: u64) {
    let mut data = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut data, offset).unwrap();
    let differs = pattern::verify(seed, offset, &data);
    assert_eq!(
        differs, None,
        "{length} bytes from {offset} with seed {seed}"
    );
}

/// The block devices of `ssd0` and `ssd1`.
pub fn devices(lab: &Lab) -> (String, String) {
    let guest = lab.guest().unwrap();
    let [from, to] = ["ssd0", "ssd1"].map(|name| guest.nvme(name).unwrap().block_device);
    (from, to)
}

fn pair(ssd: impl Fn() -> Nvme) -> Topology {
    let builder = Topology::builder("pair")
        .root_port("rp0")
        .switch("sw0", "rp0", 4);
    let builder = builder
        .nvme("ssd0", "sw0.0", ssd())
        .nvme("ssd1", "sw0.1", ssd());
    builder.build().unwrap()
}
