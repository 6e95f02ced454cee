//! Readings of the counters: snapshots, differences, the laws that they obey, and their forms.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::counters::PortCells;
use crate::tlp::{Tally, TlpClass, TlpKind};
use crate::tree::PortKind;

/// Version of the JSON form of [`Traffic`]; it changes when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// One direction of a port's link, by flow-control class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByClass {
    /// Posted requests.
    pub posted: Tally,
    /// Non-posted requests.
    pub non_posted: Tally,
    /// Completions.
    pub completion: Tally,
}

impl ByClass {
    fn new(tallies: &[Tally; 3]) -> Self {
        let [posted, non_posted, completion] = *tallies;
        Self {
            posted,
            non_posted,
            completion,
        }
    }

    /// The tally of `class`.
    pub fn class(&self, class: TlpClass) -> Tally {
        match class {
            TlpClass::Posted => self.posted,
            TlpClass::NonPosted => self.non_posted,
            TlpClass::Completion => self.completion,
        }
    }

    /// All classes together.
    pub fn total(&self) -> Tally {
        let mut total = Tally::default();
        for class in TlpClass::ALL {
            total.add(self.class(class));
        }
        total
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            posted: self.posted.since(earlier.posted),
            non_posted: self.non_posted.since(earlier.non_posted),
            completion: self.completion.since(earlier.completion),
        }
    }
}

/// What one port counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortTraffic {
    /// Name of the port; of an endpoint's port, the endpoint's (`NAME@PORT` for an endpoint that was first
    /// plugged in elsewhere).
    pub name: String,
    /// What the port is.
    pub kind: PortKind,
    /// The port above: at the other end of the link for an upstream or endpoint port, the switch's upstream
    /// port for a downstream port.
    pub above: Option<String>,
    /// `false` where CPU accesses to a mapped BAR below bypass the switch and are not in these counters, also
    /// after that endpoint was unplugged.
    pub cpu_accesses_observed: bool,
    /// Received from the link.
    pub ingress: ByClass,
    /// Transmitted on the link.
    pub egress: ByClass,
    /// Requests that were answered with Unsupported Request at this port.
    pub unsupported_requests: u64,
    /// Requests of the function that did not leave it: Bus Master Enable off, or not in D0.
    pub blocked_requests: u64,
}

impl PortTraffic {
    pub(crate) fn new(
        name: String,
        kind: PortKind,
        above: Option<String>,
        cpu_accesses_observed: bool,
        cells: &PortCells,
    ) -> Self {
        Self {
            name,
            kind,
            above,
            cpu_accesses_observed,
            ingress: ByClass::new(&cells.tallies[0]),
            egress: ByClass::new(&cells.tallies[1]),
            unsupported_requests: cells.unsupported_requests,
            blocked_requests: cells.blocked_requests,
        }
    }

    /// Payload bytes in both directions.
    pub fn payload_bytes(&self) -> u64 {
        self.ingress
            .total()
            .payload_bytes
            .wrapping_add(self.egress.total().payload_bytes)
    }

    /// Packets in both directions.
    pub fn tlps(&self) -> u64 {
        self.ingress
            .total()
            .tlps
            .wrapping_add(self.egress.total().tlps)
    }

    fn since(&self, earlier: &Self) -> Self {
        Self {
            ingress: self.ingress.since(&earlier.ingress),
            egress: self.egress.since(&earlier.egress),
            unsupported_requests: self
                .unsupported_requests
                .wrapping_sub(earlier.unsupported_requests),
            blocked_requests: self.blocked_requests.wrapping_sub(earlier.blocked_requests),
            ..self.clone()
        }
    }
}

/// What went from one party to another, by kind of packet. Parties are endpoints by their port's name, and `cpu`,
/// `memory`, `interrupts` (MSI-X writes) and `unclaimed` (addresses that nothing decodes).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatrixEntry {
    /// Who sent it.
    pub source: String,
    /// Whom it reached.
    pub destination: String,
    /// Kind of packet.
    pub kind: TlpKind,
    /// How much.
    #[serde(flatten)]
    pub tally: Tally,
}

/// All counters of a fabric, of one moment or between two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Ports of the tree in the order of the topology, then those of the endpoints.
    pub ports: Vec<PortTraffic>,
    /// All pairs that exchanged anything.
    pub matrix: Vec<MatrixEntry>,
}

impl Traffic {
    /// What has come since `earlier`, a reading of the same fabric. Ports that are new since count from zero.
    #[must_use]
    pub fn since(&self, earlier: &Traffic) -> Traffic {
        let ports = self
            .ports
            .iter()
            .map(|port| match earlier.port(&port.name) {
                Some(before) => port.since(before),
                None => port.clone(),
            })
            .collect();
        let matrix = self
            .matrix
            .iter()
            .map(|entry| MatrixEntry {
                tally: entry.tally.since(earlier.between(
                    &entry.source,
                    &entry.destination,
                    entry.kind,
                )),
                ..entry.clone()
            })
            .filter(|entry| !entry.tally.is_zero())
            .collect();
        Traffic {
            schema_version: self.schema_version,
            ports,
            matrix,
        }
    }

    /// The port named `name`.
    pub fn port(&self, name: &str) -> Option<&PortTraffic> {
        self.ports.iter().find(|port| port.name == name)
    }

    /// What went from `source` to `destination` in packets of `kind`.
    pub fn between(&self, source: &str, destination: &str, kind: TlpKind) -> Tally {
        self.matrix
            .iter()
            .find(|e| e.source == source && e.destination == destination && e.kind == kind)
            .map(|entry| entry.tally)
            .unwrap_or_default()
    }

    /// Upstream ports that lie directly below a root port: where a switch tree's traffic meets the host.
    pub fn upstream_ports(&self) -> impl Iterator<Item = &PortTraffic> {
        self.ports.iter().filter(|port| {
            port.kind == PortKind::Upstream
                && port
                    .above
                    .as_deref()
                    .and_then(|above| self.port(above))
                    .is_some_and(|above| above.kind == PortKind::Root)
        })
    }

    /// Payload bytes in both directions at all upstream ports below root ports.
    pub fn upstream_payload_bytes(&self) -> u64 {
        self.upstream_ports().map(PortTraffic::payload_bytes).sum()
    }

    /// Checks the laws that the counters obey; each violation is a sentence.
    ///
    /// 1. What enters a switch leaves it, class by class.
    /// 2. What one end of a link sends the other end receives.
    /// 3. Data asked for at a port comes back through it, or is refused.
    /// 4. The matrix, summed over the paths that its pairs take, equals the ports.
    ///
    /// # Errors
    /// The violations.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut violations = Vec::new();
        self.check_switches(&mut violations);
        self.check_links(&mut violations);
        self.check_reads(&mut violations);
        self.check_matrix(&mut violations);
        if violations.is_empty() {
            Ok(())
        } else {
            Err(violations)
        }
    }

    fn check_switches(&self, violations: &mut Vec<String>) {
        for switch in self
            .ports
            .iter()
            .filter(|port| port.kind == PortKind::Upstream)
        {
            let mut sums = [(Tally::default(), Tally::default()); 3];
            let downstream = self.ports.iter().filter(|port| {
                port.kind == PortKind::Downstream && port.above.as_ref() == Some(&switch.name)
            });
            for port in downstream.chain([switch]) {
                for (class, (ingress, egress)) in TlpClass::ALL.iter().zip(&mut sums) {
                    ingress.add(port.ingress.class(*class));
                    egress.add(port.egress.class(*class));
                }
            }
            for (class, (ingress, egress)) in TlpClass::ALL.iter().zip(sums) {
                if ingress != egress {
                    violations.push(format!(
                        "switch {}: {class:?}: {ingress:?} entered, {egress:?} left",
                        switch.name
                    ));
                }
            }
        }
    }

    fn check_links(&self, violations: &mut Vec<String>) {
        // Endpoints take turns below a port: compare each port with all that were ever below it.
        let mut below: BTreeMap<&str, (ByClass, ByClass)> = BTreeMap::new();
        for port in &self.ports {
            let link = matches!(port.kind, PortKind::Upstream | PortKind::Endpoint);
            if let Some(above) = port.above.as_deref().filter(|_| link) {
                let (ingress, egress) = below.entry(above).or_default();
                *ingress = sum(ingress, &port.ingress);
                *egress = sum(egress, &port.egress);
            }
        }
        for port in &self.ports {
            let is_top = matches!(port.kind, PortKind::Root | PortKind::Downstream);
            let (ingress, egress) = below.get(port.name.as_str()).copied().unwrap_or_default();
            if is_top && (port.egress != ingress || port.ingress != egress) {
                violations.push(format!("link below {}: its ends disagree", port.name));
            }
        }
    }

    fn check_reads(&self, violations: &mut Vec<String>) {
        for port in &self.ports {
            for (way, there, back) in [
                ("egress", &port.egress, &port.ingress),
                ("ingress", &port.ingress, &port.egress),
            ] {
                let asked = there.non_posted.requested_bytes;
                let got = back.completion.payload_bytes;
                let refused = back.completion.requested_bytes;
                if asked != got.wrapping_add(refused) {
                    violations.push(format!(
                        "port {}, {way}: {asked} bytes asked for, {got} completed, {refused} refused",
                        port.name
                    ));
                }
            }
        }
    }

    /// From a party up to its root port, the party's own port first; empty for the host's parties.
    fn ascent(&self, party: &str) -> Vec<&PortTraffic> {
        let endpoint = self
            .port(party)
            .filter(|port| port.kind == PortKind::Endpoint);
        // Bounded: a reading that came from a file may say that a port lies above itself.
        std::iter::successors(endpoint, |port| {
            port.above.as_deref().and_then(|a| self.port(a))
        })
        .take(self.ports.len())
        .collect()
    }

    fn check_matrix(&self, violations: &mut Vec<String>) {
        let mut expected: BTreeMap<&str, [[Tally; 3]; 2]> = BTreeMap::new();
        for entry in &self.matrix {
            let (mut up, mut down) = (self.ascent(&entry.source), self.ascent(&entry.destination));
            let turn = up
                .iter()
                .find(|p| p.kind == PortKind::Upstream && down.iter().any(|d| d.name == p.name))
                .map(|port| port.name.clone());
            if let Some(turn) = turn {
                up.truncate(up.iter().position(|p| p.name == turn).unwrap_or(up.len()));
                down.truncate(
                    down.iter()
                        .position(|p| p.name == turn)
                        .unwrap_or(down.len()),
                );
            }
            let class = entry.kind.class() as usize;
            for (ports, upwards) in [(up, true), (down, false)] {
                for port in ports {
                    let sends_up = matches!(port.kind, PortKind::Upstream | PortKind::Endpoint);
                    let egress = usize::from(sends_up == upwards);
                    expected.entry(&port.name).or_default()[egress][class].add(entry.tally);
                }
            }
        }
        for port in &self.ports {
            let sums = expected
                .get(port.name.as_str())
                .copied()
                .unwrap_or_default();
            if ByClass::new(&sums[0]) != port.ingress || ByClass::new(&sums[1]) != port.egress {
                violations.push(format!("port {}: the matrix does not sum to it", port.name));
            }
        }
    }
}

fn sum(a: &ByClass, b: &ByClass) -> ByClass {
    let add = |mut x: Tally, y| {
        x.add(y);
        x
    };
    ByClass {
        posted: add(a.posted, b.posted),
        non_posted: add(a.non_posted, b.non_posted),
        completion: add(a.completion, b.completion),
    }
}

/// The text form: a table of ports, then the matrix.
impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .ports
            .iter()
            .map(|p| p.name.len())
            .max()
            .unwrap_or(0)
            .max(4);
        writeln!(
            f,
            "{:width$}  {:>8}  {:>16} {:>12}  {:>16} {:>12}  {:>6}",
            "port", "kind", "in: payload B", "TLPs", "out: payload B", "TLPs", "errors"
        )?;
        for port in &self.ports {
            let (ingress, egress) = (port.ingress.total(), port.egress.total());
            let kind = match port.kind {
                PortKind::Root => "root",
                PortKind::Upstream => "upstream",
                PortKind::Downstream => "down",
                PortKind::Endpoint => "endpoint",
            };
            let note = if port.cpu_accesses_observed {
                ""
            } else {
                "  CPU accesses not observed"
            };
            writeln!(
                f,
                "{:width$}  {kind:>8}  {:>16} {:>12}  {:>16} {:>12}  {:>6}{note}",
                port.name,
                ingress.payload_bytes,
                ingress.tlps,
                egress.payload_bytes,
                egress.tlps,
                port.unsupported_requests
                    .wrapping_add(port.blocked_requests),
            )?;
        }
        writeln!(f)?;
        let source = self
            .matrix
            .iter()
            .map(|e| e.source.len())
            .max()
            .unwrap_or(0)
            .max(4);
        let destination = self
            .matrix
            .iter()
            .map(|e| e.destination.len())
            .max()
            .unwrap_or(0)
            .max(2);
        writeln!(
            f,
            "{:source$}  {:destination$}  {:5}  {:>16}  {:>12}  {:>16}",
            "from", "to", "kind", "payload B", "TLPs", "header B"
        )?;
        for entry in &self.matrix {
            writeln!(
                f,
                "{:source$}  {:destination$}  {:5}  {:>16}  {:>12}  {:>16}",
                entry.source,
                entry.destination,
                format!("{:?}", entry.kind),
                entry.tally.payload_bytes,
                entry.tally.tlps,
                entry.tally.header_bytes,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reading may come from a file: nonsense is a violation, not an endless walk.
    #[test]
    fn a_port_above_itself_is_survived() {
        let port = PortTraffic::new(
            "a".to_owned(),
            PortKind::Endpoint,
            Some("a".to_owned()),
            true,
            &PortCells::default(),
        );
        let tally = Tally {
            tlps: 1,
            ..Tally::default()
        };
        let traffic = Traffic {
            schema_version: SCHEMA_VERSION,
            ports: vec![port],
            matrix: vec![MatrixEntry {
                source: "a".to_owned(),
                destination: "memory".to_owned(),
                kind: TlpKind::MWr,
                tally,
            }],
        };
        assert!(traffic.check().is_err());
    }
}
