//! PCI Express type 0 config space (PCI Express Base 6.0, chapter 7).
//!
//! Each byte carries masks that say what a write does to it, so that a write of any size and alignment is
//! only ever what the masks allow. What a write means beyond that is read off the registers afterwards
//! ([`ConfigSpace::decode_state`]) and handed to the function, which acts on it.
//!
//! Not here: the capabilities of the physical layer that section 7.7 asks of a 16 GT/s port (the link is
//! not modelled), MSI, PME, and error messages (errors are logged, no ERR_* message is sent).

mod build;
mod errors;
mod layout;
#[cfg(test)]
mod tests;
mod validate;

use std::ops::Range;

pub(crate) use errors::memory_request_header;
pub(crate) use layout::CONFIG_SPACE_SIZE;
pub(crate) use validate::{pba_length, table_length, validate};

use crate::endpoint::{Declaration, ResetKind};
use layout::*;

/// One byte of config space and what may happen to it; see `build::Field`.
#[derive(Clone, Copy, Debug, Default)]
struct Byte {
    value: u8,
    reset: u8,
    writable: u8,
    write_one_clears: u8,
    sticky: u8,
    survives_flr: u8,
}

/// Device power state (section 5.3.1). D1 and D2 are not implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PowerState {
    /// Fully on.
    D0,
    /// Off but for config space: no memory decoding, no requests.
    D3Hot,
}

/// Addresses that the guest programmed into a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BarWindow {
    /// First bus address, a multiple of the size. Whatever the guest wrote: `address + size` may be 2^64.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// All that config space tells the fabric: what the function decodes and how it may send. Published as a
/// whole at each change, so that no transaction needs the lock of config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecodeState {
    /// A guest is connected. Set by the function, not by config space.
    pub link_up: bool,
    /// Memory Space Enable, as programmed; see [`decodes`](Self::decodes).
    pub memory_space_enabled: bool,
    /// Bus Master Enable, as programmed; see [`may_send`](Self::may_send).
    pub bus_master_enabled: bool,
    /// Device power state.
    pub power_state: PowerState,
    /// The BARs, as programmed; `None` where there is none and in the second register of a 64-bit pair.
    pub bars: [Option<BarWindow>; 6],
    /// Max_Payload_Size in bytes.
    pub max_payload_size: u32,
    /// Max_Read_Request_Size in bytes.
    pub max_read_request_size: u32,
    /// Read Completion Boundary in bytes, 64 or 128.
    pub read_completion_boundary: u32,
    /// MSI-X Enable.
    pub msix_enabled: bool,
    /// MSI-X Function Mask.
    pub msix_function_masked: bool,
    /// Interrupt Disable.
    pub intx_disabled: bool,
}

impl DecodeState {
    /// Whether the function answers to the addresses of its BARs.
    pub(crate) fn decodes(&self) -> bool {
        self.memory_space_enabled && self.power_state == PowerState::D0
    }

    /// Whether the function may issue memory requests; MSI-X messages are such requests.
    pub(crate) fn may_send(&self) -> bool {
        self.bus_master_enabled && self.power_state == PowerState::D0
    }

    /// Bus address of BAR `index` as programmed, whether or not it is decoded.
    pub(crate) fn bar_address(&self, index: u8) -> Option<u64> {
        self.bars
            .get(usize::from(index))
            .copied()
            .flatten()
            .map(|window| window.address)
    }
}

/// What a config write changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConfigChange {
    /// Anything in [`DecodeState`]: decoding, bus mastering, power state, sizes, interrupt control.
    pub state: bool,
    /// Initiate Function Level Reset was written. Nothing has been reset yet.
    pub flr_requested: bool,
}

/// A config space. Reads and writes past its end read as ones and are dropped; the caller checks bounds.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    /// [`CONFIG_SPACE_SIZE`] of them.
    bytes: Box<[Byte]>,
    /// Size and width of the BARs.
    bars: [Option<(u64, bool)>; 6],
    has_msix: bool,
}

impl ConfigSpace {
    /// The config space of `declaration`, after power-on.
    ///
    /// # Errors
    /// The rule that the declaration breaks.
    pub(crate) fn new(declaration: &Declaration) -> Result<Self, String> {
        validate(declaration)?;
        Ok(build::build(declaration))
    }

    /// Reads `data.len()` bytes at `offset`.
    pub(crate) fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, out) in data.iter_mut().enumerate() {
            let byte = offset.checked_add(index).and_then(|at| self.bytes.get(at));
            *out = byte.map_or(0xff, |byte| byte.value);
        }
    }

    /// Writes `data` at `offset`: each bit as its mask allows.
    pub(crate) fn write(&mut self, offset: usize, data: &[u8]) -> ConfigChange {
        let before = self.decode_state();
        let flr_requested = initiates_flr(offset, data);
        let power_state = self.u16_at(PM_CONTROL_STATUS) & PM_POWER_STATE;
        for (index, new) in data.iter().enumerate() {
            let byte = offset
                .checked_add(index)
                .and_then(|at| self.bytes.get_mut(at));
            if let Some(byte) = byte {
                byte.value = (byte.value & !byte.writable) | (new & byte.writable);
                byte.value &= !(new & byte.write_one_clears);
            }
        }
        // Section 7.5.2.2: a power state that is not supported is discarded, with no change of state.
        if matches!(self.u16_at(PM_CONTROL_STATUS) & PM_POWER_STATE, 1 | 2) {
            self.set_bits(PM_CONTROL_STATUS, PM_POWER_STATE, power_state);
        }
        ConfigChange {
            state: self.decode_state() != before,
            flr_requested,
        }
    }

    /// Restores reset values. FLR and conventional resets keep the sticky bits, and FLR also what section
    /// 6.6.2 exempts; a lost connection is a power cycle, which keeps nothing.
    pub(crate) fn reset(&mut self, kind: ResetKind) {
        for byte in &mut self.bytes {
            let kept = match kind {
                ResetKind::FunctionLevel => byte.sticky | byte.survives_flr,
                ResetKind::Conventional => byte.sticky,
                ResetKind::ConnectionLost => 0,
            };
            byte.value = (byte.value & kept) | (byte.reset & !kept);
        }
    }

    /// What the fabric must know. `link_up` is left `false`.
    pub(crate) fn decode_state(&self) -> DecodeState {
        let mut bars = [None; 6];
        for (index, slot) in (0u8..).zip(&mut bars) {
            *slot = self.bar_window(index);
        }
        DecodeState {
            link_up: false,
            memory_space_enabled: self.memory_space_enabled(),
            bus_master_enabled: self.bus_master_enabled(),
            power_state: self.power_state(),
            bars,
            max_payload_size: self.max_payload_size(),
            max_read_request_size: self.max_read_request_size(),
            read_completion_boundary: self.read_completion_boundary(),
            msix_enabled: self.msix_enabled(),
            msix_function_masked: self.msix_function_masked(),
            intx_disabled: self.intx_disabled(),
        }
    }

    fn bus_master_enabled(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    fn memory_space_enabled(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_MEMORY_SPACE != 0
    }

    fn intx_disabled(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    fn power_state(&self) -> PowerState {
        match self.u16_at(PM_CONTROL_STATUS) & PM_POWER_STATE {
            0 => PowerState::D0,
            _ => PowerState::D3Hot,
        }
    }

    fn bar_window(&self, index: u8) -> Option<BarWindow> {
        let (size, is_64bit) = (*self.bars.get(usize::from(index))?)?;
        let offset = build::bar_offset(index);
        let mut address = u64::from(self.u32_at(offset));
        if is_64bit {
            address |= u64::from(self.u32_at(offset + 4)) << 32;
        }
        Some(BarWindow {
            address: address & build::address_mask(size),
            size,
        })
    }

    /// Encodings that are reserved, or larger than Max_Payload_Size Supported, mean 128 bytes: the one size
    /// that every function must take.
    fn max_payload_size(&self) -> u32 {
        let control = self.u16_at(DEVICE_CONTROL) & DEVCTL_MAX_PAYLOAD;
        match control >> DEVCTL_MAX_PAYLOAD_SHIFT {
            encoding @ 0..=MAX_PAYLOAD_SUPPORTED => 128 << encoding,
            _ => 128,
        }
    }

    /// Reserved encodings mean 128 bytes.
    fn max_read_request_size(&self) -> u32 {
        let control = self.u16_at(DEVICE_CONTROL) & DEVCTL_MAX_READ_REQUEST;
        match control >> DEVCTL_MAX_READ_REQUEST_SHIFT {
            encoding @ 0..=5 => 128 << encoding,
            _ => 128,
        }
    }

    fn read_completion_boundary(&self) -> u32 {
        if self.u16_at(LINK_CONTROL) & LNKCTL_RCB != 0 {
            128
        } else {
            64
        }
    }

    fn msix_enabled(&self) -> bool {
        self.has_msix && self.u16_at(MSIX_CONTROL) & MSIX_ENABLE != 0
    }

    fn msix_function_masked(&self) -> bool {
        self.has_msix && self.u16_at(MSIX_CONTROL) & MSIX_FUNCTION_MASK != 0
    }

    /// Sets Interrupt Status: the level of the INTx pin, whether or not it is disabled.
    pub(crate) fn set_interrupt_status(&mut self, asserted: bool) {
        let bit = if asserted { STATUS_INTERRUPT } else { 0 };
        self.set_bits(STATUS, STATUS_INTERRUPT, bit);
    }

    fn range(offset: u16, width: usize) -> Range<usize> {
        let first = usize::from(offset);
        first..first.saturating_add(width)
    }

    fn u16_at(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(Self::range(offset, 2).start, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn u32_at(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(Self::range(offset, 4).start, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets the bits of `mask` at `offset` to those of `value`, whatever a guest may write there.
    fn set_bits(&mut self, offset: u16, mask: u16, value: u16) {
        let value = (self.u16_at(offset) & !mask) | (value & mask);
        self.store(offset, &value.to_le_bytes());
    }

    /// Stores `data` at `offset`, whatever a guest may write there.
    fn store(&mut self, offset: u16, data: &[u8]) {
        let bytes = self
            .bytes
            .get_mut(Self::range(offset, data.len()))
            .unwrap_or_default();
        for (byte, new) in bytes.iter_mut().zip(data) {
            byte.value = *new;
        }
    }
}

/// Whether a config write initiates a Function Level Reset, in a function that was declared here.
#[must_use]
pub fn initiates_flr(offset: usize, data: &[u8]) -> bool {
    written(offset, data, usize::from(DEVICE_CONTROL) + 1)
        .is_some_and(|byte| byte & (DEVCTL_INITIATE_FLR >> 8) as u8 != 0)
}

/// The byte that a write of `data` at `offset` puts at `at`, if it does.
fn written(offset: usize, data: &[u8], at: usize) -> Option<u8> {
    data.get(at.checked_sub(offset)?).copied()
}
