//! Namespace Management and Namespace Attachment (Base 5.22, 5.23, NVM 4.1.6).

use zerocopy::little_endian::U16;
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::Shared;
use crate::dma::{Direction, Dma};
use crate::identify::CNTLID;
use crate::locks::lock;
use crate::namespace::Format;
use crate::spec::command::{Command, NSID_ALL, namespace_sel as sel};
use crate::spec::identify::IdentifyNamespace;
use crate::spec::status::Status;
use crate::transfer::Transfer;

/// Command set 0, NVM, is the only one.
const CSI_NVM: u8 = 0;

/// Namespace Management; the NSID of what it created.
pub(super) fn manage(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<u32, Status> {
    match (command.cdw10.get() & 0xf) as u8 {
        sel::CREATE => create(shared, dma, command, transfer),
        sel::DELETE => delete(shared, command.nsid.get()).map(|()| 0),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn create(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<u32, Status> {
    let [.., csi] = command.cdw11.get().to_le_bytes();
    if csi != CSI_NVM {
        return Err(Status::IO_COMMAND_SET_NOT_SUPPORTED);
    }
    let mut wanted = IdentifyNamespace::new_zeroed();
    fetch(dma, command, transfer, wanted.as_mut_bytes())?;
    let format = Format::of_creation(wanted.flbas, wanted.dps)?;
    // Every block has its place from the start (NSFEAT bit 0).
    if wanted.ncap != wanted.nsze {
        return Err(Status::THIN_PROVISIONING_NOT_SUPPORTED);
    }
    // The subsystem has one controller, no NVM sets and no endurance groups.
    if wanted.nmic != 0 || wanted.nvmsetid.get() != 0 || wanted.endgid.get() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    shared.namespaces.create(wanted.nsze.get(), format)
}

fn delete(shared: &Shared, nsid: u32) -> Result<(), Status> {
    let namespaces = &shared.namespaces;
    let nsids = match nsid {
        NSID_ALL => namespaces.ids(false),
        nsid => vec![nsid],
    };
    for nsid in nsids {
        let was_attached = namespaces.is_attached(nsid)?;
        namespaces.delete(nsid)?;
        for features in [&shared.features, &shared.saved_features] {
            lock(features).forget_namespace(nsid);
        }
        if was_attached {
            lock(&shared.events).namespace_changed(nsid);
        }
    }
    Ok(())
}

/// Namespace Attachment.
pub(super) fn attach(
    shared: &Shared,
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
) -> Result<(), Status> {
    let nsid = command.nsid.get();
    let sel = (command.cdw10.get() & 0xf) as u8;
    if !matches!(sel, sel::ATTACH | sel::DETACH) {
        return Err(Status::INVALID_FIELD);
    }
    shared.namespaces.is_attached(nsid)?;
    // A controller list: a count, then as many identifiers (Base 4.4.1).
    let mut list = [U16::new(0); 2048];
    fetch(dma, command, transfer, list.as_mut_bytes())?;
    match list {
        [count, controller, ..] if count == 1 && controller == CNTLID => {}
        _ => return Err(Status::CONTROLLER_LIST_INVALID),
    }
    if sel == sel::ATTACH {
        shared.namespaces.attach(nsid)?;
    } else {
        shared.namespaces.detach(nsid)?;
    }
    lock(&shared.events).namespace_changed(nsid);
    Ok(())
}

fn fetch(
    dma: &Dma,
    command: &Command,
    transfer: &mut Transfer,
    data: &mut [u8],
) -> Result<(), Status> {
    dma.data(
        command,
        data.len() as u64,
        Direction::ToController,
        transfer,
        // PRPs alone: there is one run.
        |memory, _| memory.drain_to_slice(data),
    )
}
