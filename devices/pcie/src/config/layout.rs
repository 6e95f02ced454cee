//! Offsets and bits of a type 0 config space (PCI Express Base 6.0, chapter 7), with their names there.

/// Size of PCI Express config space in bytes.
pub const CONFIG_SPACE_SIZE: usize = 4096;

// Type 0 header, section 7.5.1.
pub const VENDOR_ID: u16 = 0x00;
pub const DEVICE_ID: u16 = 0x02;
pub const COMMAND: u16 = 0x04;
pub const STATUS: u16 = 0x06;
pub const REVISION_ID: u16 = 0x08;
pub const CLASS_CODE: u16 = 0x09;
pub const CACHE_LINE_SIZE: u16 = 0x0c;
pub const BAR_0: u16 = 0x10;
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
pub const SUBSYSTEM_ID: u16 = 0x2e;
pub const CAPABILITIES_POINTER: u16 = 0x34;
pub const INTERRUPT_LINE: u16 = 0x3c;
pub const INTERRUPT_PIN: u16 = 0x3d;

pub const COMMAND_MEMORY_SPACE: u16 = 1 << 1;
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
pub const COMMAND_PARITY_RESPONSE: u16 = 1 << 6;
pub const COMMAND_SERR: u16 = 1 << 8;
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

pub const STATUS_INTERRUPT: u16 = 1 << 3;
pub const STATUS_CAPABILITIES_LIST: u16 = 1 << 4;
/// Master Data Parity Error, Signaled and Received Target Abort, Received Master Abort, Signaled System
/// Error, Detected Parity Error.
pub const STATUS_ERRORS: u16 = 0xf900;

/// Received Master Abort: one of those.
pub const STATUS_MASTER_ABORT: u16 = 1 << 13;

pub const BAR_TYPE_64BIT: u64 = 1 << 2;
pub const BAR_PREFETCHABLE: u64 = 1 << 3;

// Power Management, section 7.5.2.
pub const PM: u16 = 0x40;
pub const PM_ID: u16 = 0x01;
pub const PM_CAPABILITIES: u16 = PM + 2;
pub const PM_CONTROL_STATUS: u16 = PM + 4;
pub const PM_VERSION_3: u16 = 3;
pub const PM_POWER_STATE: u16 = 0x3;
pub const PM_NO_SOFT_RESET: u16 = 1 << 3;

// MSI-X, section 7.7.2.
pub const MSIX: u16 = 0x50;
pub const MSIX_ID: u16 = 0x11;
pub const MSIX_CONTROL: u16 = MSIX + 2;
pub const MSIX_TABLE: u16 = MSIX + 4;
pub const MSIX_PBA: u16 = MSIX + 8;
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;
pub const MSIX_ENABLE: u16 = 1 << 15;

// PCI Express, section 7.5.3.
pub const PCIE: u16 = 0x60;
pub const PCIE_ID: u16 = 0x10;
pub const PCIE_CAPABILITIES: u16 = PCIE + 0x02;
pub const DEVICE_CAPABILITIES: u16 = PCIE + 0x04;
pub const DEVICE_CONTROL: u16 = PCIE + 0x08;
pub const DEVICE_STATUS: u16 = PCIE + 0x0a;
pub const LINK_CAPABILITIES: u16 = PCIE + 0x0c;
pub const LINK_CONTROL: u16 = PCIE + 0x10;
pub const LINK_STATUS: u16 = PCIE + 0x12;
pub const DEVICE_CAPABILITIES_2: u16 = PCIE + 0x24;
pub const DEVICE_CONTROL_2: u16 = PCIE + 0x28;
pub const LINK_CAPABILITIES_2: u16 = PCIE + 0x2c;
pub const LINK_CONTROL_2: u16 = PCIE + 0x30;
pub const LINK_STATUS_2: u16 = PCIE + 0x32;

/// Max_Payload_Size Supported: 512 bytes.
pub const MAX_PAYLOAD_SUPPORTED: u16 = 2;
pub const DEVCAP_EXTENDED_TAG: u32 = 1 << 5;
pub const DEVCAP_ROLE_BASED_ERRORS: u32 = 1 << 15;
pub const DEVCAP_FLR: u32 = 1 << 28;

pub const DEVCTL_ERROR_REPORTING: u16 = 0xf;
pub const DEVCTL_RELAXED_ORDERING: u16 = 1 << 4;
pub const DEVCTL_MAX_PAYLOAD: u16 = 0x7 << 5;
pub const DEVCTL_MAX_PAYLOAD_SHIFT: u32 = 5;
pub const DEVCTL_EXTENDED_TAG: u16 = 1 << 8;
pub const DEVCTL_NO_SNOOP: u16 = 1 << 11;
pub const DEVCTL_MAX_READ_REQUEST: u16 = 0x7 << 12;
pub const DEVCTL_MAX_READ_REQUEST_SHIFT: u32 = 12;
pub const DEVCTL_INITIATE_FLR: u16 = 1 << 15;

pub const DEVSTA_CORRECTABLE: u16 = 1 << 0;
pub const DEVSTA_NON_FATAL: u16 = 1 << 1;
pub const DEVSTA_FATAL: u16 = 1 << 2;
pub const DEVSTA_UNSUPPORTED_REQUEST: u16 = 1 << 3;

pub const LINK_SPEED_16GT: u16 = 4;
pub const LINK_WIDTH_X4: u16 = 4 << 4;
pub const LNKCAP_ASPM_OPTIONALITY: u32 = 1 << 22;
pub const LNKCTL_ASPM: u16 = 0x3;
pub const LNKCTL_RCB: u16 = 1 << 3;
pub const LNKCTL_COMMON_CLOCK: u16 = 1 << 6;
pub const LNKCTL_EXTENDED_SYNCH: u16 = 1 << 7;
pub const LNKSTA_SLOT_CLOCK: u16 = 1 << 12;
/// Completion timeout ranges A to D, and that the timeout may be disabled.
pub const DEVCAP2_COMPLETION_TIMEOUT: u32 = 0x1f;
pub const DEVCTL2_COMPLETION_TIMEOUT: u16 = 0x1f;
/// 2.5, 5, 8 and 16 GT/s.
pub const LNKCAP2_SPEEDS: u32 = 0xf << 1;
/// All but Hardware Autonomous Speed Disable and Selectable De-emphasis, which are hardwired to 0.
pub const LNKCTL2_WRITABLE: u16 = 0xff9f;
/// Equalization of 8 GT/s complete, in all phases.
pub const LNKSTA2_EQUALIZED: u16 = 0xf << 1;

// Advanced Error Reporting, section 7.8.4.
pub const AER: u16 = 0x100;
pub const AER_ID: u32 = 0x0001;
pub const AER_UNCORRECTABLE_STATUS: u16 = AER + 0x04;
pub const AER_UNCORRECTABLE_MASK: u16 = AER + 0x08;
pub const AER_UNCORRECTABLE_SEVERITY: u16 = AER + 0x0c;
pub const AER_CORRECTABLE_STATUS: u16 = AER + 0x10;
pub const AER_CORRECTABLE_MASK: u16 = AER + 0x14;
pub const AER_CONTROL: u16 = AER + 0x18;
pub const AER_HEADER_LOG: u16 = AER + 0x1c;

/// The uncorrectable errors that exist here: Data Link Protocol, Surprise Down, Poisoned TLP, Flow Control,
/// Completion Timeout, Completer Abort, Unexpected Completion, Receiver Overflow, Malformed TLP,
/// Unsupported Request, Internal.
pub const AER_UNCORRECTABLE_ERRORS: u32 = 0x0057_f030;
/// Those of them that are masked after reset: Internal.
pub const AER_UNCORRECTABLE_MASK_RESET: u32 = 1 << 22;
/// Those of them that are fatal after reset.
pub const AER_UNCORRECTABLE_SEVERITY_RESET: u32 = 0x0046_2030;
pub const AER_UNSUPPORTED_REQUEST_BIT: u32 = 20;
pub const AER_UNSUPPORTED_REQUEST: u32 = 1 << AER_UNSUPPORTED_REQUEST_BIT;
/// Receiver Error, Bad TLP, Bad DLLP, REPLAY_NUM Rollover, Replay Timer Timeout, Advisory Non-Fatal.
pub const AER_CORRECTABLE_ERRORS: u32 = 0x31c1;
pub const AER_ADVISORY_NON_FATAL: u32 = 1 << 13;
pub const AER_FIRST_ERROR_POINTER: u32 = 0x1f;

// Device Serial Number, section 7.9.3.
pub const DSN: u16 = 0x150;
pub const DSN_ID: u32 = 0x0003;
pub const DSN_LOW: u16 = DSN + 4;
