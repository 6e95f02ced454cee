//! The examples side by side, each as its command runs it: throughput and bytes at the upstream port, beside what the
//! talk's hardware had.

use std::collections::BTreeMap;

use p2plab_images::Progress;
use p2plab_pcie::COUNTING;

use super::bench_p2p::upstream_target;
use super::{ScenarioOptions, nvme_cmb_copy, nvme_pmr_copy, nvram_copy};
use crate::lab::LabError;
use crate::report::{
    BENCHMARK_SCHEMA_VERSION, Benchmark, CopyReport, Measurement, Report, Table, Talk, Target,
};
use crate::topology::{GIB, sizes};

/// Name on the command line.
pub const NAME: &str = "bench-examples";

/// Rounds; in each, every example runs once in a lab of its own, and they take turns in going first.
const ROUNDS: usize = 5;
/// Share of nvme-cmb-copy's rate that nvram-copy is to reach.
const SHARE: f64 = 0.85;
const MODES: [&str; 2] = ["classic", "p2p"];

type Run = fn(&ScenarioOptions, &mut dyn Progress) -> Result<CopyReport, LabError>;
const EXAMPLES: [(&str, Run); 3] = [
    (nvram_copy::NAME, nvram_copy::run),
    (nvme_cmb_copy::NAME, nvme_cmb_copy::run),
    (nvme_pmr_copy::NAME, nvme_pmr_copy::run),
];

/// What an example had in all rounds.
struct Samples {
    name: &'static str,
    talk: Option<Talk>,
    /// Bytes a second, classic and peer to peer.
    rates: [Vec<f64>; 2],
    /// Payload bytes at the upstream port, peer to peer.
    upstream: Vec<f64>,
}

impl Samples {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            talk: None,
            rates: [Vec::new(), Vec::new()],
            upstream: Vec::new(),
        }
    }

    fn add(&mut self, report: &CopyReport) {
        self.talk = report.talk;
        for (mode, rates) in MODES.iter().zip(&mut self.rates) {
            let mode = report.modes.get(*mode);
            rates.extend(mode.map(|mode| mode.bytes_per_second));
        }
        let p2p = report.modes.get("p2p").filter(|_| COUNTING);
        self.upstream
            .extend(p2p.map(|mode| mode.usp_payload_bytes as f64));
    }
}

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let mut examples = EXAMPLES.map(|(name, run)| (run, Samples::new(name)));
    let mut versions = BTreeMap::new();
    for round in 0..ROUNDS {
        for turn in 0..EXAMPLES.len() {
            let which = (round + turn) % EXAMPLES.len();
            let Some((run, samples)) = examples.get_mut(which) else {
                continue;
            };
            let what = format!("round {} of {ROUNDS}: {}", round + 1, samples.name);
            progress.step(&what, None);
            let report = run(options, progress)?;
            if !report.passed() {
                let what = format!("{} copied wrong bytes", samples.name);
                return Err(LabError::Unexpected(what));
            }
            samples.add(&report);
            versions.extend(report.versions);
        }
    }
    progress.finish();
    let mut report = report(options, examples.map(|(_, samples)| samples));
    report.versions = versions;
    Ok(report)
}

/// What an example had, summed up.
struct Measured {
    name: &'static str,
    talk: Option<Talk>,
    classic: Measurement,
    p2p: Measurement,
    upstream: Measurement,
}

impl From<Samples> for Measured {
    fn from(samples: Samples) -> Self {
        let name = samples.name;
        let new = |mode, unit, samples| {
            Measurement::new(&[("example", name), ("mode", mode)], unit, samples)
        };
        let [classic, p2p] = samples.rates;
        let upstream = "payload bytes at the upstream port";
        Self {
            name,
            talk: samples.talk,
            classic: new("classic", "bytes per second", classic),
            p2p: new("p2p", "bytes per second", p2p),
            upstream: new("p2p", upstream, samples.upstream),
        }
    }
}

const HEAD: [&str; 8] = [
    "example",
    "classic MB/s",
    "p2p MB/s",
    "(min-max)",
    "the talk",
    "p2p USP bytes",
    "MB for 8 GiB",
    "the talk",
];

impl Measured {
    /// Its row of the table, below [`HEAD`].
    fn row(&self, size: u64) -> Vec<String> {
        let mega = |value: f64| format!("{:.0}", value / 1e6);
        let talk = |figure: fn(&Talk) -> u64| {
            let figure = self.talk.as_ref().map(figure);
            figure.map_or_else(|| "-".to_owned(), |figure| mega(figure as f64))
        };
        let counted = |cell: String| if COUNTING { cell } else { "-".to_owned() };
        let upstream = self.upstream.median;
        let for_8_gib = upstream * (8 * GIB) as f64 / size as f64;
        let (least, most) = (self.p2p.minimum, self.p2p.maximum);
        vec![
            self.name.to_owned(),
            mega(self.classic.median),
            mega(self.p2p.median),
            format!("({}-{})", mega(least), mega(most)),
            talk(|talk| talk.p2p_bytes_per_second),
            counted(format!("{upstream:.0}")),
            counted(format!("{:.2}", for_8_gib / 1e6)),
            talk(|talk| talk.p2p_usp_bytes),
        ]
    }

    /// What the talk's hardware had; none where the talk printed nothing.
    fn targets(&self, size: u64) -> Vec<Target> {
        let Some(talk) = self.talk else {
            return Vec::new();
        };
        let name = self.name;
        let rate = talk.p2p_bytes_per_second as f64 / 1e6;
        let text = format!("{name}: at least {rate:.0} MB/s, as the talk's hardware");
        let mut targets = vec![Target::at_least(text, rate, self.p2p.median / 1e6)];
        if COUNTING {
            let mut target = upstream_target(size, self.upstream.median);
            target.wanted = format!("{name}: {}", target.wanted);
            targets.push(target);
        }
        targets
    }
}

fn report(options: &ScenarioOptions, examples: [Samples; EXAMPLES.len()]) -> Benchmark {
    let (size, chunk) = (sizes::format(options.size), sizes::format(options.chunk));
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "{size} in chunks of {chunk} ({} thread(s), depth {}), each time in a lab of its own, the examples in turn; \
             medians of {ROUNDS} rounds; USP: payload at the upstream port",
            options.threads, options.depth
        ),
        table: Table::new(&HEAD),
        ..Benchmark::default()
    };
    let examples = examples.map(Measured::from);
    for example in &examples {
        report.table.row(example.row(options.size));
        report.targets.extend(example.targets(options.size));
    }
    let [nvram, cmb, _] = &examples;
    let text = format!("{}: at least {SHARE} times {}", nvram.name, cmb.name);
    let ratio = nvram.p2p.median / cmb.p2p.median;
    report.targets.push(Target::at_least(text, SHARE, ratio));
    for example in examples {
        report.measurements.extend([example.classic, example.p2p]);
        if COUNTING {
            report.measurements.push(example.upstream);
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rates of three rounds in MB/s, each half as fast through host memory.
    fn samples(name: &'static str, rates: [f64; 3], upstream: f64) -> Samples {
        Samples {
            name,
            talk: (name != nvme_pmr_copy::NAME).then(|| Talk::example(600_000_000)),
            rates: [0.5, 1.0].map(|part| rates.map(|rate| rate * part * 1e6).to_vec()),
            upstream: vec![upstream; 3],
        }
    }

    #[test]
    fn medians_stand_beside_what_is_wanted() {
        let options = ScenarioOptions {
            size: GIB,
            ..ScenarioOptions::default()
        };
        let report = report(
            &options,
            [
                samples(nvram_copy::NAME, [700.0, 100.0, 800.0], 1e6),
                samples(nvme_cmb_copy::NAME, [900.0, 1000.0, 950.0], 2e6),
                samples(nvme_pmr_copy::NAME, [1.0, 2.0, 3.0], 3e6),
            ],
        );
        let table = report.table.to_string();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        let nvram = [
            "nvram-copy",
            "350",
            "700",
            "(100-800)",
            "600",
            "1000000",
            "8.00",
            "15",
        ];
        let pmr = [
            "nvme-pmr-copy",
            "1",
            "2",
            "(1-3)",
            "-",
            "3000000",
            "24.00",
            "-",
        ];
        assert_eq!(rows[1], nvram);
        assert_eq!(rows[3], pmr);
        let targets: Vec<(f64, bool)> = report
            .targets
            .iter()
            .map(|target| ((target.measured * 100.0).round() / 100.0, target.met))
            .collect();
        let expected = [
            (700.0, true),
            (1.0, true),
            (950.0, true),
            // 15 MB for 8 GiB are 1.875 MB for 1 GiB.
            (2.0, false),
            (0.74, false),
        ];
        assert_eq!(targets, expected);
    }
}
