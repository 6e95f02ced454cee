//! Builds a config space out of a [`Declaration`].

use super::layout::*;
use super::{Byte, ConfigSpace};
use crate::endpoint::{BarDeclaration, Declaration, Identity, MsixDeclaration};

/// One register or field: where it lies, what it resets to, and what a write does to each of its bits.
/// A bit named in no mask is read-only.
#[derive(Clone, Copy, Default)]
struct Field {
    offset: u16,
    /// Bytes, 1 to 8.
    width: u16,
    reset: u64,
    /// RW and RWS.
    writable: u64,
    /// RW1C and RW1CS.
    write_one_clears: u64,
    /// Kept by a conventional reset and by FLR: the RWS, RW1CS and ROS of the specification.
    sticky: u64,
    /// Kept by FLR alone (section 6.6.2 lists them).
    survives_flr: u64,
}

impl Field {
    fn new(offset: u16, width: u16, reset: u64) -> Self {
        Self {
            offset,
            width,
            reset,
            ..Self::default()
        }
    }
    fn u8(offset: u16, reset: u8) -> Self {
        Self::new(offset, 1, reset.into())
    }
    fn u16(offset: u16, reset: u16) -> Self {
        Self::new(offset, 2, reset.into())
    }
    fn u32(offset: u16, reset: u32) -> Self {
        Self::new(offset, 4, reset.into())
    }
    fn writable(self, mask: impl Into<u64>) -> Self {
        Self {
            writable: mask.into(),
            ..self
        }
    }
    fn write_one_clears(self, mask: impl Into<u64>) -> Self {
        Self {
            write_one_clears: mask.into(),
            ..self
        }
    }
    fn sticky(self) -> Self {
        Self {
            sticky: u64::MAX,
            ..self
        }
    }
    fn survives_flr(self, mask: impl Into<u64>) -> Self {
        Self {
            survives_flr: mask.into(),
            ..self
        }
    }
}

struct Builder {
    bytes: Box<[Byte]>,
}

impl Builder {
    fn field(&mut self, field: Field) {
        let first = usize::from(field.offset);
        let bytes = self
            .bytes
            .iter_mut()
            .skip(first)
            .take(usize::from(field.width));
        for (index, byte) in bytes.enumerate() {
            let part = |value: u64| value.to_le_bytes().get(index).copied().unwrap_or(0);
            *byte = Byte {
                value: part(field.reset),
                reset: part(field.reset),
                writable: part(field.writable),
                write_one_clears: part(field.write_one_clears),
                sticky: part(field.sticky),
                survives_flr: part(field.survives_flr),
            };
        }
    }

    fn header(&mut self, identity: &Identity, intx: bool) {
        self.field(Field::u16(VENDOR_ID, identity.vendor_id));
        self.field(Field::u16(DEVICE_ID, identity.device_id));
        let command = COMMAND_MEMORY_SPACE
            | COMMAND_BUS_MASTER
            | COMMAND_PARITY_RESPONSE
            | COMMAND_SERR
            | COMMAND_INTX_DISABLE;
        self.field(Field::u16(COMMAND, 0).writable(command));
        self.field(Field::u16(STATUS, STATUS_CAPABILITIES_LIST).write_one_clears(STATUS_ERRORS));
        self.field(Field::u8(REVISION_ID, identity.revision_id));
        self.field(Field::new(CLASS_CODE, 3, identity.class_code.into()));
        self.field(Field::u8(CACHE_LINE_SIZE, 0).writable(u8::MAX));
        self.field(Field::u16(
            SUBSYSTEM_VENDOR_ID,
            identity.subsystem_vendor_id,
        ));
        self.field(Field::u16(SUBSYSTEM_ID, identity.subsystem_id));
        self.field(Field::u8(INTERRUPT_LINE, 0).writable(u8::MAX));
        self.field(Field::u8(INTERRUPT_PIN, intx.into()));
    }

    fn bar(&mut self, bar: &BarDeclaration) {
        let mut flags = 0;
        if bar.is_64bit {
            flags |= BAR_TYPE_64BIT;
        }
        if bar.prefetchable {
            flags |= BAR_PREFETCHABLE;
        }
        let width = if bar.is_64bit { 8 } else { 4 };
        let offset = bar_offset(bar.index);
        self.field(Field::new(offset, width, flags).writable(address_mask(bar.size)));
    }

    fn power_management(&mut self, next: u16) {
        self.capability(PM, PM_ID, next);
        self.field(Field::u16(PM_CAPABILITIES, PM_VERSION_3));
        self.field(Field::u16(PM_CONTROL_STATUS, PM_NO_SOFT_RESET).writable(PM_POWER_STATE));
    }

    fn msix(&mut self, msix: &MsixDeclaration, next: u16) {
        let bar = u32::from(msix.bar);
        self.capability(MSIX, MSIX_ID, next);
        self.field(
            Field::u16(MSIX_CONTROL, msix.vectors.saturating_sub(1))
                .writable(MSIX_ENABLE | MSIX_FUNCTION_MASK),
        );
        self.field(Field::u32(MSIX_TABLE, msix.table_offset | bar));
        self.field(Field::u32(MSIX_PBA, msix.pba_offset | bar));
    }

    fn pci_express(&mut self, next: u16) {
        self.capability(PCIE, PCIE_ID, next);
        // Capability version 2, PCI Express Endpoint.
        self.field(Field::u16(PCIE_CAPABILITIES, 2));
        self.device_registers();
        self.link_registers();
    }

    fn device_registers(&mut self) {
        self.field(Field::u32(
            DEVICE_CAPABILITIES,
            u32::from(MAX_PAYLOAD_SUPPORTED)
                | DEVCAP_EXTENDED_TAG
                | DEVCAP_ROLE_BASED_ERRORS
                | DEVCAP_FLR,
        ));
        // After reset: 128-byte payloads, 512-byte read requests.
        let control =
            DEVCTL_RELAXED_ORDERING | DEVCTL_NO_SNOOP | 2 << DEVCTL_MAX_READ_REQUEST_SHIFT;
        self.field(
            Field::u16(DEVICE_CONTROL, control)
                .writable(
                    DEVCTL_ERROR_REPORTING
                        | DEVCTL_RELAXED_ORDERING
                        | DEVCTL_MAX_PAYLOAD
                        | DEVCTL_EXTENDED_TAG
                        | DEVCTL_NO_SNOOP
                        | DEVCTL_MAX_READ_REQUEST,
                )
                .survives_flr(DEVCTL_MAX_PAYLOAD),
        );
        self.field(Field::u16(DEVICE_STATUS, 0).write_one_clears(
            DEVSTA_CORRECTABLE | DEVSTA_NON_FATAL | DEVSTA_FATAL | DEVSTA_UNSUPPORTED_REQUEST,
        ));
        self.field(Field::u32(
            DEVICE_CAPABILITIES_2,
            DEVCAP2_COMPLETION_TIMEOUT,
        ));
        self.field(Field::u16(DEVICE_CONTROL_2, 0).writable(DEVCTL2_COMPLETION_TIMEOUT));
    }

    fn link_registers(&mut self) {
        let link = LINK_SPEED_16GT | LINK_WIDTH_X4;
        self.field(Field::u32(
            LINK_CAPABILITIES,
            u32::from(link) | LNKCAP_ASPM_OPTIONALITY,
        ));
        let control = LNKCTL_ASPM | LNKCTL_RCB | LNKCTL_COMMON_CLOCK | LNKCTL_EXTENDED_SYNCH;
        self.field(
            Field::u16(LINK_CONTROL, 0)
                .writable(control)
                .survives_flr(control),
        );
        self.field(Field::u16(LINK_STATUS, link | LNKSTA_SLOT_CLOCK));
        self.field(Field::u32(LINK_CAPABILITIES_2, LNKCAP2_SPEEDS));
        self.field(
            Field::u16(LINK_CONTROL_2, LINK_SPEED_16GT)
                .writable(LNKCTL2_WRITABLE)
                .sticky(),
        );
        self.field(Field::u16(LINK_STATUS_2, LNKSTA2_EQUALIZED));
    }

    fn advanced_errors(&mut self, next: u16) {
        self.extended_capability(AER, AER_ID, 2, next);
        let errors = AER_UNCORRECTABLE_ERRORS;
        self.field(
            Field::u32(AER_UNCORRECTABLE_STATUS, 0)
                .write_one_clears(errors)
                .sticky(),
        );
        self.field(
            Field::u32(AER_UNCORRECTABLE_MASK, AER_UNCORRECTABLE_MASK_RESET)
                .writable(errors)
                .sticky(),
        );
        self.field(
            Field::u32(AER_UNCORRECTABLE_SEVERITY, AER_UNCORRECTABLE_SEVERITY_RESET)
                .writable(errors)
                .sticky(),
        );
        let correctable = AER_CORRECTABLE_ERRORS;
        self.field(
            Field::u32(AER_CORRECTABLE_STATUS, 0)
                .write_one_clears(correctable)
                .sticky(),
        );
        self.field(
            Field::u32(AER_CORRECTABLE_MASK, AER_ADVISORY_NON_FATAL)
                .writable(correctable)
                .sticky(),
        );
        self.field(Field::u32(AER_CONTROL, 0).sticky());
        self.field(Field::new(AER_HEADER_LOG, 8, 0).sticky());
        self.field(Field::new(AER_HEADER_LOG + 8, 8, 0).sticky());
    }

    fn serial_number(&mut self, number: u64) {
        self.extended_capability(DSN, DSN_ID, 1, 0);
        self.field(Field::new(DSN_LOW, 8, number));
    }

    /// The first word of a capability (section 7.5.2).
    fn capability(&mut self, offset: u16, id: u16, next: u16) {
        self.field(Field::u16(offset, id | next << 8));
    }

    /// The first doubleword of an extended capability (section 7.6.3).
    fn extended_capability(&mut self, offset: u16, id: u32, version: u32, next: u16) {
        self.field(Field::u32(
            offset,
            id | version << 16 | u32::from(next) << 20,
        ));
    }
}

/// Offset of BAR `index`.
pub(super) fn bar_offset(index: u8) -> u16 {
    BAR_0 + 4 * u16::from(index)
}

/// The bits of a BAR of `size` bytes that hold an address.
pub(super) fn address_mask(size: u64) -> u64 {
    !size.saturating_sub(1)
}

/// The config space of a declaration that [`super::validate`] has accepted.
pub(super) fn build(declaration: &Declaration) -> ConfigSpace {
    let mut builder = Builder {
        bytes: vec![Byte::default(); CONFIG_SPACE_SIZE].into_boxed_slice(),
    };
    builder.header(&declaration.identity, declaration.intx);
    for bar in &declaration.bars {
        builder.bar(bar);
    }
    builder.field(Field::u8(CAPABILITIES_POINTER, PM.to_le_bytes()[0]));
    builder.power_management(if declaration.msix.is_some() {
        MSIX
    } else {
        PCIE
    });
    if let Some(msix) = &declaration.msix {
        builder.msix(msix, PCIE);
    }
    builder.pci_express(0);
    let serial_number = declaration.identity.serial_number;
    builder.advanced_errors(if serial_number.is_some() { DSN } else { 0 });
    if let Some(number) = serial_number {
        builder.serial_number(number);
    }
    let mut bars = [None; 6];
    for bar in &declaration.bars {
        if let Some(slot) = bars.get_mut(usize::from(bar.index)) {
            *slot = Some((bar.size, bar.is_64bit));
        }
    }
    ConfigSpace {
        bytes: builder.bytes,
        bars,
        has_msix: declaration.msix.is_some(),
    }
}
