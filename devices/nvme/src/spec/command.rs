//! Submission queue entries (Base 3.3.3.1) and the command dwords that the controller decodes.

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::sgl::SglDescriptor;

/// A submission queue entry. Its data pointer is named as for PRPs; with an SGL it is one descriptor.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Command {
    /// Opcode.
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    /// Command Identifier.
    pub cid: U16,
    /// Namespace Identifier.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata Pointer.
    pub mptr: U64,
    /// PRP Entry 1.
    pub prp1: U64,
    /// PRP Entry 2.
    pub prp2: U64,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<Command>() == 64);

impl Command {
    /// Dwords 10 and 11 as one number: the starting LBA of I/O commands.
    pub fn slba(&self) -> u64 {
        u64::from(self.cdw10.get()) | (u64::from(self.cdw11.get()) << 32)
    }

    /// The data pointer as SGL entry 1.
    pub fn sgl1(&self) -> SglDescriptor {
        let [a, b, c, d, e, f, g, identifier] = self.prp2.to_bytes();
        SglDescriptor {
            address: self.prp1,
            length: U32::from_bytes([a, b, c, d]),
            reserved: [e, f, g],
            identifier,
        }
    }

    /// Makes `descriptor` the data pointer, and says so (PSDT 01b: metadata, if any, is contiguous).
    pub fn set_sgl1(&mut self, descriptor: SglDescriptor) {
        let [a, b, c, d] = descriptor.length.to_bytes();
        let [e, f, g] = descriptor.reserved;
        self.prp1 = descriptor.address;
        self.prp2 = U64::from_bytes([a, b, c, d, e, f, g, descriptor.identifier]);
        self.flags = PSDT_SGL;
    }
}

/// PSDT, in the flags of a command: data by PRPs.
pub const PSDT_PRP: u8 = 0 << 6;
/// PSDT: data by an SGL, metadata in a contiguous buffer.
pub const PSDT_SGL: u8 = 1 << 6;

/// FUSE, in the flags of a command: which part of a fused operation it is.
pub const FUSE: u8 = 0b11;
/// FUSE: the first command of a fused operation.
pub const FUSE_FIRST: u8 = 0b01;
/// FUSE: the second command of a fused operation.
pub const FUSE_SECOND: u8 = 0b10;

/// NSID that addresses all namespaces.
pub const NSID_ALL: u32 = 0xffff_ffff;

/// Admin opcodes (Base 5).
pub mod admin {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const DELETE_IO_SQ: u8 = 0x00;
    pub const CREATE_IO_SQ: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const DELETE_IO_CQ: u8 = 0x04;
    pub const CREATE_IO_CQ: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const NAMESPACE_MANAGEMENT: u8 = 0x0d;
    pub const FIRMWARE_COMMIT: u8 = 0x10;
    pub const FIRMWARE_IMAGE_DOWNLOAD: u8 = 0x11;
    pub const DEVICE_SELF_TEST: u8 = 0x14;
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
    pub const FORMAT_NVM: u8 = 0x80;
    pub const SANITIZE: u8 = 0x84;
}

/// I/O opcodes (NVM 3.2).
pub mod io {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const VERIFY: u8 = 0x0c;
    pub const COPY: u8 = 0x19;
}

/// Feature identifiers (Base 5.27.1, NVM 4.1.3).
pub mod feature {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR_CONFIG: u8 = 0x09;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENT_CONFIG: u8 = 0x0b;
    pub const TIMESTAMP: u8 = 0x0e;
    pub const SANITIZE_CONFIG: u8 = 0x17;
    pub const SOFTWARE_PROGRESS_MARKER: u8 = 0x80;
}

/// CNS values of Identify (Base 5.17.1).
pub mod cns {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const NAMESPACE_CSI: u8 = 0x05;
    pub const CONTROLLER_CSI: u8 = 0x06;
    pub const ACTIVE_NAMESPACES_CSI: u8 = 0x07;
    pub const NAMESPACE_INDEPENDENT: u8 = 0x08;
    pub const ALLOCATED_NAMESPACES: u8 = 0x10;
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    pub const ATTACHED_CONTROLLERS: u8 = 0x12;
    pub const CONTROLLERS: u8 = 0x13;
}

/// Dword 10 of Create I/O Submission Queue and Create I/O Completion Queue (Base 5.4, 5.5).
#[bitfield(u32)]
pub struct CreateQueueCdw10 {
    /// Queue Identifier.
    pub qid: u16,
    /// Queue Size.
    pub qsize_z: u16,
}

/// Dword 11 of Create I/O Completion Queue (Base 5.4).
#[bitfield(u32)]
pub struct CreateCqCdw11 {
    /// Physically Contiguous.
    pub pc: bool,
    /// Interrupts Enabled.
    pub ien: bool,
    #[bits(14)]
    _reserved: u16,
    /// Interrupt Vector.
    pub iv: u16,
}

/// Dword 11 of Create I/O Submission Queue (Base 5.5).
#[bitfield(u32)]
pub struct CreateSqCdw11 {
    /// Physically Contiguous.
    pub pc: bool,
    /// Queue Priority.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    _reserved: u16,
    /// Completion Queue Identifier.
    pub cqid: u16,
}

/// Dword 10 of Get Log Page (Base 5.16).
#[bitfield(u32)]
pub struct GetLogPageCdw10 {
    /// Log Page Identifier.
    pub lid: u8,
    /// Log Specific Parameter.
    #[bits(7)]
    pub lsp: u8,
    /// Retain Asynchronous Event.
    pub rae: bool,
    /// Number of Dwords, lower 16 bits.
    pub numdl_z: u16,
}

/// Dword 14 of Get Log Page.
#[bitfield(u32)]
pub struct GetLogPageCdw14 {
    /// UUID Index.
    #[bits(7)]
    pub uuid_index: u8,
    #[bits(16)]
    _reserved: u16,
    /// Offset Type: the offset is an index.
    pub ot: bool,
    /// Command Set Identifier.
    pub csi: u8,
}

/// Dword 10 of Firmware Commit (Base 5.12).
#[bitfield(u32)]
pub struct FirmwareCommitCdw10 {
    /// Firmware Slot.
    #[bits(3)]
    pub fs: u8,
    /// Commit Action.
    #[bits(3)]
    pub ca: u8,
    #[bits(25)]
    _reserved: u32,
    /// Boot Partition ID.
    pub bpid: bool,
}

/// Dword 10 of Sanitize (Base 5.24).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SanitizeCdw10 {
    /// Sanitize Action.
    #[bits(3)]
    pub sanact: u8,
    /// Allow Unrestricted Sanitize Exit.
    pub ause: bool,
    /// Overwrite Pass Count.
    #[bits(4)]
    pub owpass: u8,
    /// Overwrite Invert Pattern Between Passes.
    pub oipbp: bool,
    /// No-Deallocate After Sanitize.
    pub ndas: bool,
    #[bits(22)]
    _reserved: u32,
}

/// Dword 10 of Get Features (Base 5.15).
#[bitfield(u32)]
pub struct GetFeaturesCdw10 {
    /// Feature Identifier.
    pub fid: u8,
    /// Select: 0 current, 1 default, 2 saved, 3 supported capabilities.
    #[bits(3)]
    pub sel: u8,
    #[bits(21)]
    _reserved: u32,
}

/// Dword 10 of Set Features (Base 5.27).
#[bitfield(u32)]
pub struct SetFeaturesCdw10 {
    /// Feature Identifier.
    pub fid: u8,
    #[bits(23)]
    _reserved: u32,
    /// Save.
    pub sv: bool,
}

/// Dword 12 of the commands that address blocks: Compare, Read, Verify, Write, Write Uncorrectable and Write
/// Zeroes (NVM 3.2).
#[bitfield(u32)]
pub struct ReadWriteCdw12 {
    /// Number of Logical Blocks.
    pub nlb_z: u16,
    #[bits(9)]
    _reserved: u16,
    /// Deallocate (Write Zeroes).
    pub deac: bool,
    /// Protection Information.
    #[bits(4)]
    pub prinfo: u8,
    /// Force Unit Access.
    pub fua: bool,
    /// Limited Retry.
    pub lr: bool,
}

/// One range of Dataset Management (NVM 3.2.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DatasetRange {
    /// Context Attributes.
    pub cattr: U32,
    /// Length in logical blocks.
    pub nlb: U32,
    /// Starting LBA.
    pub slba: U64,
}

const _: () = assert!(size_of::<DatasetRange>() == 16);

/// PRINFO: what to do with protection information (NVM 2.3, figure "Protection Information Field").
#[bitfield(u8)]
pub struct Prinfo {
    /// Protection Information Check: Logical Block Reference Tag.
    pub reference: bool,
    /// Protection Information Check: Application Tag.
    pub application: bool,
    /// Protection Information Check: Guard.
    pub guard: bool,
    /// Protection Information Action: insert on writes, strip on reads.
    pub pract: bool,
    #[bits(4)]
    _reserved: u8,
}

/// Dword 15 of the commands that address blocks: the application tag (NVM 3.2).
#[bitfield(u32)]
pub struct ApplicationTagCdw15 {
    /// (Expected) Logical Block Application Tag.
    pub lbat: u16,
    /// (Expected) Logical Block Application Tag Mask.
    pub lbatm: u16,
}

/// Dword 12 of Copy (NVM 3.2.2).
#[bitfield(u32)]
pub struct CopyCdw12 {
    /// Number of Ranges.
    pub nr_z: u8,
    /// Descriptor Format.
    #[bits(4)]
    pub desfmt: u8,
    /// Protection Information Field Read.
    #[bits(4)]
    pub prinfor: u8,
    #[bits(4)]
    _reserved: u8,
    /// Directive Type.
    #[bits(4)]
    pub dtype: u8,
    #[bits(2)]
    _reserved2: u8,
    /// Protection Information Field Write.
    #[bits(4)]
    pub prinfow: u8,
    /// Force Unit Access.
    pub fua: bool,
    /// Limited Retry.
    pub lr: bool,
}

/// A source range of Copy, descriptor format 0 (NVM 3.2.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CopyRange {
    /// Reserved.
    pub reserved0: [u8; 8],
    /// Starting LBA.
    pub slba: U64,
    /// Number of Logical Blocks.
    pub nlb_z: U16,
    /// Reserved.
    pub reserved18: [u8; 6],
    /// Expected Initial Logical Block Reference Tag.
    pub eilbrt: U32,
    /// Expected Logical Block Application Tag.
    pub elbat: U16,
    /// Expected Logical Block Application Tag Mask.
    pub elbatm: U16,
}

const _: () = assert!(size_of::<CopyRange>() == 32);

/// Dword 10 of Format NVM (Base 5.14).
#[bitfield(u32)]
pub struct FormatCdw10 {
    /// LBA Format, lower bits.
    #[bits(4)]
    pub lbafl: u8,
    /// Metadata Settings: metadata lies behind each block's data.
    pub mset: bool,
    /// Protection Information: its type.
    #[bits(3)]
    pub pi: u8,
    /// Protection Information Location: in the first bytes of the metadata.
    pub pil: bool,
    /// Secure Erase Settings.
    #[bits(3)]
    pub ses: u8,
    /// LBA Format, upper bits.
    #[bits(2)]
    pub lbafu: u8,
    #[bits(18)]
    _reserved: u32,
}

/// SEL, in dword 10 of Namespace Management (Base 5.23) and Namespace Attachment (Base 5.22).
pub mod namespace_sel {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const CREATE: u8 = 0;
    pub const DELETE: u8 = 1;
    pub const ATTACH: u8 = 0;
    pub const DETACH: u8 = 1;
}
