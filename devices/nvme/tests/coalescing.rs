//! Interrupt coalescing: completions wait for company, and not for long.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::fs::File;
use std::time::{Duration, Instant};

use driver::{Driver, Rig, config, take_events, wait_until};
use p2plab_nvme::spec::command::{feature, io};

/// Aggregation Time, the longest there is, and the same as a duration.
const TIME: u32 = 255 << 8;
const LONGEST: Duration = Duration::from_micros(25_500);

/// A disk with one queue pair, and the interrupt of its completions.
fn plug(rig: &mut Rig) -> (Driver, File) {
    let mut d = rig.plug(config("coalescing"));
    let event = d.enable_msix(1);
    d.enable();
    d.create_queues(1, 256, None).unwrap();
    (d, event)
}

/// Submits a read, and returns when its completion is there. The host does not consume it.
fn read_one(d: &mut Driver) {
    let buffer = 0x1000;
    let command = d.transfer(io::READ, 0, 1, buffer);
    d.submit(1, command);
    let (cq, tail) = (d.queue(1).cq, d.queue(1).tail);
    // In the first round the phase tag is 1.
    let status = cq + (u64::from(tail) - 1) * 16 + 14;
    wait_until("a completion", || {
        (d.load(status, 1)[0] & 1 == 1).then_some(())
    });
}

fn wait_for_interrupt(event: &File) {
    wait_until("an interrupt", || (take_events(event) > 0).then_some(()));
}

/// Interrupts for 64 reads, one after the other, and the most that there may be with a threshold of 8: each time that
/// passes makes one more.
fn interrupts(d: &mut Driver, event: &File) -> (u64, u64) {
    take_events(event);
    let start = Instant::now();
    (0..64).for_each(|_| read_one(d));
    let periods = start.elapsed().as_micros() / LONGEST.as_micros();
    // Those of the last completions are on their way.
    std::thread::sleep(2 * LONGEST);
    (take_events(event), 8 + periods as u64 + 1)
}

#[test]
fn a_threshold_makes_one_interrupt_of_many() {
    let mut rig = Rig::new();
    let (mut d, event) = plug(&mut rig);
    // A command that is quick to follow may share the interrupt of the one before.
    assert!(interrupts(&mut d, &event).0 > 32, "none is coalesced yet");
    d.set_feature(feature::INTERRUPT_COALESCING, TIME | 7)
        .unwrap();
    let (count, most) = interrupts(&mut d, &event);
    assert!((8..=most).contains(&count), "{count} of at most {most}");
    // Not on this vector.
    let disable = 1 << 16 | 1;
    d.set_feature(feature::INTERRUPT_VECTOR_CONFIG, disable)
        .unwrap();
    assert!(interrupts(&mut d, &event).0 > 32);
}

#[test]
fn a_completion_alone_waits_its_time() {
    let mut rig = Rig::new();
    let (mut d, event) = plug(&mut rig);
    d.set_feature(feature::INTERRUPT_COALESCING, TIME | 255)
        .unwrap();
    for _ in 0..20 {
        let start = Instant::now();
        read_one(&mut d);
        wait_for_interrupt(&event);
        assert!(start.elapsed() >= LONGEST, "{:?}", start.elapsed());
    }
    // A queue that is made afterwards is no exception.
    let second = d.enable_msix(2);
    d.create_queues(2, 16, None).unwrap();
    let start = Instant::now();
    let command = d.transfer(io::READ, 0, 1, 0x1000);
    d.submit(2, command);
    wait_for_interrupt(&second);
    assert!(start.elapsed() >= LONGEST);
    // Without coalescing nothing is left waiting.
    read_one(&mut d);
    d.set_feature(feature::INTERRUPT_COALESCING, 0).unwrap();
    wait_for_interrupt(&event);
}

/// A host that polls has found its completions before they are due: it is not interrupted for nothing.
#[test]
fn consumed_completions_do_not_interrupt() {
    let mut rig = Rig::new();
    let (mut d, event) = plug(&mut rig);
    d.set_feature(feature::INTERRUPT_COALESCING, TIME | 255)
        .unwrap();
    let mut quick = 0;
    for _ in 0..20 {
        let start = Instant::now();
        d.read(0, 1, 0x1000).unwrap();
        let in_time = start.elapsed() < LONGEST / 2;
        std::thread::sleep(2 * LONGEST);
        let count = take_events(&event);
        if in_time {
            quick += 1;
            assert_eq!(count, 0);
        }
    }
    assert!(quick > 0, "this host is too slow for this test");
}

/// Completions that fill their queue interrupt: nothing can join them.
#[test]
fn a_full_queue_does_not_wait() {
    let mut rig = Rig::new();
    let (mut d, _) = plug(&mut rig);
    d.set_feature(feature::INTERRUPT_COALESCING, TIME | 255)
        .unwrap();
    let command = d.transfer(io::READ, 0, 1, 0x1000);
    let mut soon = 0;
    for id in 2..12 {
        let event = d.enable_msix(id);
        d.create_queues(id, 4, None).unwrap();
        let index = usize::from(id);
        let start = Instant::now();
        // Three fill the completion queue, the fourth finds it full.
        for n in 0..3 {
            d.submit(index, command);
            let status = d.queue(index).cq + n * 16 + 14;
            wait_until("a completion", || {
                (d.load(status, 1)[0] & 1 == 1).then_some(())
            });
        }
        d.submit(index, command);
        wait_for_interrupt(&event);
        soon += u32::from(start.elapsed() < LONGEST);
        (0..4).for_each(|_| assert!(d.complete(index).status().is_success()));
    }
    assert!(soon > 0);
}
