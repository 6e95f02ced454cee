//! Device self-tests: in the background, over resets, and truly reading.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::os::unix::fs::FileExt;

use driver::{Driver, Rig, config, nvm, wait_until};
use p2plab_nvme::spec::command::{NSID_ALL, admin, feature};
use p2plab_nvme::spec::log::{SelfTestResult, lid, self_test_result as result};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Backing, NamespaceConfig};
use zerocopy::FromBytes;

const SHORT: u32 = 1;
const EXTENDED: u32 = 2;
const ABORT: u32 = 0xf;

fn start(d: &mut Driver, nsid: u32, code: u32) -> Result<u32, Status> {
    d.simple_admin(admin::DEVICE_SELF_TEST, nsid, [code, 0, 0])
}

/// Current operation, percent, results.
fn page(d: &mut Driver) -> (u8, u8, Vec<SelfTestResult>) {
    let page = d.log_page(lid::DEVICE_SELF_TEST, 564);
    let results = page[4..].chunks(28);
    let results = results.map(|entry| SelfTestResult::read_from_bytes(entry).unwrap());
    (page[0], page[1], results.collect())
}

/// The newest result, when nothing runs any more.
fn wait(d: &mut Driver) -> SelfTestResult {
    wait_until("the end of a self-test", || {
        let (operation, _, results) = page(d);
        (operation == 0).then(|| results[0])
    })
}

#[test]
fn tests_read_and_leave_their_results() {
    let mut rig = Rig::new();
    let mut cfg = config("test");
    cfg.namespaces.push(NamespaceConfig::memory(1 << 20));
    let mut d = rig.plug(cfg);
    d.enable();
    let id = d.identify_controller();
    assert_eq!(id[256] & 1 << 4, 1 << 4);
    assert!(page(&mut d).2.iter().all(|r| r.status == result::UNUSED));
    // Something to read, behind a hole.
    let file = d.controller.namespace_file(1).unwrap();
    file.write_all_at(&[1; 3 << 20], 20 << 20).unwrap();
    for (nsid, code) in [(NSID_ALL, SHORT), (1, EXTENDED), (0, SHORT)] {
        start(&mut d, nsid, code).unwrap();
        let newest = wait(&mut d);
        assert_eq!(newest.status, (code as u8) << 4 | result::NO_ERROR);
        assert_eq!(newest.valid, 0);
    }
    // Twenty results are kept.
    for _ in 0..20 {
        start(&mut d, 0, SHORT).unwrap();
        wait(&mut d);
    }
    let results = page(&mut d).2;
    assert!(results.iter().all(|r| r.status == 0x10), "{results:?}");
    for (nsid, code, status) in [
        (3, SHORT, Status::INVALID_FIELD),
        (257, SHORT, Status::INVALID_NAMESPACE),
        (1, 0, Status::INVALID_FIELD),
        (1, 3, Status::INVALID_FIELD),
        (1, 0xe, Status::INVALID_FIELD),
    ] {
        assert_eq!(start(&mut d, nsid, code), Err(Status(status.code())));
    }
    // There is nothing to abort, which is well.
    assert_eq!(start(&mut d, 0, ABORT), Ok(0));
}

#[test]
fn one_test_at_a_time_and_it_can_be_aborted() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("test"));
    d.enable();
    d.controller.hold_background(true);
    start(&mut d, 1, EXTENDED).unwrap();
    assert_eq!(page(&mut d).0, 2);
    for code in [SHORT, EXTENDED] {
        let again = start(&mut d, 1, code);
        assert_eq!(again, Err(Status(Status::SELF_TEST_IN_PROGRESS.code())));
    }
    start(&mut d, NSID_ALL, ABORT).unwrap();
    let aborted = page(&mut d);
    assert_eq!((aborted.0, aborted.2[0].status), (0, 0x21));
    // The next one begins though the thread of the last was held.
    start(&mut d, 1, SHORT).unwrap();
    d.controller.hold_background(false);
    assert_eq!(wait(&mut d).status, 0x10);
}

/// A reset ends the short test, not the extended one; nor does a loss of power, which only delays it.
#[test]
fn resets_end_the_short_test_alone() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("test"));
    d.enable();
    d.controller.hold_background(true);
    start(&mut d, 1, SHORT).unwrap();
    d.disable();
    d.enable();
    assert_eq!(wait(&mut d).status, 0x10 | result::ABORTED_BY_RESET);
    start(&mut d, 1, SHORT).unwrap();
    d.flr();
    d.restore_config_space();
    d.enable();
    assert_eq!(wait(&mut d).status, 0x10 | result::ABORTED_BY_RESET);
    start(&mut d, 1, EXTENDED).unwrap();
    d.disable();
    d.enable();
    assert_eq!(page(&mut d).0, 2);
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    d.enable();
    assert_eq!(page(&mut d).0, 2);
    d.controller.hold_background(false);
    assert_eq!(wait(&mut d).status, 0x20);
}

/// Who formats or deletes a namespace does not wait for its test.
#[test]
fn a_test_gives_way_to_namespace_management() {
    let mut rig = Rig::new();
    let mut cfg = config("test");
    cfg.namespaces.push(NamespaceConfig::memory(1 << 20));
    let mut d = rig.plug(cfg);
    d.enable();
    d.controller.hold_background(true);
    start(&mut d, 1, EXTENDED).unwrap();
    nvm::format(&mut d, 2, 1).unwrap();
    assert_eq!(page(&mut d).0, 2, "another namespace's");
    nvm::format(&mut d, 1, 1).unwrap();
    assert_eq!(wait(&mut d).status, 0x20 | result::ABORTED_BY_FORMAT);
    start(&mut d, NSID_ALL, EXTENDED).unwrap();
    nvm::format(&mut d, NSID_ALL, 0).unwrap();
    assert_eq!(wait(&mut d).status, 0x20 | result::ABORTED_BY_FORMAT);
    start(&mut d, 2, EXTENDED).unwrap();
    nvm::delete(&mut d, 2).unwrap();
    d.controller.hold_background(false);
    let removed = 0x20 | result::ABORTED_BY_NAMESPACE_REMOVAL;
    assert_eq!(wait(&mut d).status, removed);
}

/// A file that lost its end fails both tests, with namespace and block, an event, and telemetry.
#[test]
fn what_cannot_be_read_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![7; 4 << 20]).unwrap();
    let mut cfg = config("test");
    cfg.namespaces.push(NamespaceConfig {
        backing: Backing::File {
            path: path.clone(),
            size: None,
            create: false,
        },
        ..NamespaceConfig::memory(0)
    });
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    file.unwrap().set_len(3 << 20).unwrap();
    d.set_feature(feature::ASYNC_EVENT_CONFIG, 1 << 10).unwrap();
    let requests = [d.request_event(), d.request_event()];
    start(&mut d, NSID_ALL, SHORT).unwrap();
    // Diagnostic Failure, then Telemetry Log Changed.
    assert_eq!(d.event(requests[0]), 0x0001_0200);
    assert_eq!(d.event(requests[1]), 0x0008_0302);
    let errors = d.log_page(lid::ERROR_INFORMATION, 64);
    assert_eq!((errors[8], errors[24]), (0xff, 2));
    let newest = wait(&mut d);
    assert_eq!(newest.status, 0x10 | result::SEGMENT_FAILED);
    assert_eq!(
        (newest.valid, newest.segment, newest.nsid.get()),
        (15, 1, 2)
    );
    assert_eq!(newest.failing_lba.get(), ((4 << 20) - (64 << 10)) / 512);
    assert_eq!((newest.status_code_type, newest.status_code), (2, 0x81));
    let telemetry = wait_until("telemetry", || {
        Some(d.log_page(lid::TELEMETRY_CONTROLLER, 512)).filter(|page| page[382] == 1)
    });
    assert!(telemetry[384..].starts_with(b"a device self-test failed"));
    start(&mut d, 2, EXTENDED).unwrap();
    assert_eq!(wait(&mut d).status, 0x20 | result::SEGMENT_FAILED);
    start(&mut d, 1, EXTENDED).unwrap();
    assert_eq!(wait(&mut d).status, 0x20);
    assert_eq!(d.log_page(lid::SMART, 512)[160], 2, "media errors");
}

/// Tests start, and the controller goes away or is reset: nothing hangs.
#[test]
fn a_test_in_progress_holds_nothing_up() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("test"));
    let file = d.controller.namespace_file(1).unwrap();
    file.write_all_at(&vec![3; 32 << 20], 0).unwrap();
    for i in 0..20 {
        d.enable();
        let code = if i % 2 == 0 { SHORT } else { EXTENDED };
        match start(&mut d, 1, code) {
            Ok(_) => {}
            Err(status) => assert_eq!(status.code(), Status::SELF_TEST_IN_PROGRESS.code()),
        }
        d.disable();
    }
    d.controller.hold_background(true);
    d.enable();
    start(&mut d, 1, ABORT).unwrap();
    start(&mut d, 1, EXTENDED).unwrap();
    rig.fabric.unplug("nvme0").unwrap();
}
