//! Windows: the addresses by which a host's commands name memory of the controller's own.

use std::sync::atomic::{AtomicU64, Ordering};

use p2plab_pcie::DmaRange;

/// No window is open. No base address register gives it: those are multiples of 4 KiB.
const CLOSED: u64 = u64::MAX;

/// Whether a range of addresses is in the controller's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Outside: reached through the port.
    Bus,
    /// Inside the CMB, at this offset of its memory: the DMA never leaves the controller.
    Cmb(u64),
    /// The same for the PMR.
    Pmr(u64),
    /// Partly inside.
    Straddles,
}

impl Place {
    /// Whether a DMA there never leaves the controller.
    pub(crate) fn is_inside(self) -> bool {
        matches!(self, Self::Cmb(_) | Self::Pmr(_))
    }
}

/// A window of fixed size that a host opens at an address of its choice.
#[derive(Debug)]
pub(crate) struct Window {
    size: u64,
    base: AtomicU64,
}

impl Window {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            base: AtomicU64::new(CLOSED),
        }
    }

    /// Opens it at `base`, or closes it. `false` where the addresses from `base` on wrap, or meet those of
    /// `other`: it is closed then.
    pub(crate) fn set(&self, base: Option<u64>, other: Option<&Self>) -> bool {
        let meets = |base: u64| {
            let range = DmaRange {
                address: base,
                length: self.size,
            };
            other.is_some_and(|other| place(other.base(), other.size, range) != Some(Place::Bus))
        };
        let valid = base.filter(|base| base.checked_add(self.size).is_some() && !meets(*base));
        self.base.store(valid.unwrap_or(CLOSED), Ordering::Release);
        valid == base
    }

    /// Its first address, if it is open.
    pub(crate) fn base(&self) -> Option<u64> {
        let base = self.base.load(Ordering::Acquire);
        (base != CLOSED).then_some(base)
    }

    /// Offset of `range` in the window; [`Err`] says why it has none.
    pub(crate) fn offset(&self, range: DmaRange) -> Result<u64, Place> {
        offset(self.base(), self.size, range)
    }
}

fn place(base: Option<u64>, size: u64, range: DmaRange) -> Option<Place> {
    offset(base, size, range).err()
}

/// Offset of `range` in the `size` bytes from `base` on; [`Err`] says why it has none.
pub(crate) fn offset(base: Option<u64>, size: u64, range: DmaRange) -> Result<u64, Place> {
    let base = base.ok_or(Place::Bus)?;
    let end = range.address.saturating_add(range.length);
    if end <= base || range.address >= base.saturating_add(size) {
        return Err(Place::Bus);
    }
    match range.address.checked_sub(base) {
        Some(offset) if end - base <= size => Ok(offset),
        _ => Err(Place::Straddles),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(window: &Window, address: u64, length: u64) -> Result<u64, Place> {
        window.offset(DmaRange { address, length })
    }

    #[test]
    fn the_window_has_edges() {
        let window = Window::new(0x20_0000);
        assert_eq!(at(&window, 0x1_0000_0000, 16), Err(Place::Bus));
        assert!(window.set(Some(0x1_0000_0000), None));
        assert_eq!(at(&window, 0x1_0000_0000, 0x20_0000), Ok(0));
        assert_eq!(at(&window, 0x1_001f_fff0, 16), Ok(0x1f_fff0));
        assert_eq!(at(&window, 0x1_001f_fff0, 17), Err(Place::Straddles));
        assert_eq!(at(&window, 0xffff_fff0, 17), Err(Place::Straddles));
        assert_eq!(at(&window, 0xffff_fff0, 16), Err(Place::Bus));
        assert_eq!(at(&window, 0x1_0020_0000, 16), Err(Place::Bus));
        assert_eq!(at(&window, u64::MAX, 16), Err(Place::Bus));
    }

    #[test]
    fn a_base_that_wraps_or_meets_another_window_is_invalid() {
        let (window, other) = (Window::new(0x2000), Window::new(0x2000));
        assert!(!window.set(Some(u64::MAX - 0xfff), None));
        assert_eq!(window.base(), None);
        assert!(other.set(Some(0x10_0000), None));
        for (base, valid) in [
            (0xf_e000, true),
            (0xf_f000, false),
            (0x10_1000, false),
            (0x10_2000, true),
        ] {
            assert_eq!(window.set(Some(base), Some(&other)), valid, "{base:#x}");
            assert_eq!(window.base().is_some(), valid);
        }
        assert!(window.set(None, Some(&other)));
    }
}
