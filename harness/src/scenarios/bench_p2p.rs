//! The peer-to-peer copy beside a plain program on the host that does the same two copies into the same files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use p2plab_images::Progress;

use super::ScenarioOptions;
use super::copy::{self, GuestCopy};
use super::media::{clear, fill, medium, verify};
use super::nvme_cmb_copy;
use crate::lab::{Lab, LabError};
use crate::report::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table, Target};
use crate::topology::{GIB, sizes};

/// Name on the command line.
pub const NAME: &str = "bench-p2p";

/// Rounds; in each, guest and host copy once.
const ROUNDS: usize = 5;
/// What the talk's hardware copied through a CMB, in MB/s.
const TALK: f64 = 1600.0;
/// What the talk counted at the upstream port for 8 GB, in bytes.
const TALK_UPSTREAM: f64 = 15e6;
/// Share of the host program's rate that the guest's copy is to reach.
const SHARE: f64 = 0.6;

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let topology = nvme_cmb_copy::topology(NAME, options)?;
    copy::in_lab(topology, options, progress, measure)
}

fn measure(
    lab: &Lab,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<Benchmark, LabError> {
    let (source, destination) = (medium(lab, "ssd0")?, medium(lab, "ssd1")?);
    fill(&source, options.size, progress)?;
    copy::prefer_sgls(lab)?;
    let guest = lab.guest()?;
    let (from, to) = (guest.nvme("ssd0")?, guest.nvme("ssd1")?);
    let buffer = copy::p2pmem(lab, &from, "ssd0")?;
    let (mut guests, mut hosts, mut upstream) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        clear(&destination, options.size)?;
        progress.step(&format!("round {round} of {ROUNDS}: peer to peer"), None);
        let before = lab.traffic();
        let seconds = GuestCopy::new(&from, &to, buffer, options).run(lab)?;
        let traffic = lab.traffic().since(&before);
        guests.push(options.size as f64 / seconds);
        upstream.push(traffic.upstream_payload_bytes() as f64);
        if !verify(&destination, options.size, progress)? {
            return Err(LabError::Unexpected(
                "the copy differs from the source".into(),
            ));
        }
        clear(&destination, options.size)?;
        progress.step(
            &format!("round {round} of {ROUNDS}: a program on the host"),
            None,
        );
        let seconds = host_copy(&source, &destination, options)?;
        hosts.push(options.size as f64 / seconds);
    }
    progress.finish();
    Ok(report(lab, options, guests, hosts, upstream))
}

/// Copies through a buffer as large as what the guest has in flight; returns the seconds.
fn host_copy(from: &File, to: &File, options: &ScenarioOptions) -> Result<f64, LabError> {
    let flights = u64::from(options.threads) * u64::from(options.depth);
    let chunk = usize::try_from(options.chunk).unwrap_or(usize::MAX);
    let mut buffers: Vec<Vec<u8>> = (0..flights).map(|_| vec![0; chunk]).collect();
    let begin = Instant::now();
    let mut offset = 0;
    for index in (0..buffers.len()).cycle() {
        if offset >= options.size {
            break;
        }
        if let Some(buffer) = buffers.get_mut(index) {
            from.read_exact_at(buffer, offset)
                .map_err(LabError::medium)?;
            to.write_all_at(buffer, offset).map_err(LabError::medium)?;
        }
        offset += options.chunk;
    }
    Ok(begin.elapsed().as_secs_f64())
}

fn report(
    lab: &Lab,
    options: &ScenarioOptions,
    guests: Vec<f64>,
    hosts: Vec<f64>,
    upstream: Vec<f64>,
) -> Benchmark {
    let (size, chunk) = (sizes::format(options.size), sizes::format(options.chunk));
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "{size} in chunks of {chunk} from ssd0 to ssd1, in the guest through the CMB of ssd0 ({} thread(s), depth \
             {}), and by a program on the host that reads and writes the same files, in turn",
            options.threads, options.depth
        ),
        table: Table::new(&["what", "median", "min", "max"]),
        versions: copy::versions(lab),
        ..Benchmark::default()
    };
    let mut row = |what: &str, unit: &str, scale: f64, samples: Vec<f64>| {
        let measurement = Measurement::new(&[("what", what)], unit, samples);
        let show = |value: f64| format!("{:.0}", value / scale);
        report.table.row(vec![
            what.to_owned(),
            show(measurement.median),
            show(measurement.minimum),
            show(measurement.maximum),
        ]);
        let median = measurement.median;
        report.measurements.push(measurement);
        median
    };
    let guest = row("peer to peer, MB/s", "bytes per second", 1e6, guests);
    let host = row("host program, MB/s", "bytes per second", 1e6, hosts);
    let usp = row(
        "payload at the upstream port, bytes",
        "bytes",
        1.0,
        upstream,
    );
    report.targets = vec![
        Target::at_least(
            format!("at least {TALK:.0} MB/s, as the talk's hardware"),
            TALK,
            guest / 1e6,
        ),
        Target::at_least(
            format!("at least {SHARE} times the program on the host"),
            SHARE,
            guest / host,
        ),
        upstream_target(options.size, usp),
    ];
    report
}

/// `bytes` of payload at the upstream port are enough for the talk's share of `size` bytes copied.
pub(super) fn upstream_target(size: u64, bytes: f64) -> Target {
    let limit = TALK_UPSTREAM * size as f64 / (8 * GIB) as f64 / 1e6;
    let text = format!("at most {limit:.2} MB of payload at the upstream port, 15 MB for 8 GiB");
    Target::at_most(text, limit, bytes / 1e6)
}
