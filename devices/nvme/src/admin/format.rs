//! Format NVM (Base 5.14). It ends when the namespace is formatted; the workers go on with the others.

use crate::controller::Shared;
use crate::locks::lock;
use crate::namespace::Format;
use crate::spec::command::{Command, FormatCdw10, NSID_ALL};
use crate::spec::status::Status;

/// Secure Erase Settings: no secure erase, and user data erase. Both make all data read as zeros: after a format no
/// data from before it is returned.
const NO_SECURE_ERASE: u8 = 0;
const USER_DATA_ERASE: u8 = 1;

pub(super) fn format(shared: &Shared, command: &Command) -> Result<(), Status> {
    let cdw10 = FormatCdw10::from_bits(command.cdw10.get());
    // There is no encryption to erase the key of (FNA bit 2).
    if !matches!(cdw10.ses(), NO_SECURE_ERASE | USER_DATA_ERASE) {
        return Err(Status::INVALID_FIELD);
    }
    let format = Format::of_format(cdw10)?;
    let nsids = match command.nsid.get() {
        NSID_ALL => shared.namespaces.ids(true),
        nsid => vec![nsid],
    };
    // All are asked before one is formatted: a refused command changes nothing.
    for nsid in &nsids {
        let refused = shared.namespaces.get(*nsid)?.refuses(format);
        refused.map_or(Ok(()), Err)?;
    }
    let test = &shared.self_test;
    test.abort_for_format(shared, command.nsid.get());
    for nsid in nsids {
        shared.namespaces.format(nsid, format)?;
        lock(&shared.events).namespace_changed(nsid);
    }
    Ok(())
}
