//! File systems on the SSDs: made, filled, checked, and whole after a power cut.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use p2plab::agent::Command;
use p2plab::topology::{MIB, Nvme, Topology, WriteCacheConfig};
use p2plab_pcie::Endpoint;
use p2plab_tests::TestLab;
use p2plab_tests::tools::{Tools, with_tools};

use crate::disks::{bytes_written, medium};
use crate::patience::until;

/// A file system with the commands that make and check it; `DISK` stands for the disk.
struct FileSystem {
    ssd: &'static str,
    kind: &'static str,
    make: &'static str,
    /// Changes nothing, and fails where anything is wrong.
    check: &'static str,
}

/// ext4 on blocks of 4096 bytes, xfs on blocks of 512.
const FILE_SYSTEMS: [FileSystem; 2] = [
    FileSystem {
        ssd: "ssd0",
        kind: "ext4",
        make: "mkfs.ext4 -q DISK",
        check: "e2fsck -fn DISK",
    },
    FileSystem {
        ssd: "ssd1",
        kind: "xfs",
        make: "mkfs.xfs -q DISK",
        check: "xfs_repair -n DISK",
    },
];

impl FileSystem {
    fn run(&self, tools: &Tools<'_>, line: &str) -> String {
        tools.run(&line.replace("DIR", &format!("/mnt/{}", self.kind)))
    }

    fn make_and_mount(&self, tools: &Tools<'_>) {
        self.run(tools, self.make);
        self.mount(tools);
    }

    fn mount(&self, tools: &Tools<'_>) {
        self.run(tools, "mkdir -p DIR && mount DISK DIR");
    }
}

/// mkfs, mount, write, trim, sync, umount and a check, for each kind; files are there after the next mount, and trim
/// gives their place back to the host once they are gone.
#[test]
fn file_systems_are_made_filled_and_checked() {
    let name = "file_systems_are_made_filled_and_checked";
    let ssds = [
        Nvme::memory(256 * MIB).block_size(4096),
        Nvme::memory(512 * MIB),
    ];
    let lab = TestLab::start(name, with_tools("mkfs", ssds));
    for fs in &FILE_SYSTEMS {
        let tools = Tools::new(&lab, fs.ssd);
        fs.make_and_mount(&tools);
        fs.run(
            &tools,
            "dd if=/dev/urandom of=DIR/large bs=1M count=24 && cp -r /usr/lib/systemd/system DIR/tree && sync",
        );
        let sums = "cd DIR && find . -type f -exec sha256sum {} + | sort";
        let written = fs.run(&tools, sums);
        assert!(written.lines().count() > 50, "{written}");
        fs.run(&tools, "umount DIR");
        fs.run(&tools, fs.check);
        fs.mount(&tools);
        assert_eq!(fs.run(&tools, sums), written, "{}", fs.kind);

        let allocated = || medium(&lab, fs.ssd).metadata().unwrap().blocks() * 512;
        fs.run(&tools, "rm DIR/large && sync");
        let before = allocated();
        fs.run(&tools, "fstrim DIR");
        let freed = before - allocated();
        assert!(freed >= 23 * MIB, "{} gave {freed} bytes back", fs.kind);
        fs.run(&tools, "umount DIR");
        fs.run(&tools, fs.check);
    }
    lab.finish();
}

/// Two SSDs in files of `folder`, with write caches that forget: the first some blocks, the second all.
fn in_files(folder: &Path) -> Topology {
    let ssd = |name: &str, size| Nvme::file(folder.join(name), size).create();
    let some = WriteCacheConfig {
        size: 64 * MIB,
        survivors: Some(1),
    };
    let ssds = [
        ssd("ssd0", 256 * MIB)
            .block_size(4096)
            .write_cache_with(some),
        ssd("ssd1", 512 * MIB).write_cache(64 * MIB),
    ];
    with_tools("power-cut", ssds)
}

/// The lab ends without a word while the guest writes: its power is cut, and what the SSDs had in their write caches is
/// lost. In the next lab on the same files, journals are replayed, what was
/// written with fsync is whole, and nothing is found wrong.
#[test]
fn file_systems_survive_a_power_cut() {
    let name = "file_systems_survive_a_power_cut";
    let folder = tempfile::tempdir().unwrap();
    let lab = TestLab::start(name, in_files(folder.path()));
    let mut sums = Vec::new();
    for fs in &FILE_SYSTEMS {
        let tools = Tools::new(&lab, fs.ssd);
        fs.make_and_mount(&tools);
        let write = "dd if=/dev/urandom of=DIR/kept bs=256k count=20 conv=fsync && sync DIR && sha256sum < DIR/kept";
        sums.push(fs.run(&tools, write));
        // Files come and go, some of them synchronised, until the end.
        let churn = format!(
            "i=0; while :; do i=$((i + 1)); f=/mnt/{}/$((i % 50)); head -c $((i % 97 * 1000)) /dev/urandom > $f; \
             [ $((i % 5)) = 0 ] && sync $f; [ $((i % 7)) = 0 ] && rm $f; done",
            fs.kind
        );
        let line = ["/system", "/bin/sh", "-c", &churn];
        let endless = Command::new("chroot").args(line);
        let endless = endless.deadline(Duration::from_secs(600));
        // Nobody waits for it: it ends with the guest.
        std::mem::forget(lab.agent().unwrap().start(&endless).unwrap());
    }
    for fs in &FILE_SYSTEMS {
        let before = bytes_written(&lab, fs.ssd);
        until("the guest to write", || {
            bytes_written(&lab, fs.ssd) > before + 2 * MIB
        });
    }
    let controllers = FILE_SYSTEMS.map(|fs| {
        let device = lab.devices().device(fs.ssd).unwrap();
        Arc::clone(device.nvme().unwrap())
    });
    drop(lab);
    for (fs, controller) in FILE_SYSTEMS.iter().zip(controllers) {
        let dump = controller.dump();
        // What there was to lose depends on whether the cut met a file system between its writes and their flush.
        let losses = dump["write_cache"]["power_losses"].as_u64();
        assert!(losses > Some(0), "{}: {dump:#}", fs.kind);
    }

    let lab = TestLab::start(name, in_files(folder.path()));
    for (fs, sum) in FILE_SYSTEMS.iter().zip(sums) {
        let tools = Tools::new(&lab, fs.ssd);
        fs.mount(&tools);
        assert_eq!(fs.run(&tools, "sha256sum < DIR/kept"), sum, "{}", fs.kind);
        fs.run(&tools, "umount DIR");
        fs.run(&tools, fs.check);
    }
    // The journals had something to replay: the file systems were not unmounted before.
    let log = lab.guest().unwrap().sh("dmesg").unwrap();
    assert!(log.contains("recovery complete"), "ext4: {log}");
    assert!(log.contains("Starting recovery"), "xfs: {log}");
    lab.finish();
}
