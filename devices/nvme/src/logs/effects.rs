//! Commands Supported and Effects (Base 5.16.1.6), from the table of what the controller executes.
//!
//! A test sends every opcode and holds the answer against this table.

use crate::config::NvmeConfig;
use crate::controller::Shared;
use crate::spec::command::{admin, io};

/// CSUPP.
const SUPPORTED: u32 = 1;
/// LBCC: logical blocks change.
const CONTENT: u32 = 1 << 1;
/// NCC: what Identify says of a namespace changes.
const NAMESPACE_CAPABILITY: u32 = 1 << 2;
/// NIC: namespaces come or go.
const NAMESPACE_INVENTORY: u32 = 1 << 3;
/// CSE 001b: no other command to the same namespace while it is executed.
const ALONE_IN_NAMESPACE: u32 = 1 << 16;
/// CSE 010b: no other command to any namespace.
const ALONE: u32 = 2 << 16;

/// CSP: what a command acts on.
const NAMESPACE: u32 = 1 << 20;
const CONTROLLER: u32 = 1 << 21;
const SUBSYSTEM: u32 = 1 << 25;

/// The admin commands, and what they do beside what they are for.
const ADMIN: &[(u8, u32)] = &[
    (admin::DELETE_IO_SQ, CONTROLLER),
    (admin::CREATE_IO_SQ, CONTROLLER),
    (admin::GET_LOG_PAGE, CONTROLLER),
    (admin::DELETE_IO_CQ, CONTROLLER),
    (admin::CREATE_IO_CQ, CONTROLLER),
    (admin::IDENTIFY, CONTROLLER | NAMESPACE),
    (admin::ABORT, CONTROLLER),
    (admin::SET_FEATURES, CONTROLLER | NAMESPACE),
    (admin::GET_FEATURES, CONTROLLER | NAMESPACE),
    (admin::ASYNC_EVENT_REQUEST, CONTROLLER),
    (admin::NAMESPACE_MANAGEMENT, SUBSYSTEM | NAMESPACE_INVENTORY),
    (admin::FIRMWARE_COMMIT, CONTROLLER),
    (admin::FIRMWARE_IMAGE_DOWNLOAD, CONTROLLER),
    (admin::DEVICE_SELF_TEST, CONTROLLER | NAMESPACE),
    (admin::NAMESPACE_ATTACHMENT, SUBSYSTEM | NAMESPACE_INVENTORY),
    (admin::DOORBELL_BUFFER_CONFIG, CONTROLLER),
    (
        admin::FORMAT_NVM,
        NAMESPACE | CONTENT | NAMESPACE_CAPABILITY | ALONE_IN_NAMESPACE,
    ),
    (admin::SANITIZE, SUBSYSTEM | CONTENT | ALONE),
];

/// The commands of the NVM command set.
const IO: &[(u8, u32)] = &[
    (io::FLUSH, NAMESPACE),
    (io::WRITE, NAMESPACE | CONTENT),
    (io::READ, NAMESPACE),
    (io::WRITE_UNCORRECTABLE, NAMESPACE | CONTENT),
    (io::COMPARE, NAMESPACE),
    (io::WRITE_ZEROES, NAMESPACE | CONTENT),
    (io::DATASET_MANAGEMENT, NAMESPACE | CONTENT),
    (io::VERIFY, NAMESPACE),
    (io::COPY, NAMESPACE | CONTENT),
];

/// I/O commands so far that change blocks.
pub(crate) fn writes(shared: &Shared) -> u64 {
    let changing = IO.iter().filter(|(_, effects)| effects & CONTENT != 0);
    let counts = changing.map(|(opcode, _)| shared.counters.io_commands(*opcode));
    counts.fold(0, u64::saturating_add)
}

/// The page: 256 dwords for admin commands, then 256 for I/O commands.
pub(super) fn page(config: &NvmeConfig) -> Vec<u8> {
    let half = |table: &'static [(u8, u32)]| {
        (0..=u8::MAX).map(|opcode| {
            let entry = table.iter().find(|(listed, _)| *listed == opcode);
            entry.map_or(0, |(_, effects)| SUPPORTED | effects)
        })
    };
    let mut admin: Vec<u32> = half(ADMIN).collect();
    if !config.offers_shadow_doorbells()
        && let Some(entry) = admin.get_mut(usize::from(admin::DOORBELL_BUFFER_CONFIG))
    {
        *entry = 0;
    }
    let all = admin.into_iter().chain(half(IO));
    let mut page: Vec<u8> = all.flat_map(u32::to_le_bytes).collect();
    page.resize(4096, 0);
    page
}
