//! BAR 4: reached by the CPU and by peers, and counted; kept over everything but a loss of power that it was not armed
//! for.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use driver::{Driver, Mover, Rig, SIZE, pattern};
use p2plab_nvram::spec::{Event, offset, outcome};
use p2plab_nvram::{Fault, NvramConfig};
use p2plab_pcie::{BarBacking, CpuAccess, DmaError, DmaRange, ResetKind, TlpKind};

fn config() -> NvramConfig {
    NvramConfig::memory("nv0", SIZE)
}

fn range(address: u64, length: u64) -> DmaRange {
    DmaRange { address, length }
}

/// Memory Writes of the default Max_Payload_Size, 128 bytes, for `length` bytes at `address`: none crosses a multiple of
/// 4 KiB, and so none of 128 where the first begins at one.
fn packets(address: u64, length: u64) -> u64 {
    let mut count = 0;
    let (mut at, end) = (address, address + length);
    while at < end {
        let page = (at / 4096 + 1) * 4096;
        at = end.min(at + 128).min(page);
        count += 1;
    }
    count
}

#[test]
fn peers_write_and_read_it_and_the_switch_counts() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let (name, mover) = rig.plug_mover();
    let data = pattern(1, 1 << 20);
    let before = rig.fabric.traffic();
    let (mut bytes, mut writes) = (0, 0);
    // From its start, over its middle, to its last byte; aligned and not.
    for (at, length) in [
        (0, 1 << 20),
        (SIZE / 2 - 4099, 8197),
        (SIZE - 300, 300),
        (77, 1),
    ] {
        mover.port().write(d.memory + at, &data[..length]).unwrap();
        assert_eq!(d.load(at, length), data[..length], "{at:#x}");
        let mut back = vec![0; length];
        mover.port().read(d.memory + at, &mut back).unwrap();
        assert_eq!(back, data[..length]);
        bytes += length as u64;
        writes += packets(d.memory + at, length as u64);
    }
    let traffic = rig.fabric.traffic().since(&before);
    let written = traffic.between(&name, &d.name, TlpKind::MWr);
    assert_eq!((written.payload_bytes, written.tlps), (bytes, writes));
    let asked = traffic.between(&name, &d.name, TlpKind::MRd);
    assert_eq!(asked.requested_bytes, bytes);
    let sent = traffic.between(&d.name, &name, TlpKind::CplD);
    assert_eq!(sent.payload_bytes, bytes);
    // The CPU's accesses go through the USP; a peer's do not.
    let loaded = traffic.between(&d.name, "cpu", TlpKind::CplD).payload_bytes;
    assert_eq!(loaded, bytes);
    assert_eq!(traffic.upstream_payload_bytes(), loaded);
    traffic.check().unwrap();
}

/// Example 1 of the talk in small: one DMA in by Memory Writes, one out by Memory Reads.
#[test]
fn it_is_a_bounce_buffer() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let ((from, source), (to, destination)) = (rig.plug_mover(), rig.plug_mover());
    let data = pattern(9, 256 << 10);
    let before = rig.fabric.traffic();
    source.port().write(d.memory + 4096, &data).unwrap();
    let mut arrived = vec![0; data.len()];
    destination
        .port()
        .read(d.memory + 4096, &mut arrived)
        .unwrap();
    assert_eq!(arrived, data);
    let traffic = rig.fabric.traffic().since(&before);
    let length = data.len() as u64;
    let tally = |a: &str, b: &str, kind| traffic.between(a, b, kind);
    assert_eq!(tally(&from, &d.name, TlpKind::MWr).payload_bytes, length);
    assert_eq!(tally(&to, &d.name, TlpKind::MRd).requested_bytes, length);
    assert_eq!(tally(&d.name, &to, TlpKind::CplD).payload_bytes, length);
    assert_eq!(traffic.upstream_payload_bytes(), 0);
}

/// Bytes move between two ranges of it, and past its end there is nobody.
#[test]
fn what_leaves_it_is_refused() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let (_, mover) = rig.plug_mover();
    let data = pattern(4, 8192);
    d.store(0, &data);
    mover
        .port()
        .move_between(
            &[range(d.memory, 8192)],
            &[range(d.memory + SIZE - 8192, 8192)],
        )
        .unwrap();
    assert_eq!(d.load(SIZE - 8192, 8192), data);
    let end = d.memory + SIZE;
    for (at, length) in [(end - 1, 2), (end, 1), (d.memory - 1, 2)] {
        let refused = mover.port().write(at, &vec![9; length]);
        assert!(matches!(refused, Err(DmaError::UnsupportedRequest { .. })));
    }
    // Nothing of a DMA moves that cannot move whole.
    assert_eq!(d.load(SIZE - 8192, 8192), data);
    assert!(d.function.bar_read(4, SIZE - 1, &mut [0; 2]).is_err());
    assert!(d.function.bar_write(4, SIZE, &[0]).is_err());
    assert!(d.function.bar_write(4, u64::MAX, &[0]).is_err());
}

#[test]
fn without_memory_space_enable_or_in_d3_nobody_answers() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let (_, mover) = rig.plug_mover();
    d.store(0, &[1; 8]);
    let refused = |d: &Driver, mover: &Mover| {
        assert!(mover.port().write(d.memory, &[2; 8]).is_err());
        d.store(0, &[2; 8]);
        assert_eq!(d.load(0, 8), [0xff; 8]);
    };
    d.function.config_write(4, &0u16.to_le_bytes()).unwrap();
    refused(&d, &mover);
    d.function.config_write(4, &6u16.to_le_bytes()).unwrap();
    assert_eq!(d.load(0, 8), [1; 8]);
    let power = d.capability(1) + 4;
    d.function.config_write(power, &3u16.to_le_bytes()).unwrap();
    refused(&d, &mover);
    d.function.config_write(power, &0u16.to_le_bytes()).unwrap();
    assert_eq!(d.load(0, 8), [1; 8]);
    assert!(d.status().armed());
}

#[test]
fn resets_keep_the_contents_and_the_arming() {
    for armed in [true, false] {
        let mut rig = Rig::new();
        let mut config = config();
        config.armed = armed;
        let d = rig.plug(config);
        let data = pattern(3, 4096);
        d.store(SIZE - 4096, &data);
        d.arm(!armed);
        for (count, kind) in (1..).zip([
            ResetKind::FunctionLevel,
            ResetKind::Conventional,
            ResetKind::ConnectionLost,
        ]) {
            d.write32(offset::INTEN, 1);
            d.function.reset(kind);
            d.set_up();
            d.wait_idle();
            assert_eq!(d.load(SIZE - 4096, 4096), data, "{kind:?}");
            assert_eq!(d.status().armed(), !armed);
            assert_eq!(d.read32(offset::INTEN), 0);
            assert_eq!(d.read64(offset::RESETS), count);
        }
        assert_eq!(d.outcome(), outcome::NONE);
    }
}

#[test]
fn an_armed_card_keeps_its_contents_when_the_power_fails() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    let data = pattern(5, 1 << 20);
    d.store(1 << 20, &data);
    for count in 1..3 {
        d.card.power_cut();
        assert_eq!(d.load(1 << 20, 1 << 20), data);
        assert_eq!(d.outcome(), outcome::RESTORED);
        assert_eq!(d.event(), Event::new().with_power(true));
        assert_eq!(d.read64(offset::POWER_CUTS), count);
        assert_eq!(d.read64(offset::RESTORES), count);
    }
}

/// Something that keeps the card from saving, and what PFAIL says of it.
type Way = (&'static str, fn(&Driver), u8);

#[test]
fn a_card_that_cannot_save_loses_its_contents() {
    let ways: [Way; 5] = [
        ("disarmed", |d| d.arm(false), outcome::DISARMED),
        (
            "no capacitor",
            |d| d.card.inject(Fault::Capacitor),
            outcome::FAILED,
        ),
        ("no flash", |d| d.card.inject(Fault::Flash), outcome::FAILED),
        (
            "the save fails",
            |d| d.card.inject(Fault::Medium),
            outcome::FAILED,
        ),
        (
            "disarmed and broken",
            |d| {
                d.arm(false);
                d.card.inject(Fault::Flash);
            },
            outcome::DISARMED,
        ),
    ];
    for (count, (what, prepare, expected)) in (1..).zip(ways) {
        let mut rig = Rig::new();
        let d = rig.plug(config());
        d.store(4096, &[7; 4096]);
        prepare(&d);
        d.card.power_cut();
        assert_eq!(d.load(4096, 4096), [0xff; 4096], "{what}");
        // What nobody wrote.
        assert_eq!(d.load(SIZE / 2, 8), [0; 8], "{what}");
        assert_eq!(d.outcome(), expected, "{what}");
        let counted = (d.read64(offset::RESTORES), d.read64(offset::LOSSES));
        assert_eq!(counted, (0, 1), "{what}, {count}");
        // After power on it is armed as configured, if it can be.
        let broken = !d.card.faults().is_empty() && d.card.faults() != [Fault::Medium];
        assert_eq!(d.status().armed(), !broken, "{what}");
    }
}

/// A peer writes while the power fails, again and again: afterwards there is nothing of the time before.
#[test]
fn dma_that_is_under_way_does_not_outlast_a_loss() {
    let mut rig = Rig::new();
    let mut config = config();
    config.armed = false;
    let d = rig.plug(config);
    let (_, mover) = rig.plug_mover();
    // The number of the last write that has begun.
    let (stop, begun) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let number = begun.fetch_add(1, Ordering::SeqCst) + 1;
                // Refused while the power is off.
                let _ = mover
                    .port()
                    .write(d.memory, &number.to_le_bytes().repeat(512));
            }
        });
        for _ in 0..50 {
            let before = begun.load(Ordering::SeqCst);
            driver::wait_until("a write", || begun.load(Ordering::SeqCst) > before + 2);
            let before = begun.load(Ordering::SeqCst);
            d.card.power_cut();
            for word in d.load(0, 4096).chunks_exact(8) {
                // The one that had begun may have found the power back.
                let number = u64::from_le_bytes(word.try_into().unwrap());
                assert!(number >= before, "{number} after {before}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    d.card.power_cut();
    assert_eq!(d.load(0, 4096), [0xff; 4096]);
    assert_eq!(d.read64(offset::LOSSES), 51);
    rig.fabric.traffic().check().unwrap();
}

#[test]
fn a_card_outlives_its_slot() {
    let mut rig = Rig::new();
    let d = rig.plug(config());
    d.store(0, &[4; 64]);
    d.arm(false);
    let (card, name) = (Arc::clone(&d.card), d.name.clone());
    rig.fabric.unplug(&name).unwrap();
    assert_eq!(d.load(0, 4), [0xff; 4]);
    card.power_cut();
    let d = rig.plug_card(card);
    assert_eq!(d.outcome(), outcome::DISARMED);
    assert_eq!(d.load(0, 64), [0xff; 64]);
    d.flush();
}

#[test]
fn the_cpu_reaches_it_as_configured() {
    for access in [CpuAccess::Trapped, CpuAccess::Mapped] {
        let mut rig = Rig::new();
        let mut config = config();
        config.cpu_access = access;
        let d = rig.plug(config);
        let bars = &d.function.declaration().bars;
        let bar = bars.iter().find(|bar| bar.index == 4).unwrap();
        assert_eq!((bar.cpu_access, bar.size), (access, SIZE));
        assert!(matches!(bar.backing, BarBacking::Memory(_)));
    }
}
