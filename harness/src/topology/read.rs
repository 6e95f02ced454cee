//! The TOML form, read.

use std::path::Path;

use super::{Topology, TopologyError};

impl Topology {
    /// Reads and checks a topology file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// The first fault, with file, line and column.
    pub fn from_toml(file: &Path) -> Result<Self, TopologyError> {
        let _ = file;
        unimplemented!()
    }

    /// Reads and checks the text of a topology file; `file` is what errors call it, and relative paths are
    /// relative to its folder.
    ///
    /// # Errors
    /// The first fault, with file, line and column.
    pub fn from_toml_text(text: &str, file: &Path) -> Result<Self, TopologyError> {
        let _ = (text, file);
        unimplemented!()
    }
}
