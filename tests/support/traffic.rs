//! An independent model of what commands cost on the bus, to hold the switch's counters against.
//!
//! It is written from the specification alone (PCI Express Base 6.0) and shares no code with the fabric: a
//! transfer is split packet by packet in a plain loop, and a packet crosses a link if one of its ends lies below
//! the link and the other does not. The fabric computes packets in closed form and routes along stored paths;
//! that both agree is what the scenarios prove.
//!
//! Commands come from the controllers' traces, addresses and settings from the guest.

use std::collections::BTreeMap;

use p2plab::topology::Topology;
use p2plab_nvme::{TraceEntry, TraceLog, TraceRange};
use p2plab_pcie::{MatrixEntry, PortTraffic, Tally, TlpKind, Traffic};

/// What the guest programmed into an endpoint's Device Control and Link Control registers, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Max_Payload_Size (section 7.5.3.4).
    pub mps: u64,
    /// Max_Read_Request_Size (section 7.5.3.4).
    pub mrrs: u64,
    /// Read Completion Boundary of the root complex above (section 7.5.3.7).
    pub rcb: u64,
}

/// An endpoint as the model knows it.
#[derive(Clone, Debug)]
pub struct ModelEndpoint {
    /// Its registers.
    pub settings: Settings,
    /// Memory BARs: first address and length.
    pub bars: Vec<(u64, u64)>,
}

/// What goes from whom to whom, by kind.
pub type Matrix = BTreeMap<(String, String, u8), Tally>;

/// What a port received from its link and sent on it: posted, non-posted, completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Received.
    pub ingress: [Tally; 3],
    /// Sent.
    pub egress: [Tally; 3],
}

impl PortCounts {
    /// What the switch counted at `port`.
    pub fn of(port: &PortTraffic) -> Self {
        let (i, e) = (&port.ingress, &port.egress);
        Self {
            ingress: [i.posted, i.non_posted, i.completion],
            egress: [e.posted, e.non_posted, e.completion],
        }
    }
}

/// The topology as parent links, with its endpoints' settings.
#[derive(Clone, Debug)]
pub struct Model {
    /// Each port's and endpoint's neighbour towards the root; root ports have none.
    parents: BTreeMap<String, String>,
    /// Links as (lower end, upper end): an endpoint or a switch's upstream port, and the port above it.
    links: Vec<(String, String)>,
    endpoints: BTreeMap<String, ModelEndpoint>,
}

/// A Memory Write or Read takes 3 DW of header below 4 GiB and 4 DW above (section 2.2.4.1).
fn request_header(address: u64) -> u64 {
    if address < 1 << 32 { 12 } else { 16 }
}

/// Completions are routed by ID: 3 DW (section 2.2.9).
const COMPLETION_HEADER: u64 = 12;

/// Splits `[address, address + length)` into packets of at most `most` bytes none of which crosses a multiple of
/// 4 KiB (section 2.2.7).
fn packets(mut address: u64, length: u64, most: u64) -> Vec<(u64, u64)> {
    let end = address + length;
    let mut packets = Vec::new();
    while address < end {
        let page_end = (address / 4096 + 1) * 4096;
        let stop = end.min(page_end).min(address + most);
        packets.push((address, stop - address));
        address = stop;
    }
    packets
}

/// Lengths of the completions of one read request: each but the last ends on the completer's Read Completion
/// Boundary and none is longer than its Max_Payload_Size (section 2.3.1.1).
fn completions((mut address, length): (u64, u64), mps: u64, rcb: u64) -> Vec<u64> {
    let end = address + length;
    let mut lengths = Vec::new();
    while address < end {
        let mut stop = address + mps;
        if stop >= end {
            stop = end;
        } else {
            stop = stop / rcb * rcb;
        }
        lengths.push(stop - address);
        address = stop;
    }
    lengths
}

impl Model {
    /// The model of `topology`; `endpoint` says what the guest programmed into each.
    pub fn new(topology: &Topology, endpoint: impl Fn(&str) -> ModelEndpoint) -> Self {
        let mut parents = BTreeMap::new();
        let mut links = Vec::new();
        for switch in &topology.switches {
            links.push((switch.name.clone(), switch.below.clone()));
            for port in &switch.ports {
                parents.insert(port.clone(), switch.name.clone());
            }
        }
        for endpoint in &topology.endpoints {
            links.push((endpoint.name.clone(), endpoint.port.clone()));
        }
        parents.extend(links.iter().cloned());
        let endpoints = topology.endpoints.iter();
        Self {
            parents,
            links,
            endpoints: endpoints
                .map(|e| (e.name.clone(), endpoint(&e.name)))
                .collect(),
        }
    }

    /// Whose memory lies at `address`.
    fn owner(&self, address: u64) -> &str {
        let decodes = |endpoint: &ModelEndpoint| {
            let mut bars = endpoint.bars.iter();
            bars.any(|(start, length)| address >= *start && address - start < *length)
        };
        let mut endpoints = self.endpoints.iter();
        endpoints
            .find(|(_, endpoint)| decodes(endpoint))
            .map_or("memory", |(name, _)| name)
    }

    /// All DMA that the commands in `log`, executed by `requester`, must have caused.
    ///
    /// # Panics
    /// Where the trace is incomplete, or has a failed command: what moved then is not defined.
    pub fn dma(&self, requester: &str, log: &TraceLog) -> Matrix {
        assert_eq!(log.lost, 0, "the trace of {requester} is incomplete");
        let mut matrix = Matrix::new();
        for entry in &log.entries {
            assert_eq!(entry.status, 0, "{requester}: {entry:?}");
            self.command(requester, entry, &mut matrix);
        }
        for doorbell in &log.doorbells {
            match doorbell.write {
                true => self.write(requester, &doorbell.range, &mut matrix),
                false => self.read(requester, &doorbell.range, &mut matrix),
            }
        }
        matrix
    }

    fn command(&self, requester: &str, entry: &TraceEntry, matrix: &mut Matrix) {
        self.read(requester, &entry.fetch, matrix);
        for list in &entry.lists {
            self.read(requester, list, matrix);
        }
        for data in entry.data.iter().chain(&entry.metadata) {
            // NVMe Base 2.0, section 3.1.3 (opcodes): bits 1:0 are the direction of the data.
            match entry.opcode & 3 {
                1 => self.read(requester, data, matrix),
                2 => self.write(requester, data, matrix),
                _ => panic!("{requester} moved data for a command without: {entry:?}"),
            }
        }
        self.write(requester, &entry.completion, matrix);
    }

    fn write(&self, requester: &str, range: &TraceRange, matrix: &mut Matrix) {
        if range.internal {
            return;
        }
        let mps = self.endpoints[requester].settings.mps;
        for (address, length) in packets(range.address, range.length, mps) {
            let to = self.owner(address);
            let tally = Tally {
                tlps: 1,
                payload_bytes: length,
                header_bytes: request_header(address),
                requested_bytes: 0,
            };
            add(matrix, requester, to, TlpKind::MWr, tally);
        }
    }

    fn read(&self, requester: &str, range: &TraceRange, matrix: &mut Matrix) {
        if range.internal {
            return;
        }
        let mine = self.endpoints[requester].settings;
        for request in packets(range.address, range.length, mine.mrrs) {
            let (address, length) = request;
            let completer = self.owner(address);
            let tally = Tally {
                tlps: 1,
                payload_bytes: 0,
                header_bytes: request_header(address),
                requested_bytes: length,
            };
            add(matrix, requester, completer, TlpKind::MRd, tally);
            // A root complex has the boundary that software told the requester of, and here the payload size, as
            // software gives one to the whole hierarchy; any other completer has 128 bytes and its own.
            let (mps, rcb) = match self.endpoints.get(completer) {
                Some(peer) => (peer.settings.mps, 128),
                None => (mine.mps, mine.rcb),
            };
            for payload_bytes in completions(request, mps, rcb) {
                let tally = Tally {
                    tlps: 1,
                    payload_bytes,
                    header_bytes: COMPLETION_HEADER,
                    requested_bytes: 0,
                };
                add(matrix, completer, requester, TlpKind::CplD, tally);
            }
        }
    }

    /// Whether `party` lies at or below `port`.
    fn is_below(&self, party: &str, port: &str) -> bool {
        let mut at = Some(party);
        while let Some(here) = at {
            if here == port {
                return true;
            }
            at = self.parents.get(here).map(String::as_str);
        }
        false
    }

    /// What each port must count if `matrix` is all that moved.
    pub fn ports(&self, matrix: &Matrix) -> BTreeMap<String, PortCounts> {
        let mut ports: BTreeMap<String, PortCounts> = BTreeMap::new();
        for (lower, upper) in &self.links {
            for ((from, to, kind), tally) in matrix {
                let (sender, receiver) =
                    match (self.is_below(from, lower), self.is_below(to, lower)) {
                        (true, false) => (lower, upper),
                        (false, true) => (upper, lower),
                        _ => continue,
                    };
                let class = class_of(*kind);
                ports.entry(sender.clone()).or_default().egress[class].add(*tally);
                ports.entry(receiver.clone()).or_default().ingress[class].add(*tally);
            }
        }
        ports
    }
}

/// The flow-control class of a kind (section 2.6.1): only Memory Writes are posted here.
fn class_of(kind: u8) -> usize {
    match TlpKind::ALL[usize::from(kind)] {
        TlpKind::MWr => 0,
        TlpKind::MRd | TlpKind::CfgRd | TlpKind::CfgWr => 1,
        TlpKind::Cpl | TlpKind::CplD => 2,
    }
}

fn add(matrix: &mut Matrix, from: &str, to: &str, kind: TlpKind, tally: Tally) {
    let key = (from.to_owned(), to.to_owned(), kind as u8);
    matrix.entry(key).or_default().add(tally);
}

/// Adds all of `other` to `matrix`.
pub fn merge(matrix: &mut Matrix, other: &Matrix) {
    for (key, tally) in other {
        matrix.entry(key.clone()).or_default().add(*tally);
    }
}

/// Splits what was counted into DMA, which commands determine, and what the guest's CPUs and interrupts caused,
/// which depends on timing.
pub fn split(traffic: &Traffic) -> (Matrix, Matrix) {
    let timing = |e: &MatrixEntry| {
        e.source == "cpu" || e.destination == "cpu" || e.destination == "interrupts"
    };
    let (mut dma, mut other) = (Matrix::new(), Matrix::new());
    for entry in &traffic.matrix {
        let half = if timing(entry) { &mut other } else { &mut dma };
        add(
            half,
            &entry.source,
            &entry.destination,
            entry.kind,
            entry.tally,
        );
    }
    (dma, other)
}

/// The sum of the entries of `matrix` from `from` to `to` of `kind`.
pub fn between(matrix: &Matrix, from: &str, to: &str, kind: TlpKind) -> Tally {
    let key = (from.to_owned(), to.to_owned(), kind as u8);
    matrix.get(&key).copied().unwrap_or_default()
}

/// `matrix` with the kinds' names, for messages.
pub fn show(matrix: &Matrix) -> String {
    let line = |((from, to, kind), tally): (&(String, String, u8), &Tally)| {
        format!(
            "  {from} -> {to} {:?}: {tally:?}\n",
            TlpKind::ALL[usize::from(*kind)]
        )
    };
    matrix.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two root ports; a switch below each, another one below the first.
    fn model() -> Model {
        let topology = Topology::builder("model")
            .root_port("rp0")
            .root_port("rp1")
            .switch("a", "rp0", 3)
            .switch("b", "a.2", 2)
            .switch("c", "rp1", 2)
            .nvme("x", "a.0", p2plab::topology::Nvme::memory(1 << 20))
            .nvme("y", "b.1", p2plab::topology::Nvme::memory(1 << 20))
            .nvme("z", "c.0", p2plab::topology::Nvme::memory(1 << 20))
            .build()
            .unwrap();
        let settings = Settings {
            mps: 128,
            mrrs: 512,
            rcb: 64,
        };
        Model::new(&topology, |_| ModelEndpoint {
            settings,
            bars: Vec::new(),
        })
    }

    fn crossed(from: &str, to: &str) -> Vec<String> {
        let tally = Tally {
            tlps: 1,
            ..Tally::default()
        };
        let mut matrix = Matrix::new();
        add(&mut matrix, from, to, TlpKind::MWr, tally);
        let ports = model().ports(&matrix).into_iter();
        ports
            .map(|(name, counts)| {
                let way = if counts.ingress[0].tlps == 1 {
                    '>'
                } else {
                    '<'
                };
                format!("{way}{name}")
            })
            .collect()
    }

    #[test]
    fn packets_cross_the_links_between_their_ends() {
        assert_eq!(crossed("x", "memory"), ["<a", ">a.0", ">rp0", "<x"]);
        assert_eq!(
            crossed("x", "y"),
            [">a.0", "<a.2", ">b", "<b.1", "<x", ">y"]
        );
        assert_eq!(
            crossed("y", "z"),
            [
                "<a", ">a.2", "<b", ">b.1", ">c", "<c.0", ">rp0", "<rp1", "<y", ">z"
            ]
        );
        assert_eq!(crossed("cpu", "z"), [">c", "<c.0", "<rp1", ">z"]);
    }

    #[test]
    fn packets_end_where_the_specification_says() {
        assert_eq!(packets(0xf80, 0x180, 256), [(0xf80, 0x80), (0x1000, 0x100)]);
        assert_eq!(completions((0x20, 512), 128, 64), [96, 128, 128, 128, 32]);
        assert_eq!(completions((0x20, 512), 256, 128), [224, 256, 32]);
        assert_eq!(completions((0x64, 4), 128, 64), [4]);
        assert_eq!(request_header(0xffff_ffff), 12);
        assert_eq!(request_header(1 << 32), 16);
    }
}
