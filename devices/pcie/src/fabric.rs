//! The tree of ports: root complex, root ports, switches, and the slots that endpoints are plugged into.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use crate::counters::{HOST_PARTIES, Ledger, Party, PortError};
use crate::endpoint::{BarBacking, BarDeclaration, CpuAccess, Declaration, Endpoint, ResetKind};
use crate::function::{Function, FunctionLink};
use crate::host_memory::HostMemory;
use crate::link::Link;
use crate::port::{Port, PortInner};
use crate::route::{BarRoute, Bars, RouteTable};
use crate::tlp::TlpKind;
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
            core: Arc::new(Core {
                paths: Paths::new(&self.tree),
                ledger: Ledger::new(self.tree.ports.len()),
                routes: RwLock::default(),
                tree: self.tree,
            }),
            plugged: Mutex::default(),
        })
    }
}

/// A tree of ports with the endpoints plugged into it. It routes and counts every transaction.
pub struct Fabric {
    core: Arc<Core>,
    plugged: Mutex<Vec<Plugged>>,
}

/// The part of a fabric that transactions need. It owns no endpoint, so that a DMA on an endpoint's own
/// thread may hold the last reference to it: tearing endpoints down, which waits for their threads, is
/// left to whoever drops the [`Fabric`].
pub(crate) struct Core {
    tree: Tree,
    pub(crate) paths: Paths,
    pub(crate) ledger: Ledger,
    /// Lock order: `plugged`, then `routes`, then a function's host memory, then the ledger.
    routes: RwLock<RouteTable>,
}

/// An endpoint that is, or was, plugged in; its place in the list is its number.
struct Plugged {
    name: String,
    /// Name of its port and its row in readings: one label is never used for two slots.
    label: String,
    slot: usize,
    /// It has, or once had, a BAR that the CPU reaches unseen: its counters lack that forever.
    unobserved: bool,
    /// `None` once unplugged.
    function: Option<Arc<Function>>,
}

impl Fabric {
    /// Plugs `endpoint` in, under `name`, below root or downstream port `port`.
    ///
    /// An endpoint that is plugged again under its old name and port goes on with its old counters. Under
    /// its old name below another port it gets new ones, which readings call `NAME@PORT`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn plug(
        self: &Arc<Self>,
        port: &str,
        name: &str,
        endpoint: Arc<dyn Endpoint>,
    ) -> Result<Arc<Function>, FabricError> {
        let core = &self.core;
        let slot = core.tree.find(port)?;
        if let Some(by) = &core.tree.ports[slot].switch_below {
            return Err(FabricError::Occupied {
                port: port.to_owned(),
                by: by.clone(),
            });
        }
        if !core.tree.is_slot(slot) {
            return Err(FabricError::UnknownPort(port.to_owned()));
        }
        let declaration = endpoint.declaration();
        let mut plugged = self.plugged();
        let present = |p: &&Plugged| p.function.is_some();
        if let Some(by) = plugged.iter().filter(present).find(|p| p.slot == slot) {
            return Err(FabricError::Occupied {
                port: port.to_owned(),
                by: by.name.clone(),
            });
        }
        let old = plugged
            .iter()
            .position(|p| p.name == name && p.slot == slot);
        let label = match old {
            Some(number) => plugged[number].label.clone(),
            None if plugged.iter().any(|p| p.name == name) => format!("{name}@{port}"),
            None => name.to_owned(),
        };
        let taken = plugged.iter().filter(present).any(|p| p.name == name)
            || (old.is_none() && plugged.iter().any(|p| p.label == label));
        if taken || core.tree.find(&label).is_ok() || HOST_PARTIES.contains(&name) {
            return Err(FabricError::DuplicateName(name.to_owned()));
        }
        let number = old.unwrap_or(plugged.len());
        let unobserved = has_mapped_bar(&declaration);
        // Nothing is entered anywhere until the declaration has been found good.
        let (function, port, link) =
            core.new_function(number, slot, name, endpoint.clone(), declaration)?;
        if old.is_none() {
            core.ledger.add_endpoint();
            plugged.push(Plugged {
                name: name.to_owned(),
                label,
                slot,
                unobserved: false,
                function: None,
            });
        }
        let entry = &mut plugged[number];
        entry.unobserved |= unobserved;
        entry.function = Some(function.clone());
        link.decode_changed(&function.decode_state());
        endpoint.attach(port);
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
        let mut plugged = self.plugged();
        // Somebody else may have unplugged it meanwhile, and a new endpoint be in its place.
        let ours = |entry: &&mut Plugged| {
            let present = entry.function.as_ref();
            present.is_some_and(|present| Arc::ptr_eq(present, &function))
        };
        if let Some(entry) = plugged.get_mut(number).filter(ours) {
            self.core.routes_mut().remove(number);
            entry.function = None;
        }
        Ok(())
    }

    /// The function of the endpoint that is plugged in under `name`.
    pub fn find(&self, name: &str) -> Option<Arc<Function>> {
        self.plugged()
            .iter()
            .filter(|p| p.name == name)
            .find_map(|p| p.function.clone())
    }

    /// All counters, of one moment.
    pub fn traffic(&self) -> Traffic {
        let plugged = self.plugged();
        let core = &self.core;
        let cells = core.ledger.snapshot();
        let unobserved: Vec<usize> = plugged
            .iter()
            .filter(|p| p.unobserved)
            .flat_map(|p| {
                let slot = Station::Slot(p.slot);
                core.paths.between(slot, Station::RootComplex)
            })
            .map(|crossing| crossing.port)
            .collect();
        let mut ports: Vec<PortTraffic> = (core.tree.ports.iter().enumerate().zip(&cells.ports))
            .map(|((number, port), cells)| {
                let above = port.above.map(|above| core.tree.ports[above].name.clone());
                let observed = !unobserved.contains(&number);
                PortTraffic::new(port.name.clone(), port.kind, above, observed, cells)
            })
            .collect();
        ports.extend(plugged.iter().zip(&cells.endpoints).map(|(p, cells)| {
            let above = Some(core.tree.ports[p.slot].name.clone());
            let kind = PortKind::Endpoint;
            PortTraffic::new(p.label.clone(), kind, above, !p.unobserved, cells)
        }));
        let name = |row: usize| match row.checked_sub(HOST_PARTIES.len()) {
            None => HOST_PARTIES[row].to_owned(),
            Some(endpoint) => plugged
                .get(endpoint)
                .map_or_else(String::new, |p| p.label.clone()),
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

    fn plugged(&self) -> MutexGuard<'_, Vec<Plugged>> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// A function with its port and its link, all known to nobody yet.
    fn new_function(
        self: &Arc<Self>,
        number: usize,
        slot: usize,
        name: &str,
        endpoint: Arc<dyn Endpoint>,
        declaration: Declaration,
    ) -> Result<(Arc<Function>, Port, Arc<Link>), FabricError> {
        check_register_bars(&declaration).map_err(|reason| FabricError::BadDeclaration {
            endpoint: name.to_owned(),
            reason,
        })?;
        let host = Arc::new(HostMemory::new());
        let port = Arc::new(PortInner {
            name: name.to_owned(),
            endpoint: number,
            slot,
            core: Arc::downgrade(self),
            host: host.clone(),
            function: OnceLock::new(),
        });
        let link = Arc::new(Link {
            port: port.clone(),
            bars: memory_bars(&declaration),
        });
        let function = Function::new(name.to_owned(), endpoint, declaration, host, link.clone())
            .map_err(|reason| FabricError::BadDeclaration {
                endpoint: name.to_owned(),
                reason,
            })?;
        // Set once: the cell was made some lines above.
        let _ = port.function.set(Arc::downgrade(&function));
        Ok((function, Port { inner: port }, link))
    }

    /// The address map, held in place.
    pub(crate) fn routes(&self) -> RwLockReadGuard<'_, RouteTable> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn routes_mut(&self) -> RwLockWriteGuard<'_, RouteTable> {
        self.routes.write().unwrap_or_else(PoisonError::into_inner)
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
}

/// Largest register BAR: a DMA to a peer's registers takes a buffer as long as its part of the BAR.
const LARGEST_REGISTER_BAR: u64 = 16 << 20;

fn check_register_bars(declaration: &Declaration) -> Result<(), String> {
    let too_large = |bar: &&BarDeclaration| {
        matches!(bar.backing, BarBacking::Registers) && bar.size > LARGEST_REGISTER_BAR
    };
    match declaration.bars.iter().find(too_large) {
        Some(bar) => Err(format!(
            "BAR {} has {:#x} bytes of registers; beyond {LARGEST_REGISTER_BAR:#x} it must be memory",
            bar.index, bar.size
        )),
        None => Ok(()),
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
            trapped: bar.cpu_access == CpuAccess::Trapped,
        })
        .collect()
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
