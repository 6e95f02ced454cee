//! Resets of every kind at any moment under load: each ends in time, nothing of before is completed afterwards, and
//! the disk works again.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use driver::{Driver, HOST_MEMORY, Rig, SetOnDrop, config, pattern, wait_until};
use p2plab_nvme::PmrConfig;
use p2plab_nvme::spec::command::io;
use p2plab_nvme::spec::registers::{Cap, Cc, Csts, NSSR_MAGIC, offset, shst};
use p2plab_pcie::{Endpoint, ResetKind};

/// What ends the work of a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Disable,
    Subsystem,
    FunctionLevel,
    Conventional,
    PowerCut,
    NormalShutdown,
    AbruptShutdown,
}

const ENDS: [End; 7] = [
    End::Disable,
    End::Subsystem,
    End::FunctionLevel,
    End::Conventional,
    End::PowerCut,
    End::NormalShutdown,
    End::AbruptShutdown,
];

fn shut_down(d: &Driver, notification: u8) {
    let cc = Cc::from_bits(d.read32(offset::CC)).with_shn(notification);
    d.write32(offset::CC, cc.into_bits());
    d.wait_status("CSTS.SHST", |csts| csts.shst() == shst::COMPLETE);
}

/// Returns when the host may reuse the memory of its queues.
fn end(d: &mut Driver, end: End) {
    match end {
        End::Disable => d.disable(),
        End::Subsystem => {
            d.write32(offset::NSSR, NSSR_MAGIC);
            d.wait_status("CSTS.NSSRO", |csts| csts.nssro() && !csts.rdy());
        }
        End::FunctionLevel => d.flr(),
        End::Conventional => d.function.reset(ResetKind::Conventional),
        End::PowerCut => d.controller.power_cut(),
        End::NormalShutdown => shut_down(d, 1),
        End::AbruptShutdown => shut_down(d, 2),
    }
}

/// 280 rounds: four queues full of commands, and the end at a moment that differs from round to round.
#[test]
fn every_end_at_any_moment_under_load() {
    const QUEUES: u16 = 4;
    let started = Instant::now();
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.pmr = Some(PmrConfig::memory(1 << 20));
    let mut d = rig.plug(cfg);
    let buffer = d.pages(64);
    let first = d.pages(0);
    for round in 0..280u32 {
        let how = ENDS[round as usize % ENDS.len()];
        d.rewind(first);
        d.enable_cmb();
        d.enable();
        for id in 1..=QUEUES {
            let inside = d.cmb_address + u64::from(id) * 0x2000;
            // Some queues in the CMB, which is what a reset takes away under them.
            let (sq, cq) = match (id, round % 2) {
                (1, _) => (Some(inside), Some(inside + 0x1000)),
                (2, 0) => (Some(inside), None),
                _ => (None, None),
            };
            d.create_queues_at(id, 64, sq, cq).unwrap();
        }
        for queue in 1..=usize::from(QUEUES) {
            let opcode = if queue == 3 { io::WRITE } else { io::READ };
            let command = d.transfer(opcode, 0, 64 << (queue % 3), buffer);
            for _ in 0..60 {
                d.push(queue, command);
            }
            d.ring_doorbell(queue);
        }
        if round % 3 > 0 {
            d.complete(1 + round as usize % usize::from(QUEUES));
        }
        std::thread::sleep(Duration::from_micros(u64::from(round * 37 % 900)));
        end(&mut d, how);

        // From here on the memory is the host's: whatever is written there now is stale.
        let queues: Vec<(u64, u64)> = d.io_queues.iter().map(|q| (q.cq, q.sq)).collect();
        let outside = |address: &u64| *address < d.cmb_address;
        let mine: Vec<u64> = queues.iter().map(|(cq, _)| *cq).filter(outside).collect();
        for cq in &mine {
            d.store(*cq, &[0xee; 1024]);
        }
        d.store(buffer, &vec![0xee; 64 << 12]);
        std::thread::sleep(Duration::from_micros(200));
        for cq in &mine {
            assert!(d.load(*cq, 1024).iter().all(|b| *b == 0xee), "{how:?}");
        }
        assert!(
            d.load(buffer, 64 << 12).iter().all(|b| *b == 0xee),
            "{how:?}"
        );
        recover(&mut d, how);
    }
    assert!(started.elapsed() < Duration::from_secs(60));
}

/// What the registers say after `how`, and a disk that works.
fn recover(d: &mut Driver, how: End) {
    match how {
        End::NormalShutdown | End::AbruptShutdown => {
            assert!(d.status().rdy());
            d.disable();
            assert_eq!(d.status().shst(), shst::NORMAL);
        }
        End::FunctionLevel | End::Conventional => d.restore_config_space(),
        End::Disable | End::Subsystem | End::PowerCut => {}
    }
    let kept = how == End::Disable
        || matches!(
            how,
            End::NormalShutdown | End::AbruptShutdown | End::FunctionLevel
        );
    assert_eq!(d.read32(offset::CMBSZ) != 0, kept, "{how:?}");
    let nssro = Csts::new().with_nssro(how == End::Subsystem);
    assert_eq!(d.status(), nssro, "{how:?}");
    if how == End::Subsystem {
        d.enable();
        assert!(d.status().nssro(), "until the host clears it");
        d.write32(offset::CSTS, nssro.into_bits());
        assert!(!d.status().nssro());
        d.disable();
    }
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    let page = d.pages(1);
    let data = pattern(1, 4096);
    d.store(page, &data);
    d.write(1000, 8, page).unwrap();
    d.store(page, &[0; 4096]);
    d.read(1000, 8, page).unwrap();
    assert!(d.load(page, 4096) == data);
    d.disable();
}

/// Resets from one thread and doorbells from another: what is bad about them is refused, and nothing hangs.
#[test]
fn resets_race_with_doorbells_and_register_writes() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    let first = d.pages(0);
    let stop = AtomicBool::new(false);
    let function = std::sync::Arc::clone(&d.function);
    let controller = std::sync::Arc::clone(&d.controller);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u32;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_add(1);
                let at = offset::DOORBELLS + u64::from(n % 6) * 4;
                let _ = function.bar_write(0, at, &(n % 40).to_le_bytes());
            }
        });
        let _stop = SetOnDrop(&stop);
        for round in 0..200 {
            d.rewind(first);
            d.restore_config_space();
            d.write32(offset::CC, 0);
            let _ = d.status();
            // Where the driver has nothing else.
            d.write32(offset::AQA, 0x1f_001f);
            d.write64(offset::ASQ, HOST_MEMORY - 0x2000);
            d.write64(offset::ACQ, HOST_MEMORY - 0x1000);
            d.write32(offset::CC, 0x46_0001);
            match round % 4 {
                0 => d.flr(),
                1 => controller.power_cut(),
                2 => d.write32(offset::NSSR, NSSR_MAGIC),
                _ => function.reset(ResetKind::Conventional),
            }
        }
    });
    wait_until("the last subsystem reset", || {
        d.restore_config_space();
        (d.read32(offset::CC) == 0).then_some(())
    });
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    let page = d.pages(1);
    d.read(0, 8, page).unwrap();
}

#[test]
fn only_the_magic_number_resets_the_subsystem() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    assert!(Cap::from_bits(u64::from(d.read32(offset::CAP + 4)) << 32).nssrs());
    d.enable();
    for value in [0, 1, NSSR_MAGIC + 1, NSSR_MAGIC.swap_bytes()] {
        d.write32(offset::NSSR, value);
    }
    assert_eq!(d.read32(offset::NSSR), 0);
    d.create_queues(1, 16, None).unwrap();
    assert!(d.status().rdy() && !d.status().nssro());
}

/// What was acknowledged before a shutdown is there afterwards, nothing is acknowledged after it, and the CMB does
/// not survive a loss of power where everything else does.
#[test]
fn what_a_shutdown_and_a_power_cut_keep() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    let page = d.pages(1);
    d.store(page, &[5; 4096]);
    d.write(0, 8, page).unwrap();
    d.store(d.cmb_address, &[5; 16]);
    shut_down(&d, 1);
    let command = d.transfer(io::WRITE, 8, 8, page);
    d.submit(1, command);
    std::thread::sleep(Duration::from_millis(20));
    assert!(d.poll(1).is_none());
    d.controller.power_cut();
    let power = |d: &Driver| {
        let health = &d.controller.dump()["health"];
        ["power_cycles", "unsafe_shutdowns"].map(|name| health[name].as_u64())
    };
    assert_eq!(power(&d), [Some(2), Some(0)]);
    assert_eq!(d.load(d.cmb_address, 16), [0; 16]);
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    d.read(0, 8, page).unwrap();
    assert_eq!(d.load(page, 4096), [5; 4096]);
    d.read(8, 8, page).unwrap();
    assert_eq!(d.load(page, 4096), [0; 4096]);
    d.controller.power_cut();
    assert_eq!(power(&d), [Some(3), Some(1)], "nobody had shut it down");
}
