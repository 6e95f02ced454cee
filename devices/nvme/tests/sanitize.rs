//! Sanitize operations: what they erase, what they forbid meanwhile, how they fail.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use driver::{Driver, NAMESPACE_SIZE, Rig, config, nvm, pattern, wait_until};
use p2plab_nvme::spec::command::{
    Command, NSID_ALL, ReadWriteCdw12, SanitizeCdw10, admin, feature, io,
};
use p2plab_nvme::spec::log::{SanitizeStatus, lid};
use p2plab_nvme::spec::registers::offset;
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Backing, NamespaceConfig, PmrConfig};
use p2plab_pcie::{
    BarBacking, BarDeclaration, CpuAccess, Declaration, Endpoint, Identity, Port, ResetKind,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use zerocopy::FromBytes;

const EXIT_FAILURE_MODE: u8 = 1;
const BLOCK_ERASE: u8 = 2;
const OVERWRITE: u8 = 3;
const CRYPTO_ERASE: u8 = 4;

const COMPLETED: u16 = 1;
const IN_PROGRESS: u16 = 2;
const FAILED: u16 = 3;
const DEALLOCATED: u16 = 4;
const GLOBAL_DATA_ERASED: u16 = 1 << 8;

fn fails<T>(status: Status) -> Result<T, Status> {
    Err(Status(status.code()))
}

fn action(action: u8) -> SanitizeCdw10 {
    SanitizeCdw10::new().with_sanact(action)
}

fn sanitize(d: &mut Driver, cdw10: SanitizeCdw10) -> Result<u32, Status> {
    let dwords = [cdw10.into_bits(), 0xdead_beef, 0];
    d.simple_admin(admin::SANITIZE, 0, dwords)
}

fn status(d: &mut Driver) -> SanitizeStatus {
    SanitizeStatus::read_from_bytes(&d.log_page(lid::SANITIZE_STATUS, 512)).unwrap()
}

fn wait(d: &mut Driver) -> SanitizeStatus {
    wait_until("the end of a sanitize operation", || {
        Some(status(d)).filter(|s| s.sstat.get() & 7 != IN_PROGRESS)
    })
}

/// Blocks are deallocated in any case: for a host that does not want that, an error or a warning as it chooses.
#[test]
fn unwanted_deallocation_is_an_error_or_a_warning() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    let unwanted = action(BLOCK_ERASE).with_ndas(true);
    assert_eq!(sanitize(&mut d, unwanted), fails(Status::INVALID_FIELD));
    d.set_feature(feature::SANITIZE_CONFIG, 1).unwrap();
    let cid = d.request_event();
    sanitize(&mut d, unwanted).unwrap();
    assert_eq!(d.event(cid), 0x0081_0206);
    assert_eq!(status(&mut d).sstat.get(), DEALLOCATED | GLOBAL_DATA_ERASED);
    assert!(is_zero(&d));
}

/// Two namespaces, with data in both.
fn disk(rig: &mut Rig) -> Driver {
    let mut cfg = config("sanitize");
    cfg.namespaces.push(NamespaceConfig::memory(1 << 20));
    let mut d = rig.plug(cfg);
    fill(&d);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    d
}

fn fill(d: &Driver) {
    for nsid in [1, 2] {
        let file = d.controller.namespace_file(nsid).unwrap();
        file.write_all_at(&pattern(nsid.into(), 1 << 20), 0)
            .unwrap();
    }
}

fn is_zero(d: &Driver) -> bool {
    [(1, NAMESPACE_SIZE), (2, 1 << 20)]
        .iter()
        .all(|(nsid, size)| {
            let mut data = vec![1; *size as usize];
            let file = d.controller.namespace_file(*nsid).unwrap();
            file.read_exact_at(&mut data, 0).unwrap();
            data.iter().all(|byte| *byte == 0)
        })
}

#[test]
fn everything_reads_as_zeros_afterwards() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    let id = d.identify_controller();
    // Block Erase, Overwrite, No-Deallocate Inhibited, NODMMAS 01b.
    assert_eq!(id[328..332], [0b110, 0, 0, 0b0110_0000]);
    let never = status(&mut d);
    assert_eq!((never.sprog.get(), never.sstat.get()), (0xffff, 0));

    let overwrite = action(OVERWRITE).with_owpass(3).with_oipbp(true);
    for (cdw10, passes) in [(action(BLOCK_ERASE), 0), (overwrite, 3)] {
        fill(&d);
        let cid = d.request_event();
        sanitize(&mut d, cdw10).unwrap();
        assert_eq!(d.event(cid), 0x0081_0106);
        let done = status(&mut d);
        assert_eq!(
            done.sstat.get(),
            COMPLETED | passes << 3 | GLOBAL_DATA_ERASED
        );
        assert_eq!(done.scdw10.get(), cdw10.into_bits());
        assert_eq!(done.sprog.get(), 0xffff);
        assert!(is_zero(&d));
    }
    // A write, and not all is erased any more.
    let buffer = d.pages(1);
    d.write(0, 1, buffer).unwrap();
    assert_eq!(status(&mut d).sstat.get() & GLOBAL_DATA_ERASED, 0);
}

#[test]
fn overwriting_takes_the_passes_asked_for() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    // 0 stands for 16.
    sanitize(&mut d, action(OVERWRITE)).unwrap();
    assert_eq!(wait(&mut d).sstat.get() >> 3 & 0x1f, 16);
    // The log outlives a loss of power.
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    d.enable();
    assert_eq!(status(&mut d).sstat.get() >> 3 & 0x1f, 16);
}

#[test]
fn little_is_allowed_meanwhile() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    let buffer = d.pages(1);
    d.controller.hold_background(true);
    sanitize(&mut d, action(BLOCK_ERASE)).unwrap();
    let now = status(&mut d);
    assert_eq!(now.sstat.get(), IN_PROGRESS);
    assert_ne!(now.sprog.get(), 0xffff);
    for result in [d.read(0, 1, buffer), d.write(0, 1, buffer)] {
        assert_eq!(result, fails(Status::SANITIZE_IN_PROGRESS));
    }
    let flush = Command {
        opcode: io::FLUSH,
        nsid: NSID_ALL.into(),
        ..Command::default()
    };
    assert_eq!(d.execute(1, flush), Ok(0));
    for (opcode, cdw10) in [
        (admin::SANITIZE, action(BLOCK_ERASE).into_bits()),
        (admin::SANITIZE, action(EXIT_FAILURE_MODE).into_bits()),
        (admin::DEVICE_SELF_TEST, 1),
        (admin::FIRMWARE_COMMIT, 0),
        (admin::GET_LOG_PAGE, u32::from(lid::FIRMWARE_SLOT)),
    ] {
        let result = d.simple_admin(opcode, 0, [cdw10, 0, 0]);
        assert_eq!(result, fails(Status::SANITIZE_IN_PROGRESS), "{opcode:#x}");
    }
    // What a driver needs to come up goes on, and a reset changes nothing.
    d.log_page(lid::SMART, 512);
    d.identify_controller();
    d.disable();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    assert_eq!(d.read(0, 1, buffer), fails(Status::SANITIZE_IN_PROGRESS));
    // Nor does a loss of power.
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    assert_eq!(status(&mut d).sstat.get(), IN_PROGRESS);
    d.controller.hold_background(false);
    assert_eq!(wait(&mut d).sstat.get(), COMPLETED | GLOBAL_DATA_ERASED);
    assert!(is_zero(&d));
    let buffer = d.pages(1);
    assert_eq!(d.read(0, 1, buffer), Ok(0));
}

/// The first of two fused commands is as much of an I/O command as any.
#[test]
fn fused_commands_do_not_pass_either() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    let buffer = d.pages(1);
    d.controller.hold_background(true);
    sanitize(&mut d, action(BLOCK_ERASE)).unwrap();
    let [compare, write] = [io::COMPARE, io::WRITE].map(|opcode| d.transfer(opcode, 0, 1, buffer));
    let results = nvm::fused(&mut d, 1, compare, write);
    let expected = [Status::SANITIZE_IN_PROGRESS, Status::FAILED_FUSED_COMMAND];
    assert_eq!(results, expected.map(nvm::code));
    d.controller.hold_background(false);
    wait(&mut d);
    d.store(buffer, &[0; 512]);
    let results = nvm::fused(&mut d, 1, compare, write);
    assert_eq!(results, [Status::SUCCESS; 2]);
}

/// Namespaces that are not attached, metadata, what is behind the last block, the PMR: another day they are read.
#[test]
fn what_no_command_reaches_now_is_erased_too() {
    let dir = tempfile::tempdir().unwrap();
    let [disk, metadata, pmr] = ["disk", "disk.meta", "pmr"].map(|name| dir.path().join(name));
    let mut rig = Rig::new();
    let mut cfg = config("sanitize");
    cfg.unallocated = 1 << 20;
    cfg.namespaces = vec![
        NamespaceConfig {
            backing: Backing::File {
                path: disk.clone(),
                size: Some(9 << 9),
                create: true,
            },
            ..NamespaceConfig::memory(0)
        },
        NamespaceConfig {
            backing: Backing::Null { size: 1 << 30 },
            ..NamespaceConfig::memory(0)
        },
    ];
    cfg.pmr = Some(PmrConfig::file(&pmr, 2 << 20).create());
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    // Blocks of 4 KiB with metadata, of which there is one.
    nvm::format(&mut d, 1, 3).unwrap();
    assert_eq!(nvm::create(&mut d, 64, 0, 0), Ok(3));
    let detached = d.controller.namespace_file(3).unwrap();
    for cdw10 in [action(BLOCK_ERASE), action(OVERWRITE).with_owpass(1)] {
        std::fs::write(&disk, [7; 9 << 9]).unwrap();
        std::fs::write(&metadata, [7; 8]).unwrap();
        std::fs::write(&pmr, vec![7; 2 << 20]).unwrap();
        detached.write_all_at(&[7; 64 << 9], 0).unwrap();
        d.write32(offset::PMRCTL, 1);
        let refused = fails(Status::SANITIZE_PROHIBITED_BY_PMR);
        assert_eq!(sanitize(&mut d, cdw10), refused);
        d.write32(offset::PMRCTL, 0);
        sanitize(&mut d, cdw10).unwrap();
        assert_eq!(wait(&mut d).sstat.get() & 7, COMPLETED);
        assert_eq!(std::fs::read(&disk).unwrap(), [0; 9 << 9]);
        assert_eq!(std::fs::read(&metadata).unwrap(), [0; 8]);
        assert!(std::fs::read(&pmr).unwrap() == vec![0; 2 << 20]);
        let mut data = [1; 64 << 9];
        detached.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, [0; 64 << 9]);
    }
}

/// A loss of power begins an operation anew.
#[test]
fn a_power_cut_does_not_end_it() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    d.controller.hold_background(true);
    sanitize(&mut d, action(OVERWRITE).with_owpass(2)).unwrap();
    d.controller.power_cut();
    d.enable();
    assert_eq!(status(&mut d).sstat.get(), IN_PROGRESS);
    d.controller.hold_background(false);
    let done = COMPLETED | 2 << 3 | GLOBAL_DATA_ERASED;
    assert_eq!(wait(&mut d).sstat.get(), done);
    assert!(is_zero(&d));
}

#[test]
fn a_self_test_gives_way() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    d.controller.hold_background(true);
    d.simple_admin(admin::DEVICE_SELF_TEST, NSID_ALL, [2, 0, 0])
        .unwrap();
    sanitize(&mut d, action(BLOCK_ERASE)).unwrap();
    d.controller.hold_background(false);
    wait(&mut d);
    let page = d.log_page(lid::DEVICE_SELF_TEST, 564);
    assert_eq!((page[0], page[4]), (0, 0x29));
}

#[test]
fn what_is_not_possible_is_refused() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    for bad in [
        action(0),
        action(CRYPTO_ERASE),
        action(5),
        action(7),
        action(BLOCK_ERASE).with_ndas(true),
    ] {
        assert_eq!(sanitize(&mut d, bad), fails(Status::INVALID_FIELD));
    }
    // Nothing has failed, so there is nothing to leave.
    assert_eq!(sanitize(&mut d, action(EXIT_FAILURE_MODE)), Ok(0));
    assert_eq!(status(&mut d).sstat.get(), 0);
    assert!(!is_zero(&d));

    let mut read_only = config("read-only");
    let mut ns = NamespaceConfig::memory(1 << 20);
    ns.read_only = true;
    read_only.namespaces.push(ns);
    let mut d = rig.plug(read_only);
    d.enable();
    assert_eq!(
        sanitize(&mut d, action(BLOCK_ERASE)),
        fails(Status::WRITE_PROTECTED)
    );
}

/// A medium that cannot be written any more: only a new attempt or, if it was allowed, giving up leads out.
#[test]
fn a_failure_is_kept_until_the_host_deals_with_it() {
    let medium = memfd_create("medium", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&medium, 1 << 20).unwrap();
    let mut cfg = config("sanitize");
    cfg.namespaces = vec![NamespaceConfig::file(format!(
        "/proc/self/fd/{}",
        medium.as_raw_fd()
    ))];
    assert!(matches!(cfg.namespaces[0].backing, Backing::File { .. }));
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    d.write(0, 8, buffer).unwrap();
    fcntl_add_seals(&medium, SealFlags::WRITE).unwrap();

    let failed = |d: &mut Driver, cdw10| {
        let cid = d.request_event();
        sanitize(d, cdw10).unwrap();
        assert_eq!(d.event(cid), 0x0081_0106);
        assert_eq!(status(d).sstat.get() & 7, FAILED);
    };
    for kind in [BLOCK_ERASE, OVERWRITE] {
        // Restricted.
        failed(&mut d, action(kind));
        assert_eq!(d.read(0, 8, buffer), fails(Status::SANITIZE_FAILED));
        for refused in [action(EXIT_FAILURE_MODE), action(kind).with_ause(true)] {
            assert_eq!(sanitize(&mut d, refused), fails(Status::SANITIZE_FAILED));
        }
        d.disable();
        d.enable();
        d.create_queues(1, 64, None).unwrap();
        assert_eq!(d.read(0, 8, buffer), fails(Status::SANITIZE_FAILED));
    }
    // Another restricted attempt would be needed; it cannot succeed here. A controller of its own for the other mode.
    drop((d, rig));
    let mut cfg = config("other");
    cfg.namespaces = vec![NamespaceConfig::file(format!(
        "/proc/self/fd/{}",
        medium.as_raw_fd()
    ))];
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    failed(&mut d, action(BLOCK_ERASE).with_ause(true));
    assert_eq!(d.read(0, 8, buffer), fails(Status::SANITIZE_FAILED));
    sanitize(&mut d, action(EXIT_FAILURE_MODE)).unwrap();
    assert_eq!(d.read(0, 8, buffer), Ok(0));
    assert_eq!(status(&mut d).sstat.get() & 7, FAILED);
}

/// A peer whose registers answer when they are told to.
struct Slow {
    asked: AtomicBool,
    answers: AtomicBool,
}

impl Endpoint for Slow {
    fn declaration(&self) -> Declaration {
        Declaration {
            identity: Identity {
                vendor_id: 1,
                device_id: 1,
                subsystem_vendor_id: 1,
                subsystem_id: 1,
                revision_id: 1,
                class_code: 0x05_8000,
                serial_number: None,
            },
            bars: vec![BarDeclaration {
                index: 0,
                size: 4096,
                is_64bit: true,
                prefetchable: false,
                cpu_access: CpuAccess::Trapped,
                backing: BarBacking::Registers,
            }],
            msix: None,
            intx: false,
        }
    }

    fn attach(&self, _port: Port) {}

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        self.asked.store(true, Ordering::SeqCst);
        wait_until("leave to answer", || {
            self.answers.load(Ordering::SeqCst).then_some(())
        });
        data.fill(0xee);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self, _kind: ResetKind) {}

    fn detach(&self) {}

    fn dump(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// A write that was on its way when the operation began is erased with the rest: the operation waits for it.
#[test]
fn no_write_slips_through() {
    let mut rig = Rig::new();
    let mut d = disk(&mut rig);
    let slow = Arc::new(Slow {
        asked: AtomicBool::new(false),
        answers: AtomicBool::new(false),
    });
    let peer = rig.fabric.plug("dp1", "slow", slow.clone()).unwrap();
    peer.connect();
    peer.config_write(0x10, &0xe000_0000u32.to_le_bytes())
        .unwrap();
    peer.config_write(4, &0x6u16.to_le_bytes()).unwrap();

    let mut command = d.transfer(io::WRITE, 0, 1, 0xe000_0000);
    // With FUA it is the worker's: this thread goes on.
    command.cdw12 = ReadWriteCdw12::new().with_fua(true).into_bits().into();
    d.submit(1, command);
    wait_until("the write's read", || {
        slow.asked.load(Ordering::SeqCst).then_some(())
    });
    sanitize(&mut d, action(BLOCK_ERASE)).unwrap();
    let buffer = d.pages(1);
    // Commands of other queues are refused meanwhile, and nothing is erased yet.
    d.create_queues(2, 64, None).unwrap();
    let read = d.transfer(io::READ, 0, 1, buffer);
    for _ in 0..100 {
        assert_eq!(d.execute(2, read), fails(Status::SANITIZE_IN_PROGRESS));
        assert_eq!(status(&mut d).sstat.get(), IN_PROGRESS);
        let mut data = [0; 512];
        let file = d.controller.namespace_file(1).unwrap();
        file.read_exact_at(&mut data, 4096).unwrap();
        assert!(data == pattern(1, 1 << 20)[4096..4608]);
    }
    slow.answers.store(true, Ordering::SeqCst);
    assert!(d.complete(1).status().is_success());
    assert_eq!(wait(&mut d).sstat.get() & 7, COMPLETED);
    assert!(is_zero(&d));
}
