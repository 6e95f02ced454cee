//! What a guest has been told is safe, after the lab is gone from one moment to the next.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use p2plab::topology::{MIB, Nvme, Topology};
use p2plab_tests::{HostShare, TestLab, p2plab};
use rustix::process::{Pid, Signal, kill_process};

use crate::patience::until;

const BLOCK: usize = 4096;
/// Blocks that the guest writes, round and round.
const BLOCKS: usize = 64;
const LABS: usize = 3;

/// Block I of lab L is "L I" line after line; its number is printed once fsync has returned. The disk stays open: the last
/// close would write what fsync has not.
const WRITER: &str = "exec 3<>/dev/nvme0n1; i=0; while :; do \
    yes \"LAB $i\" | head -c 4096 | dd of=/dev/nvme0n1 bs=4096 seek=$((i % 64)) conv=fsync,notrunc 2>/dev/null \
    && echo $i; i=$((i + 1)); done";

/// Block `number` of `lab`.
fn block(lab: usize, number: usize) -> Vec<u8> {
    let line = format!("{lab} {number}\n");
    line.bytes().cycle().take(BLOCK).collect()
}

/// A guest writes blocks to an SSD on a file, each with fsync, and says which it has written. The whole lab is killed
/// while it does. What it had said is in the file, whole.
#[test]
fn what_was_synced_outlives_a_killed_lab() {
    let _share = HostShare::take();
    let place = tempfile::tempdir().unwrap();
    let disk = place.path().join("ssd.img");
    let ssd = Nvme::file(&disk, 16 * MIB).create();
    let builder = Topology::builder("killed").root_port("rp0");
    let topology = builder.nvme("ssd0", "rp0", ssd).build().unwrap();
    fs::write(place.path().join("topology.toml"), topology.to_toml()).unwrap();

    // Of each block of the disk, who wrote it: the lab and the number.
    let mut expected = vec![None; BLOCKS];
    for lab in 1..=LABS {
        // The first dies early, the last has been round.
        let enough = [3, BLOCKS / 2, BLOCKS + 5][lab - 1];
        let said = run_and_kill(place.path(), lab, enough);
        assert!(said >= enough, "{said}");
        (0..said).for_each(|number| expected[number % BLOCKS] = Some((lab, number)));

        let file = File::open(&disk).unwrap();
        for (index, expected) in expected.iter_mut().enumerate() {
            let mut found = vec![0; BLOCK];
            file.read_exact_at(&mut found, (index * BLOCK) as u64)
                .unwrap();
            // The one that the lab died over may be there, too.
            if index == said % BLOCKS && found == block(lab, said) {
                *expected = Some((lab, said));
            }
            let wanted = expected.map_or(vec![0; BLOCK], |(lab, number)| block(lab, number));
            let start = String::from_utf8_lossy(&found[..16]);
            assert!(
                found == wanted,
                "lab {lab} wrote {said}, block {index} is {start:?}, not of {expected:?}"
            );
        }
    }
}

/// A guest writes blocks past its page cache and flushes some of them. When its power is cut what it did not flush is
/// what it was before, and what it did is there: for the host, and for the guest of the next boot.
#[test]
fn what_was_not_flushed_is_lost_with_the_power() {
    let name = "what_was_not_flushed_is_lost_with_the_power";
    let builder = Topology::builder("write-cache").root_port("rp0");
    let ssd = Nvme::memory(16 * MIB).write_cache(4 * MIB);
    let topology = builder.nvme("ssd0", "rp0", ssd).build().unwrap();
    let mut lab = TestLab::start(name, topology);
    let disk = lab.guest().unwrap().nvme("ssd0").unwrap().block_device;
    // The disk stays open: nothing is flushed by its last close.
    let line = format!(
        "exec 3<>{disk}; w() {{ yes $1 | head -c 4096 | dd of={disk} bs=4096 seek=$2 oflag=direct conv=$3notrunc; }}; \
         w old 0 && w flushed 1 fsync, && w new 0 && w unsaved 2 && \
         dd if={disk} bs=4096 count=3 iflag=direct | tr -s '\\n' | cut -b -7 | uniq | tr '\\n' ' '"
    );
    let seen = lab.guest().unwrap().sh(&line).unwrap();
    assert_eq!(seen.trim_end(), "new flushed unsaved");
    let controller = Arc::clone(lab.devices().device("ssd0").unwrap().nvme().unwrap());
    let host_sees = || {
        let file = controller.namespace_file(1).unwrap();
        [0, 1, 2].map(|block| {
            let mut data = [0; BLOCK];
            file.read_exact_at(&mut data, block * BLOCK as u64).unwrap();
            let text = String::from_utf8_lossy(&data);
            text.lines()
                .next()
                .unwrap_or_default()
                .trim_matches('\0')
                .to_owned()
        })
    };
    assert_eq!(host_sees(), ["new", "flushed", "unsaved"]);
    lab.kill_qemu().unwrap();
    assert_eq!(host_sees(), ["old", "flushed", ""]);
    lab.boot_again().unwrap();
    let line = format!("dd if={disk} bs=4096 count=2 | uniq | tr '\\n' ' '");
    assert_eq!(
        lab.guest().unwrap().sh(&line).unwrap().trim_end(),
        "old flushed"
    );
    lab.finish();
}

/// Runs a lab that writes, and kills it once it has said that it wrote `enough` blocks; how many it had said by then.
fn run_and_kill(place: &std::path::Path, lab: usize, enough: usize) -> usize {
    let script = WRITER.replace("LAB", &lab.to_string());
    let mut process = Command::new(p2plab())
        .args(["boot", "topology.toml", "--exec", &script])
        .current_dir(place)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = 0;
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    for line in lines.map(Result::unwrap) {
        assert_eq!(line.parse(), Ok(said));
        said += 1;
        if said == enough {
            // Somewhere in a later block.
            std::thread::sleep(Duration::from_millis(7 * lab as u64));
            kill_process(Pid::from_child(&process), Signal::KILL).unwrap();
        }
    }
    until("the lab to end", || process.try_wait().unwrap().is_some());
    said
}
