//! Sanitize (Base 5.24).

use std::sync::Arc;

use crate::controller::Shared;
use crate::locks::lock;
use crate::spec::command::{Command, SanitizeCdw10};
use crate::spec::status::Status;

/// Sanitize Action.
mod action {
    pub(super) const EXIT_FAILURE_MODE: u8 = 1;
    pub(super) const BLOCK_ERASE: u8 = 2;
    pub(super) const OVERWRITE: u8 = 3;
}

pub(super) fn execute(shared: &Arc<Shared>, command: &Command) -> Result<(), Status> {
    let cdw10 = SanitizeCdw10::from_bits(command.cdw10.get());
    let pattern = match cdw10.sanact() {
        action::EXIT_FAILURE_MODE => return shared.sanitize.exit_failure_mode(shared),
        action::BLOCK_ERASE => None,
        action::OVERWRITE => Some(command.cdw11.get()),
        _ => return Err(Status::INVALID_FIELD),
    };
    // SANICAP.NDI: blocks are deallocated, which is an error or a warning as the host has chosen.
    if cdw10.ndas() && !lock(&shared.features).deallocates_anyway {
        return Err(Status::INVALID_FIELD);
    }
    if lock(&shared.firmware).is_pending() {
        return Err(Status::FIRMWARE_NEEDS_RESET);
    }
    if lock(&shared.registers).pmrctl.en() {
        return Err(Status::SANITIZE_PROHIBITED_BY_PMR);
    }
    if shared
        .namespaces
        .all_allocated()
        .iter()
        .any(|ns| ns.read_only)
    {
        return Err(Status::WRITE_PROTECTED);
    }
    shared.sanitize.start(shared, cdw10, pattern)
}
