//! What scenarios report: one table for people, one JSON document for programs.
//!
//! Every scenario that compares modes uses the keys of [`CopyReport`], every benchmark those of [`Benchmark`].

mod benchmark;
mod table;
mod transfers;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use p2plab_pcie::{COUNTING, MatrixEntry, PortTraffic, Traffic};
use serde::{Deserialize, Serialize};

pub use benchmark::{BENCHMARK_SCHEMA_VERSION, Benchmark, Measurement, Table, Target};
pub use transfers::{Talk, Transfer, TransferBy};

/// What a scenario hands to whoever ran it; its `Display` form is the table.
pub trait Report: fmt::Display {
    /// Whether the scenario found everything right.
    fn passed(&self) -> bool;

    /// The JSON form.
    ///
    /// # Errors
    /// None that a report can have: the serializer's.
    fn json(&self) -> serde_json::Result<serde_json::Value>;

    /// Writes the JSON form.
    ///
    /// # Errors
    /// The file's.
    fn write_json(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(&self.json()?)?;
        text.push('\n');
        std::fs::write(path, text)
    }
}

/// Version of the JSON form of [`CopyReport`]; it changes when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// A comparison of ways to copy the same bytes in the same guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyReport {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the scenario.
    pub scenario: String,
    /// One sentence: what is copied from where to where through what.
    pub description: String,
    /// Bytes copied in each mode.
    pub size_bytes: u64,
    /// Bytes moved by one read and one write.
    pub chunk_bytes: u64,
    /// Threads that copy, and chunks that each has in flight.
    pub threads: u32,
    /// See `threads`.
    pub depth: u32,
    /// Whether traffic was counted. Where the counters were compiled out, to measure what they cost, all that they
    /// would say is missing below.
    pub counted: bool,
    /// How the bytes travelled; keys are `classic` (through host memory) and `p2p`.
    pub modes: BTreeMap<String, ModeReport>,
    /// Payload at the upstream ports of mode `p2p` divided by that of `classic`.
    pub usp_payload_ratio: Option<f64>,
    /// Each port in each mode.
    pub ports: Vec<PortReport>,
    /// Who sent what to whom, in each mode.
    pub matrix: Vec<MatrixReport>,
    /// The DMAs that carried all of the data, in each mode.
    #[serde(default)]
    pub transfers: Vec<Transfer>,
    /// What the talk measured, where this is an example of it.
    #[serde(default)]
    pub talk: Option<Talk>,
    /// What it ran on: QEMU, kernel, p2plab and others, by name.
    pub versions: BTreeMap<String, String>,
}

/// One way to copy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModeReport {
    /// Wall-clock time of the copy, measured in the guest.
    pub seconds: f64,
    /// `size_bytes / seconds`.
    pub bytes_per_second: f64,
    /// Payload bytes at the upstream ports below the root ports, both directions.
    #[serde(default, skip_serializing_if = "uncounted")]
    pub usp_payload_bytes: u64,
    /// Packets at the same ports, both directions.
    #[serde(default, skip_serializing_if = "uncounted")]
    pub usp_tlps: u64,
    /// Whether every byte of the destination was compared with what the source was filled with.
    pub verified: bool,
}

/// A zero of a counter that was compiled out is no measurement and is not written as one.
fn uncounted(_value: &u64) -> bool {
    !COUNTING
}

/// One port in one mode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortReport {
    /// The mode.
    pub mode: String,
    /// The counters.
    #[serde(flatten)]
    pub traffic: PortTraffic,
    /// Payload bytes in both directions.
    pub payload_bytes: u64,
    /// Packets in both directions.
    pub tlps: u64,
}

/// One pair of parties in one mode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MatrixReport {
    /// The mode.
    pub mode: String,
    /// The counters.
    #[serde(flatten)]
    pub entry: MatrixEntry,
}

/// A mode as it was measured.
#[derive(Clone, Debug)]
pub struct MeasuredMode {
    /// `classic` or `p2p`.
    pub name: String,
    /// Wall-clock time in the guest.
    pub seconds: f64,
    /// What crossed the ports meanwhile.
    pub traffic: Traffic,
    /// Whether the data was compared and is right.
    pub verified: bool,
}

impl CopyReport {
    /// Puts measured modes together; the caller fills in what describes the run.
    pub fn new(scenario: &str, size_bytes: u64, chunk_bytes: u64, modes: &[MeasuredMode]) -> Self {
        let mut report = Self {
            schema_version: SCHEMA_VERSION,
            scenario: scenario.to_owned(),
            description: String::new(),
            size_bytes,
            chunk_bytes,
            threads: 1,
            depth: 1,
            counted: COUNTING,
            modes: BTreeMap::new(),
            usp_payload_ratio: None,
            ports: Vec::new(),
            matrix: Vec::new(),
            transfers: Vec::new(),
            talk: None,
            versions: BTreeMap::new(),
        };
        for mode in modes {
            report.add(mode);
        }
        report.usp_payload_ratio = report
            .modes
            .get("p2p")
            .zip(report.modes.get("classic"))
            .filter(|_| COUNTING)
            .map(|(p2p, classic)| {
                p2p.usp_payload_bytes as f64 / classic.usp_payload_bytes.max(1) as f64
            });
        report
    }

    fn add(&mut self, mode: &MeasuredMode) {
        self.modes.insert(
            mode.name.clone(),
            ModeReport {
                seconds: mode.seconds,
                bytes_per_second: self.size_bytes as f64 / mode.seconds,
                usp_payload_bytes: mode.traffic.upstream_payload_bytes(),
                usp_tlps: mode.traffic.upstream_ports().map(PortTraffic::tlps).sum(),
                verified: mode.verified,
            },
        );
        if !COUNTING {
            return;
        }
        self.ports
            .extend(mode.traffic.ports.iter().map(|port| PortReport {
                mode: mode.name.clone(),
                payload_bytes: port.payload_bytes(),
                tlps: port.tlps(),
                traffic: port.clone(),
            }));
        let transfers = transfers::transfers(&mode.name, self.size_bytes, &mode.traffic);
        self.transfers.extend(transfers);
        self.matrix
            .extend(mode.traffic.matrix.iter().map(|entry| MatrixReport {
                mode: mode.name.clone(),
                entry: entry.clone(),
            }));
    }
}

impl Report for CopyReport {
    fn passed(&self) -> bool {
        self.modes.values().all(|mode| mode.verified)
    }

    fn json(&self) -> serde_json::Result<serde_json::Value> {
        serde_json::to_value(self)
    }
}
