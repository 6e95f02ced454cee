//! The Controller Memory Buffer: which addresses are in it, and what its properties say (Base 8.5).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use p2plab_pcie::{BarMemory, DmaRange};

use crate::config::CmbConfig;
use crate::spec::registers::{CmbLoc, CmbMsc, CmbSz};

/// BAR of the CMB.
pub(crate) const CMB_BAR: u8 = 4;

/// No window is open. No CMBMSC.CBA gives it: those are multiples of 4 KiB.
const CLOSED: u64 = u64::MAX;

/// Whether a range of addresses is in the CMB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Outside: reached through the port.
    Bus,
    /// Inside, at this offset: the DMA never leaves the controller.
    Cmb(u64),
    /// Partly inside.
    Straddles,
}

/// The buffer and the window through which commands address it.
#[derive(Debug)]
pub(crate) struct Cmb {
    pub(crate) memory: Arc<BarMemory>,
    pub(crate) config: CmbConfig,
    window: AtomicU64,
}

impl Cmb {
    pub(crate) fn new(memory: Arc<BarMemory>, config: CmbConfig) -> Self {
        Self {
            memory,
            config,
            window: AtomicU64::new(CLOSED),
        }
    }

    /// CMBLOC when the host has set CMBMSC.CRE.
    ///
    /// A command's data must lie all inside or all outside (CDMMMS = 0); its PRP lists may lie anywhere.
    pub(crate) fn location() -> CmbLoc {
        CmbLoc::new()
            .with_bir(CMB_BAR)
            .with_cdpmls(true)
            .with_cdpcils(true)
    }

    /// CMBSZ when the host has set CMBMSC.CRE: in the largest unit that divides the size.
    pub(crate) fn size_register(config: &CmbConfig) -> CmbSz {
        let mut szu = 0u8;
        while szu < 6 && config.size.is_multiple_of(4096u64 << (4 * (szu + 1))) {
            szu += 1;
        }
        let units = config.size / (4096u64 << (4 * szu));
        CmbSz::new()
            .with_sqs(config.sqs)
            .with_lists(true)
            .with_rds(true)
            .with_wds(true)
            .with_szu(szu)
            .with_sz(u32::try_from(units).unwrap_or(0))
    }

    /// Follows CMBMSC; `false` where its base address is invalid (CMBSTS.CBAI), which leaves the window closed.
    pub(crate) fn set_window(&self, control: CmbMsc) -> bool {
        let base = control.cba() << 12;
        let valid = base.checked_add(self.config.size).is_some();
        let open = control.cmse() && valid;
        self.window
            .store(if open { base } else { CLOSED }, Ordering::Release);
        valid || !control.cmse()
    }

    /// Where the commands' addresses of the CMB start, if they are enabled.
    pub(crate) fn window(&self) -> Option<u64> {
        let base = self.window.load(Ordering::Acquire);
        (base != CLOSED).then_some(base)
    }

    pub(crate) fn place(&self, range: DmaRange) -> Place {
        let Some(base) = self.window() else {
            return Place::Bus;
        };
        let size = self.config.size;
        let end = range.address.saturating_add(range.length);
        if end <= base || range.address >= base.saturating_add(size) {
            return Place::Bus;
        }
        match range.address.checked_sub(base) {
            Some(offset) if end - base <= size => Place::Cmb(offset),
            _ => Place::Straddles,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use p2plab_pcie::CpuAccess;

    fn cmb(size: u64) -> Cmb {
        let config = CmbConfig {
            size,
            cpu_access: CpuAccess::Trapped,
            sqs: true,
        };
        Cmb::new(Arc::new(BarMemory::anonymous("cmb", size).unwrap()), config)
    }

    fn place(cmb: &Cmb, address: u64, length: u64) -> Place {
        cmb.place(DmaRange { address, length })
    }

    #[test]
    fn sizes_are_exact_in_their_unit() {
        for shift in 12..=40 {
            let size = 1u64 << shift;
            let config = CmbConfig {
                size,
                cpu_access: CpuAccess::Trapped,
                sqs: false,
            };
            let register = Cmb::size_register(&config);
            assert_eq!(
                u64::from(register.sz()) * (4096 << (4 * register.szu())),
                size
            );
        }
    }

    #[test]
    fn the_window_has_edges() {
        let cmb = cmb(0x20_0000);
        assert_eq!(place(&cmb, 0x1_0000_0000, 16), Place::Bus);
        assert!(cmb.set_window(CmbMsc::new().with_cmse(true).with_cba(0x1_0000_0000 >> 12)));
        assert_eq!(place(&cmb, 0x1_0000_0000, 0x20_0000), Place::Cmb(0));
        assert_eq!(place(&cmb, 0x1_001f_fff0, 16), Place::Cmb(0x1f_fff0));
        assert_eq!(place(&cmb, 0x1_001f_fff0, 17), Place::Straddles);
        assert_eq!(place(&cmb, 0xffff_fff0, 17), Place::Straddles);
        assert_eq!(place(&cmb, 0xffff_fff0, 16), Place::Bus);
        assert_eq!(place(&cmb, 0x1_0020_0000, 16), Place::Bus);
        assert_eq!(place(&cmb, u64::MAX, 16), Place::Bus);
    }

    #[test]
    fn a_base_that_wraps_is_invalid() {
        let cmb = cmb(0x20_0000);
        assert!(!cmb.set_window(CmbMsc::new().with_cmse(true).with_cba((1 << 52) - 1)));
        assert_eq!(cmb.window(), None);
        assert!(cmb.set_window(CmbMsc::new().with_cba((1 << 52) - 1)));
    }
}
