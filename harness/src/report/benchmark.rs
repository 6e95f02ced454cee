//! What a benchmark reports: samples of something measured side by side, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Report;

/// Version of the JSON form of [`Benchmark`]; it changes when a key changes its meaning or goes.
pub const BENCHMARK_SCHEMA_VERSION: u32 = 1;

/// A benchmark's measurements. It compares what ran in turn in one run, and fails for no figure: a loaded host
/// must not look like a defect.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Benchmark {
    /// [`BENCHMARK_SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the scenario.
    pub scenario: String,
    /// What is measured and how.
    pub description: String,
    /// Everything that was measured.
    pub measurements: Vec<Measurement>,
    /// The figures that the project wants, and whether this run has them.
    pub targets: Vec<Target>,
    /// What it ran on: QEMU, kernel, p2plab and others, by name.
    pub versions: BTreeMap<String, String>,
    /// For people.
    #[serde(skip)]
    pub table: Table,
}

/// One thing, measured several times.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// What tells it from the other measurements: `device`, `mode`, `chunk_bytes` and the like.
    pub labels: BTreeMap<String, String>,
    /// Unit of the samples.
    pub unit: String,
    /// The samples in the order of the rounds.
    pub samples: Vec<f64>,
    /// Middle sample, or the mean of the two middle ones.
    pub median: f64,
    /// Smallest sample.
    pub minimum: f64,
    /// Largest sample.
    pub maximum: f64,
}

impl Measurement {
    /// Puts samples together; without any, all figures are 0.
    pub fn new(labels: &[(&str, &str)], unit: &str, samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        let last = sorted.len().saturating_sub(1);
        Self {
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            unit: unit.to_owned(),
            median: (at(last / 2) + at(sorted.len() / 2)) / 2.0,
            minimum: at(0),
            maximum: at(last),
            samples,
        }
    }
}

/// A figure that the project wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// What is to be how large, as a sentence.
    pub wanted: String,
    /// What this run has.
    pub measured: f64,
    /// Whether that is enough.
    pub met: bool,
}

impl Target {
    /// `measured` is to be at least `bound`.
    pub fn at_least(wanted: impl Into<String>, bound: f64, measured: f64) -> Self {
        Self {
            wanted: wanted.into(),
            measured,
            met: measured >= bound,
        }
    }

    /// `measured` is to be at most `bound`.
    pub fn at_most(wanted: impl Into<String>, bound: f64, measured: f64) -> Self {
        Self {
            wanted: wanted.into(),
            measured,
            met: measured <= bound,
        }
    }
}

/// Cells with a head; the first column is aligned to the left, the others to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// Adds a row below the others.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths: Vec<usize> = Vec::new();
        for row in &self.rows {
            for (index, cell) in row.iter().enumerate() {
                let length = cell.chars().count();
                match widths.get_mut(index) {
                    Some(width) => *width = length.max(*width),
                    None => widths.push(length),
                }
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if index == 0 {
                    line.push_str(&format!("{cell:width$}"));
                } else {
                    line.push_str(&format!("  {cell:>width$}"));
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {}\n\n{}",
            self.scenario, self.description, self.table
        )?;
        for target in &self.targets {
            let met = if target.met { "met" } else { "MISSED" };
            writeln!(f, "{}: {:.2}, {met}", target.wanted, target.measured)?;
        }
        Ok(())
    }
}

impl Report for Benchmark {
    fn passed(&self) -> bool {
        true
    }

    fn json(&self) -> serde_json::Result<serde_json::Value> {
        serde_json::to_value(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let median = |samples: &[f64]| Measurement::new(&[], "s", samples.to_vec()).median;
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["mode", "MB/s"]);
        table.row(vec!["p2p".into(), "1,234".into()]);
        assert_eq!(table.to_string(), "mode   MB/s\np2p   1,234\n");
    }
}
