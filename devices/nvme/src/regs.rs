//! The register file: controller properties as the host reads and writes them (Base 3.1.3).
//!
//! It decides nothing that takes time: a write that needs work (enable, reset, shut down) leaves a request
//! for the controller's thread in [`Pending`].

use std::sync::Arc;

use p2plab_pcie::Mistakes;
use p2plab_pcie::registers::{self, Register, Use, register};

use crate::cmb::Cmb;
use crate::config::{CmbConfig, CmbScheme};
use crate::pmr::Pmr;
use crate::spec::registers::{
    Aqa, Cap, Cc, CmbMsc, Csts, NSSR_MAGIC, PmrCtl, PmrMsc, offset, shst,
};

/// Largest queue, 0's based (CAP.MQES).
pub(crate) const MAX_QUEUE_ENTRIES_Z: u16 = 1023;

/// VS: 2.0, or the version that the scheme of the CMB belongs to.
pub(crate) fn version(cmb: Option<&CmbConfig>) -> u32 {
    match cmb.map(|cmb| cmb.scheme) {
        Some(CmbScheme::V1_3) => 0x0001_0300,
        Some(CmbScheme::V1_4) | None => 0x0002_0000,
    }
}

/// 5 s in units of 500 ms: how long a host waits for CSTS.RDY.
const READY_TIMEOUT: u8 = 10;

/// Name of a register that the file decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name {
    Cap,
    Vs,
    Intms,
    Intmc,
    Cc,
    Csts,
    Nssr,
    Aqa,
    Asq,
    Acq,
    CmbLoc,
    CmbSz,
    CmbMsc,
    CmbSts,
    Crto,
    PmrCap,
    PmrCtl,
    PmrSts,
    PmrEbs,
    PmrSwtp,
    /// PMRMSCL and PMRMSCU.
    PmrMsc,
}

/// Every register, in order of offset. What is not here reads as zero.
pub(crate) const REGISTERS: &[Register<Name>] = &[
    register(Name::Cap, offset::CAP, 8, Use::ReadOnly),
    register(Name::Vs, offset::VS, 4, Use::ReadOnly),
    register(Name::Intms, offset::INTMS, 4, Use::ReadWrite),
    register(Name::Intmc, offset::INTMC, 4, Use::ReadWrite),
    register(Name::Cc, offset::CC, 4, Use::ReadWrite),
    register(Name::Csts, offset::CSTS, 4, Use::ReadWrite),
    register(Name::Nssr, offset::NSSR, 4, Use::ReadWrite),
    register(Name::Aqa, offset::AQA, 4, Use::ReadWrite),
    register(Name::Asq, offset::ASQ, 8, Use::ReadWrite),
    register(Name::Acq, offset::ACQ, 8, Use::ReadWrite),
    register(Name::CmbLoc, offset::CMBLOC, 4, Use::ReadOnly),
    register(Name::CmbSz, offset::CMBSZ, 4, Use::ReadOnly),
    register(Name::CmbMsc, offset::CMBMSC, 8, Use::ReadWrite),
    register(Name::CmbSts, offset::CMBSTS, 4, Use::ReadOnly),
    register(Name::Crto, offset::CRTO, 4, Use::ReadOnly),
    register(Name::PmrCap, offset::PMRCAP, 4, Use::ReadOnly),
    register(Name::PmrCtl, offset::PMRCTL, 4, Use::ReadWrite),
    register(Name::PmrSts, offset::PMRSTS, 4, Use::ReadOnly),
    register(Name::PmrEbs, offset::PMREBS, 4, Use::ReadOnly),
    register(Name::PmrSwtp, offset::PMRSWTP, 4, Use::ReadOnly),
    register(Name::PmrMsc, offset::PMRMSC, 8, Use::ReadWrite),
];

/// What the controller's thread has to do, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pending {
    /// The power fails. No register asks for this; a fault does.
    pub(crate) power_cut: bool,
    /// NSSR asked for an NVM Subsystem Reset.
    pub(crate) subsystem_reset: bool,
    /// PMRCTL.EN went from 1 to 0.
    pub(crate) pmr_disable: bool,
    /// CC.EN went from 1 to 0.
    pub(crate) reset: bool,
    /// CC.EN went from 0 to 1.
    pub(crate) enable: bool,
    /// CC.SHN asked for a shutdown.
    pub(crate) shutdown: bool,
}

/// What a write asks of its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// Wake the controller's thread.
    pub(crate) wake: bool,
    /// The interrupt mask changed.
    pub(crate) interrupts: bool,
    /// CMBMSC or PMRMSC changed.
    pub(crate) windows: bool,
}

/// The state of the registers.
#[derive(Debug)]
pub(crate) struct Registers {
    cmb: Option<CmbConfig>,
    pmr: Option<Arc<Pmr>>,
    pub(crate) cc: Cc,
    pub(crate) csts: Csts,
    pub(crate) aqa: u32,
    pub(crate) asq: u64,
    pub(crate) acq: u64,
    pub(crate) interrupt_mask: u32,
    pub(crate) cmbmsc: CmbMsc,
    pub(crate) cmb_base_invalid: bool,
    pub(crate) pmrctl: PmrCtl,
    pub(crate) pmrmsc: PmrMsc,
    pub(crate) pmr_base_invalid: bool,
    pub(crate) pending: Pending,
    mistakes: Mistakes,
}

impl Registers {
    pub(crate) fn new(cmb: Option<CmbConfig>, pmr: Option<Arc<Pmr>>) -> Self {
        Self {
            cmb,
            pmr,
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: 0,
            asq: 0,
            acq: 0,
            interrupt_mask: 0,
            cmbmsc: CmbMsc::new(),
            cmb_base_invalid: false,
            pmrctl: PmrCtl::new(),
            pmrmsc: PmrMsc::new(),
            pmr_base_invalid: false,
            pending: Pending::default(),
            mistakes: Mistakes::default(),
        }
    }

    /// All registers as after power on. The caller lets the windows follow.
    pub(crate) fn reset_all(&mut self) {
        if self.pmrctl.en()
            && let Some(pmr) = &self.pmr
        {
            pmr.disable();
        }
        let mistakes = std::mem::take(&mut self.mistakes);
        *self = Self {
            mistakes,
            ..Self::new(self.cmb, self.pmr.take())
        };
    }

    /// A Function Level Reset leaves CMBMSC alone (Base 3.7.2), and is no NVM Subsystem Reset.
    pub(crate) fn function_reset(&mut self) {
        let (cmbmsc, invalid) = (self.cmbmsc, self.cmb_base_invalid);
        let nssro = self.csts.nssro();
        self.reset_all();
        (self.cmbmsc, self.cmb_base_invalid) = (cmbmsc, invalid);
        self.csts.set_nssro(nssro);
    }

    /// What CC.EN from 1 to 0 resets: not AQA, ASQ, ACQ, CMBMSC and the PMR's registers (Base 3.7.2).
    pub(crate) fn controller_reset(&mut self) {
        self.csts = Csts::new().with_nssro(self.csts.nssro());
        self.interrupt_mask = 0;
    }

    fn cap(&self) -> Cap {
        Cap::new()
            .with_mqes_z(MAX_QUEUE_ENTRIES_Z)
            .with_cqr(true)
            .with_to(READY_TIMEOUT)
            .with_nssrs(true)
            .with_css(1)
            .with_pmrs(self.pmr.is_some())
            .with_cmbs(self.has_cmbmsc())
            .with_crwms(self.is_new())
    }

    /// Whether the CMB, if there is one, has the scheme of 1.4.
    fn is_new(&self) -> bool {
        self.cmb.is_none_or(|cmb| cmb.scheme == CmbScheme::V1_4)
    }

    fn has_cmbmsc(&self) -> bool {
        self.cmb.is_some() && self.is_new()
    }

    pub(crate) fn value(&self, name: Name) -> u64 {
        let visible = self.cmbmsc.cre() || !self.is_new();
        let cmb = self.cmb.as_ref().filter(|_| visible);
        let pmr = self.pmr.as_ref();
        match name {
            Name::Cap => self.cap().into_bits(),
            Name::Vs => version(self.cmb.as_ref()).into(),
            Name::Intms | Name::Intmc => self.interrupt_mask.into(),
            Name::Cc => self.cc.into_bits().into(),
            Name::Csts => self.csts.into_bits().into(),
            Name::Aqa => self.aqa.into(),
            Name::Asq => self.asq,
            Name::Acq => self.acq,
            Name::Nssr => 0,
            Name::CmbLoc => cmb.map_or(0, |c| Cmb::location(c).into_bits().into()),
            Name::CmbSz => cmb.map_or(0, |c| Cmb::size_register(c).into_bits().into()),
            Name::CmbMsc => self.cmbmsc.into_bits(),
            Name::CmbSts => self.cmb_base_invalid.into(),
            Name::Crto if self.is_new() => READY_TIMEOUT.into(),
            Name::Crto => 0,
            Name::PmrCap => pmr.map_or(0, |pmr| pmr.capabilities().into_bits().into()),
            Name::PmrCtl => self.pmrctl.into_bits().into(),
            Name::PmrSts => pmr.map_or(0, |pmr| {
                let status = pmr.status(self.pmrctl.en());
                status.with_cbai(self.pmr_base_invalid).into_bits().into()
            }),
            Name::PmrEbs => pmr.map_or(0, |pmr| pmr.elasticity().into_bits().into()),
            Name::PmrSwtp => pmr.map_or(0, |pmr| pmr.throughput().into_bits().into()),
            Name::PmrMsc => self.pmrmsc.into_bits(),
        }
    }

    /// Fills `data` with the bytes at `at`, whatever its length and alignment.
    pub(crate) fn read(&self, at: u64, data: &mut [u8]) {
        registers::read(REGISTERS, at, data, |name| self.value(name));
    }

    /// Takes a write. Hosts use aligned 4 or 8 bytes (Base 3.1.3); everything else is ignored.
    pub(crate) fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let Some(write) = registers::Write::parse(at, data) else {
            if self.mistakes.is_worth_a_line() {
                tracing::warn!(
                    offset = at,
                    length = data.len(),
                    "register write of a bad shape"
                );
            }
            return Effect::default();
        };
        let mut effect = Effect::default();
        for register in REGISTERS {
            let Some((value, mask)) = write.part(register) else {
                continue;
            };
            let value = (self.value(register.name) & !mask) | value;
            self.write_register(register.name, value, &mut effect);
        }
        effect
    }

    fn write_register(&mut self, name: Name, value: u64, effect: &mut Effect) {
        let low = (value & 0xffff_ffff) as u32;
        match name {
            Name::Intms => {
                self.interrupt_mask |= low;
                effect.interrupts = true;
            }
            Name::Intmc => {
                self.interrupt_mask &= !low;
                effect.interrupts = true;
            }
            Name::Cc => self.write_cc(Cc::from_bits(low), effect),
            // CSTS.NSSRO alone can be written: 1 clears it.
            Name::Csts if Csts::from_bits(low).nssro() => self.csts.set_nssro(false),
            Name::Nssr if low == NSSR_MAGIC => {
                self.pending.subsystem_reset = true;
                effect.wake = true;
            }
            Name::Aqa => self.aqa = low & 0x0fff_0fff,
            Name::Asq => self.asq = value & !0xfff,
            Name::Acq => self.acq = value & !0xfff,
            Name::CmbMsc if self.has_cmbmsc() => {
                self.cmbmsc = CmbMsc::from_bits(value & !0xffc);
                effect.windows = true;
            }
            Name::PmrCtl => self.write_pmrctl(PmrCtl::from_bits(low & 1), effect),
            Name::PmrMsc if self.pmr.is_some() => {
                self.pmrmsc = PmrMsc::from_bits(value & !0xffd);
                effect.windows = true;
            }
            _ => {}
        }
    }

    fn write_pmrctl(&mut self, new: PmrCtl, effect: &mut Effect) {
        let Some(pmr) = &self.pmr else { return };
        let old = std::mem::replace(&mut self.pmrctl, new);
        if !old.en() && new.en() {
            pmr.enable();
        }
        if old.en() && !new.en() {
            pmr.disable();
            self.pending.pmr_disable = true;
            effect.wake = true;
        }
    }

    fn write_cc(&mut self, new: Cc, effect: &mut Effect) {
        let old = std::mem::replace(&mut self.cc, new);
        if old.en() && !new.en() {
            self.pending = Pending {
                reset: true,
                enable: false,
                shutdown: false,
                ..self.pending
            };
            effect.wake = true;
        }
        if !old.en() && new.en() {
            self.pending.enable = true;
            effect.wake = true;
        }
        if new.shn() != 0 && old.shn() == 0 {
            self.csts.set_shst(shst::OCCURRING);
            self.pending.shutdown = true;
            effect.wake = true;
        }
    }

    pub(crate) fn aqa(&self) -> Aqa {
        Aqa::from_bits(self.aqa)
    }

    /// Why the controller cannot be enabled as configured, if it cannot.
    pub(crate) fn bad_configuration(&self) -> Option<&'static str> {
        let (cc, aqa) = (self.cc, self.aqa());
        let checks = [
            (
                cc.css() != 0,
                "CC.CSS selects a command set that is not the NVM command set",
            ),
            (cc.mps() != 0, "CC.MPS selects a page size other than 4 KiB"),
            (
                cc.ams() != 0,
                "CC.AMS selects an arbitration other than round robin",
            ),
            (
                aqa.asqs_z() == 0 || aqa.acqs_z() == 0,
                "AQA gives a queue of one entry",
            ),
            // Nothing prevents a host from memory at address 0, but a queue there is a forgotten write.
            (self.asq == 0 || self.acq == 0, "ASQ or ACQ is not set"),
            (cc.crime(), "CC.CRIME is set without CAP.CRMS.CRIMS"),
        ];
        checks.iter().find(|(bad, _)| *bad).map(|(_, why)| *why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PmrConfig;
    use proptest::prelude::*;

    fn registers() -> Registers {
        let pmr = Pmr::open("a", PmrConfig::memory(1 << 20)).unwrap();
        Registers::new(Some(CmbConfig::new(64 << 20)), Some(Arc::new(pmr)))
    }

    fn read32(registers: &Registers, at: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_table_is_in_order_and_does_not_overlap() {
        for pair in REGISTERS.windows(2) {
            assert!(pair[0].offset + pair[0].width <= pair[1].offset);
        }
    }

    #[test]
    fn wide_registers_take_halves_in_any_order() {
        let mut r = registers();
        r.write(offset::ASQ + 4, &0x12u32.to_le_bytes());
        r.write(offset::ASQ, &0x3456_7fffu32.to_le_bytes());
        assert_eq!(r.asq, 0x12_3456_7000);
        r.write(offset::ACQ, &0x9_8765_4000u64.to_le_bytes());
        assert_eq!(r.acq, 0x9_8765_4000);
        assert_eq!(read32(&r, offset::ACQ + 4), 9);
    }

    #[test]
    fn the_cmb_is_hidden_until_cre() {
        let mut r = registers();
        let mut cap = [0; 8];
        r.read(offset::CAP, &mut cap);
        assert!(Cap::from_bits(u64::from_le_bytes(cap)).cmbs());
        assert_eq!(
            (read32(&r, offset::CMBLOC), read32(&r, offset::CMBSZ)),
            (0, 0)
        );
        assert!(r.write(offset::CMBMSC, &1u32.to_le_bytes()).windows);
        assert_eq!(read32(&r, offset::CMBLOC) & 7, 4);
        assert_ne!(read32(&r, offset::CMBSZ), 0);
    }

    #[test]
    fn masks_set_and_clear() {
        let mut r = registers();
        assert!(r.write(offset::INTMS, &5u32.to_le_bytes()).interrupts);
        assert_eq!(read32(&r, offset::INTMC), 5);
        r.write(offset::INTMC, &1u32.to_le_bytes());
        assert_eq!(read32(&r, offset::INTMS), 4);
    }

    #[test]
    fn enable_and_disable_before_the_thread_ran_leave_a_reset() {
        let mut r = registers();
        r.write(offset::CC, &1u32.to_le_bytes());
        assert_eq!(
            r.pending,
            Pending {
                enable: true,
                ..Pending::default()
            }
        );
        r.write(offset::CC, &0u32.to_le_bytes());
        assert_eq!(
            r.pending,
            Pending {
                reset: true,
                ..Pending::default()
            }
        );
        r.write(offset::CC, &1u32.to_le_bytes());
        assert_eq!(
            r.pending,
            Pending {
                reset: true,
                enable: true,
                ..Pending::default()
            }
        );
    }

    #[test]
    fn a_shutdown_is_occurring_at_once() {
        let mut r = registers();
        r.write(offset::CC, &Cc::new().with_shn(1).into_bits().to_le_bytes());
        assert_eq!(r.csts.shst(), shst::OCCURRING);
        assert!(r.pending.shutdown);
    }

    #[test]
    fn bad_configurations_are_named() {
        let mut r = registers();
        (r.aqa, r.asq, r.acq) = (0x001f_001f, 0x1000, 0x2000);
        assert_eq!(r.bad_configuration(), None);
        r.cc.set_mps(1);
        assert!(
            r.bad_configuration()
                .is_some_and(|why| why.contains("page size"))
        );
        r.cc.set_mps(0);
        r.aqa = 0x001f_0000;
        assert!(r.bad_configuration().is_some_and(|why| why.contains("AQA")));
    }

    proptest! {
        #[test]
        fn any_access_is_harmless(
            at in 0u64..0x1100,
            data in prop::collection::vec(any::<u8>(), 0..70),
            length in 0usize..70,
        ) {
            let mut r = registers();
            let _ = r.write(at, &data);
            let mut out = vec![0xaa; length];
            r.read(at, &mut out);
            // A read in pieces sees what a read as a whole sees.
            for (i, byte) in out.iter().enumerate() {
                let mut one = [0xaa];
                r.read(at + i as u64, &mut one);
                prop_assert_eq!(one[0], *byte);
            }
        }
    }
}
