use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

use super::raw::*;

const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;
const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;

fn set(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

fn events(count: usize) -> Vec<File> {
    (0..count)
        .map(|_| File::from(eventfd(0, EventfdFlags::empty()).unwrap()))
        .collect()
}

fn count(mut event: &File) -> u64 {
    let mut bytes = [0; 8];
    match event.read_exact(&mut bytes) {
        Ok(()) => u64::from_ne_bytes(bytes),
        Err(_) => 0,
    }
}

#[test]
fn msix_vectors_are_connected_fired_and_taken_away() {
    let mut raw = Raw::new();
    let events = events(3);
    let fds: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
    assert_eq!(
        raw.call_with(SET_IRQS, &set(EVENTFD | TRIGGER, MSIX, 5, 3), &fds),
        Ok(vec![])
    );
    let flags = rustix::fs::fcntl_getfl(&events[0]).unwrap();
    assert!(flags.contains(OFlags::NONBLOCK));
    {
        let mut connected = raw.target.msix.lock().unwrap();
        assert!(connected[..5].iter().all(Option::is_none));
        connected[6]
            .as_mut()
            .unwrap()
            .write_all(&1u64.to_ne_bytes())
            .unwrap();
    }
    assert_eq!([0, 1, 2].map(|n| count(&events[n])), [0, 1, 0]);

    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | TRIGGER, MSIX, 6, 2)),
        Ok(vec![])
    );
    assert_eq!([0, 1, 2].map(|n| count(&events[n])), [0, 1, 1]);
    let mut some = words(&[23, BOOL | TRIGGER, MSIX, 5, 3]);
    some.extend([1, 0, 0xff]);
    assert_eq!(raw.call(SET_IRQS, &some), Ok(vec![]));
    assert_eq!([0, 1, 2].map(|n| count(&events[n])), [1, 0, 1]);

    // No descriptors: these are taken away. No count: all are.
    assert_eq!(
        raw.call(SET_IRQS, &set(EVENTFD | TRIGGER, MSIX, 5, 1)),
        Ok(vec![])
    );
    assert!(raw.target.msix.lock().unwrap()[5].is_none());
    assert!(raw.target.msix.lock().unwrap()[6].is_some());
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | TRIGGER, MSIX, 0, 0)),
        Ok(vec![])
    );
    assert!(raw.target.msix.lock().unwrap().iter().all(Option::is_none));
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | TRIGGER, MSIX, 0, 8)),
        Ok(vec![])
    );
    assert_eq!([0, 1, 2].map(|n| count(&events[n])), [0, 0, 0]);
}

#[test]
fn intx_is_connected_and_masked() {
    let mut raw = Raw::new();
    let event = &events(1)[0];
    let request = set(EVENTFD | TRIGGER, INTX, 0, 1);
    assert_eq!(
        raw.call_with(SET_IRQS, &request, &[event.as_fd()]),
        Ok(vec![])
    );
    assert!(raw.target.intx.lock().unwrap().is_some());
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | MASK, INTX, 0, 1)),
        Ok(vec![])
    );
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | UNMASK, INTX, 0, 1)),
        Ok(vec![])
    );
    for byte in [0, 1] {
        let mut request = words(&[21, BOOL | MASK, INTX, 0, 1]);
        request.push(byte);
        assert_eq!(raw.call(SET_IRQS, &request), Ok(vec![]));
    }
    assert_eq!(
        raw.target.take_log(),
        ["mask true", "mask false", "mask true"]
    );
    let resample = set(EVENTFD | UNMASK, INTX, 0, 1);
    assert_eq!(
        raw.call_with(SET_IRQS, &resample, &[event.as_fd()]),
        Err(EOPNOTSUPP)
    );
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | TRIGGER, INTX, 0, 0)),
        Ok(vec![])
    );
    assert!(raw.target.intx.lock().unwrap().is_none());
}

#[test]
fn bad_requests_are_refused() {
    let mut raw = Raw::new();
    let bad = [
        set(NONE | TRIGGER, MSIX, 8, 1),
        set(NONE | TRIGGER, MSIX, 0, 9),
        set(NONE | TRIGGER, MSIX, u32::MAX, 2),
        set(NONE | TRIGGER, MSI, 0, 1),
        set(NONE | TRIGGER, 5, 0, 0),
        set(NONE, MSIX, 0, 1),
        set(TRIGGER, MSIX, 0, 1),
        set(NONE | BOOL | TRIGGER, MSIX, 0, 1),
        set(NONE | MASK | TRIGGER, INTX, 0, 1),
        set(NONE | MASK, INTX, 0, 0),
        set(EVENTFD | TRIGGER, MSIX, 0, 0),
        set(NONE | TRIGGER | 0x40, MSIX, 0, 1),
        set(BOOL | TRIGGER, MSIX, 0, 1),
        words(&[19, NONE | TRIGGER, MSIX, 0, 1]),
        words(&[24, NONE | TRIGGER, MSIX, 0, 1]),
        words(&[20, NONE | TRIGGER, MSIX, 0]),
    ];
    for request in bad {
        assert_eq!(raw.call(SET_IRQS, &request), Err(EINVAL), "{request:?}");
    }
    assert_eq!(
        raw.call(SET_IRQS, &set(NONE | MASK, MSIX, 0, 1)),
        Err(EOPNOTSUPP)
    );
    let events = events(2);
    let fds: Vec<_> = events.iter().map(|event| event.as_fd()).collect();
    for (flags, count) in [(EVENTFD, 1), (EVENTFD, 3), (NONE, 2)] {
        let request = set(flags | TRIGGER, MSIX, 0, count);
        assert_eq!(raw.call_with(SET_IRQS, &request, &fds), Err(EINVAL));
    }
    raw.assert_in_step();
    assert!(raw.target.msix.lock().unwrap().iter().all(Option::is_none));
}

#[test]
fn the_request_interrupt_asks_for_release() {
    let mut raw = Raw::new();
    assert!(!raw.server.request_release());
    let event = &events(1)[0];
    let request = set(EVENTFD | TRIGGER, 4, 0, 1);
    assert_eq!(
        raw.call_with(SET_IRQS, &request, &[event.as_fd()]),
        Ok(vec![])
    );
    assert!(raw.server.request_release());
    assert_eq!(count(event), 1);
}
