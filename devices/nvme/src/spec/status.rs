//! Completion status (Base 3.3.3.2.1, NVM 3.1).

use std::fmt;

/// Status Code, Status Code Type and the two flags of a completion, without the phase tag:
/// SC in bits 7:0, SCT in 10:8, More in 13, Do Not Retry in 14.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    /// Successful Completion.
    pub const SUCCESS: Self = Self(0x000);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Self = Self(0x001).dnr();
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Self = Self(0x002).dnr();
    /// Data Transfer Error: the host memory or peer could not be reached.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x004);
    /// Internal Error.
    pub const INTERNAL_ERROR: Self = Self(0x006);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Self = Self(0x007);
    /// Command Aborted due to Failed Fused Command.
    pub const FAILED_FUSED_COMMAND: Self = Self(0x009).dnr();
    /// Command Aborted due to Missing Fused Command.
    pub const MISSING_FUSED_COMMAND: Self = Self(0x00a).dnr();
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Self = Self(0x00b).dnr();
    /// Command Sequence Error.
    pub const COMMAND_SEQUENCE_ERROR: Self = Self(0x00c).dnr();
    /// Invalid SGL Segment Descriptor.
    pub const INVALID_SGL_SEGMENT_DESCRIPTOR: Self = Self(0x00d).dnr();
    /// Invalid Number of SGL Descriptors.
    pub const INVALID_NUMBER_OF_SGL_DESCRIPTORS: Self = Self(0x00e).dnr();
    /// Data SGL Length Invalid.
    pub const DATA_SGL_LENGTH_INVALID: Self = Self(0x00f).dnr();
    /// SGL Descriptor Type Invalid.
    pub const SGL_DESCRIPTOR_TYPE_INVALID: Self = Self(0x011).dnr();
    /// Invalid Use of Controller Memory Buffer.
    pub const INVALID_USE_OF_CMB: Self = Self(0x012).dnr();
    /// PRP Offset Invalid.
    pub const PRP_OFFSET_INVALID: Self = Self(0x013).dnr();
    /// Atomic Write Unit Exceeded.
    pub const ATOMIC_WRITE_UNIT_EXCEEDED: Self = Self(0x014).dnr();
    /// Sanitize Failed.
    pub const SANITIZE_FAILED: Self = Self(0x01c).dnr();
    /// Sanitize In Progress.
    pub const SANITIZE_IN_PROGRESS: Self = Self(0x01d);
    /// Namespace is Write Protected.
    pub const WRITE_PROTECTED: Self = Self(0x020).dnr();
    /// LBA Out of Range.
    pub const LBA_OUT_OF_RANGE: Self = Self(0x080).dnr();
    /// Format In Progress.
    pub const FORMAT_IN_PROGRESS: Self = Self(0x084);
    /// Completion Queue Invalid.
    pub const COMPLETION_QUEUE_INVALID: Self = Self(0x100).dnr();
    /// Invalid Queue Identifier.
    pub const INVALID_QUEUE_IDENTIFIER: Self = Self(0x101).dnr();
    /// Invalid Queue Size.
    pub const INVALID_QUEUE_SIZE: Self = Self(0x102).dnr();
    /// Asynchronous Event Request Limit Exceeded.
    pub const ASYNC_EVENT_LIMIT_EXCEEDED: Self = Self(0x105).dnr();
    /// Invalid Firmware Slot.
    pub const INVALID_FIRMWARE_SLOT: Self = Self(0x106).dnr();
    /// Invalid Firmware Image.
    pub const INVALID_FIRMWARE_IMAGE: Self = Self(0x107).dnr();
    /// Invalid Interrupt Vector.
    pub const INVALID_INTERRUPT_VECTOR: Self = Self(0x108).dnr();
    /// Invalid Log Page.
    pub const INVALID_LOG_PAGE: Self = Self(0x109).dnr();
    /// Invalid Format.
    pub const INVALID_FORMAT: Self = Self(0x10a).dnr();
    /// Invalid Queue Deletion.
    pub const INVALID_QUEUE_DELETION: Self = Self(0x10c).dnr();
    /// Feature Identifier Not Saveable.
    pub const FEATURE_NOT_SAVEABLE: Self = Self(0x10d).dnr();
    /// Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Self = Self(0x10e).dnr();
    /// Feature Not Namespace Specific.
    pub const FEATURE_NOT_NAMESPACE_SPECIFIC: Self = Self(0x10f).dnr();
    /// Firmware Activation Requires Controller Level Reset. The commit has succeeded.
    pub const FIRMWARE_NEEDS_RESET: Self = Self(0x111).dnr();
    /// Overlapping Range.
    pub const OVERLAPPING_RANGE: Self = Self(0x114).dnr();
    /// Namespace Insufficient Capacity.
    pub const NAMESPACE_INSUFFICIENT_CAPACITY: Self = Self(0x115).dnr();
    /// Namespace Identifier Unavailable.
    pub const NAMESPACE_IDENTIFIER_UNAVAILABLE: Self = Self(0x116).dnr();
    /// Namespace Already Attached.
    pub const NAMESPACE_ALREADY_ATTACHED: Self = Self(0x118).dnr();
    /// Namespace Not Attached.
    pub const NAMESPACE_NOT_ATTACHED: Self = Self(0x11a).dnr();
    /// Thin Provisioning Not Supported.
    pub const THIN_PROVISIONING_NOT_SUPPORTED: Self = Self(0x11b).dnr();
    /// Controller List Invalid.
    pub const CONTROLLER_LIST_INVALID: Self = Self(0x11c).dnr();
    /// Device Self-test In Progress.
    pub const SELF_TEST_IN_PROGRESS: Self = Self(0x11d).dnr();
    /// Sanitize Prohibited While Persistent Memory Region is Enabled.
    pub const SANITIZE_PROHIBITED_BY_PMR: Self = Self(0x123).dnr();
    /// I/O Command Set Not Supported.
    pub const IO_COMMAND_SET_NOT_SUPPORTED: Self = Self(0x129).dnr();
    /// Invalid Protection Information.
    pub const INVALID_PROTECTION_INFORMATION: Self = Self(0x181).dnr();
    /// Command Size Limit Exceeded.
    pub const COMMAND_SIZE_LIMIT_EXCEEDED: Self = Self(0x183).dnr();
    /// Write Fault.
    pub const WRITE_FAULT: Self = Self(0x280);
    /// Unrecovered Read Error.
    pub const UNRECOVERED_READ_ERROR: Self = Self(0x281);
    /// End-to-end Guard Check Error.
    pub const GUARD_CHECK_ERROR: Self = Self(0x282).dnr();
    /// End-to-end Application Tag Check Error.
    pub const APPLICATION_TAG_CHECK_ERROR: Self = Self(0x283).dnr();
    /// End-to-end Reference Tag Check Error.
    pub const REFERENCE_TAG_CHECK_ERROR: Self = Self(0x284).dnr();
    /// Compare Failure.
    pub const COMPARE_FAILURE: Self = Self(0x285).dnr();

    /// The same with Do Not Retry set.
    pub const fn dnr(self) -> Self {
        Self(self.0 | 0x4000)
    }

    /// The same with More set: the Error Information log page has an entry.
    pub const fn more(self) -> Self {
        Self(self.0 | 0x2000)
    }

    /// Status Code Type and Status Code, without flags.
    pub const fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// Whether data was lost or does not fit its protection information: what SMART counts as Media and Data Integrity
    /// Errors (Base 5.16.1.3).
    pub const fn is_media_error(self) -> bool {
        matches!(self.code(), 0x280..=0x284)
    }

    /// Whether the command succeeded.
    pub const fn is_success(self) -> bool {
        self.code() == 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Status({:#05x}{})",
            self.code(),
            if self.0 & 0x4000 == 0 { "" } else { " DNR" }
        )
    }
}
