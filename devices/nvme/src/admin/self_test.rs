//! Device Self-test (Base 5.9).

use std::sync::Arc;

use crate::controller::Shared;
use crate::io;
use crate::self_test::Kind;
use crate::spec::command::{Command, NSID_ALL};
use crate::spec::log::self_test_result;
use crate::spec::status::Status;

/// Self-test Code.
mod code {
    pub(super) const SHORT: u32 = 1;
    pub(super) const EXTENDED: u32 = 2;
    pub(super) const ABORT: u32 = 0xf;
}

pub(super) fn execute(shared: &Arc<Shared>, command: &Command) -> Result<(), Status> {
    let kind = match command.cdw10.get() & 0xf {
        code::SHORT => Kind::Short,
        code::EXTENDED => Kind::Extended,
        code::ABORT => {
            let why = self_test_result::ABORTED_BY_COMMAND;
            shared.self_test.abort(shared, why);
            return Ok(());
        }
        _ => return Err(Status::INVALID_FIELD),
    };
    let namespaces = match command.nsid.get() {
        // The controller alone.
        0 => Vec::new(),
        NSID_ALL => shared.namespaces.all(),
        nsid => vec![io::namespace(shared, nsid)?],
    };
    shared.self_test.start(shared, kind, &namespaces)
}
