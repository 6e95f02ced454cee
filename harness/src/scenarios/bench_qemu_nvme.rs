//! What a user would take instead: the same copies between two of QEMU's own NVMe devices, in the same guest,
//! below the same switch, in turn with those between two of ours.

use std::fs::File;
use std::sync::Arc;

use p2plab_images::Progress;
use serde_json::json;

use super::ScenarioOptions;
use super::copy::{self, GuestCopy};
use super::media::{clear, fill, medium, verify};
use super::qemu_nvme;
use crate::lab::{GuestNvme, Lab, LabError};
use crate::report::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table, Target};
use crate::topology::{KIB, MIB, Nvme, Topology, sizes};

/// Name on the command line.
pub const NAME: &str = "bench-qemu-nvme";

/// Rounds; in each, every case runs once.
const ROUNDS: usize = 5;
/// Linux ignores a CMB that is no multiple of 2 MiB.
const CMB: u64 = 64 * MIB;
/// Bytes that the longest case copies, and the size of each SSD.
const MEDIUM: u64 = 256 * MIB;
const CHUNKS: [u64; 2] = [MIB, 128 * KIB];

/// A pair of SSDs and what lies on them.
struct Pair {
    device: &'static str,
    from: GuestNvme,
    to: GuestNvme,
    source: Arc<File>,
    destination: Arc<File>,
}

/// One cell of the table.
struct Case<'a> {
    pair: &'a Pair,
    mode: &'static str,
    chunk: u64,
    /// Sized so that each case takes some tenths of a second.
    size: u64,
    rates: Vec<f64>,
}

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let topology = Topology::builder(NAME)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(MEDIUM).cmb(CMB))
        .nvme("ssd1", "sw0.1", Nvme::memory(MEDIUM))
        .build()?;
    copy::in_lab(topology, options, progress, measure)
}

fn measure(
    lab: &Lab,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<Benchmark, LabError> {
    let (source, destination) = (
        qemu_nvme::medium("source", MEDIUM)?,
        qemu_nvme::medium("destination", MEDIUM)?,
    );
    qemu_nvme::add(
        lab,
        "qemu0",
        "sw0.2",
        &source,
        json!({ "cmb_size_mb": CMB / MIB }),
    )?;
    qemu_nvme::add(lab, "qemu1", "sw0.3", &destination, json!({}))?;
    let guest = lab.guest()?;
    let slot = |port: &str| {
        lab.devices()
            .shape()
            .slot(port)
            .ok_or_else(|| LabError::Unexpected(format!("{port} is no slot")))
    };
    let pairs = [
        Pair {
            device: "qemu",
            from: guest.nvme_in_slot("qemu0", &slot("sw0.2")?)?,
            to: guest.nvme_in_slot("qemu1", &slot("sw0.3")?)?,
            source: Arc::new(source),
            destination: Arc::new(destination),
        },
        Pair {
            device: "p2plab",
            from: guest.nvme("ssd0")?,
            to: guest.nvme("ssd1")?,
            source: medium(lab, "ssd0")?,
            destination: medium(lab, "ssd1")?,
        },
    ];
    for pair in &pairs {
        fill(&pair.source, MEDIUM, progress)?;
        // Without this, the first copy alone would pay for the allocation of the destination's pages.
        fill(&pair.destination, MEDIUM, progress)?;
    }
    let mut cases = cases(&pairs);
    for round in 1..=ROUNDS {
        progress.step(&format!("round {round} of {ROUNDS}"), None);
        for case in &mut cases {
            case.run(lab, options)?;
        }
    }
    for case in &cases {
        case.check(lab, options, progress)?;
    }
    progress.finish();
    Ok(report(lab, options, &cases))
}

fn cases(pairs: &[Pair]) -> Vec<Case<'_>> {
    let mut cases = Vec::new();
    for chunk in CHUNKS {
        for mode in ["classic", "p2p"] {
            for pair in pairs {
                let size = match (pair.device, mode) {
                    ("qemu", "p2p") => 8 * MIB,
                    ("qemu", _) => 64 * MIB,
                    (_, "p2p") => MEDIUM,
                    _ => 128 * MIB,
                };
                cases.push(Case {
                    pair,
                    mode,
                    chunk,
                    size,
                    rates: Vec::new(),
                });
            }
        }
    }
    cases
}

impl Case<'_> {
    fn copy(&self, lab: &Lab, options: &ScenarioOptions) -> Result<f64, LabError> {
        let buffer = match self.mode {
            "p2p" => copy::p2pmem(lab, &self.pair.from, self.pair.device)?,
            _ => "memory",
        };
        GuestCopy {
            size: self.size,
            chunk: self.chunk,
            ..GuestCopy::new(&self.pair.from, &self.pair.to, buffer, options)
        }
        .run(lab)
    }

    fn run(&mut self, lab: &Lab, options: &ScenarioOptions) -> Result<(), LabError> {
        let seconds = self.copy(lab, options)?;
        self.rates.push(self.size as f64 / seconds);
        Ok(())
    }

    /// Copies once more, onto zeros, and compares: a fast copy of the wrong bytes is no copy.
    fn check(
        &self,
        lab: &Lab,
        options: &ScenarioOptions,
        progress: &mut dyn Progress,
    ) -> Result<(), LabError> {
        clear(&self.pair.destination, MEDIUM)?;
        self.copy(lab, options)?;
        if verify(&self.pair.destination, self.size, progress)? {
            return Ok(());
        }
        Err(LabError::Unexpected(format!(
            "{} copied wrong bytes in mode {} with chunks of {}",
            self.pair.device,
            self.mode,
            sizes::format(self.chunk)
        )))
    }

    fn measurement(&self) -> Measurement {
        let labels = [
            ("device", self.pair.device),
            ("mode", self.mode),
            ("chunk_bytes", &self.chunk.to_string()),
            ("size_bytes", &self.size.to_string()),
        ];
        Measurement::new(&labels, "bytes per second", self.rates.clone())
    }
}

fn report(lab: &Lab, options: &ScenarioOptions, cases: &[Case<'_>]) -> Benchmark {
    let head = [
        "mode, chunk",
        "QEMU nvme MB/s",
        "(min-max)",
        "copied",
        "p2plab MB/s",
        "(min-max)",
        "copied",
        "ratio",
    ];
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "p2pcopy between two SSDs below one switch, media in memory, {} thread(s), depth {}; medians of \
             {ROUNDS} rounds, cases in turn in one guest; classic: buffer in guest memory; p2p: in the source's CMB",
            options.threads, options.depth
        ),
        table: Table::new(&head),
        versions: copy::versions(lab),
        ..Benchmark::default()
    };
    for case in cases.chunks(2) {
        let [theirs, ours] = case else { continue };
        let (chunk, mode) = (sizes::format(ours.chunk), ours.mode);
        let mut cells = vec![format!("{mode}, {chunk}")];
        let measured = [theirs, ours].map(|case| {
            let measurement = case.measurement();
            let mega = |rate: f64| format!("{:.0}", rate / 1e6);
            cells.push(mega(measurement.median));
            let (low, high) = (mega(measurement.minimum), mega(measurement.maximum));
            cells.push(format!("({low}-{high})"));
            cells.push(sizes::format(case.size));
            measurement
        });
        let [theirs, ours] = &measured;
        let ratio = ours.median / theirs.median;
        cells.push(format!("{ratio:.1}"));
        report.table.row(cells);
        let bound = if mode == "p2p" { 20.0 } else { 1.2 };
        report.targets.push(Target::at_least(
            format!("{mode} in chunks of {chunk} at least {bound} times QEMU's"),
            bound,
            ratio,
        ));
        report.measurements.extend(measured);
    }
    report
}
