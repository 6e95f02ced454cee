//! BAR 0 as a host sees it: every register, its reserved bits, odd accesses, interrupts.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::{Driver, Rig, SIZE};
use p2plab_nvram::spec::{CLASS_CODE, DEVICE_ID, Event, ID, VENDOR_ID, VERSION, offset, outcome};
use p2plab_nvram::{Fault, MAX_SIZE, MIN_SIZE, NvramCard, NvramConfig};
use proptest::prelude::*;

fn config() -> NvramConfig {
    NvramConfig::memory("nv0", SIZE)
}

fn config_word(d: &Driver, at: u64) -> u32 {
    let mut data = [0; 4];
    d.function.config_read(at, &mut data).unwrap();
    u32::from_le_bytes(data)
}

#[test]
fn the_function_says_what_it_is() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    assert_eq!(
        config_word(&d, 0),
        u32::from(DEVICE_ID) << 16 | u32::from(VENDOR_ID)
    );
    assert_eq!(config_word(&d, 8) >> 8, CLASS_CODE);
    // BAR 4: 64-bit, prefetchable, as large as the memory.
    assert_eq!(config_word(&d, 0x20) & 0xf, 0xc);
    for at in [0x20, 0x24] {
        d.function.config_write(at, &[0xff; 4]).unwrap();
    }
    let mask = u64::from(config_word(&d, 0x24)) << 32 | u64::from(config_word(&d, 0x20) & !0xf);
    assert_eq!(mask, !(SIZE - 1));
    // The Device Serial Number capability is the first extended one that has id 3.
    let mut at = 0x100;
    while config_word(&d, at) & 0xffff != 3 {
        at = u64::from(config_word(&d, at) >> 20);
        assert_ne!(at, 0);
    }
    let serial = u64::from(config_word(&d, at + 8)) << 32 | u64::from(config_word(&d, at + 4));
    assert_eq!(serial, d.read64(offset::SN));
    let other = rig.plug(NvramConfig::memory("nv1", SIZE));
    assert_ne!(serial, other.read64(offset::SN));
}

/// What a card in memory, armed and healthy, has in its registers.
fn expected(d: &Driver) -> Vec<(u64, u64)> {
    vec![
        (offset::ID, u64::from(VERSION) << 32 | u64::from(ID)),
        (offset::SIZE, SIZE),
        (offset::SN, d.read64(offset::SN)),
        (offset::CAP, 1 << 32),
        (offset::STS, 1),
        (offset::PFAIL, 0),
        (offset::EVENT, 0),
        (offset::POWER_CUTS, 0),
        (offset::RESTORES, 0),
        (offset::LOSSES, 0),
        (offset::FLUSHES, 0),
        (offset::FLUSH_ERRORS, 0),
        (offset::RESETS, 0),
        (offset::MISTAKES, 0),
    ]
}

#[test]
fn every_register_has_its_place_and_its_bits() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let expected = expected(&d);
    for (at, value) in &expected {
        assert_eq!(d.read64(*at), *value, "{at:#x}");
    }
    assert_eq!(&ID.to_le_bytes(), b"NVRM");
    // What is not listed reads as zero, to the end of the BAR.
    for at in (0x38..0x40).chain(0x78..0x4000).step_by(4) {
        assert_eq!(d.read32(at), 0, "{at:#x}");
    }
    // Read-only registers do not change, reserved bits of the others neither. FLUSH and CTRL do something.
    for at in (0..0x4000u64).step_by(4) {
        if ![offset::FLUSH, offset::CTRL, offset::INTEN].contains(&at) {
            d.write32(at, u32::MAX);
        }
    }
    d.write32(offset::INTEN, u32::MAX);
    assert_eq!(d.read32(offset::INTEN), Event::ALL);
    d.write32(offset::INTEN, 0);
    d.write32(offset::CTRL, u32::MAX);
    assert_eq!(d.read32(offset::CTRL), 1);
    d.write32(offset::FLUSH, !1);
    for (at, value) in &expected {
        assert_eq!(d.read64(*at), *value, "{at:#x}");
    }
    // Eight bytes are two registers.
    d.function
        .bar_write(0, offset::EVENT, &(7u64 << 32).to_le_bytes())
        .unwrap();
    assert_eq!(d.read32(offset::INTEN), 7);
}

#[test]
fn a_card_on_a_file_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::new();
    let path = folder.path().join("nv0");
    let d = rig.plug(NvramConfig::file("nv0", &path, SIZE).create());
    assert_eq!(d.read32(offset::CAP), 1);
}

#[test]
fn writes_of_a_bad_shape_are_ignored_and_counted() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    for (count, (at, length)) in (1..).zip([
        (offset::CTRL, 1),
        (offset::CTRL, 2),
        (offset::CTRL, 3),
        (offset::CTRL + 1, 4),
        (offset::CTRL + 2, 8),
        (offset::CTRL, 16),
        (offset::SIZE, 64),
    ]) {
        d.function.bar_write(0, at, &vec![0; length]).unwrap();
        assert_eq!(d.read64(offset::MISTAKES), count);
    }
    assert!(d.status().armed());
    // Reads may be of any shape.
    let mut bytes = [0; 3];
    d.function.bar_read(0, 1, &mut bytes).unwrap();
    assert_eq!(&bytes, b"VRM");
    // Past the end there is nothing, and that is no access of the card's.
    for (at, length) in [(0x3ffd, 4), (0x4000, 1), (u64::MAX, 1), (0, 0x4001)] {
        assert!(d.function.bar_read(0, at, &mut vec![0; length]).is_err());
        assert!(d.function.bar_write(0, at, &vec![0; length]).is_err());
    }
    assert_eq!(d.read64(offset::MISTAKES), 7);
}

#[test]
fn flushes_end_and_are_counted() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    d.flush();
    assert_eq!(d.read64(offset::FLUSHES), 1);
    assert!(d.event().flushed());
    d.write32(offset::EVENT, u32::MAX);
    assert_eq!(d.event(), Event::new());
    d.card.inject(Fault::Medium);
    // That flushes will fail is not known before one has.
    assert!(!d.health().medium() && d.status().armed());
    d.flush();
    assert!(d.health().medium() && d.event().health() && d.event().flushed());
    assert_eq!(
        (d.read64(offset::FLUSHES), d.read64(offset::FLUSH_ERRORS)),
        (1, 1)
    );
    d.arm(false);
    d.arm(true);
    assert!(!d.status().armed());
    d.card.repair(Fault::Medium);
    d.arm(false);
    d.arm(true);
    assert!(d.status().armed() && d.health().medium());
}

#[test]
fn intx_is_asserted_while_an_enabled_event_is_set() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let signal = d.intx();
    d.card.inject(Fault::Capacitor);
    assert_eq!(signal.take(), 0);
    d.write32(offset::INTEN, 2);
    assert_eq!(signal.take(), 1);
    // Unmasked with the level still there it comes again; without, it does not.
    d.function.mask_intx(false);
    assert_eq!(signal.take(), 1);
    d.write32(offset::EVENT, 2);
    d.function.mask_intx(false);
    assert_eq!(signal.take(), 0);
    d.card.repair(Fault::Capacitor);
    assert_eq!(signal.take(), 1);
    // A reset takes it back, and leaves the event.
    d.function_level_reset();
    d.function.mask_intx(false);
    assert_eq!(signal.take(), 0);
    assert!(d.event().health());
}

#[test]
fn msix_has_a_message_for_each_event() {
    let mut rig = Rig::new();
    let mut config = config();
    config.msix = true;
    let d = rig.plug(config);
    let signal = d.msix();
    d.write32(offset::INTEN, Event::ALL);
    assert_eq!(signal.take(), 0);
    d.card.inject(Fault::Flash);
    // HEALTH and ARMED.
    assert_eq!(signal.take(), 2);
    d.card.repair(Fault::Flash);
    assert_eq!(signal.take(), 0);
    d.write32(offset::EVENT, u32::MAX);
    d.flush();
    // The card's thread sends it after it has said that it is idle.
    driver::wait_until("the message", || signal.take() == 1);
    // The host enables interrupts anew after power on, and then hears of the loss.
    d.card.power_cut();
    assert_eq!(signal.take(), 0);
    d.write32(offset::INTEN, Event::ALL);
    assert_eq!(signal.take(), 1);
    assert_eq!(
        (d.event(), d.outcome()),
        (Event::new().with_power(true), outcome::RESTORED)
    );
    let sent = rig.fabric.traffic();
    sent.check().unwrap();
}

#[test]
fn bad_sizes_and_places_are_refused_in_one_sentence() {
    let complaint = |config| NvramCard::new(config).err().unwrap().to_string();
    for size in [
        0,
        4096,
        MIN_SIZE / 2,
        MIN_SIZE + 4096,
        2 * MAX_SIZE,
        u64::MAX,
    ] {
        let said = complaint(NvramConfig::memory("nv0", size));
        assert!(
            said.contains("`nv0`") && said.contains("64 MiB to 8 GiB"),
            "{said}"
        );
    }
    for size in [MIN_SIZE, MAX_SIZE] {
        NvramCard::new(NvramConfig::memory("nv0", size)).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let said = complaint(NvramConfig::file("nv0", folder.path().join("none"), SIZE));
    assert!(
        said.contains("none`") && said.contains("No such file"),
        "{said}"
    );
    std::fs::write(folder.path().join("short"), [0; 4096]).unwrap();
    let said = complaint(NvramConfig::file("nv0", folder.path().join("short"), SIZE));
    assert!(said.contains("shorter"), "{said}");
    let said = complaint(NvramConfig::file("nv0", folder.path(), SIZE));
    assert!(said.contains("directory"), "{said}");
}

/// An access of any shape to any BAR.
#[derive(Clone, Debug)]
enum Step {
    Read(u8, u64, usize),
    Write(u8, u64, Vec<u8>),
    Break(usize, bool),
    Cut,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let at = prop_oneof![
        0u64..0x80,
        0x1ff0u64..0x4010,
        any::<u64>(),
        Just(SIZE - 3),
        0..SIZE
    ];
    let bar = prop_oneof![5 => Just(0u8), 2 => Just(4u8), 1 => any::<u8>()];
    let data = prop_oneof![
        any::<[u8; 4]>().prop_map(Vec::from),
        any::<[u8; 8]>().prop_map(Vec::from),
        proptest::collection::vec(any::<u8>(), 0..40)
    ];
    prop_oneof![
        6 => (bar.clone(), at.clone(), 0usize..40).prop_map(|(b, a, l)| Step::Read(b, a, l)),
        12 => (bar, at, data).prop_map(|(b, a, d)| Step::Write(b, a, d)),
        1 => (0usize..3, any::<bool>()).prop_map(|(f, b)| Step::Break(f, b)),
        1 => Just(Step::Cut),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does, the card answers afterwards, says what it is, and is armed only if it could save.
    #[test]
    fn no_sequence_of_accesses_harms_the_card(steps in proptest::collection::vec(step(), 1..60)) {
        let mut rig = Rig::new();
        let d = rig.plug(config());
        for step in steps {
            match step {
                Step::Read(bar, at, length) => {
                    let _ = d.function.bar_read(bar, at, &mut vec![0; length]);
                }
                Step::Write(bar, at, data) => {
                    let _ = d.function.bar_write(bar, at, &data);
                }
                Step::Break(index, true) => d.card.inject(Fault::ALL[index].1),
                Step::Break(index, false) => d.card.repair(Fault::ALL[index].1),
                Step::Cut => d.card.power_cut(),
                Step::Reset => d.function_level_reset(),
            }
        }
        d.wait_idle();
        prop_assert_eq!(d.read32(offset::ID), ID);
        prop_assert_eq!(d.read64(offset::SIZE), SIZE);
        let (sts, health, ctrl) = (d.status(), d.health(), d.read32(offset::CTRL));
        prop_assert_eq!(sts.into_bits() & !1, 0);
        prop_assert!(ctrl <= 1);
        prop_assert!(!sts.armed() || (ctrl == 1 && !health.cap() && !health.flash()));
        prop_assert_eq!(
            d.read64(offset::POWER_CUTS),
            d.read64(offset::RESTORES) + d.read64(offset::LOSSES)
        );
        d.store(0, &[5; 8]);
        prop_assert_eq!(d.load(0, 8), [5; 8]);
        rig.fabric.traffic().check().unwrap();
    }
}
