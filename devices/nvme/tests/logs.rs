//! Log pages and the asynchronous events that name them.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::{Rig, config, nvm, pattern, wait_until};
use p2plab_nvme::spec::command::{Command, NSID_ALL, admin, feature, io};
use p2plab_nvme::spec::log::{Smart, TelemetryHeader, lid};
use p2plab_nvme::spec::registers::{Cc, offset, shst};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{NamespaceConfig, NvmeConfig};
use p2plab_pcie::Endpoint;
use zerocopy::FromBytes;

fn dword(page: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(page[4 * index..4 * index + 4].try_into().unwrap())
}

fn smart(d: &mut driver::Driver) -> Smart {
    Smart::read_from_bytes(&d.log_page(lid::SMART, 512)).unwrap()
}

/// An opcode is Invalid Command Opcode exactly where the page says that it is not supported.
#[test]
fn commands_supported_are_those_executed() {
    for shadow_doorbells in [false, true] {
        executed_is_supported(with_doorbells(shadow_doorbells));
    }
}

/// A controller that offers to keep doorbells in the host's memory, or does not.
fn with_doorbells(shadow_doorbells: bool) -> NvmeConfig {
    let mut cfg = config("logs");
    cfg.namespaces = vec![NamespaceConfig::memory(1 << 20)];
    if shadow_doorbells {
        (cfg.cmb, cfg.shadow_doorbells) = (None, true);
    }
    cfg
}

fn executed_is_supported(cfg: NvmeConfig) {
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let page = d.log_page(lid::COMMANDS_SUPPORTED, 4096);
    for (queue, opcode) in (0..2).flat_map(|queue| (0..=u8::MAX).map(move |o| (queue, o))) {
        // Held.
        if (queue, opcode) == (0, admin::ASYNC_EVENT_REQUEST) {
            continue;
        }
        let command = Command {
            opcode,
            ..Command::default()
        };
        let unknown = d.execute(queue, command) == Err(Status(Status::INVALID_OPCODE.code()));
        let supported = dword(&page, 256 * queue + usize::from(opcode)) & 1 != 0;
        assert_eq!(supported, !unknown, "queue {queue}, opcode {opcode:#x}");
    }
    assert_eq!(dword(&page, 256 + usize::from(io::WRITE)) & 2, 2, "LBCC");
    assert_eq!(dword(&page, 256 + usize::from(io::READ)) & 2, 0);
    assert!(page[2048..].iter().all(|byte| *byte == 0));
}

/// What Identify claims is supported, and what is supported is claimed.
#[test]
fn identify_and_the_pages_agree() {
    for shadow_doorbells in [false, true] {
        claims_agree(with_doorbells(shadow_doorbells), shadow_doorbells);
    }
}

fn claims_agree(cfg: NvmeConfig, shadow_doorbells: bool) {
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    let id = d.identify_controller();
    let word = |at: usize| u16::from_le_bytes([id[at], id[at + 1]]);
    let commands = d.log_page(lid::COMMANDS_SUPPORTED, 4096);
    let pages = d.log_page(lid::SUPPORTED_LOG_PAGES, 1024);
    let features = d.log_page(lid::FEATURES_SUPPORTED, 1024);
    let claims = |field: u16, bits: &[(u32, &[u8])], table: &[u8], first: usize| {
        for (bit, members) in bits {
            for member in *members {
                let supported = dword(table, first + usize::from(*member)) & 1 != 0;
                assert_eq!(field >> bit & 1 != 0, supported, "bit {bit}: {member:#x}");
            }
        }
    };
    // OACS: security, format, firmware, namespaces, self-test, directives, MI, virtualization, doorbell buffers.
    let oacs: &[(u32, &[u8])] = &[
        (0, &[0x81, 0x82]),
        (1, &[0x80]),
        (2, &[0x10, 0x11]),
        (3, &[0x0d, 0x15]),
        (4, &[0x14]),
        (5, &[0x19, 0x1a]),
        (6, &[0x1d, 0x1e]),
        (7, &[0x1c]),
        (8, &[0x7c]),
    ];
    claims(word(256), oacs, &commands, 0);
    assert_eq!(word(256) >> 8 & 1, u16::from(shadow_doorbells));
    // ONCS: compare, write uncorrectable, dataset management, write zeroes, reservations, verify, copy.
    let oncs: &[(u32, &[u8])] = &[
        (0, &[0x05]),
        (1, &[0x04]),
        (2, &[0x09]),
        (3, &[0x08]),
        (5, &[0x0d, 0x0e, 0x11, 0x15]),
        (7, &[0x0c]),
        (8, &[0x19]),
    ];
    claims(word(520), oncs, &commands, 256);
    claims(word(520), &[(6, &[0x0e])], &features, 0);
    // VWC; KAS.
    claims(id[525].into(), &[(0, &[0x06])], &features, 0);
    let keeps_alive = u16::from(word(320) != 0);
    claims(keeps_alive, &[(0, &[0x18])], &commands, 0);
    claims(keeps_alive, &[(0, &[0x0f])], &features, 0);
    // SANICAP.
    let sanitizes = u16::from(id[328] & 7 != 0);
    claims(sanitizes, &[(0, &[0x84])], &commands, 0);
    claims(sanitizes, &[(0, &[0x81])], &pages, 0);
    claims(id[331].into(), &[(5, &[0x17])], &features, 0);
    claims(word(256) >> 4, &[(0, &[0x06])], &pages, 0);
    // LPA: effects, telemetry, persistent events, what is supported.
    let lpa: &[(u32, &[u8])] = &[
        (1, &[0x05]),
        (3, &[0x07, 0x08]),
        (4, &[0x0d]),
        (5, &[0x00, 0x12, 0x13]),
    ];
    claims(id[261].into(), lpa, &pages, 0);
    // OAES bit 8.
    claims(word(92), &[(8, &[0x04])], &pages, 0);
}

/// What becomes of a namespace is an event, and on the list of those that changed.
#[test]
fn changed_namespaces_are_told() {
    let mut rig = Rig::new();
    let mut d = rig.plug(with_doorbells(false));
    d.enable();
    d.set_feature(feature::ASYNC_EVENT_CONFIG, 1 << 8).unwrap();
    let mut told = |change: &mut dyn FnMut(&mut driver::Driver)| {
        let first = d.request_event();
        change(&mut d);
        assert_eq!(d.event(first), 0x0004_0002);
        let page = d.log_page(lid::CHANGED_NAMESPACES, 4096);
        assert_eq!(dword(&page, 1), 0);
        dword(&page, 0)
    };
    assert_eq!(told(&mut |d| assert_eq!(nvm::format(d, 1, 1), Ok(0))), 1);
    assert_eq!(told(&mut |d| assert_eq!(nvm::delete(d, 1), Ok(0))), 1);
}

#[test]
fn log_pages_supported_are_those_there() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let page = d.log_page(lid::SUPPORTED_LOG_PAGES, 1024);
    for id in 0..=u8::MAX {
        let there = d.log_page_with(id, 0, 512, |_| ());
        match dword(&page, id.into()) {
            0 => assert_eq!(there, Err(Status(Status::INVALID_LOG_PAGE.code()))),
            1 => assert!(there.is_ok(), "{id:#x}: {there:?}"),
            other => panic!("{id:#x}: {other:#x}"),
        }
    }
}

#[test]
fn a_page_is_read_in_pieces_and_ends_in_zeros() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let whole = d.log_page(lid::COMMANDS_SUPPORTED, 4096);
    let mut pieces = Vec::new();
    for offset in (0..4096).step_by(1000) {
        let piece = d.log_page_with(lid::COMMANDS_SUPPORTED, offset, 1000, |_| ());
        pieces.extend(piece.unwrap());
    }
    assert!(pieces[..4096] == whole);
    assert_eq!(pieces[4096..], [0; 904]);
    let behind = d.log_page_with(lid::SMART, 512, 8, |_| ()).unwrap();
    assert_eq!(behind, [0; 8]);
}

#[test]
fn bad_requests_for_log_pages_are_refused() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    type Change = fn(&mut Command);
    let smart: u32 = lid::SMART.into();
    let cases: [(u8, Change); 10] = [
        (lid::SMART, |c| c.nsid = 1.into()),
        (lid::ERROR_INFORMATION, |c| c.nsid = 1.into()),
        // Past the end; so far past that a sum would overflow; not in dwords.
        (lid::SMART, |c| c.cdw12 = 516.into()),
        (lid::SMART, |c| {
            (c.cdw12, c.cdw13) = (0xffff_fffc.into(), u32::MAX.into());
        }),
        (lid::SMART, |c| c.cdw12 = 2.into()),
        // 16 GiB; index offsets; a command set that there is not.
        (lid::SMART, |c| {
            c.cdw10 = (c.cdw10.get() | 0xffff_0000).into();
            c.cdw11 = 0xffff.into();
        }),
        (lid::SMART, |c| c.cdw14 = (1 << 23).into()),
        (lid::COMMANDS_SUPPORTED, |c| c.cdw14 = (2 << 24).into()),
        // Telemetry comes in blocks.
        (lid::TELEMETRY_HOST, |c| c.cdw12 = 4.into()),
        (lid::TELEMETRY_CONTROLLER, |c| {
            c.cdw10 = (u32::from(lid::TELEMETRY_CONTROLLER) | 126 << 16).into();
        }),
    ];
    for (lid, change) in cases {
        let result = d.log_page_with(lid, 0, 512, change);
        let expected = Err(Status(Status::INVALID_FIELD.code()));
        assert_eq!(result.map(|_| ()), expected, "{lid:#x}");
    }
    // None of it harmed: the status, and that the memory holds nothing of a refused page.
    let refused = Command {
        opcode: admin::GET_LOG_PAGE,
        nsid: NSID_ALL.into(),
        prp1: (1u64 << 50).into(),
        cdw10: (smart | 127 << 16).into(),
        ..Command::default()
    };
    assert_eq!(
        d.admin(refused),
        Err(Status(Status::DATA_TRANSFER_ERROR.code()))
    );
    d.log_page(lid::SMART, 512);
}

/// Counts, units and power: what SMART says is what happened.
#[test]
fn smart_counts_what_happened() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(256);
    for _ in 0..3 {
        d.write(0, 2000, buffer).unwrap();
    }
    d.read(0, 8, buffer).unwrap();
    d.read(1 << 40, 8, buffer).unwrap_err();
    let page = smart(&mut d);
    assert_eq!(page.host_writes[0].get(), 3);
    assert_eq!(page.host_reads[0].get(), 1);
    // In thousands of 512 bytes, rounded up.
    assert_eq!(page.data_units_written[0].get(), 6);
    assert_eq!(page.data_units_read[0].get(), 1);
    assert_eq!(page.error_entries[0].get(), 1);
    assert_eq!((page.critical_warning, page.available_spare), (0, 100));
    assert_eq!(page.temperature.get(), 298);
    assert_eq!(
        (
            page.power_cycles[0].get(),
            page.unsafe_shutdowns[0].get(),
            page.power_on_hours[0].get()
        ),
        (1, 0, 0)
    );
}

/// Power that goes without a shutdown is counted as such, with one it is not.
#[test]
fn power_cycles_are_counted() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    d.enable();
    let page = smart(&mut d);
    let counts = |page: &Smart| (page.power_cycles[0].get(), page.unsafe_shutdowns[0].get());
    assert_eq!(counts(&page), (2, 1));
    let cc = Cc::from_bits(d.read32(offset::CC));
    d.write32(offset::CC, cc.with_shn(1).into_bits());
    d.wait_status("shutdown", |csts| csts.shst() == shst::COMPLETE);
    // The machine goes away, and another one comes.
    d.function.disconnect();
    d.function.connect();
    d.restore_config_space();
    d.write32(offset::CC, 1);
    let health = wait_until("power", || {
        Some(d.controller.dump()["health"].clone()).filter(|h| h["power_cycles"] == 3)
    });
    assert_eq!(health["unsafe_shutdowns"], 1);
}

#[test]
fn a_temperature_that_crosses_a_threshold_is_an_event() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    d.set_feature(feature::ASYNC_EVENT_CONFIG, 0x3).unwrap();
    let cid = d.request_event();
    d.controller.set_temperature(342);
    d.log_page(lid::ERROR_INFORMATION, 64);
    d.controller.set_temperature(343);
    assert_eq!(d.event(cid), 0x0002_0101);
    let cid = d.request_event();
    // The spare is another matter, but SMART events wait until the page was read; RAE does not count.
    d.controller.set_available_spare(9);
    let retain = |c: &mut Command| c.cdw10 = (c.cdw10.get() | 1 << 15).into();
    let page = d.log_page_with(lid::SMART, 0, 512, retain).unwrap();
    assert_eq!(page[0], 0b11);
    d.controller.set_temperature(300);
    d.log_page(lid::SMART, 512);
    // What the page told of is not told again.
    d.controller.set_available_spare(50);
    d.controller.set_available_spare(1);
    assert_eq!(d.event(cid), 0x0002_0201);
    d.log_page(lid::SMART, 512);
    // The host's own threshold, below what it is.
    let cid = d.request_event();
    d.set_feature(feature::TEMPERATURE_THRESHOLD, 299).unwrap();
    assert_eq!(d.event(cid), 0x0002_0101);
    assert_eq!(smart(&mut d).critical_warning, 0b11);
    d.set_feature(feature::TEMPERATURE_THRESHOLD, 343).unwrap();
    assert_eq!(smart(&mut d).critical_warning, 0b01);
}

#[test]
fn events_that_the_host_does_not_want_are_not_sent() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let cid = d.request_event();
    d.controller.set_temperature(400);
    d.write32(offset::DOORBELLS + 8 * 5, 3);
    // The doorbell's event is the first.
    assert_eq!(d.event(cid), 0x0001_0000);
    assert_eq!(
        d.set_feature(feature::ASYNC_EVENT_CONFIG, 1 << 11),
        Err(Status(Status::INVALID_FIELD.code()))
    );
    // The warning persists: the host hears of it as soon as it wants to.
    let cid = d.request_event();
    let set = d.submit(
        0,
        Command {
            opcode: admin::SET_FEATURES,
            cdw10: u32::from(feature::ASYNC_EVENT_CONFIG).into(),
            cdw11: 2.into(),
            ..Command::default()
        },
    );
    assert_eq!(d.complete(0).cid.get(), set);
    assert_eq!(d.event(cid), 0x0002_0101);
}

/// What the host has saved applies after a reset, and a warning that persists is told again.
#[test]
fn a_saved_configuration_outlives_a_reset() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    d.controller.set_temperature(350);
    let save = u32::from(feature::ASYNC_EVENT_CONFIG) | 1 << 31;
    for reset in [true, false] {
        let cid = d.request_event();
        if reset {
            d.simple_admin(admin::SET_FEATURES, 0, [save, 2, 0])
                .unwrap();
        }
        assert_eq!(d.event(cid), 0x0002_0101);
        d.disable();
        d.enable();
    }
    // Not read meanwhile, and cooled down: nothing to tell.
    d.controller.set_temperature(300);
    d.log_page(lid::SMART, 512);
    let cid = d.request_event();
    d.log_page(lid::SMART, 512);
    assert_eq!(d.poll_event(cid), None);
}

#[test]
fn requests_for_events_are_limited_and_abortable() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let cids: Vec<u16> = (0..4).map(|_| d.request_event()).collect();
    let fifth = Command {
        opcode: admin::ASYNC_EVENT_REQUEST,
        ..Command::default()
    };
    assert_eq!(
        d.admin(fifth),
        Err(Status(Status::ASYNC_EVENT_LIMIT_EXCEEDED.code()))
    );
    // Whose completion comes first is not specified.
    let abort = |cid: u16| Command {
        opcode: admin::ABORT,
        cdw10: (u32::from(cid) << 16).into(),
        ..Command::default()
    };
    let cid = d.submit(0, abort(cids[2]));
    let mut both = [d.complete(0), d.complete(0)];
    both.sort_by_key(|completion| completion.cid.get() == cid);
    assert_eq!(both[0].cid.get(), cids[2]);
    assert_eq!(both[0].status().code(), Status::ABORT_REQUESTED.code());
    assert_eq!(both[1].dw0.get(), 0);
    // Not there any more, never there, and of a queue that is not.
    assert_eq!(d.admin(abort(cids[2])), Ok(1));
    assert_eq!(d.admin(abort(0xfff0)), Ok(1));
    assert_eq!(d.simple_admin(admin::ABORT, 0, [0xffff, 0, 0]), Ok(1));
}

/// Telemetry is the controller's state at the time that it was asked for.
#[test]
fn telemetry_is_captured_for_the_host() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let header = |page: &[u8]| TelemetryHeader::read_from_bytes(&page[..512]).unwrap();
    let none = d.log_page(lid::TELEMETRY_HOST, 512);
    assert_eq!(header(&none).last_blocks[0].get(), 0);
    let create = |c: &mut Command| c.cdw10 = (c.cdw10.get() | 1 << 8).into();
    let first = d
        .log_page_with(lid::TELEMETRY_HOST, 0, 512, create)
        .unwrap();
    let blocks = u32::from(header(&first).last_blocks[0].get());
    assert_eq!(header(&first).host_generation, 1);
    // More commands since: the capture does not change.
    d.create_queues(1, 64, None).unwrap();
    let text = |page: &[u8]| -> serde_json::Value {
        let body = &page[512..];
        let end = body.iter().rposition(|byte| *byte != 0).unwrap();
        serde_json::from_slice(&body[..=end]).unwrap()
    };
    let page = d.log_page(lid::TELEMETRY_HOST, 512 * (1 + blocks));
    let state = text(&page);
    assert_eq!(state["serial"], "logs");
    assert!(state["counters"]["admin_commands"]["0x01"].is_null());
    let again = d
        .log_page_with(lid::TELEMETRY_HOST, 0, 32 << 10, create)
        .unwrap();
    assert_eq!(header(&again).host_generation, 2);
    assert_eq!(text(&again)["counters"]["admin_commands"]["0x01"], 1);
}

/// A controller that fails keeps its state; the host finds it after the reset.
#[test]
fn telemetry_of_a_failure_is_kept_until_it_was_read() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    let header = |d: &mut driver::Driver, retain: u32| {
        let page = d.log_page_with(lid::TELEMETRY_CONTROLLER, 0, 512, |c| {
            c.cdw10 = (c.cdw10.get() | retain << 15).into();
        });
        TelemetryHeader::read_from_bytes(&page.unwrap()).unwrap()
    };
    assert_eq!(header(&mut d, 0).controller_available, 0);
    d.create_queues(1, 64, None).unwrap();
    // A submission queue's memory that nothing decodes: bus mastering is off.
    d.set_command(0x2);
    let buffer = d.pages(1);
    let command = d.transfer(io::READ, 0, 1, buffer);
    d.submit(1, command);
    d.wait_status("CSTS.CFS", |csts| csts.cfs());
    d.set_command(0x6);
    d.disable();
    d.enable();
    let kept = wait_until("telemetry", || {
        Some(header(&mut d, 1)).filter(|h| h.controller_available == 1)
    });
    assert_eq!(kept.controller_generation, 1);
    assert!(kept.reason.starts_with(b"submission queue 1"));
    assert_eq!(header(&mut d, 0).controller_available, 1);
    assert_eq!(header(&mut d, 0).controller_available, 0);
}

/// The newest errors are in front, with queue, command and place.
#[test]
fn errors_are_logged() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("logs"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    d.store(buffer, &pattern(1, 4096));
    let command = d.transfer(io::WRITE, 0x1_2345_6789, 1, buffer);
    let cid = d.submit(1, command);
    let completion = d.complete(1);
    // More: there is an entry in the log.
    assert_eq!(completion.status(), Status::LBA_OUT_OF_RANGE.more());
    let page = d.log_page(lid::ERROR_INFORMATION, 64 * 64);
    assert_eq!(page[..8], 1u64.to_le_bytes());
    assert_eq!(page[8..10], 1u16.to_le_bytes());
    assert_eq!(page[10..12], cid.to_le_bytes());
    assert_eq!(
        page[12..14],
        (Status::LBA_OUT_OF_RANGE.0 << 1).to_le_bytes()
    );
    assert_eq!(page[16..24], 0x1_2345_6789u64.to_le_bytes());
    assert_eq!(page[24..28], 1u32.to_le_bytes());
    assert!(page[64..].iter().all(|byte| *byte == 0));
}
