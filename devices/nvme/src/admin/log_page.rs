//! Get Log Page (Base 5.16): what of a page goes to the host, and what reading it changes.

use crate::controller::Shared;
use crate::dma::Dma;
use crate::locks::lock;
use crate::logs;
use crate::spec::command::{Command, GetLogPageCdw10, GetLogPageCdw14, NSID_ALL};
use crate::spec::log::{TELEMETRY_BLOCK, lid};
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Log Specific Parameter of Telemetry Host-Initiated: Create Telemetry Host-Initiated Data.
const CREATE_TELEMETRY: u8 = 1;

pub(super) fn get(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let cdw10 = GetLogPageCdw10::from_bits(command.cdw10.get());
    let cdw14 = GetLogPageCdw14::from_bits(command.cdw14.get());
    let lid = cdw10.lid();
    let upper = u64::from(command.cdw11.get() & 0xffff) << 16;
    let length = (u64::from(cdw10.numdl_z()) + upper + 1) * 4;
    let offset = u64::from(command.cdw12.get()) | u64::from(command.cdw13.get()) << 32;
    let then = lock(&shared.events).now();
    let mut page = logs::page(shared, lid)?;

    // All pages are of the controller or the subsystem, none of a namespace. Offsets are in bytes: no page has
    // IOS in Supported Log Pages.
    let is_telemetry = matches!(lid, lid::TELEMETRY_HOST | lid::TELEMETRY_CONTROLLER);
    let unit = if is_telemetry {
        TELEMETRY_BLOCK as u64
    } else {
        4
    };
    if !matches!(command.nsid.get(), 0 | NSID_ALL)
        || cdw14.ot()
        || (lid == lid::COMMANDS_SUPPORTED && cdw14.csi() != 0)
        || length > shared.config.max_transfer
        || !length.is_multiple_of(unit)
        || !offset.is_multiple_of(unit)
    {
        return Err(Status::INVALID_FIELD);
    }
    if lid == lid::TELEMETRY_HOST && cdw10.lsp() & CREATE_TELEMETRY != 0 {
        let state = shared.dump().to_string();
        lock(&shared.telemetry).capture_for_host(state);
        page = logs::page(shared, lid)?;
    }

    // What lies behind the page's end reads as zeros.
    let offset = usize::try_from(offset).map_err(|_| Status::INVALID_FIELD)?;
    let rest = page.get(offset..).ok_or(Status::INVALID_FIELD)?;
    let length = usize::try_from(length).map_err(|_| Status::INVALID_FIELD)?;
    let mut data = vec![0; length];
    for (slot, byte) in data.iter_mut().zip(rest) {
        *slot = *byte;
    }
    super::reply(dma, command, &data, transfer)?;

    if !cdw10.rae() {
        lock(&shared.events).log_was_read(lid, then);
        if lid == lid::TELEMETRY_CONTROLLER {
            lock(&shared.telemetry).was_read();
        }
    }
    Ok(())
}
