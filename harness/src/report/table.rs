//! The table for people.

use std::fmt;

use p2plab_pcie::PortKind;

use super::{CopyReport, ModeReport, PortReport};
use crate::topology::sizes;

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl CopyReport {
    fn mode(&self, name: &str) -> Option<&ModeReport> {
        self.modes.get(name)
    }

    fn port(&self, mode: &str, name: &str) -> Option<&PortReport> {
        self.ports
            .iter()
            .find(|port| port.mode == mode && port.traffic.name == name)
    }

    /// Modes in the order in which people think of them: the classic way first.
    fn mode_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.modes.keys().map(String::as_str).collect();
        names.sort_by_key(|name| *name != "classic");
        names
    }

    fn write_summary(&self, f: &mut fmt::Formatter<'_>, names: &[&str]) -> fmt::Result {
        let row =
            |f: &mut fmt::Formatter<'_>, label: &str, cell: &dyn Fn(&ModeReport) -> String| {
                write!(f, "{label:27}")?;
                for name in names {
                    let text = self.mode(name).map(cell).unwrap_or_default();
                    write!(f, "  {text:>33}")?;
                }
                writeln!(f)
            };
        write!(f, "{:27}", "")?;
        for name in names {
            write!(f, "  {name:>33}")?;
        }
        writeln!(f)?;
        row(f, "throughput", &|m| {
            format!("{:.0} MB/s", m.bytes_per_second / 1e6)
        })?;
        row(f, "time", &|m| format!("{:.2} s", m.seconds))?;
        row(f, "every byte compared", &|m| {
            (if m.verified {
                "yes, right"
            } else {
                "yes, WRONG"
            })
            .to_owned()
        })
    }

    /// A line for each mode: which way the data went.
    fn write_transfers(&self, f: &mut fmt::Formatter<'_>, names: &[&str]) -> fmt::Result {
        for name in names {
            let mine = self.transfers.iter().filter(|t| t.mode == *name);
            let mut mine: Vec<String> = mine.map(ToString::to_string).collect();
            if mine.is_empty() {
                mine.push("none of that size".to_owned());
            }
            writeln!(
                f,
                "{:27}{}",
                format!("DMA of the data, {name}"),
                mine.join(", ")
            )?;
        }
        Ok(())
    }

    fn write_ports(&self, f: &mut fmt::Formatter<'_>, names: &[&str]) -> fmt::Result {
        write!(f, "{:27}", "port")?;
        for _ in names {
            write!(f, "  {:>18} {:>14}", "payload bytes", "TLPs")?;
        }
        writeln!(f)?;
        let first = names.first().copied().unwrap_or_default();
        for port in self.ports.iter().filter(|port| port.mode == first) {
            let traffic = &port.traffic;
            // An endpoint's own port counts what the port at the other end of its link does.
            let kind = match traffic.kind {
                PortKind::Root => "root port",
                PortKind::Upstream => "USP",
                PortKind::Downstream => "DSP",
                PortKind::Endpoint => continue,
            };
            let below = self.ports.iter().find(|p| {
                p.traffic.kind == PortKind::Endpoint
                    && p.traffic.above.as_ref() == Some(&traffic.name)
            });
            let below = below
                .map(|p| format!(" ({})", p.traffic.name))
                .unwrap_or_default();
            write!(f, "{:27}", format!("{} {kind}{below}", traffic.name))?;
            for name in names {
                let port = self.port(name, &traffic.name);
                let payload = port.map_or(0, |p| p.payload_bytes);
                let tlps = port.map_or(0, |p| p.tlps);
                write!(f, "  {:>18} {:>14}", thousands(payload), thousands(tlps))?;
            }
            let note = if traffic.cpu_accesses_observed {
                ""
            } else {
                "  CPU accesses not observed"
            };
            writeln!(f, "{note}")?;
        }
        Ok(())
    }
}

impl fmt::Display for CopyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} in chunks of {} ({} thread{}, depth {})",
            self.scenario,
            sizes::format(self.size_bytes),
            sizes::format(self.chunk_bytes),
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.depth,
        )?;
        if !self.description.is_empty() {
            writeln!(f, "{}", self.description)?;
        }
        writeln!(f)?;
        let names = self.mode_names();
        self.write_summary(f, &names)?;
        writeln!(f)?;
        if !self.counted {
            return writeln!(
                f,
                "No traffic: this p2plab was built without its feature `counters`, to measure what counting costs."
            );
        }
        self.write_ports(f, &names)?;
        writeln!(f)?;
        self.write_transfers(f, &names)?;
        if let Some((p2p, classic)) = self.mode("p2p").zip(self.mode("classic")) {
            let per = classic.usp_payload_bytes as f64 / p2p.usp_payload_bytes.max(1) as f64;
            writeln!(
                f,
                "At the upstream port: {} payload bytes classic, {} peer to peer: 1/{per:.0}. \
                 Throughput: {:.1} times.",
                thousands(classic.usp_payload_bytes),
                thousands(p2p.usp_payload_bytes),
                p2p.bytes_per_second / classic.bytes_per_second,
            )?;
        }
        match &self.talk {
            Some(talk) => writeln!(f, "{talk}"),
            None => writeln!(f, "The talk, of 2017, printed no figures for this copy."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1000), "1,000");
        assert_eq!(thousands(17_179_869_184), "17,179,869,184");
    }
}
