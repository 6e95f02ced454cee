//! The scenarios that `p2plab run` knows: the examples of the talk, each one command, and benchmarks.

pub mod bench_chunks;
pub mod bench_examples;
pub mod bench_io;
pub mod bench_p2p;
pub mod bench_qemu_nvme;
pub mod bench_warm_start;
pub mod copy;
pub mod media;
pub mod nvme_cmb_copy;
pub mod nvme_pmr_copy;
pub mod nvram_copy;
mod qemu_nvme;

use std::path::PathBuf;

use p2plab_images::Progress;

use crate::lab::LabError;
use crate::report::Report;
use crate::topology::{GIB, MIB, sizes};

/// What a user can say about a scenario.
#[derive(Clone, Debug)]
pub struct ScenarioOptions {
    /// Bytes to copy in each mode.
    pub size: u64,
    /// Bytes moved by one read and one write.
    pub chunk: u64,
    /// Threads that copy.
    pub threads: u32,
    /// Chunks that each thread has in flight.
    pub depth: u32,
    /// Whose memory a copy goes through.
    pub buffer: BufferOwner,
    /// Boot from scratch.
    pub cold: bool,
    /// Folder for files that stand for the SSDs' media; memory otherwise.
    pub media: Option<PathBuf>,
    /// Folder for the run's logs.
    pub run_directory: Option<PathBuf>,
    /// QEMU, kernel and modules of the user's own.
    pub own: OwnArtifacts,
}

/// Whose memory is the buffer of a copy between two SSDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BufferOwner {
    /// That of the SSD that is read.
    #[default]
    Source,
    /// That of the SSD that is written.
    Destination,
    /// That of an SSD that takes no part otherwise.
    Third,
}

/// What a user brings along instead of what the lab fetches.
#[derive(Clone, Debug, Default)]
pub struct OwnArtifacts {
    /// A `qemu-system-x86_64`.
    pub qemu: Option<PathBuf>,
    /// A bzImage.
    pub kernel: Option<PathBuf>,
    /// The folder of that kernel's modules.
    pub modules: Option<PathBuf>,
}

impl Default for ScenarioOptions {
    fn default() -> Self {
        Self {
            size: GIB,
            chunk: MIB,
            threads: 2,
            depth: 4,
            buffer: BufferOwner::Source,
            cold: false,
            media: None,
            run_directory: None,
            own: OwnArtifacts::default(),
        }
    }
}

impl OwnArtifacts {
    /// Puts what was given in the place of what the topology says.
    pub fn apply(&self, topology: &mut crate::topology::Topology) {
        let guest = &mut topology.guest;
        for (own, theirs) in [
            (&self.qemu, &mut guest.qemu),
            (&self.kernel, &mut guest.kernel),
            (&self.modules, &mut guest.modules),
        ] {
            if own.is_some() {
                theirs.clone_from(own);
            }
        }
    }
}

/// Smallest memory for a buffer: that of a copy with few small chunks fits, and Linux takes it.
const SMALLEST_MEMORY: u64 = 64 * MIB;

/// Largest memory for a buffer: that of the largest NVRAM card.
const LARGEST_MEMORY: u64 = 8 * GIB;

/// Bytes of peer-to-peer memory that a copy with these options goes through.
fn buffer_memory(options: &ScenarioOptions) -> Result<u64, LabError> {
    let buffer = options
        .chunk
        .saturating_mul(u64::from(options.threads))
        .saturating_mul(u64::from(options.depth));
    // Linux takes a part of a CMB for queues if asked to, and allocates from a pool: twice is ample.
    let memory = buffer
        .checked_mul(2)
        .and_then(u64::checked_next_power_of_two)
        .filter(|memory| *memory <= LARGEST_MEMORY);
    let memory = memory.ok_or_else(|| {
        LabError::BadOption(format!(
            "chunks of {} for each of {} thread(s), {} at a time, are more than the {} of buffers that a device can hold; \
             give a smaller --chunk, --threads or --depth",
            sizes::format(options.chunk),
            options.threads,
            options.depth,
            sizes::format(LARGEST_MEMORY / 2)
        ))
    })?;
    Ok(memory.max(SMALLEST_MEMORY))
}

/// A port's window that such memory fits into, beside registers.
fn window(memory: u64) -> u64 {
    memory.saturating_mul(2).max(GIB)
}

/// A scenario.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for `p2plab list`.
    pub summary: &'static str,
    /// Options of the command line, without their dashes, that it does not take.
    pub fixed: &'static [&'static str],
    /// Runs it.
    pub run: Run,
}

/// Runs a scenario.
type Run = fn(&ScenarioOptions, &mut dyn Progress) -> Result<Box<dyn Report>, LabError>;

/// All scenarios.
pub const SCENARIOS: [Scenario; 9] = [
    Scenario {
        name: nvram_copy::NAME,
        summary: "copy between two NVMe SSDs, through host memory and through an NVRAM card (example 1 of the talk)",
        fixed: &["buffer"],
        run: |options, progress| Ok(Box::new(nvram_copy::run(options, progress)?)),
    },
    Scenario {
        name: nvme_cmb_copy::NAME,
        summary: "copy between two NVMe SSDs, through host memory and through a CMB (example 2 of the talk)",
        fixed: &[],
        run: |options, progress| Ok(Box::new(nvme_cmb_copy::run(options, progress)?)),
    },
    Scenario {
        name: nvme_pmr_copy::NAME,
        summary: "copy between two NVMe SSDs, through host memory and through a PMR, with the patched nvme driver",
        fixed: &[],
        run: |options, progress| Ok(Box::new(nvme_pmr_copy::run(options, progress)?)),
    },
    Scenario {
        name: bench_examples::NAME,
        summary: "benchmark: the three copies side by side, beside what the talk's hardware had",
        fixed: &["buffer"],
        run: |options, progress| Ok(Box::new(bench_examples::run(options, progress)?)),
    },
    Scenario {
        name: bench_qemu_nvme::NAME,
        summary: "benchmark: the same copies between p2plab's SSDs and between QEMU's own, in turn",
        fixed: &["size", "chunk", "buffer", "media"],
        run: |options, progress| Ok(Box::new(bench_qemu_nvme::run(options, progress)?)),
    },
    Scenario {
        name: bench_p2p::NAME,
        summary: "benchmark: the peer-to-peer copy beside a program on the host that copies the same files",
        fixed: &["buffer"],
        run: |options, progress| Ok(Box::new(bench_p2p::run(options, progress)?)),
    },
    Scenario {
        name: bench_io::NAME,
        summary: "benchmark: reads and writes of p2plab's SSD and of QEMU's own, in turn",
        fixed: &["size", "chunk", "threads", "depth", "buffer", "media"],
        run: |options, progress| Ok(Box::new(bench_io::run(options, progress)?)),
    },
    Scenario {
        name: bench_chunks::NAME,
        summary: "benchmark: throughput and upstream bytes against chunk size and threads",
        fixed: &["size", "chunk", "threads", "buffer", "media"],
        run: |options, progress| Ok(Box::new(bench_chunks::run(options, progress)?)),
    },
    Scenario {
        name: bench_warm_start::NAME,
        summary: "benchmark: from the start to two bound SSDs, warm and cold",
        fixed: &[
            "size", "chunk", "threads", "depth", "buffer", "cold", "media",
        ],
        run: |options, progress| Ok(Box::new(bench_warm_start::run(options, progress)?)),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_any_size_fit_or_are_refused_in_a_sentence() {
        let options = |chunk, threads, depth| ScenarioOptions {
            chunk,
            threads,
            depth,
            ..ScenarioOptions::default()
        };
        let built = |options: &ScenarioOptions| {
            nvram_copy::topology("x", options).map(drop)?;
            nvme_cmb_copy::topology("x", options).map(drop)?;
            nvme_pmr_copy::topology("x", options).map(drop)
        };
        // 4 GiB of buffers, in memory of 8 GiB.
        for options in [options(MIB, 2, 4), options(16 * MIB, 64, 4)] {
            let options = ScenarioOptions {
                size: GIB,
                ..options
            };
            built(&options).unwrap();
        }
        for options in [options(16 * MIB, 64, 5), options(!0xfff, 64, 1024)] {
            let said = buffer_memory(&options).unwrap_err().to_string();
            assert!(
                said.ends_with("give a smaller --chunk, --threads or --depth"),
                "{said}"
            );
            assert!(said.contains("more than the 4GiB of buffers"), "{said}");
        }
    }
}
