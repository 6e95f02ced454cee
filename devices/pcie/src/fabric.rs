//! The tree of ports: root complex, root ports, switches, and the slots that endpoints are plugged into.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use crate::config::DecodeState;
use crate::counters::{HOST_PARTIES, HostParty, Ledger, Movement, Party, PortError};
use crate::endpoint::{BarBacking, CpuAccess, Declaration, Endpoint, ResetKind};
use crate::function::{Function, FunctionLink};
use crate::host_memory::HostMemory;
use crate::port::{Port, PortInner};
use crate::route::{BarRoute, Bars, RouteTable};
use crate::tlp::{self, HEADER_3DW, Tally, TlpKind};
use crate::traffic::{MatrixEntry, PortTraffic, SCHEMA_VERSION, Traffic};
use crate::tree::{Paths, PortKind, Station, Tree};

/// Why a tree of ports cannot be built or an endpoint not be plugged in.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FabricError {
    /// Two ports or endpoints of one name.
    #[error("the name `{0}` is used twice")]
    DuplicateName(String),
    /// No port of that name.
    #[error("there is no port `{0}`")]
    UnknownPort(String),
    /// The port already has something below it.
    #[error("port `{port}` is taken by `{by}`")]
    Occupied {
        /// The port.
        port: String,
        /// What is below it.
        by: String,
    },
    /// The endpoint's declaration breaks a rule of PCI Express.
    #[error("endpoint `{endpoint}`: {reason}")]
    BadDeclaration {
        /// The endpoint.
        endpoint: String,
        /// The rule.
        reason: String,
    },
}

/// Builds a [`Fabric`]. Names are unique across the tree.
#[derive(Debug, Default)]
pub struct FabricBuilder {
    tree: Tree,
}

impl FabricBuilder {
    /// An empty tree: a root complex without ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a root port.
    ///
    /// # Errors
    /// [`FabricError::DuplicateName`].
    pub fn root_port(&mut self, name: &str) -> Result<(), FabricError> {
        self.tree.add(name, PortKind::Root, None).map(|_| ())
    }

    /// Adds a switch whose upstream port, named `switch`, lies below root or downstream port `below`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn switch(&mut self, switch: &str, below: &str) -> Result<(), FabricError> {
        let above = self.tree.find(below)?;
        if let Some(by) = &self.tree.ports[above].switch_below {
            return Err(FabricError::Occupied {
                port: below.to_owned(),
                by: by.clone(),
            });
        }
        if self.tree.ports[above].kind == PortKind::Upstream {
            return Err(FabricError::Occupied {
                port: below.to_owned(),
                by: below.to_owned(),
            });
        }
        self.tree.add(switch, PortKind::Upstream, Some(above))?;
        self.tree.ports[above].switch_below = Some(switch.to_owned());
        Ok(())
    }

    /// Adds downstream port `name` to switch `switch`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn downstream_port(&mut self, switch: &str, name: &str) -> Result<(), FabricError> {
        let upstream = self.tree.find(switch)?;
        if self.tree.ports[upstream].kind != PortKind::Upstream {
            return Err(FabricError::UnknownPort(switch.to_owned()));
        }
        self.tree
            .add(name, PortKind::Downstream, Some(upstream))
            .map(|_| ())
    }

    /// The finished tree.
    pub fn build(self) -> Arc<Fabric> {
        Arc::new(Fabric {
            paths: Paths::new(&self.tree),
            ledger: Ledger::new(self.tree.ports.len()),
            routes: RwLock::default(),
            plugged: Mutex::default(),
            tree: self.tree,
        })
    }
}

/// A tree of ports with the endpoints plugged into it. It routes and counts every transaction.
pub struct Fabric {
    tree: Tree,
    pub(crate) paths: Paths,
    pub(crate) ledger: Ledger,
    /// Lock order: `plugged`, then `routes`, then a function's host memory, then the ledger.
    pub(crate) routes: RwLock<RouteTable>,
    plugged: Mutex<Vec<Plugged>>,
}

/// An endpoint that is, or was, plugged in; its place in the list is its number.
struct Plugged {
    name: String,
    slot: usize,
    /// `None` once unplugged.
    function: Option<Arc<Function>>,
}

impl Fabric {
    /// Plugs `endpoint` in, under `name`, below root or downstream port `port`.
    ///
    /// An endpoint that is plugged again under its old name and port goes on with its old counters.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn plug(
        self: &Arc<Self>,
        port: &str,
        name: &str,
        endpoint: Arc<dyn Endpoint>,
    ) -> Result<Arc<Function>, FabricError> {
        let slot = self.tree.find(port)?;
        if let Some(by) = &self.tree.ports[slot].switch_below {
            return Err(FabricError::Occupied {
                port: port.to_owned(),
                by: by.clone(),
            });
        }
        if !self.tree.is_slot(slot) {
            return Err(FabricError::UnknownPort(port.to_owned()));
        }
        let mut plugged = self.plugged();
        let present = |p: &&Plugged| p.function.is_some();
        if let Some(by) = plugged.iter().filter(present).find(|p| p.slot == slot) {
            return Err(FabricError::Occupied {
                port: port.to_owned(),
                by: by.name.clone(),
            });
        }
        let taken = plugged.iter().filter(present).any(|p| p.name == name);
        if taken || self.tree.find(name).is_ok() || HOST_PARTIES.contains(&name) {
            return Err(FabricError::DuplicateName(name.to_owned()));
        }
        let number = match plugged
            .iter()
            .position(|p| p.name == name && p.slot == slot)
        {
            Some(number) => number,
            None => {
                plugged.push(Plugged {
                    name: name.to_owned(),
                    slot,
                    function: None,
                });
                self.ledger.add_endpoint()
            }
        };
        let function = self.new_function(number, slot, name, endpoint)?;
        plugged[number].function = Some(function.clone());
        Ok(function)
    }

    fn new_function(
        self: &Arc<Self>,
        number: usize,
        slot: usize,
        name: &str,
        endpoint: Arc<dyn Endpoint>,
    ) -> Result<Arc<Function>, FabricError> {
        let declaration = endpoint.declaration();
        let host = Arc::new(HostMemory::new());
        let port = Arc::new(PortInner {
            name: name.to_owned(),
            endpoint: number,
            slot,
            fabric: Arc::downgrade(self),
            host: host.clone(),
            function: OnceLock::new(),
        });
        let link = Arc::new(Link {
            port: port.clone(),
            bars: memory_bars(&declaration),
        });
        let function = Function::new(
            name.to_owned(),
            endpoint.clone(),
            declaration,
            host,
            link.clone(),
        )
        .map_err(|reason| FabricError::BadDeclaration {
            endpoint: name.to_owned(),
            reason,
        })?;
        // Set once: the cell was made three lines above.
        let _ = port.function.set(Arc::downgrade(&function));
        link.decode_changed(&function.decode_state());
        endpoint.attach(Port { inner: port });
        Ok(function)
    }

    /// Unplugs endpoint `name`: its link goes down, it is reset and its threads end. Its counters stay.
    ///
    /// # Errors
    /// [`FabricError::UnknownPort`] where no such endpoint is plugged in.
    pub fn unplug(&self, name: &str) -> Result<(), FabricError> {
        let (number, function) = self
            .plugged()
            .iter()
            .enumerate()
            .find_map(|(number, p)| Some((number, p.function.clone().filter(|_| p.name == name)?)))
            .ok_or_else(|| FabricError::UnknownPort(name.to_owned()))?;
        // The dying function tells the address map once more that its link is down, so it must be silent
        // before its entry goes, and its entry be gone before the name is free again.
        function.detach();
        self.routes_mut().remove(number);
        if let Some(entry) = self.plugged().get_mut(number) {
            entry.function = None;
        }
        Ok(())
    }

    /// The function of the endpoint that is plugged in under `name`.
    pub fn find(&self, name: &str) -> Option<Arc<Function>> {
        self.plugged()
            .iter()
            .find(|p| p.name == name)?
            .function
            .clone()
    }

    /// All counters, of one moment.
    pub fn traffic(&self) -> Traffic {
        let plugged = self.plugged();
        let cells = self.ledger.snapshot();
        let unobserved: Vec<usize> = plugged
            .iter()
            .filter_map(|p| p.function.as_ref().map(|f| (p.slot, f)))
            .filter(|(_, f)| has_mapped_bar(f.declaration()))
            .flat_map(|(slot, _)| {
                self.paths
                    .between(Station::Slot(slot), Station::RootComplex)
            })
            .map(|crossing| crossing.port)
            .collect();
        let mut ports: Vec<PortTraffic> = (self.tree.ports.iter().enumerate().zip(&cells.ports))
            .map(|((number, port), cells)| {
                let above = port.above.map(|above| self.tree.ports[above].name.clone());
                let observed = !unobserved.contains(&number);
                PortTraffic::new(port.name.clone(), port.kind, above, observed, cells)
            })
            .collect();
        ports.extend(plugged.iter().zip(&cells.endpoints).map(|(p, cells)| {
            let above = Some(self.tree.ports[p.slot].name.clone());
            let mapped = p
                .function
                .as_ref()
                .is_some_and(|f| has_mapped_bar(f.declaration()));
            PortTraffic::new(p.name.clone(), PortKind::Endpoint, above, !mapped, cells)
        }));
        let name = |row: usize| match row.checked_sub(HOST_PARTIES.len()) {
            None => HOST_PARTIES[row].to_owned(),
            Some(endpoint) => plugged
                .get(endpoint)
                .map_or_else(String::new, |p| p.name.clone()),
        };
        let mut matrix = Vec::new();
        for (from, row) in cells.matrix.iter().enumerate() {
            for (to, kinds) in row.iter().enumerate() {
                for (kind, tally) in TlpKind::ALL.iter().zip(kinds).filter(|(_, t)| !t.is_zero()) {
                    matrix.push(MatrixEntry {
                        source: name(from),
                        destination: name(to),
                        kind: *kind,
                        tally: *tally,
                    });
                }
            }
        }
        Traffic {
            schema_version: SCHEMA_VERSION,
            ports,
            matrix,
        }
    }

    /// Takes the endpoint threads' way out and their state back before the fabric goes.
    pub fn unplug_all(&self) {
        let names: Vec<String> = self
            .plugged()
            .iter()
            .filter(|p| p.function.is_some())
            .map(|p| p.name.clone())
            .collect();
        for name in names {
            // Another thread may have been faster, which is as good.
            let _ = self.unplug(&name);
        }
    }

    /// Counts an Unsupported Request at the port that answered: the completer's, or the root port through
    /// which the request reached the root complex.
    pub(crate) fn count_refusal(&self, party: Party, requester_slot: usize) {
        match party.0.checked_sub(HOST_PARTIES.len()) {
            Some(endpoint) => {
                self.ledger
                    .record_endpoint_error(endpoint, PortError::UnsupportedRequest);
            }
            None => {
                let root = self.tree.root_of(requester_slot);
                self.ledger
                    .record_port_error(root, PortError::UnsupportedRequest);
            }
        }
    }

    fn plugged(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn routes_mut(&self) -> std::sync::RwLockWriteGuard<'_, RouteTable> {
        self.routes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_mapped_bar(declaration: &Declaration) -> bool {
    declaration
        .bars
        .iter()
        .any(|bar| bar.cpu_access == CpuAccess::Mapped)
}

fn memory_bars(declaration: &Declaration) -> Bars {
    declaration
        .bars
        .iter()
        .map(|bar| BarRoute {
            index: bar.index,
            length: bar.size,
            memory: match &bar.backing {
                BarBacking::Memory(memory) => Some(memory.clone()),
                BarBacking::Registers => None,
            },
        })
        .collect()
}

/// A function's link into the fabric: counts what the CPU does to it, and keeps the address map.
struct Link {
    port: Arc<PortInner>,
    bars: Bars,
}

impl Link {
    fn fabric(&self) -> Option<Arc<Fabric>> {
        Weak::upgrade(&self.port.fabric)
    }

    /// Counts a request of the CPU and what comes back.
    fn count(&self, request: (TlpKind, Tally), completion: Option<(TlpKind, Tally)>) {
        let Some(fabric) = self.fabric() else { return };
        let me = Party::endpoint(self.port.endpoint);
        let cpu = HostParty::Cpu.into();
        let slot = Station::Slot(self.port.slot);
        let down = fabric.paths.between(Station::RootComplex, slot);
        let up = fabric.paths.between(slot, Station::RootComplex);
        let request = Movement {
            from: cpu,
            to: me,
            kind: request.0,
            tally: request.1,
            path: down,
        };
        match completion {
            Some((kind, tally)) => fabric.ledger.record(&[
                request,
                Movement {
                    from: me,
                    to: cpu,
                    kind,
                    tally,
                    path: up,
                },
            ]),
            None => fabric.ledger.record(&[request]),
        }
    }
}

/// The CPU's own limit on a request: a cache line.
const CPU_REQUEST: u32 = 64;

impl FunctionLink for Link {
    fn count_config(&self, write: bool, length: usize) {
        // Configuration requests carry one DW; software's longer accesses are several.
        let tlps = (length as u64).div_ceil(4);
        let bytes = length as u64;
        let header_bytes = tlps * HEADER_3DW;
        if write {
            self.count(
                (
                    TlpKind::CfgWr,
                    Tally {
                        tlps,
                        payload_bytes: bytes,
                        header_bytes,
                        requested_bytes: 0,
                    },
                ),
                Some((
                    TlpKind::Cpl,
                    Tally {
                        tlps,
                        payload_bytes: 0,
                        header_bytes,
                        requested_bytes: 0,
                    },
                )),
            );
        } else {
            self.count(
                (
                    TlpKind::CfgRd,
                    Tally {
                        tlps,
                        payload_bytes: 0,
                        header_bytes,
                        requested_bytes: bytes,
                    },
                ),
                Some((
                    TlpKind::CplD,
                    Tally {
                        tlps,
                        payload_bytes: bytes,
                        header_bytes,
                        requested_bytes: 0,
                    },
                )),
            );
        }
    }

    fn count_cpu_read(&self, address: u64, length: usize) {
        let length = length as u64;
        let request = tlp::memory_reads(address, length, CPU_REQUEST);
        let completion = tlp::read_completions(
            address,
            length,
            CPU_REQUEST,
            128,
            tlp::ENDPOINT_READ_COMPLETION_BOUNDARY,
        );
        self.count((TlpKind::MRd, request), Some((TlpKind::CplD, completion)));
    }

    fn count_cpu_write(&self, address: u64, length: usize) {
        let request = tlp::memory_writes(address, length as u64, CPU_REQUEST);
        self.count((TlpKind::MWr, request), None);
    }

    fn decode_changed(&self, state: &DecodeState) {
        if let Some(fabric) = self.fabric() {
            fabric.routes_mut().update(&self.port, state, &self.bars);
        }
    }

    fn count_delayed_msix(&self, messages: usize) {
        for _ in 0..messages {
            self.port.count_msi();
        }
    }

    fn count_unsupported_request(&self) {
        if let Some(fabric) = self.fabric() {
            fabric
                .ledger
                .record_endpoint_error(self.port.endpoint, PortError::UnsupportedRequest);
        }
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        let plugged = self
            .plugged
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for function in plugged.iter_mut().filter_map(|p| p.function.take()) {
            function.reset(ResetKind::Conventional);
            function.detach();
        }
    }
}
