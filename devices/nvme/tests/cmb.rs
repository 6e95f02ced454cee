//! The CMB in all its modes: what may lie in it, by which addresses, and what is said to a host that errs.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::{CMB_SIZE, Driver, HOST_MEMORY, Rig, config, pattern};
use p2plab_nvme::spec::command::{Command, admin, io};
use p2plab_nvme::spec::registers::{Cap, CmbLoc, CmbSz, offset};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{CmbConfig, CmbScheme};
use p2plab_pcie::TlpKind;

const REFUSED: Status = Status(Status::INVALID_USE_OF_CMB.code());

fn plug(rig: &mut Rig, change: impl FnOnce(&mut CmbConfig)) -> Driver {
    let mut config = config("a");
    change(config.cmb.as_mut().unwrap());
    rig.plug(config)
}

/// A controller with its CMB and queue pair 1, in host memory, enabled.
fn ready(rig: &mut Rig, change: impl FnOnce(&mut CmbConfig)) -> Driver {
    let mut d = plug(rig, change);
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    d
}

/// Writes of three pages whose list of two is at `list`.
fn with_list(d: &mut Driver, list: u64) -> Command {
    let data = d.pages(3);
    let entries = [(data + 4096).to_le_bytes(), (data + 8192).to_le_bytes()];
    d.store(list, &entries.concat());
    let mut command = d.transfer(io::WRITE, 0, 24, data);
    command.prp2 = list.into();
    command
}

#[test]
fn each_capability_is_said_and_enforced() {
    for off in 0..5 {
        let mut rig = Rig::new();
        let mut d = ready(&mut rig, |cmb| {
            let flags = [
                &mut cmb.sqs,
                &mut cmb.cqs,
                &mut cmb.lists,
                &mut cmb.rds,
                &mut cmb.wds,
            ];
            *flags.into_iter().nth(off).unwrap() = false;
        });
        let size = CmbSz::from_bits(d.read32(offset::CMBSZ));
        let said = [size.sqs(), size.cqs(), size.lists(), size.rds(), size.wds()];
        assert_eq!(said.map(|on| !on), [0, 1, 2, 3, 4].map(|i| i == off));

        let cmb = d.cmb_address;
        let sq = d.create_queues_at(2, 16, Some(cmb), None);
        let cq = d.create_queues_at(3, 16, None, Some(cmb + 0x1000));
        let command = with_list(&mut d, cmb + 0x2000);
        let list = d.execute(1, command);
        let read = d.read(0, 8, cmb + 0x3000);
        let write = d.write(0, 8, cmb + 0x3000);
        let results = [sq, cq, list.map(drop), read.map(drop), write.map(drop)];
        let expected = [0, 1, 2, 3, 4].map(|i| if i == off { Err(REFUSED) } else { Ok(()) });
        assert_eq!(results, expected);
    }
}

/// The completions of a queue in the CMB never leave the controller; the CPU that polls them is what is counted.
#[test]
fn completion_queues_in_the_cmb_are_read_by_the_cpu() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    d.enable_cmb();
    d.enable();
    let (sq, cq) = (d.cmb_address, d.cmb_address + 0x1000);
    d.create_queues_at(1, 8, Some(sq), Some(cq)).unwrap();
    let page = d.pages(1);
    let before = rig.fabric.traffic();
    d.controller.trace().enable(true);
    for _ in 0..50 {
        d.read(0, 8, page).unwrap();
    }
    let traffic = rig.fabric.traffic().since(&before);
    let log = d.controller.trace().take();
    let inside = |e: &p2plab_nvme::TraceEntry| e.fetch.internal && e.completion.internal;
    assert!(log.entries.len() == 50 && log.entries.iter().all(inside));
    let sent = traffic.between("nvme0", "memory", TlpKind::MWr);
    assert_eq!(sent.payload_bytes, 50 * 4096);
    assert!(
        traffic
            .between("cpu", "nvme0", TlpKind::MRd)
            .requested_bytes
            >= 50 * 16
    );
    traffic.check().unwrap();
}

/// The scheme of NVMe 1.3: no CMBMSC, and the addresses that the guest gave the BAR, wherever it moves it.
#[test]
fn the_older_scheme_follows_the_bar() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |cmb| cmb.scheme = CmbScheme::V1_3);
    let cap = u64::from(d.read32(offset::CAP)) | u64::from(d.read32(offset::CAP + 4)) << 32;
    assert!(!Cap::from_bits(cap).cmbs() && !Cap::from_bits(cap).crwms());
    assert_eq!(d.read32(offset::VS), 0x1_0300);
    let location = CmbLoc::from_bits(d.read32(offset::CMBLOC));
    assert_eq!((location.bir(), location.ofst()), (4, 0));
    assert_ne!(d.read32(offset::CMBSZ), 0);
    d.write64(offset::CMBMSC, u64::MAX);
    assert_eq!(d.read32(offset::CMBMSC), 0);
    d.enable();
    let page = d.pages(1);
    let identify = Command {
        opcode: admin::IDENTIFY,
        prp1: page.into(),
        cdw10: 1.into(),
        ..Command::default()
    };
    d.admin(identify).unwrap();
    assert_eq!(d.load(page + 80, 4), 0x1_0300u32.to_le_bytes());

    d.create_queues(1, 64, Some(d.cmb_address)).unwrap();
    let data = pattern(3, 4096);
    d.store(page, &data);
    d.write(0, 8, page).unwrap();
    d.controller.trace().enable(true);
    let old = d.cmb_address + 0x8000;
    d.read(0, 8, old).unwrap();
    assert_eq!(d.load(old, 4096), data);
    let entry = d.controller.trace().take().entries.remove(0);
    assert!(entry.fetch.internal && entry.data[0].internal && !entry.completion.internal);

    // The guest moves the BAR: only its new addresses are the CMB's, and the queue in the old ones is lost.
    d.create_queues(2, 64, None).unwrap();
    d.cmb_address += 0x40_0000;
    d.restore_config_space();
    let mut command = d.transfer(io::READ, 0, 8, old);
    let lost = Err(Status(Status::DATA_TRANSFER_ERROR.code()));
    assert_eq!(d.execute(2, command), lost);
    command.prp1 = (d.cmb_address + 0x9000).into();
    d.execute(2, command).unwrap();
    assert_eq!(d.load(d.cmb_address + 0x9000, 4096), data);
}

#[test]
fn an_offset_moves_the_cmb_in_its_bar() {
    for scheme in [CmbScheme::V1_4, CmbScheme::V1_3] {
        let mut rig = Rig::new();
        const OFFSET: u64 = 0x30_0000;
        let mut d = plug(&mut rig, |cmb| {
            (cmb.offset, cmb.scheme) = (OFFSET, scheme);
        });
        assert_eq!(d.function.bar_size(4), 8 << 20);
        let base = d.cmb_address + OFFSET;
        if scheme == CmbScheme::V1_4 {
            // CMBMSC.CBA is the address of the CMB, not of the BAR.
            let bar = std::mem::replace(&mut d.cmb_address, base);
            d.enable_cmb();
            d.cmb_address = bar;
        }
        let location = CmbLoc::from_bits(d.read32(offset::CMBLOC));
        let size = CmbSz::from_bits(d.read32(offset::CMBSZ));
        let unit = 4096u64 << (4 * size.szu());
        assert_eq!(u64::from(location.ofst()) * unit, OFFSET);
        assert_eq!(u64::from(size.sz()) * unit, CMB_SIZE);
        d.enable();
        d.create_queues(1, 64, None).unwrap();
        let page = d.pages(1);
        let data = pattern(5, 4096);
        d.store(page, &data);
        d.write(0, 8, page).unwrap();
        for inside in [base, base + CMB_SIZE - 4096] {
            d.read(0, 8, inside).unwrap();
            assert_eq!(d.load(inside, 4096), data);
        }
        for outside in [base - 4096, base + CMB_SIZE] {
            assert!(d.read(0, 8, outside).is_err());
        }
    }
}

/// CMBLOC.CDPMLS and CDPCILS, and data that is always all inside or all outside (CDMMMS).
#[test]
fn mixed_locations_follow_the_bits_of_cmbloc() {
    for (cdpmls, cdpcils) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut rig = Rig::new();
        let mut d = ready(&mut rig, |cmb| {
            (cmb.cdpmls, cmb.cdpcils) = (cdpmls, cdpcils);
        });
        let location = CmbLoc::from_bits(d.read32(offset::CMBLOC));
        assert_eq!((location.cdpmls(), location.cdpcils()), (cdpmls, cdpcils));
        assert!(!location.cdmmms() && !location.cqmms() && !location.cqpds());
        let cmb = d.cmb_address;
        d.create_queues(2, 16, Some(cmb)).unwrap();

        // A list inside: of a command outside, and of one inside.
        let command = with_list(&mut d, cmb + 0x2000);
        let outside = d.execute(1, command);
        assert_eq!(outside, if cdpcils { Ok(0) } else { Err(REFUSED) });
        assert_eq!(d.execute(2, command), Ok(0));

        // Two lists of one command that is inside, the second of them outside.
        let data = d.pages(600);
        let pages: Vec<u64> = (0..600).map(|i| data + i * 4096).collect();
        let (prp1, second) = d.prps(&pages);
        let list = d.load(second, 4096);
        d.store(cmb + 0x4000, &list);
        let mut command = d.transfer(io::READ, 0, 4800, data);
        (command.prp1, command.prp2) = (prp1.into(), (cmb + 0x4000).into());
        let mixed = d.execute(2, command);
        assert_eq!(mixed, if cdpmls { Ok(0) } else { Err(REFUSED) });

        let page = d.pages(1);
        for (first, second) in [(page, cmb + 0x8000), (cmb + 0x8000, page)] {
            let mut command = d.transfer(io::READ, 0, 16, first);
            command.prp2 = second.into();
            assert_eq!(d.execute(2, command), Err(REFUSED));
        }
    }
}

/// Queues that leave the CMB half-way, and admin queues where none may be.
#[test]
fn queues_are_all_inside_or_all_outside() {
    let mut rig = Rig::new();
    let mut d = ready(&mut rig, |_| {});
    let half = d.cmb_address + CMB_SIZE - 4096;
    assert_eq!(d.create_queues(2, 128, Some(half)), Err(REFUSED));
    let mut rig = Rig::new();
    let mut d = ready(&mut rig, |cmb| cmb.sqs = false);
    d.disable();
    d.write64(offset::ASQ, d.cmb_address);
    d.write32(offset::CC, 0x46_0001);
    d.wait_status("CSTS.CFS", |csts| csts.cfs() && !csts.rdy());
    d.disable();
    assert!(d.pages(0) < HOST_MEMORY);
    d.enable();
}
