//! Unsupported Requests: who answers, what is counted, and what both sides' error registers keep.
#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use p2plab_pcie::{DmaBuffers, DmaRange, Function, TlpKind};
use toy::{HOST, MIB, command, one_switch, plug};

const STATUS: u64 = 6;
const DEVICE_STATUS: u64 = 0x6a;
const MASTER_ABORT: u16 = 1 << 13;

fn register(function: &Function, offset: u64) -> u16 {
    let mut bytes = [0; 2];
    function.config_read(offset, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

/// As lspci would show it: the completer logs the request, the requester of a read its master abort.
#[test]
fn both_ends_of_a_refused_peer_request_log_it() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    command(&b.function, false, true);
    a.toy.port().write(b.memory, &[0; 4]).unwrap_err();
    // Unsupported Request, non-fatal; a posted request tells its requester nothing.
    assert_eq!(register(&b.function, DEVICE_STATUS), 0b1010);
    assert_eq!(register(&a.function, STATUS) & MASTER_ABORT, 0);
    b.function.config_write(DEVICE_STATUS, &[0xff, 0]).unwrap();
    a.toy.port().read(b.memory, &mut [0; 4]).unwrap_err();
    // Advisory, hence correctable.
    assert_eq!(register(&b.function, DEVICE_STATUS), 0b1001);
    assert_ne!(register(&a.function, STATUS) & MASTER_ABORT, 0);
    assert_eq!(register(&a.function, DEVICE_STATUS), 0);
    a.function.config_write(STATUS, &[0, 0x20]).unwrap();
    assert_eq!(register(&a.function, STATUS) & MASTER_ABORT, 0);
    // The header of the first error is kept: a write of one doubleword with a 64-bit address.
    let mut log = [0; 16];
    b.function.config_read(0x11c, &mut log).unwrap();
    assert_eq!(log[..4], 0x6000_0001u32.to_le_bytes());
    assert_eq!(log[8..12], ((b.memory >> 32) as u32).to_le_bytes());
}

/// Closed memory: Unsupported Request for a peer, all ones for the CPU; who has closed it can wait for those who
/// are still in it.
#[test]
fn closed_memory_refuses_and_settles() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let range = DmaRange {
        address: b.memory,
        length: 4,
    };
    let (inside, leave) = (Barrier::new(2), Barrier::new(2));
    let settled = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let source = |buffers: &DmaBuffers<'_>| {
                inside.wait();
                leave.wait();
                assert!(!settled.load(Ordering::SeqCst));
                buffers.fill_from_slice(&[7; 4])
            };
            a.toy.port().write_ranges(&[range], source).unwrap();
        });
        inside.wait();
        b.toy.memory.close();
        scope.spawn(|| {
            b.toy.port().settle();
            settled.store(true, Ordering::SeqCst);
        });
        leave.wait();
    });
    assert!(settled.load(Ordering::SeqCst));
    a.toy.port().write(b.memory, &[1; 4]).unwrap_err();
    a.toy.port().read(b.memory, &mut [0; 4]).unwrap_err();
    let mut data = [0; 4];
    b.function.bar_write(2, 0, &[1; 4]).unwrap();
    b.function.bar_read(2, 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    b.toy.memory.open_after(Duration::ZERO);
    b.function.bar_read(2, 0, &mut data).unwrap();
    assert_eq!(data, [7; 4], "the write that was under way, and no other");
}

/// An error is traffic, too: the request crossed every port on its way.
#[test]
fn what_the_cpu_is_refused_is_counted_on_the_way() {
    let fabric = one_switch(1);
    let a = plug(&fabric, "sw.0", "a", 0);
    command(&a.function, false, false);
    let before = fabric.traffic();
    a.function.bar_read(0, 0, &mut [0; 8]).unwrap();
    a.function.bar_write(0, 0, &[0; 4]).unwrap();
    let traffic = fabric.traffic().since(&before);
    traffic.check().unwrap();
    assert_eq!(traffic.port("a").unwrap().unsupported_requests, 2);
    let refused = traffic.between("a", "cpu", TlpKind::Cpl);
    assert_eq!((refused.tlps, refused.requested_bytes), (1, 8));
    assert_eq!(
        traffic.port("rp").unwrap().egress.posted.payload_bytes,
        4,
        "the write reached the function before it was dropped"
    );
}

/// A peer whose BAR lies inside host memory is met in the middle of a range, and left again.
#[test]
fn a_range_may_cross_from_host_memory_into_a_peer_and_back() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let inside = HOST + MIB / 2;
    b.function
        .config_write(0x10, &(inside as u32).to_le_bytes())
        .unwrap();
    b.function
        .config_write(0x14, &((inside >> 32) as u32).to_le_bytes())
        .unwrap();
    let before = fabric.traffic();
    let data: Vec<u8> = (0..0x8000u32).map(|i| (i / 7) as u8).collect();
    a.toy.port().write(inside - 0x2001, &data).unwrap();
    let traffic = fabric.traffic().since(&before);
    traffic.check().unwrap();
    let sent = |to| traffic.between("a", to, TlpKind::MWr).payload_bytes;
    assert_eq!((sent("memory"), sent("b")), (0x8000 - 0x4000, 0x4000));
    // The BAR's MSI-X table takes its part; the registers before it get theirs in one piece.
    let writes = b.toy.writes.lock().unwrap().clone();
    assert_eq!(writes[0].0, 0);
    assert_eq!(writes[0].1, data[0x2001..0x4001]);
    let mut back = vec![0; 0x8000];
    a.toy.port().read(inside - 0x2001, &mut back).unwrap();
    assert_eq!(back[..0x2001], data[..0x2001]);
    assert_eq!(back[0x6001..], data[0x6001..]);
    fabric.traffic().check().unwrap();
    // Without decoding, host memory lies below.
    command(&b.function, false, true);
    a.toy.port().read(inside - 0x2001, &mut back).unwrap();
}

#[test]
fn ranges_of_nothing_move_nothing() {
    let fabric = one_switch(1);
    let a = plug(&fabric, "sw.0", "a", 0);
    let before = fabric.traffic();
    let nothing = DmaRange {
        address: u64::MAX,
        length: 0,
    };
    a.toy.port().write(0, &[]).unwrap();
    a.toy.port().read(u64::MAX, &mut []).unwrap();
    a.toy.port().move_between(&[nothing], &[]).unwrap();
    assert_eq!(fabric.traffic(), before);
}

/// While software sizes the BARs of a new function they may lie over anything.
#[test]
fn a_bar_that_is_switched_off_is_in_nobodys_way() {
    let fabric = one_switch(3);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let c = plug(&fabric, "sw.2", "c", 2);
    command(&c.function, false, false);
    // c's registers, 16 KiB, in the middle of b's 2 MiB.
    let inside = b.memory + MIB;
    for (offset, word) in [(0x10, inside as u32), (0x14, (inside >> 32) as u32)] {
        c.function
            .config_write(offset, &word.to_le_bytes())
            .unwrap();
    }
    let all = vec![7; 2 * MIB as usize];
    a.toy.port().write(b.memory, &all).unwrap();
    // Switched on, it has its part, and b what lies before and behind.
    command(&c.function, true, false);
    a.toy.port().write(inside - 1, &[1; 0x4002]).unwrap();
    let mut edge = [0; 2];
    for (offset, expected) in [(MIB - 2, [7, 1]), (MIB + 0x4000, [1, 7])] {
        assert!(b.toy.memory.read(offset, &mut edge));
        assert_eq!(edge, expected);
    }
    assert_eq!(c.toy.writes.lock().unwrap()[0].0, 0);
    fabric.traffic().check().unwrap();
}

/// BARs at 0, at the top of the address space, and two at one address: nothing panics, and the laws hold.
#[test]
fn hostile_addresses_are_survived() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    for address in [0, u64::MAX, u64::MAX << 21, HOST, a.memory, a.registers] {
        for (offset, word) in [(0x18, address as u32), (0x1c, (address >> 32) as u32)] {
            b.function
                .config_write(offset, &word.to_le_bytes())
                .unwrap();
        }
        for start in [0, address, address.wrapping_sub(3), u64::MAX - 4] {
            let _ = a.toy.port().write(start, &[0; 4096]);
            let _ = a.toy.port().read(start, &mut [0; 4096]);
            let huge = DmaRange {
                address: start,
                length: u64::MAX,
            };
            let mut ran = false;
            let result = a.toy.port().write_ranges(&[huge], |_| {
                ran = true;
                Ok(())
            });
            assert!(result.is_err() && !ran);
        }
        let mut data = [0; 4];
        b.function.bar_read(2, 2 * MIB - 4, &mut data).unwrap();
        fabric.traffic().check().unwrap();
    }
}
