//! The Persistent Memory Region: memory in a BAR of its own that outlives everything but its file (Base 8.14).
//!
//! With a file, what was written is durable after the barrier that PMRCAP.PMRWBM claims: a read of PMRSTS returns
//! when the file has it. Until then it is in the host's page cache, which survives the end of QEMU and of the lab
//! and is lost with the host. Memory of this process lives as long as the controller: it survives every reset of
//! the guest and of QEMU, and the barrier has nothing to wait for.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use std::time::Duration;

use p2plab_pcie::{BarDeclaration, BarMemory, DmaRange, Port};

use crate::config::{NvmeError, PmrBacking, PmrConfig};
use crate::locks::{lock, read, write};
use crate::spec::registers::{PmrCap, PmrEbs, PmrMsc, PmrSts, PmrSwtp, hsts, pmrwbm};
use crate::window::{Place, Window};

/// BAR of the PMR.
pub(crate) const PMR_BAR: u8 = 2;

/// PMRCAP.PMRTO counts these (PMRTU = 0).
const TIMEOUT_UNIT: Duration = Duration::from_millis(500);

/// Longest time that a PMR may take to be ready: PMRTO has 8 bits.
const LONGEST: Duration = Duration::from_secs(120);

/// How a region fares, for a test that breaks it: see
/// [`NvmeController::set_pmr_condition`](crate::NvmeController::set_pmr_condition). The health is what PMRSTS says, and
/// changes nothing of what the region does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PmrCondition {
    /// As it should.
    #[default]
    Sound,
    /// Enabled anew, it does not become ready.
    NeverReady,
    /// What it held before it was enabled may be lost.
    RestoreError,
    /// It takes no writes.
    ReadOnly,
    /// Neither reads nor writes can be relied on.
    Unreliable,
}

/// The region and the window through which commands address it.
#[derive(Debug)]
pub(crate) struct Pmr {
    pub(crate) memory: Arc<BarMemory>,
    pub(crate) config: PmrConfig,
    pub(crate) window: Window,
    /// The controller's own DMA in the region holds it.
    users: RwLock<()>,
    /// Nobody is in it any more since it was disabled.
    settled: AtomicBool,
    /// Barriers that failed since it was enabled (PMRSTS.ERR).
    errors: AtomicU8,
    condition: Mutex<PmrCondition>,
    /// Where the region forgets, what a loss of power leaves in it.
    durable: Mutex<Option<Vec<u8>>>,
}

impl Pmr {
    pub(crate) fn open(serial: &str, config: PmrConfig) -> Result<Self, NvmeError> {
        check(serial, &config)?;
        let memory = BarMemory::open("nvme-pmr", &config.backing, config.size);
        let memory = memory.map_err(|source| NvmeError::PmrBacking {
            serial: serial.to_owned(),
            size: config.size,
            place: config.backing.to_string(),
            source,
        })?;
        let pmr = Self {
            memory: Arc::new(memory),
            window: Window::new(config.size),
            users: RwLock::default(),
            settled: AtomicBool::new(true),
            errors: AtomicU8::new(0),
            condition: Mutex::default(),
            durable: Mutex::default(),
            config,
        };
        pmr.disable();
        pmr.settled.store(true, Ordering::SeqCst);
        Ok(pmr)
    }

    pub(crate) fn declaration(&self) -> BarDeclaration {
        BarDeclaration::memory(PMR_BAR, &self.memory, self.config.cpu_access)
    }

    pub(crate) fn capabilities(&self) -> PmrCap {
        let units = self.config.ready_after.as_millis() / TIMEOUT_UNIT.as_millis();
        PmrCap::new()
            .with_rds(self.config.rds)
            .with_wds(self.config.wds)
            .with_bir(PMR_BAR)
            .with_pmrwbm(pmrwbm::READ_PMRSTS)
            .with_pmrto(u8::try_from(units.saturating_add(2)).unwrap_or(u8::MAX))
            .with_cmss(true)
    }

    pub(crate) fn elasticity(&self) -> PmrEbs {
        let (unit, value) = scaled(self.config.elasticity_buffer).unwrap_or_default();
        PmrEbs::new().with_pmrszu(unit).with_pmrwbz(value)
    }

    pub(crate) fn throughput(&self) -> PmrSwtp {
        let (unit, value) = scaled(self.config.sustained_throughput).unwrap_or_default();
        PmrSwtp::new().with_pmrswtu(unit).with_pmrswtv(value)
    }

    /// PMRSTS, but for CBAI.
    pub(crate) fn status(&self, enabled: bool) -> PmrSts {
        let errors = self.errors.load(Ordering::Relaxed);
        // Disabled it is not ready, but only when nobody is in it any more: the host waits for that.
        let ready = if enabled {
            self.memory.is_open()
        } else {
            !self.settled.load(Ordering::SeqCst)
        };
        let health = match *lock(&self.condition) {
            _ if errors > 0 => hsts::UNRELIABLE,
            PmrCondition::Sound | PmrCondition::NeverReady => hsts::NORMAL,
            PmrCondition::RestoreError => hsts::RESTORE_ERROR,
            PmrCondition::ReadOnly => hsts::READ_ONLY,
            PmrCondition::Unreliable => hsts::UNRELIABLE,
        };
        PmrSts::new()
            .with_err(errors)
            .with_nrdy(!ready)
            .with_hsts(health)
    }

    /// PMRCTL.EN went from 0 to 1.
    pub(crate) fn enable(&self) {
        self.errors.store(0, Ordering::Relaxed);
        if *lock(&self.condition) != PmrCondition::NeverReady {
            self.memory.open_after(self.config.ready_after);
        }
    }

    pub(crate) fn set_condition(&self, condition: PmrCondition) {
        *lock(&self.condition) = condition;
    }

    /// Lets a loss of power take back what no barrier has confirmed from now on, or keep it again.
    pub(crate) fn set_forgets(&self, forgets: bool) -> io::Result<()> {
        *lock(&self.durable) = forgets.then(|| self.content()).transpose()?;
        Ok(())
    }

    /// All of it, open or not.
    fn content(&self) -> io::Result<Vec<u8>> {
        let size = usize::try_from(self.config.size).map_err(io::Error::other)?;
        let mut content = vec![0; size];
        self.memory.file().read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    /// The power is lost, and nobody is in the region.
    pub(crate) fn lose_unconfirmed(&self) {
        if let Some(durable) = &*lock(&self.durable)
            && let Err(error) = self.memory.file().write_all_at(durable, 0)
        {
            tracing::error!(%error, "the PMR keeps what it should forget");
        }
    }

    /// PMRCTL.EN went from 1 to 0. [`settle`](Self::settle) follows, on a thread that may wait.
    pub(crate) fn disable(&self) {
        self.settled.store(false, Ordering::SeqCst);
        self.memory.close();
    }

    /// Waits for all that is still in the region.
    pub(crate) fn settle(&self, port: Option<&Port>) {
        if let Some(port) = port {
            port.settle();
        }
        drop(write(&self.users));
        self.settled.store(true, Ordering::SeqCst);
    }

    /// Keeps the region from settling while the controller itself moves bytes.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, ()> {
        read(&self.users)
    }

    /// The write barrier: all that was written before is durable when it returns. What went wrong shows in
    /// PMRSTS.
    pub(crate) fn barrier(&self) {
        let mut durable = lock(&self.durable);
        if durable.is_some() {
            match self.content() {
                Ok(content) => *durable = Some(content),
                Err(error) => tracing::error!(%error, "the PMR cannot be read"),
            }
        }
        drop(durable);
        if self.config.backing == PmrBacking::Memory {
            return;
        }
        if let Err(error) = self.memory.sync() {
            tracing::error!(%error, "the PMR's file failed");
            let more = |errors: u8| Some(errors.saturating_add(1));
            let order = (Ordering::Relaxed, Ordering::Relaxed);
            let _ = self.errors.fetch_update(order.0, order.1, more);
        }
    }

    /// Makes all of it read as zeros, durably.
    pub(crate) fn erase(&self) -> io::Result<()> {
        self.memory.clear()?;
        if let Some(durable) = &mut *lock(&self.durable) {
            durable.fill(0);
        }
        match self.config.backing {
            PmrBacking::Memory => Ok(()),
            PmrBacking::File { .. } => self.memory.sync(),
        }
    }

    /// Follows PMRMSC; `false` where its base address is invalid (PMRSTS.CBAI), which leaves the window closed.
    pub(crate) fn set_window(&self, control: PmrMsc, cmb: Option<&Window>) -> bool {
        let base = control.cmse().then(|| control.cba() << 12);
        self.window.set(base, cmb)
    }

    pub(crate) fn place(&self, range: DmaRange) -> Place {
        match self.window.offset(range) {
            Ok(offset) => Place::Pmr(offset),
            Err(place) => place,
        }
    }
}

/// A number of bytes as PMREBS and PMRSWTP have it: bytes, KiB, MiB or GiB, and 24 bits of them.
fn scaled(bytes: u64) -> Option<(u8, u32)> {
    (0..=3u8).find_map(|unit| {
        let one = 1u64 << (10 * unit);
        let value = u32::try_from(bytes / one).ok()?;
        (bytes.is_multiple_of(one) && value < 1 << 24).then_some((unit, value))
    })
}

fn check(serial: &str, config: &PmrConfig) -> Result<(), NvmeError> {
    let refuse = |what, value: String, rule| {
        Err(NvmeError::BadPmr {
            serial: serial.to_owned(),
            what,
            value,
            rule,
        })
    };
    if !config.size.is_power_of_two() || !(4096..=1 << 40).contains(&config.size) {
        let rule = "a power of two from 4096 to 1 TiB";
        return refuse("size in bytes", config.size.to_string(), rule);
    }
    if config.ready_after > LONGEST {
        let value = format!("{:?}", config.ready_after);
        return refuse("time to be ready", value, "at most 120 s");
    }
    for (what, value) in [
        ("elasticity buffer", config.elasticity_buffer),
        ("sustained write throughput", config.sustained_throughput),
    ] {
        if scaled(value).is_none() {
            let rule = "a number that 24 bits of bytes, KiB, MiB or GiB can express";
            return refuse(what, value.to_string(), rule);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_say_what_is_configured() {
        let mut config = PmrConfig::memory(1 << 20);
        config.wds = false;
        config.ready_after = Duration::from_millis(1800);
        config.elasticity_buffer = 3 << 20;
        let pmr = Pmr::open("a", config).unwrap();
        let cap = pmr.capabilities();
        assert!(cap.rds() && !cap.wds() && cap.cmss());
        assert_eq!((cap.bir(), cap.pmrtu(), cap.pmrwbm()), (2, 0, 2));
        // The host waits for longer than it takes.
        assert_eq!(cap.pmrto(), 5);
        let elasticity = pmr.elasticity();
        assert_eq!((elasticity.pmrszu(), elasticity.pmrwbz()), (0, 3 << 20));
        assert_eq!(scaled(5 << 30), Some((1, 5 << 20)));
        assert_eq!(scaled(5 << 40), Some((2, 5 << 20)));
        assert_eq!(scaled((1 << 40) + 1), None);
    }

    #[test]
    fn a_failed_barrier_shows_until_the_region_is_enabled_again() {
        let dir = tempfile::tempdir().unwrap();
        let pmr = Pmr::open("a", PmrConfig::file(dir.path().join("pmr"), 8192).create()).unwrap();
        pmr.enable();
        pmr.barrier();
        assert_eq!(pmr.status(true).into_bits(), 0);
        pmr.errors.store(2, Ordering::Relaxed);
        let status = pmr.status(true);
        assert_eq!((status.err(), status.hsts()), (2, hsts::UNRELIABLE));
        pmr.enable();
        assert_eq!(pmr.status(true).into_bits(), 0);
    }

    #[test]
    fn a_broken_region_says_so_and_mends() {
        let pmr = Pmr::open("a", PmrConfig::memory(8192)).unwrap();
        for (condition, health) in [
            (PmrCondition::RestoreError, hsts::RESTORE_ERROR),
            (PmrCondition::ReadOnly, hsts::READ_ONLY),
            (PmrCondition::Unreliable, hsts::UNRELIABLE),
        ] {
            pmr.set_condition(condition);
            pmr.enable();
            let status = pmr.status(true);
            assert_eq!((status.nrdy(), status.hsts()), (false, health));
        }
        pmr.disable();
        pmr.set_condition(PmrCondition::NeverReady);
        pmr.enable();
        assert!(pmr.status(true).nrdy() && !pmr.memory.is_open());
        pmr.set_condition(PmrCondition::Sound);
        pmr.enable();
        assert_eq!(pmr.status(true).into_bits(), 0);
    }

    #[test]
    fn a_region_that_forgets_keeps_what_a_barrier_confirmed() {
        let pmr = Pmr::open("a", PmrConfig::memory(8192)).unwrap();
        pmr.enable();
        let holds = |expected| {
            let mut found = [0];
            assert!(pmr.memory.read(100, &mut found));
            assert_eq!(found, [expected]);
        };
        pmr.set_forgets(true).unwrap();
        assert!(pmr.memory.write(100, &[1]));
        pmr.barrier();
        assert!(pmr.memory.write(100, &[2]));
        pmr.lose_unconfirmed();
        holds(1);
        pmr.set_forgets(false).unwrap();
        assert!(pmr.memory.write(100, &[3]));
        pmr.lose_unconfirmed();
        holds(3);
    }

    #[test]
    fn bad_regions_are_refused_in_one_sentence() {
        let complaint = |config| Pmr::open("a", config).unwrap_err().to_string();
        let said = complaint(PmrConfig::memory(3 << 20));
        assert!(said.contains("use a power of two"), "{said}");
        let mut config = PmrConfig::memory(1 << 20);
        config.ready_after = Duration::from_secs(121);
        assert!(complaint(config).contains("at most 120 s"));
        let mut config = PmrConfig::memory(1 << 20);
        config.sustained_throughput = (1 << 40) + 1;
        assert!(complaint(config).contains("24 bits"));
        let dir = tempfile::tempdir().unwrap();
        let said = complaint(PmrConfig::file(dir.path().join("none"), 1 << 20));
        assert!(said.contains("none`") && said.contains("No such file"));
        std::fs::write(dir.path().join("short"), [0; 4096]).unwrap();
        let said = complaint(PmrConfig::file(dir.path().join("short"), 1 << 20));
        assert!(said.contains("shorter"), "{said}");
        let shared = || PmrConfig::file(dir.path().join("shared"), 1 << 20).create();
        let first = Pmr::open("a", shared()).unwrap();
        let said = complaint(shared());
        assert!(said.contains("another lab"), "{said}");
        drop(first);
        Pmr::open("a", shared()).unwrap();
    }
}
