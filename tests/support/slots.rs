//! How many labs run at once on this host.
//!
//! Test runners start as many tests as there are CPUs, or (nextest) a process for each. A guest with two CPUs
//! under emulation wants two of them, and memory; so labs wait for a share, across processes, by locks on
//! files that end with their process.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::FlockOperation;

/// A share of the host; the next lab waits until it is dropped.
#[derive(Debug)]
pub struct HostShare {
    _lock: File,
}

/// Until the locks are looked at again: they cannot be waited for together.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Memory that a lab of the tests takes.
const LAB_MEMORY_MIB: u64 = 2048;

impl HostShare {
    /// Waits for a share. The wait ends when another lab does, which has deadlines of its own.
    ///
    /// # Panics
    /// Where the host refuses the lock files.
    pub fn take() -> Self {
        let directory = directory();
        if let Err(error) = std::fs::create_dir_all(&directory) {
            panic!("{}: {error}", directory.display());
        }
        let shares = shares();
        let files: Vec<File> = (0..shares).map(|share| open(&directory, share)).collect();
        // Whichever is free first: who queued up for one of them would wait for a long run that has it.
        loop {
            for file in &files {
                if rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                    return Self { _lock: again(file) };
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

/// The same open file, whose lock lives until the last copy is closed.
fn again(file: &File) -> File {
    match file.try_clone() {
        Ok(file) => file,
        Err(error) => panic!("a share of the host: {error}"),
    }
}

fn open(directory: &std::path::Path, share: u64) -> File {
    let path = directory.join(format!("share-{share}"));
    match OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
    {
        Ok(file) => file,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

fn directory() -> PathBuf {
    match p2plab_images::Cache::open().and_then(|cache| cache.directory("shares")) {
        Ok(directory) => directory,
        Err(error) => panic!("{error}"),
    }
}

fn shares() -> u64 {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_mib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map_or(LAB_MEMORY_MIB, |kib| kib / 1024);
    cpus.min(available_mib / LAB_MEMORY_MIB).max(1)
}
