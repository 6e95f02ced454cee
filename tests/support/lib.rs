//! What the scenarios share: labs with a place for their logs, and a limit on how many run at once.

pub mod p2pmem;
pub mod reading;
mod slots;
pub mod tools;
pub mod traffic;

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use p2plab::lab::{Lab, LabOptions};
use p2plab::topology::{GIB, MIB, Nvme, Topology};

pub use slots::HostShare;

/// A lab that holds a share of the host for as long as it runs.
pub struct TestLab {
    lab: Lab,
    _share: HostShare,
}

impl TestLab {
    /// Starts the lab of `topology`; its logs go to the folder of the test `name`.
    ///
    /// # Panics
    /// Where it does not start; the message says why and where the logs are.
    pub fn start(name: &str, topology: Topology) -> Self {
        Self::start_with(name, topology, |options| options)
    }

    /// As [`start`](Self::start), booted from scratch.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn start_cold(name: &str, topology: Topology) -> Self {
        Self::start_with(name, topology, |options| options.cold(true))
    }

    /// As [`start`](Self::start), with further options.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn start_with(
        name: &str,
        topology: Topology,
        options: impl FnOnce(LabOptions) -> LabOptions,
    ) -> Self {
        p2plab::lab::device_log::install("off");
        let share = HostShare::take();
        let directory = run_directory(name);
        match options(Lab::options(topology).run_directory(directory)).start() {
            Ok(lab) => Self { lab, _share: share },
            Err(error) => panic!("the lab does not start: {error}"),
        }
    }

    /// Ends the lab in order: power-off, laws of the counters, marker. The guest's kernel must not have warned (WARN, a
    /// lock's misuse) on its console.
    ///
    /// # Panics
    /// Where any of it fails.
    pub fn finish(self) {
        if let Ok(qemu) = self.lab.qemu() {
            let warnings = qemu.console.warnings();
            assert!(warnings.is_empty(), "{}", warnings.join("\n"));
        }
        if let Err(error) = self.lab.finish() {
            panic!("the lab does not end well: {error}");
        }
    }
}

impl Deref for TestLab {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl DerefMut for TestLab {
    fn deref_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }
}

/// Folder for the logs of the test `name`: `target/p2plab-runs/NAME`.
pub fn run_directory(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"));
    target.join("p2plab-runs").join(name)
}

/// The command line's binary, built by cargo beside the tests.
///
/// # Panics
/// Where it is not there: `cargo test` of the whole workspace builds it.
pub fn p2plab() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    let binary = test
        .ancestors()
        .nth(2)
        .map(|folder| folder.join("p2plab"))
        .unwrap_or_default();
    assert!(
        binary.is_file(),
        "{} is missing; build it with: cargo build -p p2plab",
        binary.display()
    );
    binary
}

/// One switch with four ports; two SSDs of 256 MiB in memory, the first with a CMB of 64 MiB.
///
/// # Panics
/// Never: the topology is sound.
pub fn two_ssds(name: &str) -> Topology {
    let topology = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB / 4).cmb(64 * MIB))
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
        .build();
    match topology {
        Ok(topology) => topology,
        Err(error) => panic!("{error}"),
    }
}
