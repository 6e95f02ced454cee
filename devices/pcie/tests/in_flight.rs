//! What must wait for a DMA that is under way, and what must not.
#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use p2plab_pcie::{DmaError, DmaRange, Fabric, ResetKind};
use toy::{HOST, Plugged, command, one_switch, plug};

/// Longest wait for what must happen.
const SOON: Duration = Duration::from_secs(10);
/// How long to watch that something does not happen.
const A_WHILE: Duration = Duration::from_millis(50);

/// Does `action` while a DMA of `a`'s is under way: it must return after the DMA's end, and not before.
fn waits_for_dma(a: &Plugged, action: impl FnOnce() + Send) {
    let (inside, is_inside) = channel();
    let (release, released) = channel::<()>();
    let (done, is_done) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let range = DmaRange {
                address: HOST,
                length: 4096,
            };
            let result = a.toy.port().read_ranges(&[range], |buffers| {
                inside.send(()).unwrap();
                released.recv_timeout(SOON).expect("the test to go on");
                // The memory is still there.
                buffers.drain_to_slice(&mut [0; 4096])
            });
            result.unwrap();
        });
        is_inside.recv_timeout(SOON).unwrap();
        scope.spawn(move || {
            action();
            done.send(()).unwrap();
        });
        let early = is_done.recv_timeout(A_WHILE);
        release.send(()).unwrap();
        assert_eq!(early, Err(RecvTimeoutError::Timeout), "did not wait");
        is_done.recv_timeout(SOON).expect("an end after the DMA's");
    });
}

fn refused(a: &Plugged) -> DmaError {
    a.toy.port().read(HOST, &mut [0; 4]).unwrap_err()
}

#[test]
fn unmapping_waits_for_dma_and_nothing_touches_the_memory_afterwards() {
    let fabric = one_switch(1);
    let a = plug(&fabric, "sw.0", "a", 0);
    waits_for_dma(&a, || a.function.unmap_host_memory(HOST, 0x2000).unwrap());
    assert!(matches!(refused(&a), DmaError::UnsupportedRequest { .. }));
    fabric.traffic().check().unwrap();
}

#[test]
fn resets_and_switching_off_wait_for_dma() {
    let actions: [fn(&Fabric, &Plugged); 5] = [
        |_, a| command(&a.function, true, false),
        // D3hot.
        |_, a| a.function.config_write(0x44, &[3, 0]).unwrap(),
        // Function Level Reset.
        |_, a| a.function.config_write(0x69, &[0x80]).unwrap(),
        |_, a| a.function.disconnect(),
        |fabric, _| fabric.unplug("a").unwrap(),
    ];
    for action in actions {
        let fabric = one_switch(1);
        let a = plug(&fabric, "sw.0", "a", 0);
        waits_for_dma(&a, || action(&fabric, &a));
        assert!(matches!(
            refused(&a),
            DmaError::BusMasterDisabled | DmaError::LinkDown
        ));
        let traffic = fabric.traffic();
        traffic.check().unwrap();
        assert_eq!(
            traffic.port("a").unwrap().ingress.completion.payload_bytes,
            4096,
            "the DMA that was waited for is counted"
        );
    }
}

/// Reading the counters and reaching registers go on beside a long transfer.
#[test]
fn a_long_dma_holds_up_neither_readings_nor_register_accesses() {
    let fabric = one_switch(2);
    let a = plug(&fabric, "sw.0", "a", 0);
    let b = plug(&fabric, "sw.1", "b", 1);
    let range = DmaRange {
        address: b.memory,
        length: 4096,
    };
    let result = a.toy.port().write_ranges(&[range], |_| {
        std::thread::scope(|scope| {
            let (done, is_done) = channel();
            let (fabric, b) = (&fabric, &b);
            scope.spawn(move || {
                fabric.traffic().check().unwrap();
                b.function.bar_write(0, 0, &[1; 4]).unwrap();
                b.function.config_read(0, &mut [0; 4]).unwrap();
                b.toy.port().write(HOST, &[1; 4]).unwrap();
                done.send(()).unwrap();
            });
            is_done.recv_timeout(SOON).map_err(std::io::Error::other)
        })
    });
    result.unwrap();
    a.function.reset(ResetKind::Conventional);
    fabric.traffic().check().unwrap();
}
