//! The config space as software sees it: through reads and writes alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::endpoint::{
    BarBacking, BarDeclaration, CpuAccess, Declaration, Identity, MsixDeclaration,
};
use crate::memory::BarMemory;

fn bar(index: u8, size: u64, is_64bit: bool) -> BarDeclaration {
    BarDeclaration {
        index,
        size,
        is_64bit,
        prefetchable: false,
        cpu_access: CpuAccess::Trapped,
        backing: BarBacking::Registers,
    }
}

fn declaration() -> Declaration {
    Declaration {
        identity: Identity {
            vendor_id: 0x1b36,
            device_id: 0x0010,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
            revision_id: 2,
            class_code: 0x01_0802,
            serial_number: Some(0x0011_2233_4455_6677),
        },
        bars: vec![
            bar(0, 0x4000, true),
            BarDeclaration {
                prefetchable: true,
                ..bar(2, 1 << 33, true)
            },
            bar(4, 0x1000, false),
        ],
        msix: Some(MsixDeclaration {
            vectors: 33,
            bar: 0,
            table_offset: 0x2000,
            pba_offset: 0x3000,
        }),
        intx: true,
    }
}

fn space() -> ConfigSpace {
    ConfigSpace::new(&declaration()).unwrap()
}

fn read<const N: usize>(space: &ConfigSpace, offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    space.read(offset, &mut bytes);
    bytes
}

fn read16(space: &ConfigSpace, offset: usize) -> u16 {
    u16::from_le_bytes(read(space, offset))
}

fn read32(space: &ConfigSpace, offset: usize) -> u32 {
    u32::from_le_bytes(read(space, offset))
}

/// Capabilities by ID, as lspci finds them.
fn capabilities(space: &ConfigSpace) -> BTreeMap<u8, usize> {
    let mut found = BTreeMap::new();
    let [mut at] = read::<1>(space, 0x34);
    while at != 0 {
        assert!(at >= 0x40 && at % 4 == 0, "capability at {at:#x}");
        let [id, next] = read(space, at.into());
        assert!(
            found.insert(id, usize::from(at)).is_none(),
            "capability {id:#x} twice"
        );
        at = next;
    }
    found
}

fn extended_capabilities(space: &ConfigSpace) -> BTreeMap<u32, usize> {
    let mut found = BTreeMap::new();
    let mut at = 0x100;
    while at != 0 {
        let word = read32(space, at);
        assert!(found.insert(word & 0xffff, at).is_none());
        at = (word >> 20) as usize;
        assert!(at == 0 || (at > 0x100 && at % 4 == 0));
    }
    found
}

#[test]
fn the_header_is_what_was_declared() {
    let space = space();
    assert_eq!(read::<4>(&space, 0), [0x36, 0x1b, 0x10, 0x00]);
    assert_eq!(read32(&space, 8), 0x0108_0202);
    assert_eq!(read32(&space, 0x2c), 0x1100_1af4);
    assert_eq!(read::<2>(&space, 0x3c), [0, 1]);
    assert_eq!(read16(&space, 6), 0x0010);
    assert_eq!(read::<1>(&space, 0x0e), [0], "type 0, one function");
}

#[test]
fn lspci_finds_every_capability() {
    let space = space();
    let found = capabilities(&space);
    assert_eq!(
        found.keys().copied().collect::<Vec<_>>(),
        [0x01, 0x10, 0x11]
    );
    assert_eq!(read16(&space, found[&0x01] + 2) & 7, 3);
    assert_eq!(read16(&space, found[&0x11] + 2), 32);
    assert_eq!(read32(&space, found[&0x11] + 4), 0x2000);
    assert_eq!(read32(&space, found[&0x11] + 8), 0x3000);
    let pcie = found[&0x10];
    assert_eq!(read16(&space, pcie + 2), 2);
    assert_eq!(read32(&space, pcie + 4), 0x1000_8022);
    assert_eq!(read16(&space, pcie + 8), 0x2810);
    assert_eq!(read32(&space, pcie + 0xc) & 0x3ff, 0x44);
    assert_eq!(read16(&space, pcie + 0x12) & 0x3ff, 0x44);

    let found = extended_capabilities(&space);
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 3]);
    assert_eq!(
        read::<8>(&space, found[&3] + 4),
        0x0011_2233_4455_6677u64.to_le_bytes()
    );
    assert_eq!(read32(&space, found[&1] + 8), 1 << 22);
    assert_eq!(read32(&space, found[&1] + 0xc), 0x0046_2030);
    assert_eq!(read32(&space, found[&1] + 0x14), 0x2000);
}

#[test]
fn what_is_not_declared_is_not_there() {
    let mut declared = declaration();
    declared.msix = None;
    declared.intx = false;
    declared.identity.serial_number = None;
    let space = ConfigSpace::new(&declared).unwrap();
    assert!(!capabilities(&space).contains_key(&0x11));
    assert!(!extended_capabilities(&space).contains_key(&3));
    assert_eq!(read::<1>(&space, 0x3d), [0]);
    assert!(!space.decode_state().msix_enabled);
}

#[test]
fn bars_are_sized_and_placed() {
    let mut space = space();
    space.write(0x10, &[0xff; 24]);
    assert_eq!(
        read::<8>(&space, 0x10),
        0xffff_ffff_ffff_c004u64.to_le_bytes()
    );
    assert_eq!(
        read::<8>(&space, 0x18),
        0xffff_fffe_0000_000cu64.to_le_bytes()
    );
    assert_eq!(read32(&space, 0x20), 0xffff_f000);
    assert_eq!(read32(&space, 0x24), 0);

    let change = space.write(0x18, &0x38_0000_1234u64.to_le_bytes());
    assert!(change.state);
    let window = BarWindow {
        address: 0x38_0000_0000,
        size: 1 << 33,
    };
    assert_eq!(space.decode_state().bars[2], Some(window));
    assert_eq!(space.decode_state().bar_address(3), None);
    assert_eq!(space.decode_state().bar_address(6), None);
}

#[test]
fn a_write_says_what_it_changed() {
    let mut space = space();
    assert!(space.write(4, &[0x06]).state);
    let state = space.decode_state();
    assert!(state.decodes() && state.may_send());
    assert_eq!(
        space.write(4, &[0x06, 0x01]),
        ConfigChange::default(),
        "SERR# concerns nobody"
    );
    assert!(space.write(5, &[0x04]).state);
    assert!(space.decode_state().intx_disabled);
    assert!(space.write(usize::from(MSIX_CONTROL) + 1, &[0xc0]).state);
    let state = space.decode_state();
    assert!(state.msix_enabled && state.msix_function_masked);
    assert!(space.write(usize::from(PM_CONTROL_STATUS), &[3]).state);
    let state = space.decode_state();
    assert_eq!(state.power_state, PowerState::D3Hot);
    assert!(!state.decodes() && !state.may_send());
}

#[test]
fn power_states_that_do_not_exist_are_discarded() {
    let mut space = space();
    let control = usize::from(PM_CONTROL_STATUS);
    for wrong in [1, 2] {
        assert_eq!(space.write(control, &[wrong]), ConfigChange::default());
        assert_eq!(read::<1>(&space, control), [8]);
    }
    space.write(control, &[3]);
    space.write(control, &[1]);
    assert_eq!(read::<1>(&space, control), [0xb]);
}

#[test]
fn sizes_follow_device_control() {
    let mut space = space();
    let control = usize::from(DEVICE_CONTROL);
    let sizes = |state: DecodeState| (state.max_payload_size, state.max_read_request_size);
    assert_eq!(sizes(space.decode_state()), (128, 512));
    for (encoding, expected) in [
        (0u16, (128, 128)),
        (1, (256, 256)),
        (2, (512, 512)),
        (3, (128, 1024)),
        (5, (128, 4096)),
        (6, (128, 128)),
        (7, (128, 128)),
    ] {
        space.write(control, &(encoding << 5 | encoding << 12).to_le_bytes());
        assert_eq!(sizes(space.decode_state()), expected, "encoding {encoding}");
    }
    assert_eq!(space.decode_state().read_completion_boundary, 64);
    space.write(usize::from(LINK_CONTROL), &[8]);
    assert_eq!(space.decode_state().read_completion_boundary, 128);
}

#[test]
fn flr_is_requested_by_its_bit_alone() {
    let mut space = space();
    let control = usize::from(DEVICE_CONTROL);
    assert!(space.write(control, &0x8000u16.to_le_bytes()).flr_requested);
    assert!(space.write(control + 1, &[0x80]).flr_requested);
    assert!(space.write(control - 1, &[0, 0, 0x80]).flr_requested);
    assert!(!space.write(control, &[0xff]).flr_requested);
    assert!(!space.write(control + 2, &[0xff; 8]).flr_requested);
    assert_eq!(read16(&space, control) & 0x8000, 0, "reads as zero");
}

#[test]
fn resets_keep_what_the_specification_keeps() {
    let mut space = space();
    let disturb = |space: &mut ConfigSpace| {
        space.write(4, &[0x06]);
        space.write(0x10, &[0xff; 24]);
        space.write(usize::from(DEVICE_CONTROL), &[0x50]);
        space.write(usize::from(LINK_CONTROL), &[0x08]);
        space.write(usize::from(AER_CORRECTABLE_MASK), &[0; 4]);
        space.record_unsupported_request([1, 2, 3, 4], true);
    };
    let aer = usize::from(AER);

    disturb(&mut space);
    space.reset(ResetKind::FunctionLevel);
    let state = space.decode_state();
    assert!(!state.memory_space_enabled && !state.bus_master_enabled);
    assert_eq!(state.bar_address(0), Some(0));
    assert_eq!(
        (state.max_payload_size, state.read_completion_boundary),
        (512, 128)
    );
    assert_eq!(read32(&space, aer + 4), 1 << 20);
    assert_eq!(read32(&space, aer + 0x14), 0);
    assert_eq!(read32(&space, aer + 0x28), 4);
    assert_eq!(read16(&space, DEVICE_STATUS.into()), 0);

    disturb(&mut space);
    space.reset(ResetKind::Conventional);
    let state = space.decode_state();
    assert_eq!(
        (state.max_payload_size, state.read_completion_boundary),
        (128, 64)
    );
    assert_eq!(read32(&space, aer + 4), 1 << 20);

    disturb(&mut space);
    space.reset(ResetKind::ConnectionLost);
    assert_eq!(read::<4096>(&space, 0), read::<4096>(&self::space(), 0));
}

#[test]
fn a_posted_unsupported_request_is_logged() {
    let mut space = space();
    let aer = usize::from(AER);
    space.record_unsupported_request([0x1111, 0x2222, 0x3333, 0x4444], true);
    space.record_unsupported_request([5, 6, 7, 8], true);
    assert_eq!(read16(&space, DEVICE_STATUS.into()), 0xa);
    assert_eq!(read32(&space, aer + 4), 1 << 20);
    assert_eq!(read32(&space, aer + 0x18) & 0x1f, 20);
    assert_eq!(
        read32(&space, aer + 0x1c),
        0x1111,
        "the first error stays in the log"
    );
    space.write(aer + 4, &(1u32 << 20).to_le_bytes());
    space.write(DEVICE_STATUS.into(), &[0x0f]);
    assert_eq!(read32(&space, aer + 4), 0);
    assert_eq!(read16(&space, DEVICE_STATUS.into()), 0);
    space.record_unsupported_request([5, 6, 7, 8], true);
    assert_eq!(read32(&space, aer + 0x28), 8);
}

#[test]
fn a_non_posted_unsupported_request_is_advisory() {
    let mut space = space();
    let aer = usize::from(AER);
    space.record_unsupported_request([1, 2, 3, 4], false);
    assert_eq!(read16(&space, DEVICE_STATUS.into()), 0x9);
    assert_eq!(read32(&space, aer + 0x10), 0x2000);
    assert_eq!(read32(&space, aer + 4), 0, "masked as advisory");
    space.write(aer + 0x14, &[0; 4]);
    space.record_unsupported_request([1, 2, 3, 4], false);
    assert_eq!(read32(&space, aer + 4), 1 << 20);
    space.write(aer + 0xc, &(1u32 << 20).to_le_bytes());
    space.record_unsupported_request([1, 2, 3, 4], false);
    assert_eq!(
        read16(&space, DEVICE_STATUS.into()),
        0xd,
        "fatal is never advisory"
    );
}

#[test]
fn headers_of_cpu_requests() {
    assert_eq!(
        memory_request_header(false, 0x1000, 4),
        [0x0000_0001, 0x0f, 0x1000, 0]
    );
    assert_eq!(
        memory_request_header(true, 0x1003, 2),
        [0x4000_0002, 0x18, 0x1000, 0]
    );
    assert_eq!(
        memory_request_header(true, 0x1_0000_0001, 1),
        [0x6000_0001, 0x02, 1, 0]
    );
    assert_eq!(
        memory_request_header(false, 8, usize::MAX)[0],
        0x0000_0000,
        "1024 words"
    );
}

#[test]
fn declarations_that_break_a_rule() {
    let memory = |size| BarBacking::Memory(Arc::new(BarMemory::anonymous("t", size).unwrap()));
    let mapped = |backing| BarDeclaration {
        cpu_access: CpuAccess::Mapped,
        backing,
        ..bar(4, 0x1000, false)
    };
    let with_bars = |bars: Vec<BarDeclaration>| Declaration {
        bars,
        msix: None,
        ..declaration()
    };
    let with_msix = |vectors, bar, table_offset, pba_offset| Declaration {
        msix: Some(MsixDeclaration {
            vectors,
            bar,
            table_offset,
            pba_offset,
        }),
        ..declaration()
    };
    let class_code = |class_code| {
        let identity = Identity {
            class_code,
            ..declaration().identity
        };
        Declaration {
            identity,
            ..declaration()
        }
    };
    for (wrong, words) in [
        (with_bars(vec![bar(0, 0x3000, false)]), "power of two"),
        (with_bars(vec![bar(0, 0x800, false)]), "power of two"),
        (with_bars(vec![bar(0, 0, false)]), "power of two"),
        (with_bars(vec![bar(0, 1 << 32, false)]), "must be 64-bit"),
        (
            with_bars(vec![bar(5, 0x1000, true)]),
            "BAR 5 cannot be 64-bit",
        ),
        (
            with_bars(vec![bar(6, 0x1000, false)]),
            "BAR 6 does not exist",
        ),
        (
            with_bars(vec![bar(255, 0x1000, true)]),
            "BAR 255 does not exist",
        ),
        (
            with_bars(vec![bar(1, 0x1000, false), bar(0, 0x1000, true)]),
            "both take register 1",
        ),
        (
            with_bars(vec![mapped(BarBacking::Registers)]),
            "only memory can be",
        ),
        (
            with_bars(vec![BarDeclaration {
                backing: memory(0x1000),
                ..bar(0, 0x2000, false)
            }]),
            "only 0x1000",
        ),
        (with_msix(0, 0, 0x2000, 0x3000), "1 to 2048"),
        (with_msix(2049, 0, 0x2000, 0x3000), "1 to 2048"),
        (with_msix(4, 1, 0x2000, 0x3000), "there is none"),
        (with_msix(4, 0, 0x2004, 0x3000), "not aligned"),
        (with_msix(4, 0, 0x3fe0, 0x3000), "leaves BAR 0"),
        (with_msix(4, 0, 0x2000, u32::MAX - 7), "leaves BAR 0"),
        (with_msix(4, 0, 0x2000, 0x2038), "overlap"),
        (class_code(0x0100_0000), "24 bits"),
    ] {
        let reason = ConfigSpace::new(&wrong).unwrap_err();
        assert!(reason.contains(words), "{reason:?} lacks {words:?}");
    }
    let mut wrong = with_msix(4, 4, 0, 0x800);
    wrong.bars[2] = mapped(memory(0x1000));
    assert!(
        ConfigSpace::new(&wrong)
            .unwrap_err()
            .contains("must be trapped")
    );
    assert!(ConfigSpace::new(&with_bars(vec![mapped(memory(0x1000))])).is_ok());
}

proptest! {
    /// No sequence of writes changes a bit that software must not change, and no access panics.
    #[test]
    fn hostile_accesses_do_no_harm(
        writes in proptest::collection::vec(
            (0usize..5000, proptest::collection::vec(any::<u8>(), 0..80)), 1..60)
    ) {
        let mut space = space();
        let masks: Vec<u8> =
            space.bytes.iter().map(|byte| byte.writable | byte.write_one_clears).collect();
        let before = read::<4096>(&space, 0);
        for (offset, data) in writes {
            let state = space.decode_state();
            let change = space.write(offset, &data);
            prop_assert_eq!(change.state, state != space.decode_state());
            let mut out = vec![0; data.len()];
            space.read(offset, &mut out);
        }
        let after = read::<4096>(&space, 0);
        for (at, ((old, new), mask)) in before.iter().zip(&after).zip(&masks).enumerate() {
            prop_assert_eq!(old & !mask, new & !mask, "byte {:#x}", at);
        }
        // RW1C bits that were clear can only stay clear.
        prop_assert_eq!(read16(&space, STATUS.into()), STATUS_CAPABILITIES_LIST);
        prop_assert_eq!(capabilities(&space).len(), 3);
        let state = space.decode_state();
        prop_assert!([128, 256, 512].contains(&state.max_payload_size));
        prop_assert!((128..=4096).contains(&state.max_read_request_size));
    }
}
