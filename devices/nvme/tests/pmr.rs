//! The Persistent Memory Region: enabled and not, durable, reached by CPU, peer and the controller itself.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use driver::{Driver, Rig, SetOnDrop, config, pattern, wait_until};
use p2plab_nvme::spec::command::io;
use p2plab_nvme::spec::registers::{Cap, NSSR_MAGIC, PmrCap, PmrMsc, PmrSts, offset, pmrwbm};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{NvmeConfig, PmrConfig};

const SIZE: u64 = 2 << 20;
const REFUSED: Status = Status(Status::INVALID_USE_OF_CMB.code());
const UNREACHED: Status = Status(Status::DATA_TRANSFER_ERROR.code());

fn with_pmr(pmr: PmrConfig) -> NvmeConfig {
    let mut config = config("a");
    config.pmr = Some(pmr);
    config
}

fn status(d: &Driver) -> PmrSts {
    PmrSts::from_bits(d.read32(offset::PMRSTS))
}

fn enable(d: &Driver) {
    d.write32(offset::PMRCTL, 1);
    wait_until("PMRSTS.NRDY to clear", || (!status(d).nrdy()).then_some(()));
}

fn disable(d: &Driver) {
    d.write32(offset::PMRCTL, 0);
    wait_until("PMRSTS.NRDY", || status(d).nrdy().then_some(()));
}

fn open_window(d: &Driver, base: u64) {
    let control = PmrMsc::new().with_cmse(true).with_cba(base >> 12);
    d.write64(offset::PMRMSC, control.into_bits());
}

#[test]
fn registers_say_what_there_is() {
    let mut rig = Rig::new();
    let d = rig.plug(with_pmr(PmrConfig::memory(SIZE)));
    let cap = u64::from(d.read32(offset::CAP + 4)) << 32;
    assert!(Cap::from_bits(cap).pmrs());
    let cap = PmrCap::from_bits(d.read32(offset::PMRCAP));
    assert_eq!((cap.bir(), cap.pmrwbm()), (2, pmrwbm::READ_PMRSTS));
    assert!(cap.rds() && cap.wds() && cap.cmss());
    assert!(status(&d).nrdy());
    d.write32(offset::PMRCAP, 0);
    assert_eq!(d.read32(offset::PMRCAP), cap.into_bits());
    // Without one there is nothing to see, and nothing to write.
    let d = rig.plug(config("b"));
    d.write32(offset::PMRCTL, 1);
    open_window(&d, 0);
    for at in (0xe00..0xe20).step_by(4) {
        assert_eq!(d.read32(at), 0);
    }
}

#[test]
fn only_an_enabled_region_answers_cpu_and_peers() {
    let mut rig = Rig::new();
    let mut peer = rig.plug(config("b"));
    let mut pmr = PmrConfig::memory(SIZE);
    pmr.ready_after = Duration::from_millis(100);
    let d = rig.plug(with_pmr(pmr));
    peer.enable();
    peer.create_queues(1, 16, None).unwrap();
    let shut = |d: &Driver, peer: &mut Driver| {
        d.store(d.pmr_address, &[1; 8]);
        assert_eq!(d.load(d.pmr_address, 8), [0xff; 8]);
        assert_eq!(peer.read(0, 8, d.pmr_address), Err(UNREACHED));
        assert_eq!(peer.write(0, 8, d.pmr_address), Err(UNREACHED));
    };
    shut(&d, &mut peer);
    let start = Instant::now();
    d.write32(offset::PMRCTL, 1);
    assert!(status(&d).nrdy());
    shut(&d, &mut peer);
    enable(&d);
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert_eq!(d.load(d.pmr_address, 8), [0; 8]);
    d.store(d.pmr_address, &[7; 4096]);
    peer.write(8, 8, d.pmr_address).unwrap();
    peer.read(8, 8, d.pmr_address + 4096).unwrap();
    assert_eq!(d.load(d.pmr_address + 4096, 4096), [7; 4096]);
    disable(&d);
    shut(&d, &mut peer);
    enable(&d);
    assert_eq!(d.load(d.pmr_address, 8), [7; 8]);
}

/// The region as source and target of the controller's own commands: nothing leaves it.
#[test]
fn the_controllers_own_commands_reach_it_by_its_window() {
    let mut rig = Rig::new();
    let mut d = rig.plug(with_pmr(PmrConfig::memory(SIZE)));
    enable(&d);
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    // Without the window its addresses are nobody's, for this controller.
    assert_eq!(d.read(0, 8, d.pmr_address), Err(UNREACHED));
    open_window(&d, d.pmr_address);
    let data = pattern(1, 1 << 20);
    d.store(d.pmr_address, &data);
    d.controller.trace().enable(true);
    d.write(0, 2048, d.pmr_address).unwrap();
    d.read(0, 2048, d.pmr_address + (1 << 20)).unwrap();
    let log = d.controller.trace().take();
    assert!(
        log.entries
            .iter()
            .all(|e| e.data.iter().all(|r| r.internal))
    );
    assert!(d.load(d.pmr_address + (1 << 20), 1 << 20) == data);

    // Queues, lists, and mixtures have no place in it.
    let (pmr, page) = (d.pmr_address, d.pages(1));
    assert_eq!(d.create_queues(2, 16, Some(pmr)), Err(REFUSED));
    for other in [page, d.cmb_address] {
        let mut command = d.transfer(2, 0, 16, pmr);
        command.prp2 = other.into();
        assert_eq!(d.execute(1, command), Err(REFUSED));
    }
    let mut command = d.transfer(2, 0, 24, page);
    command.prp2 = pmr.into();
    assert_eq!(d.execute(1, command), Err(REFUSED));
    disable(&d);
    assert_eq!(d.read(0, 8, pmr), Err(REFUSED));
    // A controller reset leaves its registers alone.
    enable(&d);
    d.disable();
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    d.read(0, 8, pmr).unwrap();
}

#[test]
fn a_window_that_meets_the_cmbs_is_invalid() {
    let mut rig = Rig::new();
    let d = rig.plug(with_pmr(PmrConfig::memory(SIZE)));
    d.enable_cmb();
    for (base, invalid) in [
        (d.cmb_address + 0x1000, true),
        (u64::MAX << 12, true),
        (d.pmr_address, false),
    ] {
        open_window(&d, base);
        assert_eq!(status(&d).cbai(), invalid);
    }
}

#[test]
fn directions_are_enforced() {
    for (rds, wds) in [(true, false), (false, true)] {
        let mut pmr = PmrConfig::memory(SIZE);
        (pmr.rds, pmr.wds) = (rds, wds);
        let mut rig = Rig::new();
        let mut d = rig.plug(with_pmr(pmr));
        enable(&d);
        open_window(&d, d.pmr_address);
        d.enable();
        d.create_queues(1, 16, None).unwrap();
        let result = |allowed| if allowed { Ok(0) } else { Err(REFUSED) };
        assert_eq!(d.read(0, 8, d.pmr_address), result(rds));
        assert_eq!(d.write(0, 8, d.pmr_address), result(wds));
    }
}

/// What is in the file after a barrier is what was written, and it is there after every reset and in the next
/// controller.
#[test]
fn contents_survive_resets_and_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmr");
    let pmr = || PmrConfig::file(&path, SIZE).create();
    let mut rig = Rig::new();
    let mut d = rig.plug(with_pmr(pmr()));
    enable(&d);
    let data = pattern(9, 8192);
    d.store(d.pmr_address + 100, &data);
    assert_eq!(status(&d).into_bits(), 0);
    let file = std::fs::File::open(&path).unwrap();
    let mut there = vec![0; 8192];
    file.read_exact_at(&mut there, 100).unwrap();
    assert!(there == data);

    let same = |d: &Driver| {
        assert_eq!(d.read32(offset::PMRCTL), 0, "off until the host enables it");
        enable(d);
        assert!(d.load(d.pmr_address + 100, 8192) == data);
    };
    d.flr();
    d.restore_config_space();
    same(&d);
    d.function.reset(p2plab_pcie::ResetKind::Conventional);
    d.restore_config_space();
    same(&d);
    d.write32(offset::NSSR, NSSR_MAGIC);
    d.wait_status("CSTS.NSSRO", |csts| csts.nssro());
    same(&d);
    drop((d, rig));
    let mut rig = Rig::new();
    same(&rig.plug(with_pmr(pmr())));
}

/// While a peer writes into it without a pause, the region goes off and on: when it says that it is not ready,
/// nothing in it changes any more.
#[test]
fn nobody_is_in_a_region_that_is_off() {
    let mut rig = Rig::new();
    let mut peer = rig.plug(config("b"));
    let d = rig.plug(with_pmr(PmrConfig::memory(2 * SIZE)));
    peer.enable();
    peer.create_queues(1, 16, None).unwrap();
    let (stop, reads) = (AtomicBool::new(false), AtomicU32::new(0));
    let command = peer.transfer(io::READ, 0, 8192, d.pmr_address);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let read = peer.execute(1, command);
                assert!(read.is_ok() || read == Err(UNREACHED));
                reads.fetch_add(u32::from(read.is_ok()), Ordering::Relaxed);
            }
        });
        let _stop = SetOnDrop(&stop);
        let file = d.controller.pmr().unwrap().file().try_clone().unwrap();
        // What a read writes last.
        let end = 2 * SIZE - 4096;
        for round in 0..200u32 {
            let before = reads.load(Ordering::Relaxed);
            enable(&d);
            wait_until("a read", || {
                (reads.load(Ordering::Relaxed) != before).then_some(())
            });
            // The next one is under way.
            std::thread::sleep(Duration::from_micros(u64::from(round % 8) * 40));
            disable(&d);
            let mark = (round | 1 << 31).to_le_bytes().repeat(1024);
            file.write_all_at(&mark, end).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            let mut now = vec![0; mark.len()];
            file.read_exact_at(&mut now, end).unwrap();
            assert!(now == mark, "round {round}");
        }
    });
}
