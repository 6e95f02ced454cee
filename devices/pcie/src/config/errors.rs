//! Errors that the function detects and logs (PCI Express Base 6.0, section 6.2).

use super::ConfigSpace;
use super::layout::*;

impl ConfigSpace {
    /// The function refused a request with `header` (four doublewords, byte 0 of the TLP in bits 31:24).
    ///
    /// Logged as section 6.2.3.2.4.1 says: a non-posted request whose error is non-fatal has a completion
    /// to tell its requester, so here it is but an Advisory Non-Fatal Error; as long as that is masked, as
    /// it is after reset, the Unsupported Request status bit and the header log stay as they are.
    pub(crate) fn record_unsupported_request(&mut self, header: [u32; 4], posted: bool) {
        let fatal = self.u32_at(AER_UNCORRECTABLE_SEVERITY) & AER_UNSUPPORTED_REQUEST != 0;
        let advisory = !posted && !fatal;
        let detected = match (advisory, fatal) {
            (true, _) => DEVSTA_CORRECTABLE,
            (false, true) => DEVSTA_FATAL,
            (false, false) => DEVSTA_NON_FATAL,
        };
        let detected = detected | DEVSTA_UNSUPPORTED_REQUEST;
        self.set_bits(DEVICE_STATUS, detected, detected);
        if advisory {
            let status = self.u32_at(AER_CORRECTABLE_STATUS) | AER_ADVISORY_NON_FATAL;
            self.store(AER_CORRECTABLE_STATUS, &status.to_le_bytes());
            if self.u32_at(AER_CORRECTABLE_MASK) & AER_ADVISORY_NON_FATAL != 0 {
                return;
            }
        }
        self.log_uncorrectable(AER_UNSUPPORTED_REQUEST_BIT, header);
    }

    /// A request of the function came back as Unsupported Request (section 7.5.1.1.4, Received Master Abort).
    pub(crate) fn record_master_abort(&mut self) {
        self.set_bits(STATUS, STATUS_MASTER_ABORT, STATUS_MASTER_ABORT);
    }

    /// Sets a status bit and, if it is the first error since software cleared the last one, logs the header.
    fn log_uncorrectable(&mut self, bit: u32, header: [u32; 4]) {
        let status = self.u32_at(AER_UNCORRECTABLE_STATUS);
        let control = self.u32_at(AER_CONTROL);
        let log_is_valid = status & (1 << (control & AER_FIRST_ERROR_POINTER)) != 0;
        let masked = self.u32_at(AER_UNCORRECTABLE_MASK) & (1 << bit) != 0;
        self.store(AER_UNCORRECTABLE_STATUS, &(status | 1 << bit).to_le_bytes());
        if masked || log_is_valid {
            return;
        }
        let control = (control & !AER_FIRST_ERROR_POINTER) | bit;
        self.store(AER_CONTROL, &control.to_le_bytes());
        for (offset, word) in (AER_HEADER_LOG..).step_by(4).zip(header) {
            self.store(offset, &word.to_le_bytes());
        }
    }
}

/// Header of a memory request (section 2.2.7). Requester ID and tag are 0: the fabric does not see bus numbers.
pub(crate) fn memory_request_header(posted: bool, address: u64, length: usize) -> [u32; 4] {
    let lead = (address & 3) as u32;
    let bytes = u32::try_from(length)
        .unwrap_or(4096)
        .clamp(1, 4096)
        .saturating_add(lead);
    let words = bytes.div_ceil(4);
    let first = (0xf << lead) & 0xf;
    let last = 0xf >> (words * 4 - bytes).min(3);
    let enables = if words == 1 {
        first & last
    } else {
        last << 4 | first
    };
    let [high, low] = [(address >> 32) as u32, address as u32 & !3];
    // Fmt: bit 30 for data, bit 29 for a header of four doublewords.
    let format = u32::from(posted) << 30 | u32::from(high != 0) << 29;
    let start = format | (words & 0x3ff);
    if high != 0 {
        [start, enables, high, low]
    } else {
        [start, enables, low, 0]
    }
}
