//! Completion queue entries (Base 3.3.3.2).

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::status::Status;

/// A completion queue entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Completion {
    /// Command specific result.
    pub dw0: U32,
    /// Command specific result, second half.
    pub dw1: U32,
    /// SQ Head Pointer.
    pub sqhd: U16,
    /// SQ Identifier.
    pub sqid: U16,
    /// Command Identifier.
    pub cid: U16,
    /// Phase tag in bit 0, status field above it.
    pub status_phase: U16,
}

impl Completion {
    /// The status field.
    pub fn status(&self) -> Status {
        Status(self.status_phase.get() >> 1)
    }

    /// The phase tag.
    pub fn phase(&self) -> bool {
        self.status_phase.get() & 1 != 0
    }

    /// Status field and phase tag as they lie in the entry.
    pub fn pack_status(status: Status, phase: bool) -> U16 {
        U16::new((status.0 << 1) | u16::from(phase))
    }
}

const _: () = assert!(size_of::<Completion>() == 16);
