//! Firmware updates as a host does them.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::{Driver, Rig, config};
use p2plab_nvme::spec::command::{Command, admin, feature};
use p2plab_nvme::spec::log::lid;
use p2plab_nvme::spec::status::Status;

const REPLACE: u32 = 0;
const REPLACE_AND_ACTIVATE_AT_RESET: u32 = 1;
const ACTIVATE_AT_RESET: u32 = 2;
const ACTIVATE_NOW: u32 = 3;

fn fails<T>(status: Status) -> Result<T, Status> {
    Err(Status(status.code()))
}

/// An image as `firmware.rs` documents it.
fn image(revision: &str, needs_reset: bool) -> Vec<u8> {
    let length = 12 << 10;
    let mut image = format!("p2plabFW{revision:8}").into_bytes();
    image.extend(u32::to_le_bytes(length));
    image.push(needs_reset.into());
    image.resize(length as usize, 0);
    image
}

fn piece(d: &mut Driver, offset: u32, data: &[u8]) -> Result<u32, Status> {
    let first = d.pages(0);
    let page = d.pages(1);
    d.store(page, data);
    let result = d.admin(Command {
        opcode: admin::FIRMWARE_IMAGE_DOWNLOAD,
        prp1: page.into(),
        cdw10: (data.len() as u32 / 4 - 1).into(),
        cdw11: (offset / 4).into(),
        ..Command::default()
    });
    d.rewind(first);
    result
}

fn download(d: &mut Driver, image: &[u8]) {
    for (i, data) in image.chunks(4096).enumerate() {
        piece(d, i as u32 * 4096, data).unwrap();
    }
}

fn commit(d: &mut Driver, slot: u32, action: u32) -> Result<u32, Status> {
    d.simple_admin(admin::FIRMWARE_COMMIT, 0, [slot | action << 3, 0, 0])
}

fn running(d: &mut Driver) -> String {
    let page = d.identify_controller();
    String::from_utf8(page[64..72].to_vec()).unwrap()
}

/// AFI and the revisions of slots 1 to 3.
fn slots(d: &mut Driver) -> (u8, [String; 3]) {
    let page = d.log_page(lid::FIRMWARE_SLOT, 512);
    let text = |i: usize| {
        let bytes = &page[8 * i..8 * i + 8];
        String::from_utf8(bytes.to_vec()).unwrap().replace('\0', "")
    };
    (page[0], [text(1), text(2), text(3)])
}

#[test]
fn an_image_is_activated_by_a_reset() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("firmware"));
    d.enable();
    assert_eq!(running(&mut d), "1.0     ");
    let page = d.identify_controller();
    // Three slots, the first read-only; activation without reset; 4 KiB.
    assert_eq!((page[260], page[319]), (0b1_0111, 1));
    assert_eq!(page[256] & 4, 4);

    download(&mut d, &image("2.0", false));
    assert_eq!(commit(&mut d, 2, REPLACE), Ok(0));
    let revisions = || ["1.0     ".into(), "2.0     ".into(), String::new()];
    assert_eq!(slots(&mut d), (0x01, revisions()));
    d.disable();
    d.enable();
    assert_eq!(running(&mut d), "1.0     ");
    assert_eq!(commit(&mut d, 2, ACTIVATE_AT_RESET), Ok(0));
    assert_eq!(slots(&mut d), (0x21, revisions()));
    assert_eq!(running(&mut d), "1.0     ");
    d.disable();
    d.enable();
    assert_eq!(running(&mut d), "2.0     ");
    assert_eq!(slots(&mut d), (0x02, revisions()));

    download(&mut d, &image("3.0", true));
    assert_eq!(commit(&mut d, 3, REPLACE_AND_ACTIVATE_AT_RESET), Ok(0));
    d.flr();
    d.restore_config_space();
    d.enable();
    assert_eq!(running(&mut d), "3.0     ");
}

#[test]
fn an_image_is_activated_at_once_if_it_can_be() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("firmware"));
    d.enable();
    d.set_feature(feature::ASYNC_EVENT_CONFIG, 1 << 9).unwrap();
    let cid = d.request_event();
    download(&mut d, &image("2.0", false));
    commit(&mut d, 2, ACTIVATE_NOW).unwrap();
    assert_eq!(d.event(cid), 0x0003_0102);
    assert_eq!(running(&mut d), "2.0     ");
    // Back to what is in a slot, without a download.
    commit(&mut d, 1, ACTIVATE_NOW).unwrap();
    assert_eq!(running(&mut d), "1.0     ");

    download(&mut d, &image("3.0", true));
    assert_eq!(
        commit(&mut d, 0, ACTIVATE_NOW),
        fails(Status::FIRMWARE_NEEDS_RESET)
    );
    assert_eq!(running(&mut d), "1.0     ");
    assert_eq!(slots(&mut d).0, 0x31);
    d.disable();
    d.enable();
    assert_eq!(running(&mut d), "3.0     ");
}

#[test]
fn bad_updates_are_refused_and_change_nothing() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("firmware"));
    d.enable();
    let before = slots(&mut d);
    let good = image("2.0", false);
    // Nothing downloaded; nothing in the slot; slots that are not, or not the host's to write.
    for action in [REPLACE, REPLACE_AND_ACTIVATE_AT_RESET] {
        assert_eq!(
            commit(&mut d, 2, action),
            fails(Status::INVALID_FIRMWARE_IMAGE)
        );
    }
    for action in [ACTIVATE_AT_RESET, ACTIVATE_NOW] {
        assert_eq!(
            commit(&mut d, 3, action),
            fails(Status::INVALID_FIRMWARE_IMAGE)
        );
        assert_eq!(
            commit(&mut d, 0, action),
            fails(Status::INVALID_FIRMWARE_SLOT)
        );
    }
    download(&mut d, &good);
    for slot in [1, 4, 7] {
        assert_eq!(
            commit(&mut d, slot, REPLACE),
            fails(Status::INVALID_FIRMWARE_SLOT)
        );
    }
    for action in 4..8 {
        assert_eq!(commit(&mut d, 2, action), fails(Status::INVALID_FIELD));
    }
    // The image is still there, and is used up by a reset.
    d.disable();
    d.enable();
    assert_eq!(
        commit(&mut d, 2, REPLACE),
        fails(Status::INVALID_FIRMWARE_IMAGE)
    );
    // A gap; a second copy of a piece; one that is no image.
    piece(&mut d, 0, &good[..4096]).unwrap();
    piece(&mut d, 8192, &good[8192..]).unwrap();
    assert_eq!(
        piece(&mut d, 8192, &good[8192..]),
        fails(Status::OVERLAPPING_RANGE)
    );
    assert_eq!(
        commit(&mut d, 2, REPLACE),
        fails(Status::INVALID_FIRMWARE_IMAGE)
    );
    download(&mut d, &vec![0x5a; 12 << 10]);
    assert_eq!(
        commit(&mut d, 2, REPLACE),
        fails(Status::INVALID_FIRMWARE_IMAGE)
    );
    assert_eq!(slots(&mut d), before);
    // A host that begins again gets what it sent last.
    download(&mut d, &image("bad", false));
    download(&mut d, &good);
    commit(&mut d, 2, REPLACE).unwrap();
    assert_eq!(slots(&mut d).1[1], "2.0     ");
}

#[test]
fn pieces_that_overflow_or_miss_the_granularity_are_refused() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("firmware"));
    d.enable();
    let page = d.pages(1);
    for (numd_z, ofst) in [
        (u32::MAX, 0),
        (u32::MAX, u32::MAX),
        (1023, u32::MAX - 1023),
        (1023, 1 << 20),
        (1022, 0),
        (1023, 1),
    ] {
        let command = Command {
            opcode: admin::FIRMWARE_IMAGE_DOWNLOAD,
            prp1: page.into(),
            cdw10: numd_z.into(),
            cdw11: ofst.into(),
            ..Command::default()
        };
        assert_eq!(d.admin(command), fails(Status::INVALID_FIELD));
    }
    let mut nowhere = Command {
        opcode: admin::FIRMWARE_IMAGE_DOWNLOAD,
        prp1: (1u64 << 50).into(),
        cdw10: 1023.into(),
        ..Command::default()
    };
    assert_eq!(d.admin(nowhere), fails(Status::DATA_TRANSFER_ERROR));
    // The last piece that fits.
    nowhere.prp1 = page.into();
    nowhere.cdw11 = ((4 << 20) / 4 - 1024).into();
    assert_eq!(d.admin(nowhere), Ok(0));
}
