//! A controller as a disk: enable, queues, reads and writes, bad commands.

mod driver;

use driver::{NAMESPACE_SIZE, Rig, config, pattern, take_events, wait_until};
use p2plab_nvme::spec::command::{Command, NSID_ALL, admin, io};
use p2plab_nvme::spec::registers::{Cc, Csts, offset, shst};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Backing, Metadata, NamespaceConfig, NvmeController};

fn without_flags(status: Status) -> Status {
    Status(status.code())
}

/// What is written is read back, with every number of PRPs from one to a chained list, on several queues.
#[test]
fn data_written_is_data_read() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    for id in 1..=3 {
        d.create_queues(id, 64, None).unwrap();
    }
    let (from, to) = (d.pages(1024), d.pages(1024));
    for (seed, blocks) in [(1, 1), (2, 8), (3, 16), (4, 24), (5, 2048), (6, 8192)] {
        let data = pattern(seed, blocks as usize * 512);
        d.store(from, &data);
        d.store(to, &vec![0; data.len()]);
        d.write(seed * 8192, blocks, from).unwrap();
        d.read(seed * 8192, blocks, to).unwrap();
        assert!(d.load(to, data.len()) == data, "{blocks} blocks");
    }
    for index in 1..=3 {
        let command = d.transfer(io::READ, 8192, 1, to);
        d.execute(index, command).unwrap();
    }
}

/// Data goes to pages that are anywhere, and PRP 1 may start within one.
#[test]
fn scattered_pages_and_an_offset() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let base = d.pages(64);
    let data = pattern(9, 8 * 4096);
    d.store(base, &data);
    d.write(0, 64, base).unwrap();

    let target = d.pages(64);
    let mut pages: Vec<u64> = (0..9).map(|i| target + (i * 5 % 9) * 8192).collect();
    pages[0] += 1024;
    let (prp1, prp2) = d.prps(&pages);
    let mut command = d.transfer(io::READ, 0, 64, base);
    (command.prp1, command.prp2) = (prp1.into(), prp2.into());
    d.execute(1, command).unwrap();
    let mut read = d.load(pages[0], 3072);
    for page in &pages[1..] {
        read.extend(d.load(*page, 4096));
    }
    assert!(read[..data.len()] == data);
}

#[test]
fn the_trace_tells_each_access_of_a_command() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1024);
    d.controller.trace().enable(true);
    d.read(16, 8192, buffer).unwrap();
    let log = d.controller.trace().take();
    assert_eq!((log.entries.len(), log.lost), (1, 0));
    let entry = &log.entries[0];
    assert_eq!(
        (entry.queue, entry.opcode, entry.slba, entry.blocks),
        (1, io::READ, 16, 8192)
    );
    assert_eq!(
        (entry.fetch.address, entry.fetch.length),
        (d.io_queues[0].sq, 64)
    );
    assert_eq!(
        (entry.completion.address, entry.completion.length),
        (d.io_queues[0].cq, 16)
    );
    // 1023 entries: a full page of 511 and a pointer, then 512.
    assert_eq!(
        entry.lists.iter().map(|l| l.length).collect::<Vec<_>>(),
        [4096, 4096]
    );
    let data: Vec<_> = entry
        .data
        .iter()
        .map(|r| (r.address, r.length, r.internal))
        .collect();
    assert_eq!(data, [(buffer, 4 << 20, false)]);
}

#[test]
fn bad_commands_get_their_status() {
    let mut rig = Rig::new();
    let mut cfg = config("disk");
    let mut read_only = NamespaceConfig::memory(1 << 20);
    read_only.read_only = true;
    cfg.namespaces.push(read_only);
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(2);
    let last = NAMESPACE_SIZE / 512;
    let good = d.transfer(io::READ, 0, 1, buffer);
    let with = |change: fn(&mut Command)| {
        let mut command = good;
        change(&mut command);
        command
    };
    let cases = [
        (with(|c| c.opcode = 0x7f), Status::INVALID_OPCODE),
        (with(|c| c.flags = 0x03), Status::INVALID_FIELD),
        (with(|c| c.flags = 0x80), Status::INVALID_FIELD),
        (with(|c| c.flags = 0xc0), Status::INVALID_FIELD),
        (with(|c| c.nsid = 0.into()), Status::INVALID_NAMESPACE),
        (with(|c| c.nsid = 3.into()), Status::INVALID_FIELD),
        (with(|c| c.nsid = 257.into()), Status::INVALID_NAMESPACE),
        (
            with(|c| c.nsid = NSID_ALL.into()),
            Status::INVALID_NAMESPACE,
        ),
        (with(|c| c.cdw12 = 0xffff.into()), Status::INVALID_FIELD),
        (
            with(|c| c.cdw11 = u32::MAX.into()),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            d.transfer(io::READ, last, 1, buffer),
            Status::LBA_OUT_OF_RANGE,
        ),
        (
            d.transfer(io::WRITE_ZEROES, last - 1, 2, buffer),
            Status::LBA_OUT_OF_RANGE,
        ),
        (with(|c| c.prp1 = 3.into()), Status::PRP_OFFSET_INVALID),
        (
            with(|c| c.prp1 = (1u64 << 40).into()),
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            with(|c| (c.opcode, c.nsid) = (io::WRITE, 2.into())),
            Status::WRITE_PROTECTED,
        ),
    ];
    for (command, status) in cases {
        let result = d.execute(1, command);
        assert_eq!(result, Err(without_flags(status)), "{command:?}");
    }
    assert_eq!(d.execute(1, good), Ok(0));
    assert!(!d.status().cfs());
}

#[test]
fn bad_queues_are_refused() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    let page = d.pages(1);
    let create = |opcode, qid: u32, size_z: u32, cdw11: u32, prp1: u64| Command {
        opcode,
        prp1: prp1.into(),
        cdw10: (qid | size_z << 16).into(),
        cdw11: cdw11.into(),
        ..Command::default()
    };
    let (cq, sq) = (admin::CREATE_IO_CQ, admin::CREATE_IO_SQ);
    let delete = |opcode, qid| create(opcode, qid, 0, 0, 0);
    let (del_sq, del_cq) = (admin::DELETE_IO_SQ, admin::DELETE_IO_CQ);
    let steps = [
        (
            create(cq, 0, 7, 1, page),
            Err(Status::INVALID_QUEUE_IDENTIFIER),
        ),
        (
            create(cq, 17, 7, 1, page),
            Err(Status::INVALID_QUEUE_IDENTIFIER),
        ),
        (create(cq, 1, 0, 1, page), Err(Status::INVALID_QUEUE_SIZE)),
        (
            create(cq, 1, 4095, 1, page),
            Err(Status::INVALID_QUEUE_SIZE),
        ),
        (create(cq, 1, 7, 0, page), Err(Status::INVALID_FIELD)),
        (
            create(cq, 1, 7, 1, page + 8),
            Err(Status::PRP_OFFSET_INVALID),
        ),
        (
            create(cq, 1, 7, 1 | 17 << 16, page),
            Err(Status::INVALID_INTERRUPT_VECTOR),
        ),
        (
            create(sq, 1, 7, 1 | 1 << 16, page),
            Err(Status::COMPLETION_QUEUE_INVALID),
        ),
        (create(cq, 1, 7, 1, page), Ok(0)),
        (
            create(cq, 1, 7, 1, page),
            Err(Status::INVALID_QUEUE_IDENTIFIER),
        ),
        (
            create(sq, 1, 7, 1, page),
            Err(Status::INVALID_QUEUE_IDENTIFIER),
        ),
        (create(sq, 2, 7, 1 | 1 << 16, page), Ok(0)),
        (
            create(sq, 2, 7, 1 | 1 << 16, page),
            Err(Status::INVALID_QUEUE_IDENTIFIER),
        ),
        (delete(del_cq, 1), Err(Status::INVALID_QUEUE_DELETION)),
        (delete(del_sq, 1), Err(Status::INVALID_QUEUE_IDENTIFIER)),
        (delete(del_sq, 2), Ok(0)),
        (delete(del_cq, 1), Ok(0)),
        (delete(del_cq, 0), Err(Status::INVALID_QUEUE_IDENTIFIER)),
    ];
    for (command, result) in steps {
        assert_eq!(
            d.admin(command),
            result.map_err(without_flags),
            "{command:?}"
        );
    }
}

/// A completion queue of 4 takes 60 commands: none is lost, none comes twice, and each has its order.
#[test]
fn a_full_completion_queue_loses_nothing() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    let (cq, sq) = (d.pages(1), d.pages(1));
    let create = |opcode, size_z: u32, cdw11: u32, prp1: u64| Command {
        opcode,
        prp1: prp1.into(),
        cdw10: (1 | size_z << 16).into(),
        cdw11: cdw11.into(),
        ..Command::default()
    };
    d.admin(create(admin::CREATE_IO_CQ, 3, 1, cq)).unwrap();
    d.admin(create(admin::CREATE_IO_SQ, 63, 1 | 1 << 16, sq))
        .unwrap();
    let buffer = d.pages(1);
    let command = d.transfer(io::READ, 0, 1, buffer);
    for cid in 0..60u16 {
        let mut command = command;
        command.cid = cid.into();
        d.store(
            sq + u64::from(cid) * 64,
            zerocopy::IntoBytes::as_bytes(&command),
        );
    }
    d.write32(offset::DOORBELLS + 8, 60);
    let (mut head, mut phase) = (0u16, 1);
    for cid in 0..60u16 {
        let entry = wait_until("a completion", || {
            let entry = d.load(cq + u64::from(head) * 16, 16);
            (entry[14] & 1 == phase).then_some(entry)
        });
        assert_eq!(u16::from_le_bytes([entry[12], entry[13]]), cid);
        head = (head + 1) % 4;
        if head == 0 {
            phase ^= 1;
        }
        d.write32(offset::DOORBELLS + 12, head.into());
    }
}

/// One interrupt at least, and not more than completions; none for a queue without them.
#[test]
fn completions_interrupt() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    let event = d.enable_msix(1);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    let command = d.transfer(io::READ, 0, 1, buffer);
    for _ in 0..20 {
        d.push(1, command);
    }
    d.ring_doorbell(1);
    for _ in 0..20 {
        d.complete(1);
    }
    let mut count = wait_until("an interrupt", || {
        Some(take_events(&event)).filter(|n| *n > 0)
    });
    d.admin(Command {
        opcode: admin::DELETE_IO_SQ,
        cdw10: 1.into(),
        ..Command::default()
    })
    .unwrap();
    count += take_events(&event);
    assert!((1..=20).contains(&count), "{count} interrupts");
}

#[test]
fn a_bad_doorbell_is_an_event() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    let cid = d.submit(
        0,
        Command {
            opcode: admin::ASYNC_EVENT_REQUEST,
            ..Command::default()
        },
    );
    d.write32(offset::DOORBELLS + 8 * 5, 3);
    let completion = d.complete(0);
    assert_eq!(
        (completion.cid.get(), completion.dw0.get()),
        (cid, 0x0001_0000)
    );
    // The Error Information page has the queue; reading it lets the next event through.
    let page = d.pages(1);
    let log = Command {
        opcode: admin::GET_LOG_PAGE,
        nsid: NSID_ALL.into(),
        prp1: page.into(),
        cdw10: (1 | 15 << 16).into(),
        ..Command::default()
    };
    d.admin(log).unwrap();
    assert_eq!(d.load(page + 8, 2), [5, 0]);
    let cid = d.submit(
        0,
        Command {
            opcode: admin::ASYNC_EVENT_REQUEST,
            ..Command::default()
        },
    );
    d.write32(offset::DOORBELLS, 999);
    let completion = d.complete(0);
    assert_eq!(
        (completion.cid.get(), completion.dw0.get()),
        (cid, 0x0001_0100)
    );
}

#[test]
fn a_file_keeps_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let backing = Backing::File {
        path: path.clone(),
        size: Some(1 << 20),
        create: true,
    };
    let mut cfg = config("disk");
    cfg.namespaces = vec![NamespaceConfig {
        backing,
        block_size: 4096,
        read_only: false,
        metadata: Metadata::None,
    }];
    let mut rig = Rig::new();
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    let data = pattern(3, 4096);
    d.store(buffer, &data);
    let mut command = d.transfer(io::WRITE, 7, 1, buffer);
    command.cdw12 = (1 << 30).into();
    d.execute(1, command).unwrap();
    let flush = Command {
        opcode: io::FLUSH,
        nsid: NSID_ALL.into(),
        ..Command::default()
    };
    d.execute(1, flush).unwrap();
    let file = std::fs::read(&path).unwrap();
    assert_eq!(file.len(), 1 << 20);
    assert!(file[7 * 4096..8 * 4096] == data);
}

#[test]
fn zeroes_and_deallocation_read_as_zeros() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(4);
    for opcode in [io::WRITE_ZEROES, io::DATASET_MANAGEMENT] {
        d.store(buffer, &pattern(1, 16384));
        d.write(0, 32, buffer).unwrap();
        let range = d.pages(1);
        d.store(
            range,
            &[[0; 4], 16u32.to_le_bytes(), 8u32.to_le_bytes(), [0; 4]].concat(),
        );
        let mut command = d.transfer(opcode, 8, 16, range);
        if opcode == io::DATASET_MANAGEMENT {
            (command.cdw10, command.cdw11) = (0.into(), 4.into());
        }
        d.execute(1, command).unwrap();
        d.read(0, 32, buffer).unwrap();
        let read = d.load(buffer, 16384);
        assert!(read[4096..12288].iter().all(|byte| *byte == 0));
        assert!(read[..4096] == pattern(1, 16384)[..4096]);
        assert!(read[12288..] == pattern(1, 16384)[12288..]);
    }
}

#[test]
fn shutdown_completes_and_a_reset_brings_the_disk_back() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let cc = Cc::from_bits(d.read32(offset::CC));
    d.write32(offset::CC, cc.with_shn(1).into_bits());
    d.wait_status("shutdown", |csts| csts.shst() == shst::COMPLETE);
    d.disable();
    assert_eq!(d.status(), Csts::new());
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    let buffer = d.pages(1);
    d.read(0, 8, buffer).unwrap();
}

#[test]
fn a_bad_configuration_is_fatal_until_reset() {
    let mut rig = Rig::new();
    let mut d = rig.plug(config("disk"));
    d.write32(offset::CC, 1);
    d.wait_status("CSTS.CFS", |csts| csts.cfs() && !csts.rdy());
    d.disable();
    d.wait_status("CSTS.CFS to clear", |csts| !csts.cfs());
    d.enable();
}

/// One page is MDTS 0, which would tell the host that there is no limit.
#[test]
fn the_largest_transfer_is_one_that_identify_can_say() {
    for (given, fits) in [
        (4096, false),
        (8192, true),
        (12288, false),
        (128 << 20, true),
        (256 << 20, false),
    ] {
        let mut cfg = config("a");
        cfg.max_transfer = given;
        match NvmeController::new(cfg) {
            Ok(_) => assert!(fits, "{given}"),
            Err(error) => {
                let text = format!("{given} bytes; use a power of two from 8192 to 134217728");
                assert!(!fits && error.to_string().contains(&text), "{error}");
            }
        }
    }
    let mut rig = Rig::new();
    let mut cfg = config("a");
    cfg.max_transfer = 8192;
    let mut d = rig.plug(cfg);
    d.enable();
    d.create_queues(1, 16, None).unwrap();
    let buffer = d.pages(3);
    assert_eq!(d.identify_controller()[77], 1, "MDTS");
    assert_eq!(d.read(0, 16, buffer), Ok(0));
    let too_long = Status(Status::INVALID_FIELD.code());
    assert_eq!(d.read(0, 17, buffer), Err(too_long));
}
