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

/// The value that starts an NVM Subsystem Reset when it is written to NSSR: "NVMe" (Base 3.1.3.7).
pub const NSSR_MAGIC: u32 = 0x4e56_4d65;

/// PMRCAP: Persistent Memory Region Capabilities (Base 3.1.3.20).
#[bitfield(u32)]
pub struct PmrCap {
    #[bits(3)]
    _reserved: u8,
    /// Read Data Support.
    pub rds: bool,
    /// Write Data Support.
    pub wds: bool,
    /// Base Indicator Register: the BAR.
    #[bits(3)]
    pub bir: u8,
    /// Persistent Memory Region Time Units: 0 are 500 ms, 1 are minutes.
    #[bits(2)]
    pub pmrtu: u8,
    /// Persistent Memory Region Write Barrier Mechanisms, see [`pmrwbm`].
    #[bits(4)]
    pub pmrwbm: u8,
    #[bits(2)]
    _reserved2: u8,
    /// Persistent Memory Region Timeout, in units of PMRTU.
    pub pmrto: u8,
    /// Controller Memory Space Supported.
    pub cmss: bool,
    #[bits(7)]
    _reserved3: u8,
}

/// Bits of PMRCAP.PMRWBM.
pub mod pmrwbm {
    /// The completion of a read of any address in the region is a barrier.
    pub const READ_PMR: u8 = 1 << 0;
    /// The completion of a read of PMRSTS is a barrier.
    pub const READ_PMRSTS: u8 = 1 << 1;
}

/// PMRCTL: Persistent Memory Region Control (Base 3.1.3.21).
#[bitfield(u32)]
pub struct PmrCtl {
    /// Enable.
    pub en: bool,
    #[bits(31)]
    _reserved: u32,
}

/// PMRSTS: Persistent Memory Region Status (Base 3.1.3.22).
#[bitfield(u32)]
pub struct PmrSts {
    /// Error.
    pub err: u8,
    /// Not Ready.
    pub nrdy: bool,
    /// Health Status, see [`hsts`].
    #[bits(3)]
    pub hsts: u8,
    /// Controller Base Address Invalid.
    pub cbai: bool,
    #[bits(19)]
    _reserved: u32,
}

/// Values of PMRSTS.HSTS.
pub mod hsts {
    /// Normal operation.
    pub const NORMAL: u8 = 0;
    /// Restore error.
    pub const RESTORE_ERROR: u8 = 1;
    /// Read only.
    pub const READ_ONLY: u8 = 2;
    /// Unreliable.
    pub const UNRELIABLE: u8 = 3;
}

/// PMREBS: Persistent Memory Region Elasticity Buffer Size (Base 3.1.3.23).
#[bitfield(u32)]
pub struct PmrEbs {
    /// Size Units: bytes, KiB, MiB or GiB.
    #[bits(4)]
    pub pmrszu: u8,
    /// Read Bypass Behavior.
    pub rbb: bool,
    #[bits(3)]
    _reserved: u8,
    /// Elasticity Buffer Size.
    #[bits(24)]
    pub pmrwbz: u32,
}

/// PMRSWTP: Persistent Memory Region Sustained Write Throughput (Base 3.1.3.24).
#[bitfield(u32)]
pub struct PmrSwtp {
    /// Units: bytes, KiB, MiB or GiB a second.
    #[bits(4)]
    pub pmrswtu: u8,
    #[bits(4)]
    _reserved: u8,
    /// Sustained Write Throughput.
    #[bits(24)]
    pub pmrswtv: u32,
}

/// PMRMSCL and PMRMSCU as one: Persistent Memory Region Memory Space Control (Base 3.1.3.25, 3.1.3.26).
#[bitfield(u64)]
pub struct PmrMsc {
    _reserved: bool,
    /// Controller Memory Space Enable.
    pub cmse: bool,
    #[bits(10)]
    _reserved2: u16,
    /// Controller Base Address, bits 63:12.
    #[bits(52)]
    pub cba: u64,
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
    /// NSSR: NVM Subsystem Reset.
    pub const NSSR: u64 = 0x20;
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
    /// PMRCAP.
    pub const PMRCAP: u64 = 0xe00;
    /// PMRCTL.
    pub const PMRCTL: u64 = 0xe04;
    /// PMRSTS.
    pub const PMRSTS: u64 = 0xe08;
    /// PMREBS.
    pub const PMREBS: u64 = 0xe0c;
    /// PMRSWTP.
    pub const PMRSWTP: u64 = 0xe10;
    /// PMRMSCL, and PMRMSCU after it.
    pub const PMRMSC: u64 = 0xe14;
    /// First doorbell: Submission Queue 0 Tail. With CAP.DSTRD = 0 queue y has its tail doorbell at
    /// `DOORBELLS + 8 y` and its completion queue's head doorbell 4 bytes on.
    pub const DOORBELLS: u64 = 0x1000;
}
