//! Log pages (Base 5.16.1).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Log Page Identifiers.
pub mod lid {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const SUPPORTED_LOG_PAGES: u8 = 0x00;
    pub const ERROR_INFORMATION: u8 = 0x01;
    pub const SMART: u8 = 0x02;
    pub const FIRMWARE_SLOT: u8 = 0x03;
    pub const COMMANDS_SUPPORTED: u8 = 0x05;
}

/// An entry of the Error Information log page (Base 5.16.1.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ErrorEntry {
    /// Error Count: a number that grows by one with each error.
    pub error_count: U64,
    /// Submission Queue ID.
    pub sqid: U16,
    /// Command ID.
    pub cid: U16,
    /// Status field with the phase tag in bit 0.
    pub status: U16,
    /// Parameter Error Location; 0xffff where no parameter is to blame.
    pub parameter: U16,
    /// LBA.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor Specific Information Available, Transport Type, command specific information.
    pub rest: [u8; 36],
}

const _: () = assert!(size_of::<ErrorEntry>() == 64);

/// SMART / Health Information (Base 5.16.1.3). 16-byte counters are kept as two halves.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Smart {
    /// Critical Warning.
    pub critical_warning: u8,
    /// Composite Temperature in kelvin.
    pub temperature: U16,
    /// Available Spare, percent.
    pub available_spare: u8,
    /// Available Spare Threshold, percent.
    pub available_spare_threshold: u8,
    /// Percentage Used.
    pub percentage_used: u8,
    /// Endurance Group Critical Warning Summary and reserved bytes.
    pub reserved: [u8; 26],
    /// Data Units Read: thousands of 512 bytes, rounded up.
    pub data_units_read: [U64; 2],
    /// Data Units Written, likewise.
    pub data_units_written: [U64; 2],
    /// Host Read Commands.
    pub host_reads: [U64; 2],
    /// Host Write Commands.
    pub host_writes: [U64; 2],
    /// Controller Busy Time, Power Cycles, Power On Hours, Unsafe Shutdowns.
    pub times: [[U64; 2]; 4],
    /// Media and Data Integrity Errors.
    pub media_errors: [U64; 2],
    /// Number of Error Information Log Entries.
    pub error_entries: [U64; 2],
    /// Temperature times, sensors, reserved.
    pub rest: [u8; 320],
}

const _: () = assert!(size_of::<Smart>() == 512);

/// Firmware Slot Information (Base 5.16.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FirmwareSlot {
    /// Active Firmware Info.
    pub afi: u8,
    /// Reserved.
    pub reserved: [u8; 7],
    /// Firmware Revision of slots 1 to 7, ASCII.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub rest: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlot>() == 512);
