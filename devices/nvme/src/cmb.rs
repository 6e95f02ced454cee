//! The Controller Memory Buffer: which addresses are in it, and what may be (Base 3.1.3.11, 8.5).

use std::sync::Arc;

use p2plab_pcie::{BarDeclaration, BarMemory, DmaRange, Port};

use crate::config::{CmbConfig, CmbScheme, NvmeError};
use crate::spec::registers::{CmbLoc, CmbMsc, CmbSz};
use crate::spec::status::Status;
use crate::window::{self, Place, Window};

/// BAR of the CMB.
pub(crate) const CMB_BAR: u8 = 4;

/// The buffer and the window through which commands address it.
#[derive(Debug)]
pub(crate) struct Cmb {
    /// All of the BAR.
    pub(crate) memory: Arc<BarMemory>,
    pub(crate) config: CmbConfig,
    pub(crate) window: Window,
}

impl Cmb {
    pub(crate) fn open(serial: &str, config: CmbConfig) -> Result<Self, NvmeError> {
        let serial = || serial.to_owned();
        let bar = check(&config).ok_or_else(|| NvmeError::BadCmbSize {
            serial: serial(),
            size: config.size,
            offset: config.offset,
        })?;
        let memory =
            BarMemory::anonymous("nvme-cmb", bar).map_err(|source| NvmeError::CmbMemory {
                serial: serial(),
                size: bar,
                source,
            })?;
        Ok(Self {
            memory: Arc::new(memory),
            config,
            window: Window::new(config.size),
        })
    }

    pub(crate) fn declaration(&self) -> BarDeclaration {
        BarDeclaration::memory(CMB_BAR, &self.memory, self.config.cpu_access)
    }

    /// CMBLOC. A queue and a command's data must lie all inside or all outside (CQMMS = CDMMMS = 0).
    pub(crate) fn location(config: &CmbConfig) -> CmbLoc {
        let (lists, free) = config.list_rules();
        let ofst = config.offset / unit(size_unit(config));
        CmbLoc::new()
            .with_bir(CMB_BAR)
            .with_cdpmls(lists)
            .with_cdpcils(free)
            .with_ofst(u32::try_from(ofst).unwrap_or(0))
    }

    /// CMBSZ: in the largest unit that divides the size and the offset.
    pub(crate) fn size_register(config: &CmbConfig) -> CmbSz {
        let szu = size_unit(config);
        CmbSz::new()
            .with_sqs(config.sqs)
            .with_cqs(config.cqs)
            .with_lists(config.lists)
            .with_rds(config.rds)
            .with_wds(config.wds)
            .with_szu(szu)
            .with_sz(u32::try_from(config.size / unit(szu)).unwrap_or(0))
    }

    /// Follows CMBMSC; `false` where its base address is invalid (CMBSTS.CBAI), which leaves the window closed.
    pub(crate) fn set_window(&self, control: CmbMsc, pmr: Option<&Window>) -> bool {
        let base = control.cmse().then(|| control.cba() << 12);
        self.window.set(base, pmr)
    }

    /// Where `range` lies. Without CMBMSC the CMB's addresses are those that the guest gave its BAR.
    pub(crate) fn place(&self, range: DmaRange, port: &Port) -> Place {
        let found = match self.config.scheme {
            CmbScheme::V1_4 => self.window.offset(range),
            CmbScheme::V1_3 => {
                let base = port.bar_address(CMB_BAR);
                let base = base.and_then(|base| base.checked_add(self.config.offset));
                window::offset(base, self.config.size, range)
            }
        };
        match found {
            Ok(offset) => Place::Cmb(offset.saturating_add(self.config.offset)),
            Err(place) => place,
        }
    }

    /// Whether PRP lists and SGL segments may lie in it, for commands that themselves do or do not (CDPCILS).
    pub(crate) fn check_list(&self, command_inside: bool) -> Result<(), Status> {
        let (_, free) = self.config.list_rules();
        allowed(self.config.lists && (free || command_inside))
    }

    /// Whether one command's lists may lie partly inside and partly outside (CDPMLS).
    pub(crate) fn check_mixed_lists(&self) -> Result<(), Status> {
        allowed(self.config.list_rules().0)
    }
}

/// What the capabilities forbid gets the status that Base 8.5 names.
pub(crate) fn allowed(allowed: bool) -> Result<(), Status> {
    if allowed {
        Ok(())
    } else {
        Err(Status::INVALID_USE_OF_CMB)
    }
}

/// CMBSZ.SZU: 16 to this power times 4 KiB.
fn size_unit(config: &CmbConfig) -> u8 {
    let fits = |szu: &u8| {
        config.size.is_multiple_of(unit(*szu)) && config.offset.is_multiple_of(unit(*szu))
    };
    (0..=6).rev().find(fits).unwrap_or(0)
}

fn unit(szu: u8) -> u64 {
    4096 << (4 * szu)
}

/// Size of the BAR, where CMBLOC and CMBSZ can express the configuration.
fn check(config: &CmbConfig) -> Option<u64> {
    const SIZES: std::ops::RangeInclusive<u64> = 4096..=1 << 40;
    let bar = config.size.checked_add(config.offset)?;
    let bar = bar.checked_next_power_of_two()?;
    let unit = unit(size_unit(config));
    let expressible = |bytes: u64| bytes.is_multiple_of(4096) && bytes / unit < 1 << 20;
    let good = config.size.is_power_of_two()
        && SIZES.contains(&config.size)
        && SIZES.contains(&bar)
        && expressible(config.size)
        && expressible(config.offset);
    good.then_some(bar)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_offsets_are_exact_in_their_unit() {
        for shift in 12..=40 {
            for offset in [0, 4096, 1 << 16, 3 << 20] {
                let mut config = CmbConfig::new(1u64 << shift);
                config.offset = offset;
                let Some(bar) = check(&config) else {
                    // 2^20 units of 4 KiB are one too many.
                    assert!(shift >= 32 || (shift == 40 && offset > 0), "{config:?}");
                    continue;
                };
                let (size, location) = (Cmb::size_register(&config), Cmb::location(&config));
                let unit = 4096u64 << (4 * size.szu());
                assert_eq!(u64::from(size.sz()) * unit, config.size);
                assert_eq!(u64::from(location.ofst()) * unit, offset);
                assert!(bar.is_power_of_two() && bar >= config.size + offset);
            }
        }
        for (size, offset) in [(0, 0), (2048, 0), (12288, 0), (4096, 100), (1 << 41, 0)] {
            let mut config = CmbConfig::new(size);
            config.offset = offset;
            assert_eq!(check(&config), None);
        }
    }

    /// Before 1.4 there are no bits that relax the rules for lists, so they are not relaxed.
    #[test]
    fn the_older_scheme_knows_strict_rules_only() {
        let mut config = CmbConfig::new(1 << 20);
        assert!(Cmb::location(&config).cdpmls() && Cmb::location(&config).cdpcils());
        config.scheme = CmbScheme::V1_3;
        assert!(!Cmb::location(&config).cdpmls() && !Cmb::location(&config).cdpcils());
        let cmb = Cmb::open("a", config).unwrap();
        assert_eq!(cmb.check_list(true), Ok(()));
        assert_eq!(cmb.check_list(false), Err(Status::INVALID_USE_OF_CMB));
        assert_eq!(cmb.check_mixed_lists(), Err(Status::INVALID_USE_OF_CMB));
    }
}
