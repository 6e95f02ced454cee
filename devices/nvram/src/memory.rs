//! BAR 4: where its bytes are, how they become durable, and how they are lost.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use p2plab_pcie::{BarDeclaration, BarMemory, CpuAccess, MemoryBacking, Port};

use crate::config::{NvramConfig, NvramError};
use crate::spec::{LOST, MEMORY_BAR};

/// The card's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) bar: Arc<BarMemory>,
    /// Its bytes are a file's.
    pub(crate) is_file: bool,
    cpu_access: CpuAccess,
    /// A test lets flushes fail.
    fails: AtomicBool,
    /// The host could not write something, and has forgotten what: Linux takes its pages for clean then, and the next
    /// sync would succeed. Held over a sync, so that one that overlaps with the failure does not either.
    incomplete: Mutex<bool>,
}

impl Memory {
    pub(crate) fn open(config: &NvramConfig) -> Result<Self, NvramError> {
        let bar = BarMemory::open("nvram", &config.backing, config.size).map_err(|source| {
            NvramError::Backing {
                name: config.name.clone(),
                size: config.size,
                place: config.backing.to_string(),
                source,
            }
        })?;
        Ok(Self {
            bar: Arc::new(bar),
            is_file: config.backing != MemoryBacking::Memory,
            cpu_access: config.cpu_access,
            fails: AtomicBool::new(false),
            incomplete: Mutex::new(false),
        })
    }

    pub(crate) fn declaration(&self) -> BarDeclaration {
        BarDeclaration::memory(MEMORY_BAR, &self.bar, self.cpu_access)
    }

    pub(crate) fn set_failing(&self, fails: bool) {
        self.fails.store(fails, Ordering::Relaxed);
    }

    /// Brings all that has arrived to the medium. Memory of the process has none.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("a test lets it fail"));
        }
        if !self.is_file {
            return Ok(());
        }
        self.sync()
    }

    /// Each sync of the file: after the first that fails, all do.
    fn sync(&self) -> io::Result<()> {
        let mut incomplete = self
            .incomplete
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let result = self.bar.sync();
        if *incomplete {
            let lost = || io::Error::other("the host lost writes in a flush before");
            return result.and_then(|()| Err(lost()));
        }
        *incomplete = result.is_err();
        result
    }

    /// The power is gone: nobody is answered any more, and no DMA is under way when this returns.
    pub(crate) fn close(&self, port: Option<&Port>) {
        self.bar.close();
        if let Some(port) = port {
            port.settle();
        }
    }

    /// The power is back.
    pub(crate) fn open_again(&self) {
        self.bar.open_after(Duration::ZERO);
    }

    /// The contents are lost.
    pub(crate) fn lose(&self) -> io::Result<()> {
        self.bar.overwrite(LOST)?;
        if self.is_file { self.sync() } else { Ok(()) }
    }
}
