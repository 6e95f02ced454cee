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
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const COMMANDS_SUPPORTED: u8 = 0x05;
    pub const DEVICE_SELF_TEST: u8 = 0x06;
    pub const TELEMETRY_HOST: u8 = 0x07;
    pub const TELEMETRY_CONTROLLER: u8 = 0x08;
    pub const FEATURES_SUPPORTED: u8 = 0x12;
    pub const MI_COMMANDS_SUPPORTED: u8 = 0x13;
    pub const RESERVATION_NOTIFICATION: u8 = 0x80;
    pub const SANITIZE_STATUS: u8 = 0x81;
}

/// Bits of Critical Warning in the SMART / Health Information page (Base 5.16.1.3).
pub mod critical_warning {
    /// The spare is below its threshold.
    pub const SPARE: u8 = 1 << 0;
    /// The temperature is outside the host's thresholds.
    pub const TEMPERATURE: u8 = 1 << 1;
    /// Reliability is degraded.
    pub const RELIABILITY: u8 = 1 << 2;
    /// All media are read-only.
    pub const READ_ONLY: u8 = 1 << 3;
    /// The volatile memory's backup has failed.
    pub const BACKUP_FAILED: u8 = 1 << 4;
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
    /// Controller Busy Time in minutes.
    pub busy_time: [U64; 2],
    /// Power Cycles.
    pub power_cycles: [U64; 2],
    /// Power On Hours.
    pub power_on_hours: [U64; 2],
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: [U64; 2],
    /// Media and Data Integrity Errors.
    pub media_errors: [U64; 2],
    /// Number of Error Information Log Entries.
    pub error_entries: [U64; 2],
    /// Warning Composite Temperature Time in minutes.
    pub warning_temperature_time: U32,
    /// Critical Composite Temperature Time in minutes.
    pub critical_temperature_time: U32,
    /// Temperature sensors, thermal management, reserved.
    pub rest: [u8; 312],
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

/// Telemetry data comes in blocks of this many bytes, and the header is one.
pub const TELEMETRY_BLOCK: usize = 512;

/// Header of the Telemetry Host-Initiated and Telemetry Controller-Initiated pages (Base 5.16.1.8, 5.16.1.9).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TelemetryHeader {
    /// Log Page Identifier.
    pub lid: u8,
    /// Reserved.
    pub reserved1: [u8; 4],
    /// IEEE OUI Identifier.
    pub ieee: [u8; 3],
    /// Last Block of Data Areas 1, 2 and 3.
    pub last_blocks: [U16; 3],
    /// Reserved.
    pub reserved14: [u8; 2],
    /// Last Block of Data Area 4.
    pub last_block_4: U32,
    /// Reserved.
    pub reserved20: [u8; 361],
    /// Telemetry Host-Initiated Data Generation Number.
    pub host_generation: u8,
    /// Telemetry Controller-Initiated Data Available.
    pub controller_available: u8,
    /// Telemetry Controller-Initiated Data Generation Number.
    pub controller_generation: u8,
    /// Reason Identifier.
    pub reason: [u8; 128],
}

const _: () = assert!(size_of::<TelemetryHeader>() == TELEMETRY_BLOCK);
const _: () = assert!(std::mem::offset_of!(TelemetryHeader, controller_available) == 382);

/// A result of the Device Self-test page (Base 5.16.1.7).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SelfTestResult {
    /// Self-test code in bits 7:4, result ([`self_test_result`]) in bits 3:0.
    pub status: u8,
    /// The segment that failed.
    pub segment: u8,
    /// Valid Diagnostic Information: NSID, FLBA, SCT, SC.
    pub valid: u8,
    /// Reserved.
    pub reserved: u8,
    /// Power On Hours when it ended.
    pub power_on_hours: U64,
    /// Namespace.
    pub nsid: U32,
    /// Failing LBA.
    pub failing_lba: U64,
    /// Status Code Type.
    pub status_code_type: u8,
    /// Status Code.
    pub status_code: u8,
    /// Vendor specific.
    pub vendor: [u8; 2],
}

const _: () = assert!(size_of::<SelfTestResult>() == 28);

/// How a self-test ended.
pub mod self_test_result {
    #![allow(missing_docs, reason = "the names say it")]
    pub const NO_ERROR: u8 = 0x0;
    pub const ABORTED_BY_COMMAND: u8 = 0x1;
    pub const ABORTED_BY_RESET: u8 = 0x2;
    pub const ABORTED_BY_NAMESPACE_REMOVAL: u8 = 0x3;
    pub const ABORTED_BY_FORMAT: u8 = 0x4;
    pub const SEGMENT_FAILED: u8 = 0x7;
    pub const ABORTED_BY_SANITIZE: u8 = 0x9;
    /// The entry is not used.
    pub const UNUSED: u8 = 0xf;
}

/// Sanitize Status (Base 5.16.1.25).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SanitizeStatus {
    /// Sanitize Progress in 65536ths; FFFFh where nothing is in progress.
    pub sprog: U16,
    /// Sanitize Status: outcome in bits 2:0, passes completed in 7:3, Global Data Erased in 8.
    pub sstat: U16,
    /// Dword 10 of the Sanitize command.
    pub scdw10: U32,
    /// Estimated times in seconds: Overwrite, Block Erase, Crypto Erase, and the same with No-Deallocate.
    pub estimates: [U32; 6],
    /// Reserved.
    pub reserved: [u8; 480],
}

const _: () = assert!(size_of::<SanitizeStatus>() == 512);
