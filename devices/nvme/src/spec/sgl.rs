//! Scatter Gather List descriptors (Base 4.1.2).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A descriptor: what it describes is in its type.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// First address of the data block or segment.
    pub address: U64,
    /// Its length in bytes; of a bit bucket, the bytes to discard.
    pub length: U32,
    /// Reserved, for the types that are not keyed.
    pub reserved: [u8; 3],
    /// SGL Identifier: type in bits 7:4, sub type in bits 3:0.
    pub identifier: u8,
}

const _: () = assert!(size_of::<SglDescriptor>() == 16);

/// Values of an identifier whose sub type is 0, an address.
pub mod kind {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const DATA_BLOCK: u8 = 0x00;
    pub const BIT_BUCKET: u8 = 0x10;
    pub const SEGMENT: u8 = 0x20;
    pub const LAST_SEGMENT: u8 = 0x30;
    pub const KEYED_DATA_BLOCK: u8 = 0x40;
    pub const TRANSPORT_DATA_BLOCK: u8 = 0x50;
}

impl SglDescriptor {
    /// A descriptor of `identifier` (see [`kind`]).
    pub fn new(identifier: u8, address: u64, length: u32) -> Self {
        Self {
            address: address.into(),
            length: length.into(),
            identifier,
            ..Self::default()
        }
    }
}
