//! Controller properties (Base 3.1.3) and the PCIe transport's doorbells.

use bitfield_struct::bitfield;

/// CAP: Controller Capabilities (Base 3.1.3.1).
#[bitfield(u64)]
pub struct Cap {
    /// Maximum Queue Entries Supported.
    pub mqes_z: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    _reserved: u8,
    /// Timeout, in units of 500 ms.
    pub to: u8,
    /// Doorbell Stride.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported; bit 0 is the NVM command set.
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported.
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready With Media Support (CRMS bit 0).
    pub crwms: bool,
    /// Controller Ready Independent of Media Support (CRMS bit 1).
    pub crims: bool,
    #[bits(3)]
    _reserved2: u8,
}

/// CC: Controller Configuration (Base 3.1.3.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    _reserved: u8,
    /// I/O Command Set Selected.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification.
    #[bits(2)]
    pub shn: u8,
    /// I/O Submission Queue Entry Size, as a power of two.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size, as a power of two.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    _reserved2: u8,
}

/// CSTS: Controller Status (Base 3.1.3.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status, see [`shst`].
    #[bits(2)]
    pub shst: u8,
    /// NVM Subsystem Reset Occurred.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    #[bits(26)]
    _reserved: u32,
}

/// Values of CSTS.SHST.
pub mod shst {
    /// Normal operation.
    pub const NORMAL: u8 = 0;
    /// Shutdown processing occurring.
    pub const OCCURRING: u8 = 1;
    /// Shutdown processing complete.
    pub const COMPLETE: u8 = 2;
}

/// AQA: Admin Queue Attributes (Base 3.1.3.8).
#[bitfield(u32)]
pub struct Aqa {
    /// Admin Submission Queue Size.
    #[bits(12)]
    pub asqs_z: u16,
    #[bits(4)]
    _reserved: u8,
    /// Admin Completion Queue Size.
    #[bits(12)]
    pub acqs_z: u16,
    #[bits(4)]
    _reserved2: u8,
}

/// CMBLOC: Controller Memory Buffer Location (Base 3.1.3.11).
#[bitfield(u32)]
pub struct CmbLoc {
    /// Base Indicator Register: the BAR.
    #[bits(3)]
    pub bir: u8,
    /// CMB Queue Mixed Memory Support.
    pub cqmms: bool,
    /// CMB Queue Physically Discontiguous Support.
    pub cqpds: bool,
    /// CMB Data Pointer Mixed Locations Support.
    pub cdpmls: bool,
    /// CMB Data Pointer and Command Independent Locations Support.
    pub cdpcils: bool,
    /// CMB Data Metadata Mixed Memory Support.
    pub cdmmms: bool,
    /// CMB Queue Dword Alignment.
    pub cqda: bool,
    #[bits(3)]
    _reserved: u8,
    /// Offset, in units of CMBSZ.SZU.
    #[bits(20)]
    pub ofst: u32,
}

/// CMBSZ: Controller Memory Buffer Size (Base 3.1.3.12).
#[bitfield(u32)]
pub struct CmbSz {
    /// Submission Queue Support.
    pub sqs: bool,
    /// Completion Queue Support.
    pub cqs: bool,
    /// PRP SGL List Support.
    pub lists: bool,
    /// Read Data Support.
    pub rds: bool,
    /// Write Data Support.
    pub wds: bool,
    #[bits(3)]
    _reserved: u8,
    /// Size Units: 4 KiB times 16 to this power.
    #[bits(4)]
    pub szu: u8,
    /// Size, in size units.
    #[bits(20)]
    pub sz: u32,
}

/// CMBMSC: Controller Memory Buffer Memory Space Control (Base 3.1.3.16).
#[bitfield(u64)]
pub struct CmbMsc {
    /// Capabilities Registers Enabled.
    pub cre: bool,
    /// Controller Memory Space Enable.
    pub cmse: bool,
    #[bits(10)]
    _reserved: u16,
    /// Controller Base Address, bits 63:12.
    #[bits(52)]
    pub cba: u64,
}

/// CMBSTS: Controller Memory Buffer Status (Base 3.1.3.17).
#[bitfield(u32)]
pub struct CmbSts {
    /// Controller Base Address Invalid.
    pub cbai: bool,
    #[bits(31)]
    _reserved: u32,
}

/// Offsets of the properties in BAR 0.
pub mod offset {
    /// CAP, 8 bytes.
    pub const CAP: u64 = 0x00;
    /// VS.
    pub const VS: u64 = 0x08;
    /// INTMS: Interrupt Mask Set.
    pub const INTMS: u64 = 0x0c;
    /// INTMC: Interrupt Mask Clear.
    pub const INTMC: u64 = 0x10;
    /// CC.
    pub const CC: u64 = 0x14;
    /// CSTS.
    pub const CSTS: u64 = 0x1c;
    /// AQA.
    pub const AQA: u64 = 0x24;
    /// ASQ: Admin Submission Queue Base Address, 8 bytes.
    pub const ASQ: u64 = 0x28;
    /// ACQ: Admin Completion Queue Base Address, 8 bytes.
    pub const ACQ: u64 = 0x30;
    /// CMBLOC.
    pub const CMBLOC: u64 = 0x38;
    /// CMBSZ.
    pub const CMBSZ: u64 = 0x3c;
    /// CMBMSC, 8 bytes.
    pub const CMBMSC: u64 = 0x50;
    /// CMBSTS.
    pub const CMBSTS: u64 = 0x58;
    /// CRTO: Controller Ready Timeouts.
    pub const CRTO: u64 = 0x68;
    /// First doorbell: Submission Queue 0 Tail. With CAP.DSTRD = 0 queue y has its tail doorbell at
    /// `DOORBELLS + 8 y` and its completion queue's head doorbell 4 bytes on.
    pub const DOORBELLS: u64 = 0x1000;
}
