//! The set of a controller's namespaces.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, RwLock};

use crate::locks::{read, write};
use crate::namespace::Namespace;

/// The namespaces by NSID. A command holds its namespace for as long as it works on it, so that one can be
/// deleted or formatted under load.
#[derive(Debug, Default)]
pub(crate) struct Namespaces(RwLock<BTreeMap<u32, Arc<Namespace>>>);

impl Namespaces {
    pub(crate) fn new(namespaces: impl IntoIterator<Item = Namespace>) -> Self {
        let by_nsid = namespaces.into_iter().map(|ns| (ns.nsid, Arc::new(ns)));
        Self(RwLock::new(by_nsid.collect()))
    }

    /// The active namespace `nsid`.
    pub(crate) fn get(&self, nsid: u32) -> Option<Arc<Namespace>> {
        read(&self.0).get(&nsid).cloned()
    }

    /// All, in the order of their NSIDs.
    pub(crate) fn all(&self) -> Vec<Arc<Namespace>> {
        read(&self.0).values().cloned().collect()
    }

    /// Flushes all; the first error, after all were tried.
    pub(crate) fn flush_all(&self) -> io::Result<()> {
        let results: Vec<_> = self.all().iter().map(|ns| ns.flush()).collect();
        results.into_iter().collect()
    }

    /// Puts `ns` in the place of what has its NSID.
    #[expect(dead_code, reason = "for Format and namespace management")]
    pub(crate) fn set(&self, ns: Namespace) {
        write(&self.0).insert(ns.nsid, Arc::new(ns));
    }
}
