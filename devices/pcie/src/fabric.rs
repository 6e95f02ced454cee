//! The tree of ports: root complex, root ports, switches, and the slots that endpoints are plugged into.

use std::sync::Arc;

use crate::endpoint::Endpoint;
use crate::function::Function;

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
pub struct FabricBuilder {}

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
        let _ = name;
        unimplemented!()
    }

    /// Adds a switch whose upstream port, named `switch`, lies below root or downstream port `below`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn switch(&mut self, switch: &str, below: &str) -> Result<(), FabricError> {
        let _ = (switch, below);
        unimplemented!()
    }

    /// Adds downstream port `name` to switch `switch`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn downstream_port(&mut self, switch: &str, name: &str) -> Result<(), FabricError> {
        let _ = (switch, name);
        unimplemented!()
    }

    /// The finished tree.
    pub fn build(self) -> Arc<Fabric> {
        unimplemented!()
    }
}

/// A tree of ports with the endpoints plugged into it. It routes and counts every transaction.
pub struct Fabric {}

impl Fabric {
    /// Plugs `endpoint` in, under `name`, below root or downstream port `port`.
    ///
    /// # Errors
    /// See [`FabricError`].
    pub fn plug(
        self: &Arc<Self>,
        port: &str,
        name: &str,
        endpoint: Arc<dyn Endpoint>,
    ) -> Result<Arc<Function>, FabricError> {
        let _ = (port, name, endpoint);
        unimplemented!()
    }
}
