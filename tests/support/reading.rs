//! Reading what a running lab counts, beside what its commands must have caused.

use std::time::{Duration, Instant};

use p2plab::lab::{Guest, Lab, LabError};
use p2plab::topology::Topology;
use p2plab_nvme::TraceLog;
use p2plab_pcie::Traffic;

use crate::traffic::{self, Matrix, Model, ModelEndpoint, PortCounts, Settings, show};

/// Counting follows the bytes: a completion that the guest has seen may be counted a moment later.
const SETTLE: Duration = Duration::from_secs(10);
/// Time between two readings of counters that must not move any more.
const STILL: Duration = Duration::from_millis(200);

/// Commands of all SSDs and what the fabric counted, between two moments at which nothing was under way.
pub struct Watch<'a> {
    lab: &'a Lab,
    model: Model,
    before: Traffic,
}

/// What a [`Watch`] saw.
pub struct Seen {
    /// The topology's model, with the settings at the beginning.
    pub model: Model,
    /// The commands, by endpoint.
    pub traces: Vec<(String, TraceLog)>,
    /// What the counters gained.
    pub traffic: Traffic,
}

/// A configuration register of endpoint `name`, by setpci's name for it (such as `CAP_EXP+8.w`).
///
/// # Errors
/// The agent's.
pub fn register(guest: &Guest<'_>, name: &str, register: &str) -> Result<u64, LabError> {
    let address = guest.nvme(name)?.address;
    let text = guest.sh(&format!("setpci -s {address} {register}"))?;
    u64::from_str_radix(text.trim(), 16)
        .map_err(|_| LabError::Unexpected(format!("setpci answers `{}`", text.trim())))
}

/// Max_Payload_Size, Max_Read_Request_Size and the Read Completion Boundary of `name`, as the guest reads them.
///
/// # Errors
/// The agent's.
pub fn settings(guest: &Guest<'_>, name: &str) -> Result<Settings, LabError> {
    let control = register(guest, name, "CAP_EXP+8.w")?;
    let link = register(guest, name, "CAP_EXP+10.w")?;
    Ok(Settings {
        mps: 128 << (control >> 5 & 7),
        mrrs: 128 << (control >> 12 & 7),
        rcb: if link >> 3 & 1 == 1 { 128 } else { 64 },
    })
}

/// Programs the three into endpoint `name`.
///
/// # Errors
/// The agent's.
pub fn program(guest: &Guest<'_>, name: &str, settings: Settings) -> Result<(), LabError> {
    let field = |bytes: u64| u64::from(bytes.trailing_zeros()) - 7;
    let control = field(settings.mps) << 5 | field(settings.mrrs) << 12;
    let link = u64::from(settings.rcb == 128) << 3;
    let address = guest.nvme(name)?.address;
    guest.sh(&format!(
        "setpci -s {address} CAP_EXP+8.w={control:x}:70e0 CAP_EXP+10.w={link:x}:8"
    ))?;
    Ok(())
}

/// Memory BARs of endpoint `name`: the kernel's list of its resources.
fn bars(guest: &Guest<'_>, name: &str) -> Result<Vec<(u64, u64)>, LabError> {
    let address = guest.nvme(name)?.address;
    let text = guest.sh(&format!("head -6 /sys/bus/pci/devices/{address}/resource"))?;
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).unwrap_or(0);
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace().map(number);
        let (start, end) = (words.next()?, words.next()?);
        (end > start).then_some((start, end - start + 1))
    });
    Ok(lines.collect())
}

impl<'a> Watch<'a> {
    /// Begins once no SSD of `topology`, which `lab` runs, has anything under way.
    ///
    /// # Errors
    /// The agent's, or counters that keep moving.
    pub fn begin(lab: &'a Lab, topology: &Topology) -> Result<Self, LabError> {
        let guest = lab.guest()?;
        let mut endpoints = std::collections::BTreeMap::new();
        for endpoint in &topology.endpoints {
            // Opening a disk waits for the end of its partition scan.
            let disk = guest.nvme(&endpoint.name)?.block_device;
            guest.sh(&format!("dd if={disk} of=/dev/null bs=4096 count=1"))?;
            let model = ModelEndpoint {
                settings: settings(&guest, &endpoint.name)?,
                bars: bars(&guest, &endpoint.name)?,
            };
            endpoints.insert(endpoint.name.clone(), model);
        }
        let model = Model::new(topology, |name| endpoints[name].clone());
        let deadline = Instant::now() + SETTLE;
        let mut before = lab.traffic();
        loop {
            traces(lab, true);
            std::thread::sleep(STILL);
            let now = lab.traffic();
            if now == before
                && traces(lab, true)
                    .iter()
                    .all(|(_, log)| log.entries.is_empty() && log.doorbells.is_empty())
            {
                return Ok(Self { lab, model, before });
            }
            if Instant::now() > deadline {
                let moving = now.since(&before);
                return Err(LabError::Unexpected(format!(
                    "the counters do not come to rest:\n{moving}"
                )));
            }
            before = now;
        }
    }

    /// Ends: holds all DMA entries of the matrix, and all ports, against the model, and returns what was seen.
    ///
    /// # Panics
    /// Where one differs.
    pub fn end(self) -> Seen {
        let deadline = Instant::now() + SETTLE;
        let mut seen: Vec<(String, TraceLog)> = Vec::new();
        let (traffic, mut expected) = loop {
            // Traces first: what they lack is counted, too, and looked for again. A controller still looks at its
            // shadow doorbells when the guest has seen the last completion.
            collect(&mut seen, traces(self.lab, true));
            let traffic = self.lab.traffic().since(&self.before);
            let mut expected = Matrix::new();
            for (name, log) in &seen {
                traffic::merge(&mut expected, &self.model.dma(name, log));
            }
            if traffic::split(&traffic).0 == expected || Instant::now() > deadline {
                break (traffic, expected);
            }
            std::thread::sleep(STILL);
        };
        traces(self.lab, false);
        let (counted, other) = traffic::split(&traffic);
        assert!(
            counted == expected,
            "counted:\n{}but the commands ask for:\n{}",
            show(&counted),
            show(&expected)
        );
        traffic::merge(&mut expected, &other);
        let ports = self.model.ports(&expected);
        for port in &traffic.ports {
            let expected = ports.get(&port.name).copied().unwrap_or_default();
            assert_eq!(PortCounts::of(port), expected, "port {}", port.name);
        }
        assert!(ports.keys().all(|name| traffic.port(name).is_some()));
        Seen {
            model: self.model,
            traces: seen,
            traffic,
        }
    }
}

/// Adds what was recorded meanwhile.
fn collect(seen: &mut Vec<(String, TraceLog)>, new: Vec<(String, TraceLog)>) {
    for (name, log) in new {
        match seen.iter_mut().find(|(endpoint, _)| *endpoint == name) {
            Some((_, all)) => {
                all.entries.extend(log.entries);
                all.doorbells.extend(log.doorbells);
                all.lost += log.lost;
            }
            None => seen.push((name, log)),
        }
    }
}

/// What all SSDs have executed since the last call; `on` goes on recording.
fn traces(lab: &Lab, on: bool) -> Vec<(String, TraceLog)> {
    let ssds = lab.devices().iter().filter_map(|d| Some((d, d.nvme()?)));
    ssds.map(|(device, controller)| {
        controller.trace().enable(on);
        (device.name().to_owned(), controller.trace().take())
    })
    .collect()
}

impl Seen {
    /// The trace of endpoint `name`.
    ///
    /// # Panics
    /// Where there is no such endpoint.
    pub fn trace(&self, name: &str) -> &TraceLog {
        match self.traces.iter().find(|(endpoint, _)| endpoint == name) {
            Some((_, log)) => log,
            None => panic!("no trace of {name}"),
        }
    }

    /// Commands that all SSDs have executed.
    pub fn commands(&self) -> u64 {
        let logs = self.traces.iter();
        logs.map(|(_, log)| log.entries.len() as u64).sum()
    }
}
