//! From bytes to configurations, addresses and commands: mostly valid ones, so that most inputs get far.
//!
//! Everything is taken from the front, byte by byte, and what is missing is zero: a changed byte changes one thing.

use arbitrary::Unstructured;
use p2plab_nvme::spec::command::{Command, admin, feature, io};
use p2plab_nvme::spec::sgl::{SglDescriptor, kind};
use p2plab_nvme::{CmbConfig, CmbScheme, Metadata, NamespaceConfig, NvmeConfig, PmrConfig};
use zerocopy::{FromBytes, IntoBytes};

use crate::machine::{CMB_AT, HOST, HOST_AT, PAGE, PMR_AT, READ_ONLY, REGISTERS_AT};

/// Size of the CMB, and of the PMR.
pub const REGION: u64 = 64 << 10;
/// Largest transfer of a command.
pub const MAX_TRANSFER: u64 = 64 << 10;
/// First of the host's pages that have no queue.
pub const FIRST_FREE_PAGE: u64 = 16;

/// Fixed numbers of bytes from the front of the input.
pub struct Tape<'a>(pub Unstructured<'a>);

impl Tape<'_> {
    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// True for `of` bytes of 256.
    pub fn rarely(&mut self, of: u8) -> bool {
        // Zero is what the end of the input gives, and means nothing special.
        self.u8() > 255 - of
    }

    /// One of `values`, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[usize::from(self.u8()) % values.len()]
    }

    /// Mostly 0, sometimes a byte's worth, rarely anything.
    pub fn mostly_zero(&mut self) -> u32 {
        match self.u8() {
            0..200 => 0,
            200..240 => self.u8().into(),
            _ => self.u32(),
        }
    }
}

/// The controller that the input asks for.
pub fn config(tape: &mut Tape<'_>) -> NvmeConfig {
    let [what, formats, caps] = [tape.u8(), tape.u8(), tape.u8()];
    let bit = |byte: u8, number: u8| byte >> number & 1 == 1;
    let mut config = NvmeConfig::new("fuzz");
    config.io_queues = 3;
    config.max_transfer = MAX_TRANSFER;
    config.unallocated = 256 << 10;
    config.msix = !bit(what, 0);
    config.shadow_doorbells = bit(what, 1);
    let old = bit(what, 2) && bit(what, 3);
    if !bit(what, 4) {
        let mut cmb = CmbConfig::new(REGION);
        if old {
            cmb.scheme = CmbScheme::V1_3;
        }
        if bit(formats, 7) {
            cmb.offset = REGION;
        }
        // What is switched off.
        (cmb.sqs, cmb.cqs, cmb.lists) = (!bit(caps, 0), !bit(caps, 1), !bit(caps, 2));
        (cmb.rds, cmb.wds) = (!bit(caps, 3), !bit(caps, 4));
        (cmb.cdpmls, cmb.cdpcils) = (!bit(caps, 5), !bit(caps, 6));
        if config.shadow_doorbells {
            cmb.cpu_access = p2plab_pcie::CpuAccess::Mapped;
        }
        config.cmb = Some(cmb);
    }
    if !bit(what, 5) && !old {
        let mut pmr = PmrConfig::memory(REGION);
        (pmr.rds, pmr.wds) = (!bit(caps, 3), !bit(caps, 7));
        if config.shadow_doorbells {
            pmr.cpu_access = p2plab_pcie::CpuAccess::Mapped;
        }
        config.pmr = Some(pmr);
    }
    for shift in [0, 3] {
        if shift == 3 && !bit(what, 6) {
            break;
        }
        let mut ns = NamespaceConfig::memory(256 << 10);
        if bit(formats, shift) {
            ns.block_size = 4096;
        }
        ns.metadata = match formats >> (shift + 1) & 3 {
            0 | 1 => Metadata::None,
            2 => Metadata::Plain,
            _ => Metadata::Protection,
        };
        ns.read_only = shift == 3 && bit(what, 7);
        config.namespaces.push(ns);
    }
    config
}

/// Page `number` of those of the host that have no queue.
pub const fn host_page(number: u64) -> u64 {
    HOST_AT + (FIRST_FREE_PAGE + number) * PAGE
}

/// An address: mostly in pages that have no queue.
pub fn address(tape: &mut Tape<'_>) -> u64 {
    let kind = tape.u8();
    let offset = match tape.u8() {
        page @ 0..192 => u64::from(page % 16) * PAGE,
        page @ 192..224 => u64::from(page % 16) * PAGE + u64::from(tape.u8()) * 16,
        _ => u64::from(tape.u16()),
    };
    match kind {
        0..128 => host_page(0) + offset,
        128..168 => CMB_AT + offset,
        168..200 => PMR_AT + offset,
        // The end of what may be written, and of everything.
        200..216 => HOST_AT + HOST - 8 * PAGE + offset,
        216..224 => HOST_AT + HOST + READ_ONLY - 8 * PAGE + offset,
        // Queues, and nothing.
        224..230 => HOST_AT + offset,
        230..232 => offset,
        232..234 => REGISTERS_AT + offset % (16 << 10),
        234..240 => tape.u64(),
        _ => host_page(0) + offset,
    }
}

/// How a command says where its data is.
#[derive(Clone, Copy, Debug)]
pub enum Pointer {
    /// As it should be, at this address: PRPs, or an SGL of `parts` data blocks. Lists begin at the other.
    Good {
        /// By an SGL.
        sgl: bool,
        /// Data blocks of the SGL, 0's based.
        parts: u8,
        /// Where the data is.
        data: u64,
        /// Where PRP lists and SGL segments are.
        list: u64,
    },
    /// Whatever PRP1 and PRP2 say.
    Prps(u64, u64),
    /// Whatever this descriptor says.
    Sgl(SglDescriptor),
}

impl Pointer {
    /// From the tape.
    pub fn from_tape(tape: &mut Tape<'_>) -> Self {
        match tape.u8() {
            how @ 0..200 => {
                let region = match tape.u8() {
                    0..160 => host_page(0),
                    160..208 => CMB_AT,
                    _ => PMR_AT,
                };
                let list = match tape.u8() {
                    0..208 => host_page(24),
                    // Leaves one slot in its page: PRP lists are chained.
                    208..232 => host_page(25) - 16,
                    _ => CMB_AT + REGION / 2,
                };
                Self::Good {
                    sgl: how & 1 == 1,
                    parts: how >> 1 & 7,
                    data: region + u64::from(tape.u8() % 8) * PAGE,
                    list,
                }
            }
            200..232 => Self::Prps(address(tape), address(tape)),
            _ => Self::Sgl(descriptor(tape)),
        }
    }
}

/// An SGL descriptor.
pub fn descriptor(tape: &mut Tape<'_>) -> SglDescriptor {
    let kinds = [
        kind::DATA_BLOCK,
        kind::BIT_BUCKET,
        kind::SEGMENT,
        kind::LAST_SEGMENT,
    ];
    let identifier = match tape.u8() {
        which @ 0..248 => kinds[usize::from(which % 4)],
        other => other,
    };
    let length = match tape.u8() {
        parts @ 0..240 => u32::from(parts) * 16,
        240..248 => u32::from(tape.u16()),
        _ => tape.u32(),
    };
    let at = address(tape);
    SglDescriptor::new(identifier, at, length)
}

/// A command, without its data pointer, and what belongs to it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The command.
    pub command: Command,
    /// Where its data is.
    pub pointer: Pointer,
    /// What Dataset Management, Copy and Namespace Management find in the memory of their data.
    pub data: Vec<u8>,
    /// Bytes that the command moves, if the input is right about the format.
    pub length: u64,
}

fn nsid(tape: &mut Tape<'_>, config: &NvmeConfig) -> u32 {
    match tape.u8() {
        which @ 0..232 => u32::from(which) % config.namespaces.len().max(1) as u32 + 1,
        // Created, or not there.
        232..248 => 3,
        248..252 => u32::MAX,
        _ => tape.u32(),
    }
}

/// A block and a number of blocks, mostly within the namespace.
fn blocks(tape: &mut Tape<'_>) -> (u64, u16) {
    let slba = match tape.u8() {
        near @ 0..240 => u64::from(near % 64),
        240..250 => u64::from(tape.u16()),
        _ => tape.u64(),
    };
    let count_z = match tape.u8() {
        few @ 0..248 => u16::from(few % 16),
        _ => tape.u16(),
    };
    (slba, count_z)
}

/// An I/O command for a controller made with `config`.
pub fn io_request(tape: &mut Tape<'_>, config: &NvmeConfig) -> Request {
    const OPCODES: [u8; 16] = [
        io::READ,
        io::WRITE,
        io::READ,
        io::WRITE,
        io::READ,
        io::WRITE,
        io::FLUSH,
        io::WRITE_UNCORRECTABLE,
        io::COMPARE,
        io::WRITE_ZEROES,
        io::DATASET_MANAGEMENT,
        io::VERIFY,
        io::COPY,
        io::COPY,
        io::COMPARE,
        io::VERIFY,
    ];
    let opcode = match tape.u8() {
        which @ 0..248 => OPCODES[usize::from(which % 16)],
        _ => tape.u8(),
    };
    let nsid = nsid(tape, config);
    let (slba, count_z) = blocks(tape);
    // PRINFO, FUA, LR, DEAC.
    let controls = match tape.u8() {
        0..192 => 0,
        // FUA and PRACT.
        192..240 => u16::from(tape.u8() & 0x60) << 8,
        _ => tape.u16(),
    };
    let mut command = Command {
        opcode,
        nsid: nsid.into(),
        cdw10: ((slba & 0xffff_ffff) as u32).into(),
        cdw11: ((slba >> 32) as u32).into(),
        cdw12: (u32::from(count_z) | u32::from(controls) << 16).into(),
        mptr: host_page(20).into(),
        ..Command::default()
    };
    if tape.rarely(48) {
        command.mptr = address(tape).into();
    }
    command.cdw14 = match tape.u8() {
        // The reference tag of protection information of type 1.
        0..224 => ((slba & 0xffff_ffff) as u32).into(),
        _ => tape.u32().into(),
    };
    command.cdw13 = tape.mostly_zero().into();
    command.cdw15 = tape.mostly_zero().into();
    // Right unless it was formatted.
    let ns = config.namespaces.get(nsid.saturating_sub(1) as usize);
    let shift = ns.map_or(9, |ns| ns.block_size.trailing_zeros());
    let mut length = (u64::from(count_z) + 1) << shift;
    let mut data = Vec::new();
    let ranges = match opcode {
        io::DATASET_MANAGEMENT | io::COPY => tape.u8() % 8 + 1,
        _ => 0,
    };
    for _ in 0..ranges {
        let (slba, count_z) = blocks(tape);
        if opcode == io::COPY {
            let mut range = [0u8; 32];
            range[8..16].copy_from_slice(&slba.to_le_bytes());
            range[16..18].copy_from_slice(&count_z.to_le_bytes());
            range[24..28].copy_from_slice(&((slba & 0xffff_ffff) as u32).to_le_bytes());
            data.extend(range);
        } else {
            data.extend(0u32.to_le_bytes());
            data.extend((u32::from(count_z) + 1).to_le_bytes());
            data.extend(slba.to_le_bytes());
        }
    }
    if ranges > 0 {
        length = data.len() as u64;
        let numbers = u32::from(ranges - 1);
        if opcode == io::COPY {
            command.cdw12 = (numbers | u32::from(controls) << 16).into();
        } else {
            command.cdw10 = numbers.into();
            command.cdw11 = if controls & 1 == 0 { 4 } else { tape.u32() }.into();
        }
    }
    let mut request = Request {
        command,
        pointer: Pointer::from_tape(tape),
        data,
        length,
    };
    disturb(tape, &mut request.command);
    request
}

/// An admin command for a controller made with `config`.
pub fn admin_request(tape: &mut Tape<'_>, config: &NvmeConfig) -> Request {
    const OPCODES: [u8; 16] = [
        admin::IDENTIFY,
        admin::GET_LOG_PAGE,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::CREATE_IO_CQ,
        admin::CREATE_IO_SQ,
        admin::DELETE_IO_SQ,
        admin::DELETE_IO_CQ,
        admin::ABORT,
        admin::ASYNC_EVENT_REQUEST,
        admin::NAMESPACE_MANAGEMENT,
        admin::NAMESPACE_ATTACHMENT,
        admin::FORMAT_NVM,
        admin::DOORBELL_BUFFER_CONFIG,
        admin::IDENTIFY,
        admin::NAMESPACE_MANAGEMENT,
    ];
    let opcode = match tape.u8() {
        which @ 0..248 => OPCODES[usize::from(which % 16)],
        _ => tape.u8(),
    };
    let mut command = Command {
        opcode,
        nsid: nsid(tape, config).into(),
        ..Command::default()
    };
    let mut data = Vec::new();
    let mut length = PAGE;
    let small = u32::from(tape.u8());
    match opcode {
        admin::IDENTIFY => {
            command.cdw10 = (small % 32).into();
            command.cdw11 = tape.mostly_zero().into();
        }
        admin::GET_LOG_PAGE => {
            let dwords = u32::from(tape.u8()) * 4;
            length = u64::from(dwords + 1) * 4;
            command.cdw10 = (small % 16 + (dwords << 16)).into();
            command.cdw12 = tape.mostly_zero().into();
            command.cdw13 = tape.mostly_zero().into();
        }
        admin::SET_FEATURES | admin::GET_FEATURES => {
            let known = u32::from(feature::ASYNC_EVENT_CONFIG);
            command.cdw10 = (small % (known + 2) + (u32::from(tape.u8() % 8) << 8)).into();
            command.cdw11 = tape.mostly_zero().into();
            command.cdw12 = tape.mostly_zero().into();
        }
        admin::ABORT => command.cdw10 = ((u32::from(tape.u16()) << 16) + small % 2).into(),
        admin::NAMESPACE_MANAGEMENT => {
            // Mostly creation; the blocks are few, or it does not fit.
            command.cdw10 = u32::from(small > 160).into();
            let blocks = match tape.u8() {
                few @ 0..240 => u64::from(few),
                _ => tape.u64(),
            };
            data = vec![0; PAGE as usize];
            data[..8].copy_from_slice(&blocks.to_le_bytes());
            data[8..16].copy_from_slice(&blocks.to_le_bytes());
            // FLBAS and DPS.
            (data[26], data[29]) = (tape.u8() % 8, tape.pick(&[0, 0, 0, 1, 9]));
        }
        admin::NAMESPACE_ATTACHMENT => {
            command.cdw10 = (small % 2).into();
            data = vec![0; PAGE as usize];
            (data[0], data[2]) = (tape.pick(&[1, 1, 1, 0, 2]), tape.pick(&[1, 1, 0, 2]));
        }
        admin::FORMAT_NVM => {
            command.cdw10 = (small & 7 | u32::from(tape.pick(&[0u8, 0, 1, 9, 2])) << 5).into();
        }
        _ => {}
    }
    let mut request = Request {
        command,
        pointer: Pointer::from_tape(tape),
        data,
        length,
    };
    if let Pointer::Good { sgl, .. } = &mut request.pointer {
        *sgl = false;
    }
    disturb(tape, &mut request.command);
    request
}

/// Rarely, one byte of a command is another; never its opcode, flags and CID.
fn disturb(tape: &mut Tape<'_>, command: &mut Command) {
    if tape.rarely(24) {
        let (at, value) = (usize::from(tape.u8()), tape.u8());
        let mut bytes = [0; 64];
        bytes.copy_from_slice(command.as_bytes());
        bytes[4 + at % 60] = value;
        if let Ok(changed) = Command::read_from_bytes(&bytes) {
            *command = changed;
        }
    }
}

/// Gives `request` its data pointer, and has what belongs to it, lists and data, stored.
pub fn place(request: &mut Request, mut store: impl FnMut(u64, &[u8])) {
    let command = &mut request.command;
    match request.pointer {
        Pointer::Prps(prp1, prp2) => (command.prp1, command.prp2) = (prp1.into(), prp2.into()),
        Pointer::Sgl(descriptor) => command.set_sgl1(descriptor),
        Pointer::Good {
            sgl: false,
            data,
            list,
            ..
        } => {
            store(data, &request.data);
            let pages: Vec<u64> = (0..request.length.div_ceil(PAGE).max(1))
                .map(|page| data + page * PAGE)
                .collect();
            command.prp1 = data.into();
            match pages.as_slice() {
                [] | [_] => {}
                [_, second] => command.prp2 = (*second).into(),
                [_, rest @ ..] => {
                    command.prp2 = list.into();
                    let slots = ((PAGE - list % PAGE) / 8) as usize;
                    let next = (list & !(PAGE - 1)) + PAGE;
                    if rest.len() > slots {
                        let (here, after) = rest.split_at(slots - 1);
                        store(list, here.as_bytes());
                        store(list + 8 * (slots as u64 - 1), &next.to_le_bytes());
                        store(next, after.as_bytes());
                    } else {
                        store(list, rest.as_bytes());
                    }
                }
            }
        }
        Pointer::Good {
            sgl: true,
            parts,
            data,
            list,
        } => {
            store(data, &request.data);
            let parts = u64::from(parts) + 1;
            let each = request.length / parts;
            let mut descriptors: Vec<SglDescriptor> = (0..parts)
                .map(|part| {
                    let rest = if part + 1 == parts {
                        request.length % parts
                    } else {
                        0
                    };
                    let length = u32::try_from(each + rest).unwrap_or(u32::MAX);
                    SglDescriptor::new(kind::DATA_BLOCK, data + part * each, length)
                })
                .collect();
            if let [one] = descriptors.as_slice() {
                command.set_sgl1(*one);
                return;
            }
            // Of many, the last ones are in a segment of their own.
            let mut first = (kind::LAST_SEGMENT, descriptors.len());
            if descriptors.len() > 4 {
                let next = list + 3 * 16;
                let last = SglDescriptor::new(
                    kind::LAST_SEGMENT,
                    next,
                    16 * (descriptors.len() as u32 - 2),
                );
                descriptors.insert(2, last);
                first = (kind::SEGMENT, 3);
            }
            store(list, descriptors.as_bytes());
            command.set_sgl1(SglDescriptor::new(first.0, list, 16 * first.1 as u32));
        }
    }
}
