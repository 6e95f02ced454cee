//! Get Log Page: what the pages say (Base 5.16.1).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::Shared;
use crate::counters::get;
use crate::features::TEMPERATURE;
use crate::identify::FIRMWARE;
use crate::locks::lock;
use crate::spec::command::{NSID_ALL, admin, io};
use crate::spec::log::{FirmwareSlot, Smart, lid};
use crate::spec::status::Status;

/// The whole of log page `lid`.
pub(crate) fn page(shared: &Shared, lid: u8, nsid: u32) -> Result<Vec<u8>, Status> {
    match lid {
        lid::SUPPORTED_LOG_PAGES => Ok(supported()),
        lid::ERROR_INFORMATION => {
            let log = lock(&shared.errors);
            let mut page: Vec<u8> = log.entries().flat_map(|e| e.as_bytes().to_vec()).collect();
            page.resize(64 * (usize::from(crate::events::ELPE_Z) + 1), 0);
            Ok(page)
        }
        // LPA bit 0 is clear: there is no page for one namespace.
        lid::SMART if nsid != 0 && nsid != NSID_ALL => Err(Status::INVALID_FIELD),
        lid::SMART => Ok(smart(shared).as_bytes().to_vec()),
        lid::FIRMWARE_SLOT => Ok(firmware().as_bytes().to_vec()),
        lid::COMMANDS_SUPPORTED => Ok(effects()),
        _ => Err(Status::INVALID_LOG_PAGE),
    }
}

/// A dword of 1 (LSUPP) for each page that there is (Base 5.16.1.1).
fn supported() -> Vec<u8> {
    let pages = [
        lid::SUPPORTED_LOG_PAGES,
        lid::ERROR_INFORMATION,
        lid::SMART,
        lid::FIRMWARE_SLOT,
        lid::COMMANDS_SUPPORTED,
    ];
    (0..=u8::MAX)
        .flat_map(|lid| u32::from(pages.contains(&lid)).to_le_bytes())
        .collect()
}

fn smart(shared: &Shared) -> Smart {
    let counters = &shared.counters;
    let units = |bytes| [U64::new(get(bytes).div_ceil(512 * 1000)), U64::new(0)];
    let count = |counter| [U64::new(get(counter)), U64::new(0)];
    let mut smart = Smart::new_zeroed();
    smart.critical_warning = u8::from(lock(&shared.features).temperature_warning()) << 1
        | u8::from(shared.faults.read_only()) << 3;
    smart.temperature = U16::new(TEMPERATURE);
    smart.available_spare = 100;
    smart.available_spare_threshold = 10;
    smart.data_units_read = units(&counters.bytes_read);
    smart.data_units_written = units(&counters.bytes_written);
    smart.host_reads = count(&counters.host_reads);
    smart.host_writes = count(&counters.host_writes);
    smart.media_errors = count(&counters.media_errors);
    smart.error_entries = [U64::new(lock(&shared.errors).count), U64::new(0)];
    smart
}

fn firmware() -> FirmwareSlot {
    let mut page = FirmwareSlot::new_zeroed();
    // Slot 1 is active.
    page.afi = 1;
    let [slot, ..] = &mut page.revisions;
    slot.fill(b' ');
    for (byte, text) in slot.iter_mut().zip(FIRMWARE.bytes()) {
        *byte = text;
    }
    page
}

/// Commands Supported and Effects (Base 5.16.1.6): 256 dwords for admin commands, then 256 for I/O commands.
fn effects() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES_CONTENT: u32 = 1 << 1;
    // NCC: capabilities of a namespace; NIC: which namespaces there are.
    const CHANGES_NAMESPACE: u32 = 1 << 2;
    const CHANGES_INVENTORY: u32 = 1 << 3;
    // CSE: no other command to the namespace.
    const ALONE: u32 = 1 << 16;
    let admin_effects = |opcode| match opcode {
        admin::DELETE_IO_SQ
        | admin::CREATE_IO_SQ
        | admin::GET_LOG_PAGE
        | admin::DELETE_IO_CQ
        | admin::CREATE_IO_CQ
        | admin::IDENTIFY
        | admin::ABORT
        | admin::SET_FEATURES
        | admin::GET_FEATURES
        | admin::ASYNC_EVENT_REQUEST => SUPPORTED,
        admin::FORMAT_NVM => SUPPORTED | CHANGES_CONTENT | CHANGES_NAMESPACE | ALONE,
        admin::NAMESPACE_MANAGEMENT | admin::NAMESPACE_ATTACHMENT => SUPPORTED | CHANGES_INVENTORY,
        _ => 0,
    };
    let io_effects = |opcode| match opcode {
        io::FLUSH | io::READ | io::COMPARE | io::VERIFY => SUPPORTED,
        io::WRITE
        | io::WRITE_UNCORRECTABLE
        | io::WRITE_ZEROES
        | io::DATASET_MANAGEMENT
        | io::COPY => SUPPORTED | CHANGES_CONTENT,
        _ => 0,
    };
    let all = (0..=u8::MAX)
        .map(admin_effects)
        .chain((0..=u8::MAX).map(io_effects));
    let mut page: Vec<u8> = all.flat_map(u32::to_le_bytes).collect();
    page.resize(4096, 0);
    page
}
