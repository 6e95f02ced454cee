//! Transaction Layer Packets: kinds, header sizes, and how a transfer is split into packets.
//!
//! Sources: PCI Express Base 6.0, section 2.2 (packet format), 2.2.4.1 (address routing and header size),
//! 2.2.7.1 (no request crosses a 4 KiB boundary), 2.3.1.1 (Read Completion Boundary), 7.5.3.4 (Device Control).
//!
//! The model splits as a device does that wants as few packets as the rules allow: each packet starts where the
//! one before it ended and is as long as Max_Payload_Size (Max_Read_Request_Size for a read request) and the
//! next 4 KiB boundary let it be. Counts are computed in closed form, so a long transfer costs what a short
//! one does.

use serde::{Deserialize, Serialize};

/// No request crosses an address that is a multiple of this (section 2.2.7.1).
const PAGE: u64 = 4096;
/// Header of a packet routed by ID, or by a 32-bit address: 3 DW (section 2.2.1).
pub const HEADER_3DW: u64 = 12;
/// Header of a packet routed by a 64-bit address: 4 DW.
pub const HEADER_4DW: u64 = 16;

/// Kind of a Transaction Layer Packet (section 2.2.1, table 2-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TlpKind {
    /// Memory Read Request.
    MRd,
    /// Memory Write Request; MSI and MSI-X messages are such writes.
    MWr,
    /// Configuration Read Request, type 0 or 1.
    CfgRd,
    /// Configuration Write Request, type 0 or 1.
    CfgWr,
    /// Completion without data: of a configuration write, or with an error status.
    Cpl,
    /// Completion with data.
    CplD,
}

impl TlpKind {
    /// All kinds, in the order of their discriminants.
    pub const ALL: [TlpKind; 6] = [
        TlpKind::MRd,
        TlpKind::MWr,
        TlpKind::CfgRd,
        TlpKind::CfgWr,
        TlpKind::Cpl,
        TlpKind::CplD,
    ];

    /// The flow-control class that the kind belongs to (section 2.6.1).
    pub const fn class(self) -> TlpClass {
        match self {
            TlpKind::MWr => TlpClass::Posted,
            TlpKind::MRd | TlpKind::CfgRd | TlpKind::CfgWr => TlpClass::NonPosted,
            TlpKind::Cpl | TlpKind::CplD => TlpClass::Completion,
        }
    }
}

/// Flow-control class of a packet (section 2.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TlpClass {
    /// Posted requests.
    Posted,
    /// Non-posted requests.
    NonPosted,
    /// Completions.
    Completion,
}

impl TlpClass {
    /// All classes, in the order of their discriminants.
    pub const ALL: [TlpClass; 3] = [TlpClass::Posted, TlpClass::NonPosted, TlpClass::Completion];
}

/// An amount of traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Packets.
    pub tlps: u64,
    /// Data bytes carried: those that the byte enables select, without padding to whole DWs.
    pub payload_bytes: u64,
    /// Transaction Layer header bytes; no prefixes, digests, framing, sequence numbers or LCRC.
    pub header_bytes: u64,
    /// Of read requests: the bytes asked for. Of completions without data: the bytes that they refuse.
    pub requested_bytes: u64,
}

impl Tally {
    /// Adds `other`.
    pub fn add(&mut self, other: Tally) {
        self.tlps = self.tlps.wrapping_add(other.tlps);
        self.payload_bytes = self.payload_bytes.wrapping_add(other.payload_bytes);
        self.header_bytes = self.header_bytes.wrapping_add(other.header_bytes);
        self.requested_bytes = self.requested_bytes.wrapping_add(other.requested_bytes);
    }

    /// What has come since `earlier`; counters wrap.
    #[must_use]
    pub fn since(self, earlier: Tally) -> Tally {
        Tally {
            tlps: self.tlps.wrapping_sub(earlier.tlps),
            payload_bytes: self.payload_bytes.wrapping_sub(earlier.payload_bytes),
            header_bytes: self.header_bytes.wrapping_sub(earlier.header_bytes),
            requested_bytes: self.requested_bytes.wrapping_sub(earlier.requested_bytes),
        }
    }

    /// Whether nothing was counted.
    pub fn is_zero(&self) -> bool {
        *self == Tally::default()
    }
}

/// What software programmed into a function's Device Control and Link Control registers
/// (sections 7.5.3.4 and 7.5.3.7), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// Max_Payload_Size: 128 to 4096, a power of two.
    pub max_payload_size: u32,
    /// Max_Read_Request_Size: 128 to 4096, a power of two.
    pub max_read_request_size: u32,
    /// Read Completion Boundary of the root complex above: 64 or 128.
    pub read_completion_boundary: u32,
}

impl Default for LinkSettings {
    /// The values after reset.
    fn default() -> Self {
        Self {
            max_payload_size: 128,
            max_read_request_size: 512,
            read_completion_boundary: 64,
        }
    }
}

/// Read Completion Boundary of any completer but a root complex (section 2.3.1.1).
pub const ENDPOINT_READ_COMPLETION_BOUNDARY: u32 = 128;

/// Header size of a memory request to `address`: a 64-bit header only above 4 GiB (section 2.2.4.1).
fn memory_header(address: u64) -> u64 {
    if address >> 32 == 0 {
        HEADER_3DW
    } else {
        HEADER_4DW
    }
}

/// Sums `count(start, length)` over the pieces of `[address, address + length)` between 4 KiB boundaries.
/// `count` depends on the start's offset in its page only, so whole pages are counted once and multiplied.
fn over_pages(address: u64, length: u64, count: impl Fn(u64, u64) -> u64) -> u64 {
    let offset = address % PAGE;
    let head = length.min(if offset == 0 { 0 } else { PAGE - offset });
    let pages = (length - head) / PAGE;
    let tail = (length - head) % PAGE;
    let mut total = 0;
    if head > 0 {
        total += count(offset, head);
    }
    if pages > 0 {
        total += pages * count(0, PAGE);
    }
    if tail > 0 {
        total += count(0, tail);
    }
    total
}

/// Memory Writes that carry `length` bytes to `address`.
pub fn memory_writes(address: u64, length: u64, max_payload_size: u32) -> Tally {
    let tlps = over_pages(address, length, |_, n| {
        n.div_ceil(u64::from(max_payload_size))
    });
    Tally {
        tlps,
        payload_bytes: length,
        header_bytes: tlps * memory_header(address),
        requested_bytes: 0,
    }
}

/// Memory Read requests for `length` bytes at `address`.
pub fn memory_reads(address: u64, length: u64, max_read_request_size: u32) -> Tally {
    let tlps = over_pages(address, length, |_, n| {
        n.div_ceil(u64::from(max_read_request_size))
    });
    Tally {
        tlps,
        payload_bytes: 0,
        header_bytes: tlps * memory_header(address),
        requested_bytes: length,
    }
}

/// Completions of one read request for `length` bytes at page offset `offset`. Every completion but the
/// last ends on a Read Completion Boundary; a request that fits into one payload gets one completion.
fn completions_of_request(offset: u64, length: u64, payload: u64, boundary: u64) -> u64 {
    if length <= payload {
        return 1;
    }
    let first = payload - offset % boundary;
    1 + (length - first).div_ceil(payload)
}

/// Completions with data for what [`memory_reads`] requests, from a completer with `max_payload_size` and
/// `read_completion_boundary`.
pub fn read_completions(
    address: u64,
    length: u64,
    max_read_request_size: u32,
    max_payload_size: u32,
    read_completion_boundary: u32,
) -> Tally {
    let request = u64::from(max_read_request_size);
    let payload = u64::from(max_payload_size);
    let boundary = u64::from(read_completion_boundary);
    let tlps = over_pages(address, length, |offset, n| {
        // Requests of one page all start at the same offset modulo the boundary, as the request size is a
        // multiple of it; the last one may be shorter.
        let whole = n / request;
        let rest = n % request;
        let mut total = 0;
        if whole > 0 {
            total += whole * completions_of_request(offset, request, payload, boundary);
        }
        if rest > 0 {
            total += completions_of_request(offset, rest, payload, boundary);
        }
        total
    });
    Tally {
        tlps,
        payload_bytes: length,
        header_bytes: tlps * HEADER_3DW,
        requested_bytes: 0,
    }
}

/// A completion without data that refuses `refused_bytes` (0 for the completion of a configuration write).
pub fn completion_without_data(refused_bytes: u64) -> Tally {
    Tally {
        tlps: 1,
        payload_bytes: 0,
        header_bytes: HEADER_3DW,
        requested_bytes: refused_bytes,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Walks the transfer packet by packet; the closed forms must agree with it.
    fn walk(mut address: u64, mut length: u64, limit: u64) -> Vec<(u64, u64)> {
        let mut packets = Vec::new();
        while length > 0 {
            let n = length.min(limit).min(4096 - address % 4096);
            packets.push((address, n));
            address += n;
            length -= n;
        }
        packets
    }

    fn walk_completions(requests: &[(u64, u64)], payload: u64, boundary: u64) -> u64 {
        let mut count = 0;
        for &(mut at, length) in requests {
            let end = at + length;
            while at < end {
                let mut stop = (at + payload).min(end);
                if stop < end {
                    stop -= stop % boundary;
                }
                assert!(stop > at && stop - at <= payload);
                count += 1;
                at = stop;
            }
        }
        count
    }

    #[test]
    fn a_page_in_128_byte_payloads_is_32_writes() {
        let tally = memory_writes(0x1_0000_0000, 4096, 128);
        assert_eq!(tally.tlps, 32);
        assert_eq!(tally.payload_bytes, 4096);
        assert_eq!(tally.header_bytes, 32 * 16);
    }

    #[test]
    fn low_addresses_take_short_headers() {
        assert_eq!(memory_reads(0xffff_f000, 64, 512).header_bytes, 12);
        assert_eq!(memory_reads(0x1_0000_0000, 64, 512).header_bytes, 16);
    }

    #[test]
    fn an_unaligned_read_ends_its_first_completion_on_the_boundary() {
        // 512 bytes from 0x20 with 128-byte payloads: 96 (to 0x80), 3 x 128, 32.
        assert_eq!(read_completions(0x20, 512, 512, 128, 64).tlps, 5);
        // Boundary 128: the same here; payload 256: 224, 256, 32.
        assert_eq!(read_completions(0x20, 512, 512, 256, 128).tlps, 3);
    }

    fn size() -> impl Strategy<Value = u32> {
        (7u32..=12).prop_map(|shift| 1 << shift)
    }

    proptest! {
        #[test]
        fn closed_forms_equal_the_walk(
            address in 0u64..1 << 40,
            length in 0u64..300_000,
            mps in size(),
            mrrs in size(),
            rcb in prop_oneof![Just(64u32), Just(128u32)],
        ) {
            let writes = walk(address, length, u64::from(mps));
            prop_assert_eq!(memory_writes(address, length, mps).tlps, writes.len() as u64);
            let reads = walk(address, length, u64::from(mrrs));
            prop_assert_eq!(memory_reads(address, length, mrrs).tlps, reads.len() as u64);
            let completions = walk_completions(&reads, u64::from(mps), u64::from(rcb));
            prop_assert_eq!(
                read_completions(address, length, mrrs, mps, rcb).tlps,
                completions
            );
        }
    }
}
