//! How long a lab takes from its start to an agent that answers and two SSDs that the guest's driver has bound:
//! restored from a base image, and beside it booted from scratch.

use std::collections::BTreeMap;
use std::time::Instant;

use p2plab_images::Progress;

use super::ScenarioOptions;
use super::copy;
use crate::lab::LabError;
use crate::report::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table, Target};
use crate::topology::{MIB, Nvme, Topology};

/// Name on the command line.
pub const NAME: &str = "bench-warm-start";

const WARM: usize = 10;
const COLD: usize = 3;
/// Seconds that a warm start may take.
const BOUND: f64 = 1.5;
const TOTAL: &str = "total";

/// Seconds of each phase, by name, in the order in which phases happen.
#[derive(Default)]
struct Samples {
    phases: Vec<(&'static str, Vec<f64>)>,
}

impl Samples {
    fn add(&mut self, phase: &'static str, seconds: f64) {
        match self.phases.iter_mut().find(|(name, _)| *name == phase) {
            Some((_, samples)) => samples.push(seconds),
            None => self.phases.push((phase, vec![seconds])),
        }
    }
}

/// Runs the benchmark.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<Benchmark, LabError> {
    let mut report = Benchmark {
        schema_version: BENCHMARK_SCHEMA_VERSION,
        scenario: NAME.to_owned(),
        description: format!(
            "seconds from the start of a lab to two SSDs below one switch, bound by the guest's driver; {WARM} starts \
             from the base image, {COLD} boots from scratch"
        ),
        table: Table::new(&["phase", "median", "min", "max"]),
        ..Benchmark::default()
    };
    // Not measured: the first warm start of a new base image makes it.
    once(options, false, &mut Samples::default(), progress)?;
    for (start, cold, count) in [("warm", false, WARM), ("cold", true, COLD)] {
        let mut samples = Samples::default();
        for number in 1..=count {
            progress.step(&format!("{start} start {number} of {count}"), None);
            report.versions = once(options, cold, &mut samples, progress)?;
        }
        for (phase, seconds) in samples.phases {
            let labels = [("start", start), ("phase", phase)];
            let measured = Measurement::new(&labels, "s", seconds);
            let cell = |seconds: f64| format!("{seconds:.3}");
            report.table.row(vec![
                format!("{start}: {phase}"),
                cell(measured.median),
                cell(measured.minimum),
                cell(measured.maximum),
            ]);
            if (start, phase) == ("warm", TOTAL) {
                let wanted = format!("warm start at most {BOUND} s (median)");
                report
                    .targets
                    .push(Target::at_most(wanted, BOUND, measured.median));
            }
            report.measurements.push(measured);
        }
    }
    progress.finish();
    Ok(report)
}

/// Starts one lab and ends it; returns what it ran on.
fn once(
    options: &ScenarioOptions,
    cold: bool,
    samples: &mut Samples,
    progress: &mut dyn Progress,
) -> Result<BTreeMap<String, String>, LabError> {
    let options = ScenarioOptions {
        cold,
        ..options.clone()
    };
    let began = Instant::now();
    let topology = Topology::builder(NAME)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(256 * MIB).cmb(64 * MIB))
        .nvme("ssd1", "sw0.1", Nvme::memory(256 * MIB))
        .build()?;
    copy::in_lab(topology, &options, progress, |lab, _, _| {
        let started = Instant::now();
        let guest = lab.guest()?;
        guest.nvme("ssd0")?;
        guest.nvme("ssd1")?;
        let bound = started.elapsed();
        samples.add(TOTAL, began.elapsed().as_secs_f64());
        for phase in lab.start_phases() {
            samples.add(phase.name, phase.took.as_secs_f64());
        }
        samples.add("both SSDs bound", bound.as_secs_f64());
        Ok(copy::versions(lab))
    })
}
