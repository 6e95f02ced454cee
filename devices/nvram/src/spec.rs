//! The registers as a driver sees them: offsets, fields, values. The map is in the crate's documentation.

use bitfield_struct::bitfield;

/// Vendor ID: PMC-Sierra, later Microsemi, later Microchip.
pub const VENDOR_ID: u16 = 0x11f8;
/// Device ID.
pub const DEVICE_ID: u16 = 0xf117;
/// Class Code: memory controller, other.
pub const CLASS_CODE: u32 = 0x05_8000;

/// BAR of the registers.
pub const REGISTERS_BAR: u8 = 0;
/// Its size.
pub const REGISTERS_SIZE: u64 = 16 << 10;
/// BAR of the memory.
pub const MEMORY_BAR: u8 = 4;
/// MSI-X table in the registers' BAR.
pub const MSIX_TABLE: u32 = 0x2000;
/// MSI-X Pending Bit Array in the registers' BAR.
pub const MSIX_PBA: u32 = 0x3000;

/// ID: `NVRM`.
pub const ID: u32 = u32::from_le_bytes(*b"NVRM");
/// VS: 1.0.
pub const VERSION: u32 = 0x0001_0000;
/// What lost memory reads as.
pub const LOST: u8 = 0xff;

/// Offsets in BAR 0.
pub mod offset {
    /// Identity.
    pub const ID: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x04;
    /// Bytes of the memory.
    pub const SIZE: u64 = 0x08;
    /// Serial number.
    pub const SN: u64 = 0x10;
    /// Capabilities.
    pub const CAP: u64 = 0x18;
    /// Control.
    pub const CTRL: u64 = 0x1c;
    /// Status.
    pub const STS: u64 = 0x20;
    /// Health.
    pub const HEALTH: u64 = 0x24;
    /// What the last loss of power did.
    pub const PFAIL: u64 = 0x28;
    /// Starts a flush.
    pub const FLUSH: u64 = 0x2c;
    /// Events.
    pub const EVENT: u64 = 0x30;
    /// Interrupt enable.
    pub const INTEN: u64 = 0x34;
    /// Losses of power.
    pub const POWER_CUTS: u64 = 0x40;
    /// Losses of power that the contents survived.
    pub const RESTORES: u64 = 0x48;
    /// Losses of power that they did not.
    pub const LOSSES: u64 = 0x50;
    /// Flushes that succeeded.
    pub const FLUSHES: u64 = 0x58;
    /// Flushes that failed.
    pub const FLUSH_ERRORS: u64 = 0x60;
    /// Resets.
    pub const RESETS: u64 = 0x68;
    /// Writes that were ignored for their shape.
    pub const MISTAKES: u64 = 0x70;
}

/// CAP: capabilities.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// The contents outlive the card's process.
    pub file: bool,
    #[bits(31)]
    _reserved: u32,
}

/// CTRL: control.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Ctrl {
    /// The contents are to be saved when the power fails.
    pub arm: bool,
    #[bits(31)]
    _reserved: u32,
}

/// STS: status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Sts {
    /// The contents would survive a loss of power.
    pub armed: bool,
    /// A flush is under way after which the card is armed.
    pub arming: bool,
    /// A flush is under way, or due.
    pub flushing: bool,
    #[bits(29)]
    _reserved: u32,
}

/// HEALTH.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Health {
    /// The capacitor has failed: no energy for a save.
    pub cap: bool,
    /// The flash has failed: no place for a save.
    pub flash: bool,
    /// A flush has failed since power on.
    pub medium: bool,
    #[bits(29)]
    _reserved: u32,
}

/// PFAIL: what the last loss of power did.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Pfail {
    /// One of [`outcome`].
    pub outcome: u8,
    #[bits(24)]
    _reserved: u32,
}

/// Values of PFAIL.OUTCOME.
pub mod outcome {
    /// There was no loss of power yet.
    pub const NONE: u8 = 0;
    /// The contents were saved and restored.
    pub const RESTORED: u8 = 1;
    /// The card was not to be armed: lost.
    pub const DISARMED: u8 = 2;
    /// It was, and could not save the contents: lost.
    pub const FAILED: u8 = 3;
}

/// EVENT and INTEN.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Event {
    /// The power was gone and is back.
    pub power: bool,
    /// HEALTH changed.
    pub health: bool,
    /// STS.ARMED changed.
    pub armed: bool,
    /// A flush has ended.
    pub flushed: bool,
    #[bits(28)]
    _reserved: u32,
}

impl Event {
    /// All bits that mean something.
    pub const ALL: u32 = 0xf;
}
