//! Get Features and Set Features.

mod driver;

use driver::{Driver, Rig, config, nvm};
use p2plab_nvme::NamespaceConfig;
use p2plab_nvme::spec::command::{Command, NSID_ALL, admin, feature, namespace_sel};
use p2plab_nvme::spec::log::lid;
use p2plab_nvme::spec::status::Status;

const CURRENT: u32 = 0;
const DEFAULT: u32 = 1;
const SAVED: u32 = 2;
const CAPABILITIES: u32 = 3;
const SAVE: u32 = 1 << 31;

fn fails<T>(status: Status) -> Result<T, Status> {
    Err(Status(status.code()))
}

/// The page of supported features is true, and so are the capabilities.
#[test]
fn features_supported_are_those_there() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("features"));
    d.enable();
    let page = d.log_page(lid::FEATURES_SUPPORTED, 1024);
    let buffer = d.pages(1);
    for fid in 0..=u8::MAX {
        let entry = u32::from_le_bytes(page[4 * usize::from(fid)..][..4].try_into().unwrap());
        let mut get = Command {
            opcode: admin::GET_FEATURES,
            nsid: 1.into(),
            prp1: buffer.into(),
            cdw10: u32::from(fid).into(),
            ..Command::default()
        };
        let there = d.admin(get).is_ok();
        assert_eq!(entry & 1 != 0, there, "{fid:#x}");
        let capabilities = d.get_feature(fid, CAPABILITIES, 0);
        if !there {
            assert_eq!(capabilities, fails(Status::INVALID_FIELD));
            continue;
        }
        // Saveable features take SV with the value that they have, others say that they are not.
        let capabilities = capabilities.unwrap();
        assert_eq!(capabilities & 4, 4);
        let value = d.admin(get).unwrap();
        get.opcode = admin::SET_FEATURES;
        get.cdw10 = (u32::from(fid) | SAVE).into();
        get.cdw11 = value.into();
        get.nsid = if entry & 1 << 20 != 0 { 1 } else { 0 }.into();
        let set = d.admin(get);
        match capabilities & 1 {
            0 => assert_eq!(set, fails(Status::FEATURE_NOT_SAVEABLE), "{fid:#x}"),
            _ => assert_eq!(set, Ok(0), "{fid:#x}"),
        }
        assert_eq!(capabilities & 2 != 0, fid == feature::ERROR_RECOVERY);
    }
}

#[test]
fn current_saved_and_default_values_are_three() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("features"));
    d.enable();
    let fid = feature::INTERRUPT_COALESCING;
    let three =
        |d: &mut Driver| [CURRENT, SAVED, DEFAULT].map(|s| d.get_feature(fid, s, 0).unwrap());
    assert_eq!(three(&mut d), [0, 0, 0]);
    let save = u32::from(fid) | SAVE;
    d.simple_admin(admin::SET_FEATURES, 0, [save, 0x102, 0])
        .unwrap();
    d.set_feature(fid, 0x304).unwrap();
    assert_eq!(three(&mut d), [0x304, 0x102, 0]);
    // A reset makes the saved value current; so does power that goes and comes.
    d.disable();
    d.enable();
    assert_eq!(three(&mut d), [0x102, 0x102, 0]);
    d.set_feature(fid, 0x506).unwrap();
    d.flr();
    d.restore_config_space();
    d.enable();
    assert_eq!(three(&mut d), [0x102, 0x102, 0]);
    rig.fabric.unplug("nvme0").unwrap();
    let mut d = rig.plug_again(d);
    d.enable();
    assert_eq!(three(&mut d), [0x102, 0x102, 0]);
    assert_eq!(d.get_feature(fid, 4, 0), fails(Status::INVALID_FIELD));
}

#[test]
fn error_recovery_is_each_namespaces_own() {
    let mut rig = Rig::new();
    let mut cfg = config("features");
    cfg.namespaces.push(NamespaceConfig::memory(1 << 20));
    let mut d = rig.plug(cfg);
    d.enable();
    let fid = u32::from(feature::ERROR_RECOVERY);
    let set =
        |d: &mut Driver, nsid, value| d.simple_admin(admin::SET_FEATURES, nsid, [fid, value, 0]);
    let get = |d: &mut Driver, nsid| d.simple_admin(admin::GET_FEATURES, nsid, [fid, 0, 0]);
    set(&mut d, NSID_ALL, 5).unwrap();
    set(&mut d, 2, 7).unwrap();
    assert_eq!((get(&mut d, 1), get(&mut d, 2)), (Ok(5), Ok(7)));
    for (nsid, status) in [
        (0, Status::INVALID_NAMESPACE),
        (3, Status::INVALID_FIELD),
        (257, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(set(&mut d, nsid, 1), fails(status));
        assert_eq!(get(&mut d, nsid), fails(status));
    }
    assert_eq!(get(&mut d, NSID_ALL), fails(Status::INVALID_NAMESPACE));
    // Nothing reports deallocated blocks as errors.
    assert_eq!(set(&mut d, 1, 1 << 16), fails(Status::INVALID_FIELD));
    // Features of the controller have no namespace.
    let arbitration = [feature::ARBITRATION.into(), 3, 0];
    let mut with = |nsid| d.simple_admin(admin::SET_FEATURES, nsid, arbitration);
    assert_eq!(with(1), fails(Status::FEATURE_NOT_NAMESPACE_SPECIFIC));
    assert_eq!(with(9), fails(Status::INVALID_FIELD));
    assert_eq!(with(257), fails(Status::INVALID_NAMESPACE));
    assert_eq!(with(NSID_ALL), Ok(0));
    assert_eq!(d.get_feature(feature::ARBITRATION, CURRENT, 0), Ok(3));
    // A namespace that takes a deleted one's place begins anew.
    nvm::delete(&mut d, 2).unwrap();
    assert_eq!(nvm::create(&mut d, 8, 0, 0), Ok(2));
    nvm::attach(&mut d, 2, namespace_sel::ATTACH, &[0]).unwrap();
    assert_eq!(get(&mut d, 2), Ok(0));
}

#[test]
fn values_that_are_not_possible_are_refused() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("features"));
    d.enable();
    for (fid, cdw11) in [
        (feature::POWER_MANAGEMENT, 1),
        // Sensor 1, a threshold type that is reserved.
        (feature::TEMPERATURE_THRESHOLD, 1 << 16 | 300),
        (feature::TEMPERATURE_THRESHOLD, 2 << 20 | 300),
        (feature::INTERRUPT_VECTOR_CONFIG, 17),
        (feature::NUMBER_OF_QUEUES, 0xffff),
        (0x0f, 1),
        (0xff, 0),
    ] {
        assert_eq!(
            d.set_feature(fid, cdw11),
            fails(Status::INVALID_FIELD),
            "{fid:#x}"
        );
    }
    // Thresholds of one sensor and of all are the same here; over and under are not.
    let fid = feature::TEMPERATURE_THRESHOLD;
    d.set_feature(fid, 0xf << 16 | 350).unwrap();
    d.set_feature(fid, 1 << 20 | 280).unwrap();
    assert_eq!(d.get_feature(fid, CURRENT, 0), Ok(350));
    assert_eq!(d.get_feature(fid, CURRENT, 1 << 20), Ok(280));
    assert_eq!(d.get_feature(fid, DEFAULT, 0), Ok(343));
}

#[test]
fn the_clock_is_set_and_runs() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("features"));
    d.enable();
    let page = d.pages(1);
    let command = |opcode| Command {
        opcode,
        prp1: page.into(),
        cdw10: u32::from(feature::TIMESTAMP).into(),
        ..Command::default()
    };
    let read = |d: &mut Driver| {
        d.store(page, &[0xff; 8]);
        d.admin(command(admin::GET_FEATURES)).unwrap();
        let data = d.load(page, 8);
        u64::from_le_bytes(data.try_into().unwrap())
    };
    assert!(read(&mut d) < 60_000, "since the reset, origin 0");
    d.store(page, &1_790_000_000_000u64.to_le_bytes());
    d.admin(command(admin::SET_FEATURES)).unwrap();
    let now = read(&mut d);
    assert_eq!(now >> 48, 0b10, "set by the host");
    let now = now & 0xffff_ffff_ffff;
    assert!((1_790_000_000_000..1_790_000_060_000).contains(&now));
    d.disable();
    d.enable();
    assert!(read(&mut d) < 60_000);
    let mut bad = command(admin::SET_FEATURES);
    bad.prp1 = (1u64 << 50).into();
    assert_eq!(d.admin(bad), fails(Status::DATA_TRANSFER_ERROR));
}
