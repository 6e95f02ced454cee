//! The ledger: what crossed each port, and what went from whom to whom.
//!
//! Ports and matrix are counted apart, from the same events, under one lock: a snapshot is consistent as a
//! whole, and [`Traffic::check`](crate::traffic::Traffic::check) can hold the one against the other.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::tlp::{Tally, TlpKind};
use crate::tree::{Crossing, Direction};

/// Whether traffic is counted: `false` where the feature `counters` was compiled out to measure what it costs.
/// All tallies then stay zero, and stand for nothing.
pub const COUNTING: bool = cfg!(feature = "counters");

/// Number of packet kinds.
const KINDS: usize = TlpKind::ALL.len();

/// Parties that are no endpoint, in the order of their rows in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostParty {
    /// The guest's CPUs, through the root complex.
    Cpu = 0,
    /// Host memory.
    Memory = 1,
    /// The interrupt controller (MSI and MSI-X writes).
    Interrupts = 2,
    /// Addresses that nothing claims; the root complex answers Unsupported Request.
    Unclaimed = 3,
}

/// Names of the host's parties, in the same order.
pub(crate) const HOST_PARTIES: [&str; 4] = ["cpu", "memory", "interrupts", "unclaimed"];

/// Row of a party in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Party(pub usize);

impl From<HostParty> for Party {
    fn from(party: HostParty) -> Self {
        Party(party as usize)
    }
}

impl Party {
    /// Row of endpoint number `index`.
    pub(crate) fn endpoint(index: usize) -> Self {
        Party(HOST_PARTIES.len() + index)
    }
}

/// Errors counted at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortError {
    /// A request was answered with Unsupported Request here.
    UnsupportedRequest,
    /// The function's request was blocked here: Bus Master Enable off, not in D0, or no link.
    Blocked,
}

/// Counters of one port: `[direction][class]`, and errors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortCells {
    pub tallies: [[Tally; 3]; 2],
    pub unsupported_requests: u64,
    pub blocked_requests: u64,
}

/// A packet, or several alike, on their way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Movement<'a> {
    pub from: Party,
    pub to: Party,
    pub kind: TlpKind,
    pub tally: Tally,
    /// Ports crossed, without the endpoints' own.
    pub path: &'a [Crossing],
}

/// All counters of a fabric.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cells {
    /// The tree's ports.
    pub ports: Vec<PortCells>,
    /// The endpoints' own ports.
    pub endpoints: Vec<PortCells>,
    /// `matrix[from][to][kind]`.
    pub matrix: Vec<Vec<[Tally; KINDS]>>,
}

impl Cells {
    fn count(&mut self, movement: &Movement<'_>) {
        let class = movement.kind.class() as usize;
        if let Some(cell) = self
            .matrix
            .get_mut(movement.from.0)
            .and_then(|row| row.get_mut(movement.to.0))
            .and_then(|kinds| kinds.get_mut(movement.kind as usize))
        {
            cell.add(movement.tally);
        }
        for crossing in movement.path {
            if let Some(port) = self.ports.get_mut(crossing.port) {
                port.tallies[crossing.direction as usize][class].add(movement.tally);
            }
        }
        if let Some(port) = self.endpoint(movement.from) {
            port.tallies[Direction::Egress as usize][class].add(movement.tally);
        }
        if let Some(port) = self.endpoint(movement.to) {
            port.tallies[Direction::Ingress as usize][class].add(movement.tally);
        }
    }

    fn endpoint(&mut self, party: Party) -> Option<&mut PortCells> {
        self.endpoints
            .get_mut(party.0.checked_sub(HOST_PARTIES.len())?)
    }
}

/// The counters behind their lock.
#[derive(Debug)]
pub(crate) struct Ledger {
    cells: Mutex<Cells>,
}

impl Ledger {
    pub(crate) fn new(ports: usize) -> Self {
        let parties = HOST_PARTIES.len();
        Self {
            cells: Mutex::new(Cells {
                ports: vec![PortCells::default(); ports],
                endpoints: Vec::new(),
                matrix: vec![vec![[Tally::default(); KINDS]; parties]; parties],
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cells> {
        self.cells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for one more endpoint and returns its number.
    pub(crate) fn add_endpoint(&self) -> usize {
        let mut cells = self.lock();
        cells.endpoints.push(PortCells::default());
        let parties = cells.matrix.len() + 1;
        for row in &mut cells.matrix {
            row.push([Tally::default(); KINDS]);
        }
        cells.matrix.push(vec![[Tally::default(); KINDS]; parties]);
        cells.endpoints.len() - 1
    }

    /// Counts `movements` as one event.
    pub(crate) fn record(&self, movements: &[Movement<'_>]) {
        // Without the feature counting is compiled out: that is how its cost is measured.
        if COUNTING {
            let mut cells = self.lock();
            for movement in movements {
                cells.count(movement);
            }
        }
    }

    /// Counts an error at port `port` of the tree.
    pub(crate) fn record_port_error(&self, port: usize, error: PortError) {
        if let Some(cells) = self.lock().ports.get_mut(port) {
            cells.error(error);
        }
    }

    /// Counts an error at an endpoint's own port.
    pub(crate) fn record_endpoint_error(&self, endpoint: usize, error: PortError) {
        if let Some(cells) = self.lock().endpoints.get_mut(endpoint) {
            cells.error(error);
        }
    }

    /// A copy of everything, of one moment.
    pub(crate) fn snapshot(&self) -> Cells {
        self.lock().clone()
    }
}

impl PortCells {
    fn error(&mut self, error: PortError) {
        let cell = match error {
            PortError::UnsupportedRequest => &mut self.unsupported_requests,
            PortError::Blocked => &mut self.blocked_requests,
        };
        *cell = cell.wrapping_add(1);
    }
}
