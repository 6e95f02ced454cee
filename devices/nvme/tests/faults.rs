//! Faults on demand, as a host meets them.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::time::{Duration, Instant};

use driver::{Driver, Rig, config, pattern, take_events, wait_until};
use p2plab_nvme::spec::command::{Command, admin, feature, io};
use p2plab_nvme::spec::registers::{Csts, offset};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Fault, FaultEffect, NamespaceConfig};

const READ_ERROR: Status = Status(Status::UNRECOVERED_READ_ERROR.code());
const WRITE_FAULT: Status = Status(Status::WRITE_FAULT.code());
const PROTECTED: Status = Status(Status::WRITE_PROTECTED.code());
/// Longer than any test may take: a wait that is not cut short is noticed.
const LONG: Duration = Duration::from_secs(3600);

fn ready(rig: &mut Rig) -> (Driver, u64) {
    let mut d = rig.plug(config("a"));
    enable(&mut d);
    let page = d.pages(1);
    (d, page)
}

fn enable(d: &mut Driver) {
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    d.create_queues(2, 16, None).unwrap();
}

fn fault(effect: FaultEffect, change: impl FnOnce(&mut Fault)) -> Fault {
    let mut fault = Fault::new(effect);
    change(&mut fault);
    fault
}

#[test]
fn a_status_for_some_blocks_some_times() {
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.namespaces.push(NamespaceConfig::memory(1 << 20));
    let rule = fault(FaultEffect::Status(Status::INTERNAL_ERROR), |f| {
        (f.opcode, f.nsid) = (Some(io::READ), Some(1));
        (f.lba, f.after, f.count) = (Some(100..=199), 1, Some(2));
    });
    // From the configuration, as from a running test.
    cfg.faults.push(rule.clone());
    let mut d = rig.plug(cfg);
    enable(&mut d);
    let page = d.pages(1);
    let failed = Err(Status(Status::INTERNAL_ERROR.code()));
    let met = |d: &mut Driver, blocks: [(u64, bool); 8]| {
        for (slba, meets) in blocks {
            let result = d.read(slba, 8, page);
            assert_eq!(result, if meets { failed } else { Ok(0) }, "block {slba}");
            d.write(slba, 8, page).unwrap();
            let mut other = d.transfer(io::READ, slba, 8, page);
            other.nsid = 2.into();
            d.execute(1, other).unwrap();
        }
    };
    let blocks = [
        (92, false),
        (93, false),
        (200, false),
        (199, true),
        (0, false),
        (150, true),
        (150, false),
        (100, false),
    ];
    met(&mut d, blocks);
    d.controller.faults().clear();
    let id = d.controller.faults().add(rule);
    met(&mut d, blocks);
    assert_eq!(d.controller.faults().hits(id), Some(2));
    assert_eq!(d.controller.faults().remove(id), Some(2));
}

/// A defect of the medium: its statuses, its counter in SMART, and a disk that works beside it.
#[test]
fn media_errors_follow_the_direction() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let lba = |f: &mut Fault| f.lba = Some(8..=8);
    d.controller
        .faults()
        .add(fault(FaultEffect::MediaError, lba));
    assert_eq!(d.read(0, 16, page), Err(READ_ERROR));
    assert_eq!(d.write(8, 1, page), Err(WRITE_FAULT));
    d.read(0, 8, page).unwrap();
    d.write(9, 1, page).unwrap();
    assert_eq!(smart(&mut d)[160], 2);
}

fn smart(d: &mut Driver) -> Vec<u8> {
    let page = d.pages(1);
    let log = Command {
        opcode: admin::GET_LOG_PAGE,
        nsid: u32::MAX.into(),
        prp1: page.into(),
        cdw10: (0x7f << 16 | 2).into(),
        ..Command::default()
    };
    d.admin(log).unwrap();
    d.load(page, 512)
}

#[test]
fn a_delay_is_one_queues_own() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let delay = FaultEffect::Delay(Duration::from_millis(150));
    let rule = |f: &mut Fault| (f.queue, f.count) = (Some(1), Some(1));
    d.controller.faults().add(fault(delay, rule));
    let start = Instant::now();
    let command = d.transfer(io::READ, 0, 8, page);
    d.submit(1, command);
    for _ in 0..10 {
        d.execute(2, command).unwrap();
    }
    assert!(d.poll(1).is_none() && start.elapsed() < Duration::from_millis(150));
    assert!(d.complete(1).status().is_success());
    assert!(start.elapsed() >= Duration::from_millis(150));
}

/// Every reset cuts a delay short, on I/O queues and on the admin queue.
#[test]
fn a_reset_does_not_wait_for_a_delay() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let start = Instant::now();
    for (queue, way) in [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2), (1, 3)] {
        let delay = fault(FaultEffect::Delay(LONG), |f| f.queue = Some(queue));
        let id = d.controller.faults().add(delay);
        let mut command = d.transfer(io::READ, 0, 8, page);
        if queue == 0 {
            command.opcode = admin::IDENTIFY;
            command.cdw10 = 1.into();
        }
        d.submit(usize::from(queue), command);
        wait_until("the fault", || {
            (d.controller.faults().hits(id) == Some(1)).then_some(())
        });
        match way {
            0 => d.disable(),
            1 => {
                d.flr();
                d.restore_config_space();
            }
            2 => d.controller.power_cut(),
            _ => {
                d.write32(offset::CC, d.read32(offset::CC) | 1 << 14);
                d.wait_status("CSTS.SHST", |csts| csts.shst() == 2);
                d.disable();
            }
        }
        d.controller.faults().clear();
        enable(&mut d);
        d.read(0, 8, page).unwrap();
    }
    d.controller
        .faults()
        .add(fault(FaultEffect::Delay(LONG), |f| {
            f.queue = Some(0);
        }));
    d.submit(0, Command::default());
    rig.fabric.unplug("nvme0").unwrap();
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_dropped_completion_leaves_the_data_and_the_queue() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let data = pattern(4, 4096);
    d.store(page, &data);
    let once = |f: &mut Fault| f.count = Some(1);
    let id = d
        .controller
        .faults()
        .add(fault(FaultEffect::DropCompletion, once));
    let command = d.transfer(io::WRITE, 0, 8, page);
    d.submit(1, command);
    wait_until("the fault", || {
        (d.controller.faults().hits(id) == Some(1)).then_some(())
    });
    // The queue's commands are executed in order: after this one the write has happened.
    let other = d.pages(1);
    d.read(0, 8, other).unwrap();
    // More than the queue has slots: the lost one's was given back.
    let command = d.transfer(io::READ, 0, 8, page);
    for _ in 0..40 {
        d.store(page, &[0; 4096]);
        d.execute(1, command).unwrap();
        assert!(d.load(page, 4096) == data);
    }
    assert!(d.poll(1).is_none());
}

#[test]
fn a_lost_interrupt_leaves_the_completion() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let event = d.enable_msix(1);
    let once = |f: &mut Fault| f.count = Some(1);
    d.controller
        .faults()
        .add(fault(FaultEffect::LoseInterrupt, once));
    let command = d.transfer(io::READ, 0, 8, page);
    d.execute(1, command).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(take_events(&event), 0);
    d.execute(1, command).unwrap();
    wait_until("an interrupt", || (take_events(&event) > 0).then_some(()));
    // The admin queue's, too.
    let event = d.enable_msix(0);
    let rule = |f: &mut Fault| (f.queue, f.count) = (Some(0), Some(1));
    d.controller
        .faults()
        .add(fault(FaultEffect::LoseInterrupt, rule));
    let features = Command {
        opcode: admin::GET_FEATURES,
        cdw10: 7.into(),
        ..Command::default()
    };
    d.admin(features).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(take_events(&event), 0);
    d.admin(features).unwrap();
    wait_until("an interrupt", || (take_events(&event) > 0).then_some(()));
}

#[test]
fn a_fatal_controller_completes_nothing_until_a_reset() {
    let mut rig = Rig::new();
    for queue in [1, 0] {
        if queue == 0 {
            rig = Rig::new();
        }
        let (mut d, page) = ready(&mut rig);
        let fatal = fault(FaultEffect::Fatal, |f| {
            (f.queue, f.after) = (Some(queue), 1);
        });
        d.controller.faults().add(fatal);
        let command = match queue {
            0 => Command {
                opcode: admin::GET_FEATURES,
                cdw10: 7.into(),
                ..Command::default()
            },
            _ => d.transfer(io::READ, 0, 8, page),
        };
        let index = usize::from(queue);
        d.execute(index, command).unwrap();
        d.submit(index, command);
        d.wait_status("CSTS.CFS", |csts| csts.cfs());
        let command = d.transfer(io::READ, 0, 8, page);
        d.submit(2, command);
        std::thread::sleep(Duration::from_millis(20));
        assert!(d.poll(index).is_none() && d.poll(2).is_none());
        d.controller.faults().clear();
        d.disable();
        enable(&mut d);
        d.read(0, 8, page).unwrap();
    }
}

#[test]
fn a_disk_that_turns_read_only() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let later = |f: &mut Fault| f.after = 2;
    d.controller
        .faults()
        .add(fault(FaultEffect::ReadOnly, later));
    for _ in 0..2 {
        d.write(0, 8, page).unwrap();
        d.read(0, 8, page).unwrap();
    }
    assert_eq!(smart(&mut d)[0] & 8, 0);
    for _ in 0..3 {
        assert_eq!(d.write(0, 8, page), Err(PROTECTED));
        d.read(0, 8, page).unwrap();
    }
    assert_eq!(smart(&mut d)[0] & 8, 8);
}

/// A host that wants to hears of it, each time that it happens.
#[test]
fn a_disk_that_turns_read_only_is_an_event() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    d.set_feature(feature::ASYNC_EVENT_CONFIG, 8).unwrap();
    for _ in 0..2 {
        let request = d.request_event();
        let fault = Fault::new(FaultEffect::ReadOnly);
        let id = d.controller.faults().add(fault);
        assert_eq!(d.poll_event(request), None);
        assert_eq!(d.write(0, 8, page), Err(PROTECTED));
        assert_eq!(d.event(request), 0x0002_0001);
        assert_eq!(smart(&mut d)[0] & 8, 8);
        d.controller.faults().remove(id).unwrap();
        assert_eq!(smart(&mut d)[0] & 8, 0);
    }
}

/// A command that waits can be taken back: it is not executed, and says so.
#[test]
fn a_delayed_command_can_be_aborted() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    let rule = |f: &mut Fault| (f.queue, f.count) = (Some(1), Some(1));
    let delay = fault(FaultEffect::Delay(LONG), rule);
    d.controller.faults().add(delay);
    d.store(page, &[7; 4096]);
    let command = d.transfer(io::WRITE, 0, 8, page);
    let cid = d.submit(1, command);
    let which = u32::from(cid) << 16 | 1;
    // Until it waits there is nothing to abort.
    wait_until("the command to wait", || {
        (d.simple_admin(admin::ABORT, 0, [which, 0, 0]) == Ok(0)).then_some(())
    });
    let aborted = d.complete(1);
    assert_eq!((aborted.cid.get(), aborted.status().code()), (cid, 7));
    assert_eq!(d.simple_admin(admin::ABORT, 0, [which, 0, 0]), Ok(1));
    d.read(0, 8, page).unwrap();
    assert_eq!(d.load(page, 4096), [0; 4096]);
}

#[test]
fn a_power_cut_in_the_middle_of_the_work() {
    let mut rig = Rig::new();
    let (mut d, page) = ready(&mut rig);
    d.store(page, &[3; 4096]);
    d.write(0, 8, page).unwrap();
    for queue in [1, 0] {
        let cut = fault(FaultEffect::PowerCut, |f| {
            (f.queue, f.after, f.count) = (Some(queue), 5, Some(1));
        });
        let id = d.controller.faults().add(cut);
        let command = match queue {
            0 => Command {
                opcode: admin::GET_FEATURES,
                cdw10: 7.into(),
                ..Command::default()
            },
            _ => d.transfer(io::READ, 0, 8, page),
        };
        for _ in 0..12 {
            d.push(queue.into(), command);
        }
        d.ring_doorbell(queue.into());
        d.wait_status("the end", |csts| csts == Csts::new());
        assert_eq!(d.controller.faults().hits(id), Some(1));
        // Polling rings a doorbell: of a queue that is no more, which nobody minds.
        let completed = std::iter::from_fn(|| d.poll(queue.into())).count();
        assert_eq!(completed, 5);
        assert_eq!(d.read32(offset::CC), 0);
        d.controller.faults().clear();
        enable(&mut d);
        d.read(0, 8, page).unwrap();
        assert_eq!(d.load(page, 4096), [3; 4096]);
    }
}
