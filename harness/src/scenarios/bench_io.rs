//! Reads and writes of one SSD of ours and one of QEMU's own, in turn, in one guest, below one switch.

use std::time::Duration;

use p2plab_images::Progress;
use serde::Deserialize;
use serde_json::json;

use super::ScenarioOptions;
use super::copy;
use super::media::{fill, medium};
use super::qemu_nvme;
use crate::agent::Command;
use crate::lab::{GuestNvme, Lab, LabError};
use crate::report::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table, Target};
use crate::topology::{KIB, MIB, Nvme, Topology, sizes};

/// Name on the command line.
pub const NAME: &str = "bench-io";

/// Rounds; in each, every case runs once on each device, and the devices take turns in going first.
const ROUNDS: usize = 7;
/// How long a case runs.
const MILLISECONDS: u64 = 600;
/// Size of each SSD.
const MEDIUM: u64 = 256 * MIB;

/// What is measured: way, bytes, depth, and how many times QEMU's rate is wanted.
const CASES: [(Way, u64, u32, Option<f64>); 9] = [
    (Way::Read, 4 * KIB, 1, Some(1.25)),
    (Way::Read, 4 * KIB, 32, Some(1.5)),
    (Way::Read, 128 * KIB, 1, Some(1.35)),
    (Way::Read, 128 * KIB, 8, Some(1.35)),
    (Way::Read, MIB, 1, Some(1.5)),
    (Way::Read, MIB, 4, Some(1.5)),
    (Way::Write, 4 * KIB, 1, None),
    (Way::Write, 4 * KIB, 32, None),
    (Way::Write, MIB, 4, None),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Way {
    fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What the guest's iobench says.
#[derive(Debug, Deserialize)]
struct Measured {
    operations_per_second: f64,
}

struct Case {
    way: Way,
    block: u64,
    depth: u32,
    wanted: Option<f64>,
    /// Operations a second: QEMU's, ours.
    rates: [Vec<f64>; 2],
}

const DEVICES: [&str; 2] = ["qemu", "p2plab"];

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let topology = Topology::builder(NAME)
        .root_port("rp0")
        .switch("sw0", "rp0", 2)
        .nvme("ssd0", "sw0.0", Nvme::memory(MEDIUM))
        .build()?;
    copy::in_lab(topology, options, progress, measure)
}

fn measure(
    lab: &Lab,
    _options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<Benchmark, LabError> {
    let theirs = qemu_nvme::medium("qemu0", MEDIUM)?;
    // Blocks that were never written would be read from nothing.
    fill(&theirs, MEDIUM, progress)?;
    fill(&*medium(lab, "ssd0")?, MEDIUM, progress)?;
    qemu_nvme::add(lab, "qemu0", "sw0.1", &theirs, json!({}))?;
    let guest = lab.guest()?;
    let slot = lab.devices().shape().slot("sw0.1");
    let slot = slot.ok_or_else(|| LabError::Unexpected("sw0.1 is no slot".into()))?;
    let devices = [guest.nvme_in_slot("qemu0", &slot)?, guest.nvme("ssd0")?];
    let mut cases = CASES.map(|(way, block, depth, wanted)| Case {
        way,
        block,
        depth,
        wanted,
        rates: [Vec::new(), Vec::new()],
    });
    for round in 0..ROUNDS {
        progress.step(&format!("round {} of {ROUNDS}", round + 1), None);
        for case in &mut cases {
            for turn in 0..2 {
                let which = (round + turn) % 2;
                if let (Some(device), Some(rates)) = (devices.get(which), case.rates.get_mut(which))
                {
                    rates.push(one(lab, device, case.way, case.block, case.depth, round)?);
                }
            }
        }
    }
    progress.finish();
    Ok(report(lab, &cases))
}

/// One measurement, in operations a second.
fn one(
    lab: &Lab,
    device: &GuestNvme,
    way: Way,
    block: u64,
    depth: u32,
    round: usize,
) -> Result<f64, LabError> {
    let mut command = Command::new("iobench")
        .args([
            "--json".to_owned(),
            "--seed".to_owned(),
            (round + 1).to_string(),
        ])
        .args(["--block".to_owned(), block.to_string()])
        .args(["--depth".to_owned(), depth.to_string()])
        .args(["--milliseconds".to_owned(), MILLISECONDS.to_string()]);
    if way == Way::Write {
        command = command.arg("--write");
    }
    let command = command
        .arg(&device.block_device)
        .deadline(Duration::from_secs(60));
    let output = lab.agent()?.check(&command)?.text();
    let measured: Measured = serde_json::from_str(&output).map_err(|error| {
        LabError::Unexpected(format!("iobench answers `{}`: {error}", output.trim()))
    })?;
    Ok(measured.operations_per_second)
}

fn report(lab: &Lab, cases: &[Case]) -> Benchmark {
    let head = [
        "case",
        "QEMU nvme /s",
        "(min-max)",
        "p2plab /s",
        "(min-max)",
        "p2plab MB/s",
        "ratio",
    ];
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "iobench (O_DIRECT, Linux AIO, random places) on one SSD of QEMU's and one of p2plab's below one \
             switch, media in memory; medians of {ROUNDS} rounds of {MILLISECONDS} ms, in turn in one guest"
        ),
        table: Table::new(&head),
        versions: copy::versions(lab),
        ..Benchmark::default()
    };
    for case in cases {
        let (way, block) = (case.way.word(), sizes::format(case.block));
        let name = format!("{way} {block} depth {}", case.depth);
        let mut cells = vec![name.clone()];
        let mut medians = [0.0; 2];
        for ((device, rates), median) in DEVICES.iter().zip(&case.rates).zip(&mut medians) {
            let labels = [
                ("device", *device),
                ("operation", way),
                ("block_bytes", &case.block.to_string()),
                ("depth", &case.depth.to_string()),
            ];
            let measurement = Measurement::new(&labels, "operations per second", rates.clone());
            cells.push(format!("{:.0}", measurement.median));
            cells.push(format!(
                "({:.0}-{:.0})",
                measurement.minimum, measurement.maximum
            ));
            *median = measurement.median;
            report.measurements.push(measurement);
        }
        let [theirs, ours] = medians;
        let ratio = ours / theirs;
        cells.push(format!("{:.0}", ours * case.block as f64 / 1e6));
        cells.push(format!("{ratio:.2}"));
        report.table.row(cells);
        if let Some(wanted) = case.wanted {
            let text = format!("{name}: at least {wanted} times QEMU's");
            report.targets.push(Target::at_least(text, wanted, ratio));
        }
    }
    report
}
