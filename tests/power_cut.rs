//! What a guest has been told is safe, after the lab is gone from one moment to the next.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use p2plab::topology::{MIB, Nvme, Topology};
use p2plab_tests::{HostShare, p2plab};
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
