//! Two controllers: peer-to-peer through a CMB, queues in a CMB, and what happens when the way is shut.

mod driver;

use driver::{CMB_SIZE, Rig, config, pattern, wait_until};
use p2plab_nvme::spec::command::{Command, admin, io};
use p2plab_nvme::spec::registers::{CmbMsc, offset};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{TraceEntry, TraceRange};
use p2plab_pcie::{MatrixEntry, TlpKind};

/// The main job: one controller reads into the other's CMB, which writes from it. The second half is internal.
#[test]
fn a_copy_through_the_peers_cmb() {
    let mut rig = Rig::new();
    let (mut a, mut b) = (rig.plug(config("a")), rig.plug(config("b")));
    for d in [&mut a, &mut b] {
        d.enable();
        d.create_queues(1, 64, None).unwrap();
    }
    b.enable_cmb();
    let source = a.pages(256);
    let data = pattern(7, 1 << 20);
    a.store(source, &data);
    a.write(0, 2048, source).unwrap();

    b.controller.trace().enable(true);
    let cmb = b.cmb_address + 0x10_0000;
    a.read(0, 2048, cmb).unwrap();
    b.write(64, 2048, cmb).unwrap();
    let log = b.controller.trace().take();
    assert!(log.entries[0].data.iter().all(|range| range.internal));
    assert!(log.entries[0].lists.iter().all(|range| !range.internal));

    let target = b.pages(256);
    b.read(64, 2048, target).unwrap();
    assert!(b.load(target, data.len()) == data);
}

#[test]
fn a_submission_queue_and_its_lists_in_the_cmb() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 64, Some(d.cmb_address)).unwrap();
    d.controller.trace().enable(true);
    let buffer = d.pages(3);
    let list = d.cmb_address + 0x1_0000;
    d.store(
        list,
        &[(buffer + 4096).to_le_bytes(), (buffer + 8192).to_le_bytes()].concat(),
    );
    let mut command = d.transfer(io::READ, 0, 24, buffer);
    command.prp2 = list.into();
    for _ in 0..100 {
        d.execute(1, command).unwrap();
    }
    let log = d.controller.trace().take();
    assert_eq!(log.entries.len(), 100);
    assert!(
        log.entries
            .iter()
            .all(|e| e.fetch.internal && e.lists[0].internal)
    );
    assert!(
        log.entries
            .iter()
            .all(|e| !e.data[0].internal && !e.completion.internal)
    );
}

#[test]
fn wrong_uses_of_the_cmb_are_refused() {
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.cmb.as_mut().unwrap().sqs = false;
    let mut d = rig.plug(cfg);
    d.enable_cmb();
    d.enable();
    let refused = Err(Status(Status::INVALID_USE_OF_CMB.code()));
    assert_eq!(
        d.create_queues(1, 64, Some(d.cmb_address)),
        refused.map(|_: u32| ())
    );
    d.create_queues(2, 64, None).unwrap();
    // Data that is half inside, half outside.
    let page = d.pages(1);
    let mut command = d.transfer(io::READ, 0, 16, page);
    command.prp2 = d.cmb_address.into();
    assert_eq!(d.execute(1, command), refused);
    // Behind its end nothing decodes.
    let end = d.cmb_address + CMB_SIZE;
    let command = d.transfer(io::READ, 0, 8, end);
    assert_eq!(
        d.execute(1, command),
        Err(Status(Status::DATA_TRANSFER_ERROR.code()))
    );
}

#[test]
fn an_invalid_base_address_is_reported() {
    let mut rig = Rig::new();
    let d = rig.plug(config("a"));
    let control = CmbMsc::new()
        .with_cre(true)
        .with_cmse(true)
        .with_cba((1 << 52) - 1);
    d.write64(offset::CMBMSC, control.into_bits());
    assert_eq!(d.read32(offset::CMBSTS), 1);
    d.enable_cmb();
}

/// A peer whose memory decoding is off gives an I/O error; afterwards the disk works.
#[test]
fn a_peer_that_does_not_decode_is_an_error_and_nothing_more() {
    let mut rig = Rig::new();
    let (mut a, b) = (rig.plug(config("a")), rig.plug(config("b")));
    a.enable();
    a.create_queues(1, 64, None).unwrap();
    b.set_command(0);
    let failed = Err(Status(Status::DATA_TRANSFER_ERROR.code()));
    assert_eq!(a.read(0, 8, b.cmb_address), failed);
    assert_eq!(a.write(0, 8, b.cmb_address), failed);
    b.set_command(6);
    a.read(0, 8, b.cmb_address).unwrap();
}

#[test]
fn without_bus_mastering_the_controller_fails_and_recovers() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    d.set_command(2);
    let page = d.pages(1);
    let command = d.transfer(io::READ, 0, 8, page);
    d.submit(1, command);
    d.wait_status("CSTS.CFS", |csts| csts.cfs());
    d.set_command(6);
    d.disable();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    d.read(0, 8, page).unwrap();
}

/// A Function Level Reset under load: nothing is in flight when it returns, and the CMB's content stays.
#[test]
fn a_function_level_reset_under_load() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    let first = d.pages(0);
    for round in 0..20u8 {
        d.rewind(first);
        d.enable_cmb();
        d.enable();
        d.create_queues(1, 64, None).unwrap();
        d.store(d.cmb_address, &[round; 16]);
        let buffer = d.pages(256);
        let command = d.transfer(io::READ, 0, 2048, buffer);
        for _ in 0..40 {
            d.push(1, command);
        }
        d.ring_doorbell(1);
        d.complete(1);
        d.flr();
        d.store(buffer, &[0xee; 4096]);
        d.restore_config_space();
        assert_eq!(d.read32(offset::CC), 0);
        // CMBMSC is the register that such a reset leaves alone (Base 3.7.2).
        assert_ne!(d.read32(offset::CMBSZ), 0);
        assert_eq!(d.load(d.cmb_address, 16), [round; 16]);
        assert!(d.load(buffer, 4096).iter().all(|byte| *byte == 0xee));
    }
}

/// INTx follows the queues and the mask while MSI-X is off.
#[test]
fn intx_is_a_level() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    d.enable();
    let asserted = |d: &driver::Driver| {
        let mut status = [0; 2];
        d.function.config_read(6, &mut status).unwrap();
        status[0] & 8 != 0
    };
    d.submit(
        0,
        Command {
            opcode: admin::GET_FEATURES,
            cdw10: 7.into(),
            ..Command::default()
        },
    );
    wait_until("INTx", || asserted(&d).then_some(()));
    d.write32(offset::INTMS, 1);
    assert!(!asserted(&d));
    d.write32(offset::INTMC, 1);
    assert!(asserted(&d));
    d.complete(0);
    assert!(!asserted(&d));
}

/// What crosses the switch is what the trace says, to the byte: a peer-to-peer copy leaves the upstream port
/// with commands, lists and completions.
#[test]
fn the_switch_sees_what_the_trace_tells() {
    let mut rig = Rig::new();
    let (mut a, mut b) = (rig.plug(config("a")), rig.plug(config("b")));
    for d in [&mut a, &mut b] {
        d.enable();
        d.create_queues(1, 64, None).unwrap();
    }
    b.enable_cmb();
    let sum = |kind: TlpKind, destination: Option<&str>| {
        let traffic = rig.fabric.traffic();
        let ours = |entry: &&MatrixEntry| {
            let wanted = destination.is_none_or(|name| entry.destination == name);
            entry.source == "nvme0" && entry.kind == kind && wanted
        };
        let entries = traffic.matrix.iter().filter(ours);
        entries
            .map(|entry| entry.tally.payload_bytes + entry.tally.requested_bytes)
            .sum::<u64>()
    };
    let reading = || {
        let to_peer = sum(TlpKind::MWr, Some("nvme1"));
        (
            to_peer,
            sum(TlpKind::MWr, None) - to_peer,
            sum(TlpKind::MRd, None),
        )
    };
    let before = reading();
    a.controller.trace().enable(true);
    let address = b.cmb_address;
    for _ in 0..10 {
        a.read(0, 2048, address).unwrap();
    }
    let after = reading();
    let log = a.controller.trace().take();
    let total = |ranges: fn(&TraceEntry) -> Vec<TraceRange>| {
        log.entries
            .iter()
            .flat_map(ranges)
            .map(|range| range.length)
            .sum::<u64>()
    };
    assert_eq!(after.0 - before.0, 10 << 20);
    assert_eq!(after.0 - before.0, total(|entry| entry.data.clone()));
    assert_eq!(after.1 - before.1, total(|entry| vec![entry.completion]));
    let fetched = total(|entry| vec![entry.fetch]) + total(|entry| entry.lists.clone());
    assert_eq!(after.2 - before.2, fetched);
    assert_eq!(fetched, 10 * (64 + 255 * 8));
}

/// A controller that was unplugged is as after power on when it is plugged in again.
#[test]
fn unplugged_and_plugged_in_again() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("a"));
    d.enable();
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    assert_eq!(d.read32(offset::CC), 0);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let page = d.pages(1);
    d.read(0, 8, page).unwrap();
}
