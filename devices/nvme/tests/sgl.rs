//! Data by Scatter Gather Lists, as Linux uses them on I/O queues once Identify announces them.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::{Driver, Rig, config, pattern};
use p2plab_nvme::spec::command::{Command, admin, cns, io};
use p2plab_nvme::spec::sgl::{SglDescriptor, kind};
use p2plab_nvme::spec::status::Status;
use zerocopy::IntoBytes;

fn plug(rig: &mut Rig, serial: &str) -> Driver {
    let mut d = rig.plug(config(serial));
    d.enable_cmb();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    d
}

fn block(address: u64, length: u32) -> SglDescriptor {
    SglDescriptor::new(kind::DATA_BLOCK, address, length)
}

/// Stores `descriptors` at `address`; the descriptor that points there.
fn segment(d: &Driver, kind: u8, address: u64, descriptors: &[SglDescriptor]) -> SglDescriptor {
    d.store(address, descriptors.as_bytes());
    SglDescriptor::new(kind, address, descriptors.as_bytes().len() as u32)
}

/// Read or Write of `blocks` blocks of 512 bytes from `slba`.
fn command(opcode: u8, slba: u32, blocks: u32, sgl: SglDescriptor) -> Command {
    let mut command = Command {
        opcode,
        nsid: 1.into(),
        cdw10: slba.into(),
        cdw12: (blocks - 1).into(),
        ..Command::default()
    };
    command.set_sgl1(sgl);
    assert_eq!(command.sgl1(), sgl);
    command
}

fn code(status: Status) -> Status {
    Status(status.code())
}

/// Linux looks at SGLS bits 1:0.
#[test]
fn identify_announces_them() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, "a");
    let page = d.pages(1);
    let identify = Command {
        opcode: admin::IDENTIFY,
        prp1: page.into(),
        cdw10: u32::from(cns::CONTROLLER).into(),
        ..Command::default()
    };
    d.admin(identify).unwrap();
    assert_eq!(d.load(page + 536, 4), [1, 0, 1, 0]);
    // Admin commands use PRPs over PCIe.
    let mut with_sgl = identify;
    with_sgl.set_sgl1(block(page, 4096));
    assert_eq!(d.admin(with_sgl), Err(code(Status::INVALID_FIELD)));
}

/// What is written from one layout is read into others: at odd addresses, over a chain of segments that lie in
/// host memory and in the CMB, and with parts dropped.
#[test]
fn data_written_is_data_read() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, "a");
    let (from, to, lists) = (d.pages(32), d.pages(64), d.pages(2));
    let data = pattern(3, 64 << 10);
    d.store(from + 3, &data);
    d.execute(1, command(io::WRITE, 8, 128, block(from + 3, 64 << 10)))
        .unwrap();

    // 1000 and 21 bytes, the rest in the second segment, in the CMB, with 4096 bytes dropped.
    let rest = (64 << 10) - 1021 - 4096;
    let in_cmb = [
        SglDescriptor::new(kind::BIT_BUCKET, 0, 4096),
        block(to + 0x2_0001, rest),
    ];
    let last = segment(&d, kind::LAST_SEGMENT, d.cmb_address + 0x100, &in_cmb);
    let first = [
        block(to + 7, 1000),
        block(0, 0),
        block(to + 0x1_0000, 21),
        last,
    ];
    let sgl = segment(&d, kind::SEGMENT, lists + 8, &first);
    d.controller.trace().enable(true);
    d.execute(1, command(io::READ, 8, 128, sgl)).unwrap();
    assert!(d.load(to + 7, 1000) == data[..1000]);
    assert!(d.load(to + 0x1_0000, 21) == data[1000..1021]);
    assert!(d.load(to + 0x2_0001, rest as usize) == data[1021 + 4096..]);

    let log = d.controller.trace().take();
    let entry = &log.entries[0];
    let lists: Vec<_> = entry.lists.iter().map(|l| (l.length, l.internal)).collect();
    assert_eq!(lists, [(64, false), (32, true)]);
    let lengths: Vec<_> = entry.data.iter().map(|r| r.length).collect();
    assert_eq!(lengths, [1000, 21, u64::from(rest)]);
}

/// A peer's CMB is contiguous: one descriptor in the command says all, and no list is read.
#[test]
fn a_copy_through_the_peers_cmb_reads_no_list() {
    let mut rig = Rig::new();
    let (mut a, mut b) = (plug(&mut rig, "a"), plug(&mut rig, "b"));
    let (source, target) = (a.pages(256), b.pages(256));
    let data = pattern(7, 1 << 20);
    a.store(source, &data);
    a.execute(1, command(io::WRITE, 0, 2048, block(source, 1 << 20)))
        .unwrap();
    let upstream = |rig: &Rig| rig.fabric.traffic().upstream_payload_bytes();
    let before = upstream(&rig);
    let cmb = block(b.cmb_address + 0x10_0000, 1 << 20);
    let copies = 10;
    for _ in 0..copies {
        a.execute(1, command(io::READ, 0, 2048, cmb)).unwrap();
        b.execute(1, command(io::WRITE, 64, 2048, cmb)).unwrap();
    }
    // For each half a command, a completion and two doorbells; INTx carries no payload.
    assert_eq!(upstream(&rig) - before, copies * 2 * (64 + 16 + 8));
    b.execute(1, command(io::READ, 64, 2048, block(target, 1 << 20)))
        .unwrap();
    assert!(b.load(target, data.len()) == data);
}

#[test]
fn bad_lists_get_their_status_and_the_disk_goes_on() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, "a");
    let (buffer, list) = (d.pages(2), d.pages(1));
    let cmb_end = d.cmb_address + driver::CMB_SIZE;
    let own = segment(
        &d,
        kind::SEGMENT,
        list,
        &[SglDescriptor::new(kind::SEGMENT, list, 16)],
    );
    let cases = [
        (block(buffer, 511), Status::DATA_SGL_LENGTH_INVALID),
        (block(buffer, 513), Status::DATA_SGL_LENGTH_INVALID),
        (own, Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS),
        (
            SglDescriptor::new(kind::KEYED_DATA_BLOCK, buffer, 512),
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            SglDescriptor::new(kind::SEGMENT, list, 8),
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (block(1 << 40, 512), Status::DATA_TRANSFER_ERROR),
        (block(cmb_end - 256, 512), Status::INVALID_USE_OF_CMB),
        (
            SglDescriptor::new(kind::LAST_SEGMENT, cmb_end - 16, 32),
            Status::DATA_TRANSFER_ERROR,
        ),
    ];
    for (sgl, status) in cases {
        let result = d.execute(1, command(io::READ, 0, 1, sgl));
        assert_eq!(result, Err(code(status)), "{sgl:x?}");
    }
    d.execute(1, command(io::READ, 0, 1, block(buffer, 512)))
        .unwrap();
    assert!(!d.status().cfs());
}

/// Dataset Management takes its ranges from an SGL, too; commands without data do not look at theirs.
#[test]
fn commands_other_than_read_and_write() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, "a");
    let page = d.pages(1);
    d.store(page, &[0xaa; 4096]);
    d.execute(1, command(io::WRITE, 0, 8, block(page, 4096)))
        .unwrap();
    // Attributes, 8 blocks, from block 0.
    d.store(page, &[&[0; 4][..], &8u32.to_le_bytes(), &[0; 8]].concat());
    let mut deallocate = command(io::DATASET_MANAGEMENT, 0, 1, block(page, 16));
    (deallocate.cdw11, deallocate.cdw12) = (4.into(), 0.into());
    d.execute(1, deallocate).unwrap();
    d.execute(1, command(io::READ, 0, 8, block(page, 4096)))
        .unwrap();
    assert!(d.load(page, 4096).iter().all(|byte| *byte == 0));
    let anything = SglDescriptor::new(0xff, u64::MAX, u32::MAX);
    d.execute(1, command(io::FLUSH, 0, 1, anything)).unwrap();
}
