//! The TOML form, written.

use super::Topology;

impl Topology {
    /// The topology as a file that reads back to the same, with every default written out.
    pub fn to_toml(&self) -> String {
        unimplemented!()
    }
}
