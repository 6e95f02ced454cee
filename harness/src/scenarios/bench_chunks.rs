//! Throughput and bytes at the upstream port against the chunk size, in both modes, with one and two threads.

use p2plab_images::Progress;
use p2plab_pcie::COUNTING;

use super::ScenarioOptions;
use super::copy::{self, GuestCopy};
use super::media::{clear, fill, medium, verify};
use crate::lab::{GuestNvme, Lab, LabError};
use crate::report::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table};
use crate::topology::{KIB, MIB, Nvme, Topology, sizes};

/// Name on the command line.
pub const NAME: &str = "bench-chunks";

/// Rounds; in each, every case runs once.
const ROUNDS: usize = 3;
const CHUNKS: [u64; 6] = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB];
const THREADS: [u32; 2] = [1, 2];
const MODES: [&str; 2] = ["classic", "p2p"];
/// Size of the SSDs, and the most that one case copies.
const MEDIUM: u64 = 256 * MIB;
/// The least that one case copies.
const LEAST: u64 = 16 * MIB;
/// Chunks that one case copies, within those bounds.
const COUNT: u64 = 1024;

struct Case {
    chunk: u64,
    threads: u32,
    mode: &'static str,
    size: u64,
    rates: Vec<f64>,
    /// Payload at the upstream port for each byte copied.
    upstream: Vec<f64>,
}

struct Disks {
    from: GuestNvme,
    to: GuestNvme,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let most = CHUNKS.iter().max().copied().unwrap_or_default();
    let buffer = most * 2 * u64::from(options.depth);
    let topology = Topology::builder(NAME)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme(
            "ssd0",
            "sw0.0",
            Nvme::memory(MEDIUM).cmb((2 * buffer).next_power_of_two()),
        )
        .nvme("ssd1", "sw0.1", Nvme::memory(MEDIUM))
        .build()?;
    copy::in_lab(topology, options, progress, measure)
}

fn measure(
    lab: &Lab,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<Benchmark, LabError> {
    copy::prefer_sgls(lab)?;
    let guest = lab.guest()?;
    let disks = Disks {
        from: guest.nvme("ssd0")?,
        to: guest.nvme("ssd1")?,
    };
    fill(&*medium(lab, "ssd0")?, MEDIUM, progress)?;
    fill(&*medium(lab, "ssd1")?, MEDIUM, progress)?;
    let mut cases = cases();
    for round in 1..=ROUNDS {
        progress.step(&format!("round {round} of {ROUNDS}"), None);
        for case in &mut cases {
            case.run(lab, &disks, options)?;
        }
    }
    let destination = medium(lab, "ssd1")?;
    for case in &mut cases {
        clear(&destination, MEDIUM)?;
        case.copy(lab, &disks, options)?;
        if !verify(&destination, case.size, progress)? {
            let chunk = sizes::format(case.chunk);
            let what = format!("{} with chunks of {chunk} copied wrong bytes", case.mode);
            return Err(LabError::Unexpected(what));
        }
    }
    progress.finish();
    Ok(report(lab, options, &cases))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for chunk in CHUNKS {
        for threads in THREADS {
            for mode in MODES {
                cases.push(Case {
                    chunk,
                    threads,
                    mode,
                    size: (chunk * COUNT).clamp(LEAST, MEDIUM),
                    rates: Vec::new(),
                    upstream: Vec::new(),
                });
            }
        }
    }
    cases
}

impl Case {
    fn copy(&self, lab: &Lab, disks: &Disks, options: &ScenarioOptions) -> Result<f64, LabError> {
        let buffer = match self.mode {
            "p2p" => copy::p2pmem(lab, &disks.from, "ssd0")?,
            _ => "memory",
        };
        GuestCopy {
            size: self.size,
            chunk: self.chunk,
            threads: self.threads,
            ..GuestCopy::new(&disks.from, &disks.to, buffer, options)
        }
        .run(lab)
    }

    fn run(&mut self, lab: &Lab, disks: &Disks, options: &ScenarioOptions) -> Result<(), LabError> {
        let before = lab.traffic();
        let seconds = self.copy(lab, disks, options)?;
        let upstream = lab.traffic().since(&before).upstream_payload_bytes();
        self.rates.push(self.size as f64 / seconds);
        if COUNTING {
            self.upstream.push(upstream as f64 / self.size as f64);
        }
        Ok(())
    }

    fn measurements(&self) -> [Measurement; 2] {
        let labels = [
            ("mode", self.mode),
            ("threads", &self.threads.to_string()),
            ("chunk_bytes", &self.chunk.to_string()),
            ("size_bytes", &self.size.to_string()),
        ];
        let upstream = "payload bytes at the upstream port per byte copied";
        [
            Measurement::new(&labels, "bytes per second", self.rates.clone()),
            Measurement::new(&labels, upstream, self.upstream.clone()),
        ]
    }
}

fn report(lab: &Lab, options: &ScenarioOptions, cases: &[Case]) -> Benchmark {
    let head = [
        "chunk",
        "threads",
        "copied",
        "classic MB/s",
        "p2p MB/s",
        "ratio",
        "classic USP/byte",
        "p2p USP/byte",
        "1/n",
    ];
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "copies from ssd0 to ssd1, media in memory, depth {}; medians of {ROUNDS} rounds, cases in turn in one \
             guest; USP/byte: payload at the upstream port for each byte copied",
            options.depth
        ),
        table: Table::new(&head),
        versions: copy::versions(lab),
        ..Benchmark::default()
    };
    for pair in cases.chunks(MODES.len()) {
        let [classic, p2p] = pair else { continue };
        let [classic_rate, classic_usp] = classic.measurements();
        let [p2p_rate, p2p_usp] = p2p.measurements();
        let mut cells = vec![
            sizes::format(classic.chunk),
            classic.threads.to_string(),
            sizes::format(classic.size),
            format!("{:.0}", classic_rate.median / 1e6),
            format!("{:.0}", p2p_rate.median / 1e6),
            format!("{:.1}", p2p_rate.median / classic_rate.median),
        ];
        report.measurements.extend([classic_rate, p2p_rate]);
        if COUNTING {
            cells.push(format!("{:.3}", classic_usp.median));
            cells.push(format!("{:.5}", p2p_usp.median));
            cells.push(format!("{:.0}", classic_usp.median / p2p_usp.median));
            report.measurements.extend([classic_usp, p2p_usp]);
        } else {
            cells.extend([
                "not counted".to_owned(),
                "not counted".to_owned(),
                "-".to_owned(),
            ]);
        }
        report.table.row(cells);
    }
    report
}
