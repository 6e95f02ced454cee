//! Names that people write for codes, in files and on command lines.

use super::command::{admin, io};
use super::status::Status;

/// Opcodes of the NVM command set.
pub const IO_OPCODES: &[(&str, u8)] = &[
    ("flush", io::FLUSH),
    ("write", io::WRITE),
    ("read", io::READ),
    ("write-uncorrectable", 0x04),
    ("compare", 0x05),
    ("write-zeroes", io::WRITE_ZEROES),
    ("dataset-management", io::DATASET_MANAGEMENT),
    ("verify", 0x0c),
    ("copy", 0x19),
];

/// Opcodes of admin commands.
pub const ADMIN_OPCODES: &[(&str, u8)] = &[
    ("delete-io-sq", admin::DELETE_IO_SQ),
    ("create-io-sq", admin::CREATE_IO_SQ),
    ("get-log-page", admin::GET_LOG_PAGE),
    ("delete-io-cq", admin::DELETE_IO_CQ),
    ("create-io-cq", admin::CREATE_IO_CQ),
    ("identify", admin::IDENTIFY),
    ("abort", admin::ABORT),
    ("set-features", admin::SET_FEATURES),
    ("get-features", admin::GET_FEATURES),
    ("async-event-request", admin::ASYNC_EVENT_REQUEST),
    ("namespace-management", 0x0d),
    ("firmware-commit", 0x10),
    ("firmware-image-download", 0x11),
    ("device-self-test", 0x14),
    ("namespace-attachment", 0x15),
    ("keep-alive", 0x18),
    ("doorbell-buffer-config", 0x7c),
    ("format-nvm", 0x80),
    ("sanitize", 0x84),
];

/// Statuses that a disk gives for reasons of its own.
pub const STATUSES: &[(&str, Status)] = &[
    ("invalid-opcode", Status::INVALID_OPCODE),
    ("invalid-field", Status::INVALID_FIELD),
    ("data-transfer-error", Status::DATA_TRANSFER_ERROR),
    ("power-loss", Status(0x005)),
    ("internal-error", Status::INTERNAL_ERROR),
    ("abort-requested", Status::ABORT_REQUESTED),
    ("invalid-namespace", Status::INVALID_NAMESPACE),
    ("write-protected", Status::WRITE_PROTECTED),
    ("command-interrupted", Status(0x021)),
    ("transient-transport-error", Status(0x022)),
    ("lba-out-of-range", Status::LBA_OUT_OF_RANGE),
    ("capacity-exceeded", Status(0x081)),
    ("namespace-not-ready", Status(0x082)),
    ("write-fault", Status::WRITE_FAULT),
    ("unrecovered-read-error", Status::UNRECOVERED_READ_ERROR),
    ("guard-check-error", Status(0x282)),
    ("application-tag-check-error", Status(0x283)),
    ("reference-tag-check-error", Status(0x284)),
    ("compare-failure", Status(0x285)),
    ("access-denied", Status(0x286)),
    ("deallocated-block", Status(0x287)),
];
