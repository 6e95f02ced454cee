//! LBA formats, metadata, protection information, Format NVM.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use std::os::unix::fs::FileExt;

use driver::nvm::{command, fails, format, identify_controller, identify_namespace, plug, run};
use driver::{Driver, NAMESPACE_SIZE, Rig, config, pattern};
use p2plab_nvme::spec::command::{Command, CopyRange, NSID_ALL, io};
use p2plab_nvme::spec::sgl::{SglDescriptor, kind};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Backing, Metadata, NamespaceConfig, NvmeController};
use zerocopy::{FromZeros, IntoBytes};

/// PRINFO: PRACT, and the checks of guard, application tag and reference tag.
const PRACT: u32 = 1 << 29;
const GUARD: u32 = 1 << 28;
const APP: u32 = 1 << 27;
const REF: u32 = 1 << 26;
const ALL: u32 = GUARD | APP | REF;

/// Format NVM's dword 10: blocks of 512 bytes with metadata, and protection information of type 1.
const PLAIN_512: u32 = 2;
const PROTECTED_512: u32 = 2 | 1 << 5;
const PROTECTED_4096: u32 = 3 | 1 << 5;

fn with_metadata(metadata: Metadata, block_size: u32) -> NamespaceConfig {
    NamespaceConfig {
        metadata,
        block_size,
        ..NamespaceConfig::memory(NAMESPACE_SIZE)
    }
}

fn plug_with(rig: &mut Rig, metadata: Metadata, block_size: u32) -> Driver {
    plug(rig, |c| {
        c.namespaces[0] = with_metadata(metadata, block_size)
    })
}

/// CRC-16/T10-DIF, bit by bit.
fn crc(data: &[u8]) -> u16 {
    let mut crc = 0u16;
    for byte in data {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 != 0 {
                crc << 1 ^ 0x8bb7
            } else {
                crc << 1
            };
        }
    }
    crc
}

/// The protection information of the blocks in `data`.
fn tuples(data: &[u8], block: usize, app: u16, first: u32) -> Vec<u8> {
    let blocks = data.chunks(block).zip(first..);
    let tuple = |(data, reference): (&[u8], u32)| {
        [
            &crc(data).to_be_bytes()[..],
            &app.to_be_bytes(),
            &reference.to_be_bytes(),
        ]
        .concat()
    };
    blocks.flat_map(tuple).collect()
}

/// A command on blocks with metadata at `mptr`; `prinfo` checks against application tag 0x1234.
fn meta(mut command: Command, mptr: u64, prinfo: u32) -> Command {
    command.mptr = mptr.into();
    command.cdw12 = (command.cdw12.get() | prinfo).into();
    command.cdw14 = ((command.slba() & 0xffff_ffff) as u32).into();
    command.cdw15 = 0xffff_1234.into();
    command
}

#[test]
fn what_identify_says() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Protection, 4096);
    for nsid in [1, NSID_ALL] {
        let ns = identify_namespace(&mut d, nsid);
        let formats: Vec<_> = ns.lbaf[..=usize::from(ns.nlbaf_z)]
            .iter()
            .map(|f| (f.lbads, f.ms.get()))
            .collect();
        assert_eq!(formats, [(9, 0), (12, 0), (9, 8), (12, 8)]);
        assert_eq!((ns.mc, ns.dpc, ns.dlfeat), (2, 0b1_1001, 0b1001));
    }
    let ns = identify_namespace(&mut d, 1);
    assert_eq!(
        (ns.flbas, ns.dps, ns.nsze.get()),
        (3, 1, NAMESPACE_SIZE / 4096)
    );
    assert_eq!(identify_controller(&mut d).fna, 0);
}

/// Metadata that means nothing to the controller, by PRPs, by SGLs at any address, and in the CMB.
#[test]
fn metadata_is_kept_beside_the_data() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Plain, 512);
    let (buffer, mptr) = (d.pages(8), d.pages(1) + 4);
    let (data, metadata) = (pattern(1, 32_768), pattern(2, 512));
    d.store(buffer, &data);
    d.store(mptr, &metadata);
    let write = meta(command(&mut d, io::WRITE, 100, 64, 9, buffer), mptr, 0);
    d.controller.trace().enable(true);
    run(&mut d, write).unwrap();
    let log = d.controller.trace().take();
    let touched = log.entries[0].metadata.map(|r| (r.address, r.length));
    assert_eq!(touched, Some((mptr, 512)));

    let (target, at) = (d.pages(8), d.pages(1) + 1);
    let mut read = meta(command(&mut d, io::READ, 100, 64, 9, target), at, 0);
    assert_eq!(run(&mut d, read), fails(Status::INVALID_FIELD));
    read.set_sgl1(SglDescriptor::new(kind::DATA_BLOCK, target, 32_768));
    run(&mut d, read).unwrap();
    assert!(d.load(target, 32_768) == data && d.load(at, 512) == metadata);

    // Both in the CMB, or neither.
    let cmb = d.cmb_address;
    let read = meta(
        command(&mut d, io::READ, 100, 64, 9, cmb),
        cmb + 0x10_0000,
        0,
    );
    run(&mut d, read).unwrap();
    assert!(d.load(cmb, 32_768) == data && d.load(cmb + 0x10_0000, 512) == metadata);
    for (data, metadata) in [
        (cmb, mptr),
        (target, cmb),
        (cmb, cmb + driver::CMB_SIZE - 8),
    ] {
        let mixed = meta(command(&mut d, io::WRITE, 100, 64, 9, data), metadata, 0);
        assert_eq!(run(&mut d, mixed), fails(Status::INVALID_USE_OF_CMB));
    }
    let lost = meta(write, 1 << 40, 0);
    assert_eq!(run(&mut d, lost), fails(Status::DATA_TRANSFER_ERROR));
    let wraps = meta(write, u64::MAX - 3, 0);
    assert_eq!(run(&mut d, wraps), fails(Status::DATA_TRANSFER_ERROR));

    // Compare takes both; deallocated, both are zeros.
    let compare = meta(command(&mut d, io::COMPARE, 100, 64, 9, buffer), mptr, 0);
    run(&mut d, compare).unwrap();
    d.store(mptr + 511, &[!metadata[511]]);
    assert_eq!(run(&mut d, compare), fails(Status::COMPARE_FAILURE));
    let zeroes = command(&mut d, io::WRITE_ZEROES, 100, 64, 9, buffer);
    run(&mut d, zeroes).unwrap();
    run(&mut d, read).unwrap();
    assert!(d.load(cmb, 32_768).iter().all(|byte| *byte == 0));
    assert!(d.load(cmb + 0x10_0000, 512).iter().all(|byte| *byte == 0));
}

/// The host makes the information, the controller checks it on the way in and on the way out.
#[test]
fn protection_information_is_checked() {
    for (block, shift) in [(512, 9), (4096, 12)] {
        let mut rig = Rig::new();
        let mut d = plug_with(&mut rig, Metadata::Protection, block);
        let (buffer, mptr) = (d.pages(16), d.pages(1));
        let data = pattern(1, 16 << shift);
        let good = tuples(&data, 1 << shift, 0x1234, 50);
        d.store(buffer, &data);
        let write = meta(command(&mut d, io::WRITE, 50, 16, shift, buffer), mptr, ALL);
        let spoil = |at: usize| {
            let mut bad = good.clone();
            bad[9 * 8 + at] ^= 0x10;
            bad
        };
        for (at, check, status) in [
            (1, GUARD, Status::GUARD_CHECK_ERROR),
            (2, APP, Status::APPLICATION_TAG_CHECK_ERROR),
            (6, REF, Status::REFERENCE_TAG_CHECK_ERROR),
        ] {
            d.store(mptr, &spoil(at));
            assert_eq!(run(&mut d, write), fails(status));
            let others = meta(
                command(&mut d, io::WRITE, 50, 16, shift, buffer),
                mptr,
                ALL & !check,
            );
            run(&mut d, others).unwrap();
            let (target, read_to) = (d.pages(16), d.pages(1));
            let read = |d: &mut Driver, prinfo| {
                let read = command(d, io::READ, 50, 16, shift, target);
                run(d, meta(read, read_to, prinfo))
            };
            assert_eq!(read(&mut d, check), fails(status));
            read(&mut d, ALL & !check).unwrap();
            assert!(d.load(target, data.len()) == data && d.load(read_to, 128) == spoil(at));
            let verify = meta(command(&mut d, io::VERIFY, 50, 16, shift, target), 0, check);
            assert_eq!(run(&mut d, verify), fails(status));
            // A block whose application tag is FFFFh is not checked.
            let mut escaped = spoil(at);
            escaped[9 * 8 + 2..9 * 8 + 4].fill(0xff);
            d.store(mptr, &escaped);
            run(&mut d, write).unwrap();
            read(&mut d, ALL).unwrap();
        }
        // A refused write changed nothing.
        d.store(buffer, &vec![0; data.len()]);
        d.store(mptr, &good);
        assert_eq!(run(&mut d, write), fails(Status::GUARD_CHECK_ERROR));
        let target = d.pages(16);
        let read = command(&mut d, io::READ, 50, 16, shift, target);
        let tuples_to = d.pages(1);
        run(&mut d, meta(read, tuples_to, 0)).unwrap();
        assert!(d.load(target, data.len()) == data);
        let mut elsewhere = write;
        elsewhere.cdw14 = 51.into();
        let invalid = fails(Status::INVALID_PROTECTION_INFORMATION);
        assert_eq!(run(&mut d, elsewhere), invalid);
    }
}

/// With PRACT no metadata crosses the bus.
#[test]
fn the_controller_makes_and_takes_protection_information() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Protection, 512);
    let (buffer, target, mptr) = (d.pages(2), d.pages(2), d.pages(1));
    let data = pattern(1, 8192);
    d.store(buffer, &data);
    d.controller.trace().enable(true);
    let write = meta(
        command(&mut d, io::WRITE, 7, 16, 9, buffer),
        u64::MAX,
        PRACT,
    );
    run(&mut d, write).unwrap();
    let read = meta(
        command(&mut d, io::READ, 7, 16, 9, target),
        u64::MAX,
        PRACT | ALL,
    );
    run(&mut d, read).unwrap();
    assert!(d.load(target, 8192) == data);
    let log = d.controller.trace().take();
    assert!(log.entries.iter().all(|entry| entry.metadata.is_none()));
    let read = meta(command(&mut d, io::READ, 7, 16, 9, target), mptr, ALL);
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 128), tuples(&data, 512, 0x1234, 7));
    // The medium lies.
    let file = d.controller.namespace_file(1).unwrap();
    file.write_all_at(&[!data[5 * 512]], 12 * 512).unwrap();
    let guard = fails(Status::GUARD_CHECK_ERROR);
    assert_eq!(run(&mut d, read), guard);
    let verify = meta(command(&mut d, io::VERIFY, 7, 16, 9, buffer), 0, GUARD);
    assert_eq!(run(&mut d, verify), guard);
    let compare = meta(command(&mut d, io::COMPARE, 7, 16, 9, buffer), mptr, GUARD);
    assert_eq!(run(&mut d, compare), guard);
    // Data that the host drops with a bit bucket is not moved, metadata is.
    let segment = d.pages(1);
    let descriptors = [
        SglDescriptor::new(kind::BIT_BUCKET, 0, 1000),
        SglDescriptor::new(kind::DATA_BLOCK, target, 3096),
    ];
    d.store(segment, descriptors.as_bytes());
    let mut read = meta(command(&mut d, io::READ, 14, 8, 9, target), mptr, ALL);
    read.set_sgl1(SglDescriptor::new(kind::LAST_SEGMENT, segment, 32));
    run(&mut d, read).unwrap();
    assert!(d.load(target, 3096) == data[7 * 512 + 1000..15 * 512]);
}

/// Blocks never written, deallocated or zeroed.
#[test]
fn protection_information_of_blocks_without_data() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Protection, 512);
    let (buffer, mptr) = (d.pages(1), d.pages(1));
    let unchecked = meta(command(&mut d, io::READ, 0, 8, 9, buffer), mptr, 0);
    let read = meta(unchecked, mptr, ALL);
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 64), [0xff; 64]);
    let write = meta(command(&mut d, io::WRITE, 0, 8, 9, buffer), mptr, PRACT);
    let zeroes = command(&mut d, io::WRITE_ZEROES, 0, 8, 9, buffer);
    for (command, expected) in [
        (meta(zeroes, 0, PRACT), tuples(&[0; 4096], 512, 0x1234, 0)),
        (
            meta(zeroes, 0, PRACT | 1 << 25),
            tuples(&[0; 4096], 512, 0x1234, 0),
        ),
        (zeroes, vec![0; 64]),
    ] {
        d.store(buffer, &pattern(1, 4096));
        run(&mut d, write).unwrap();
        run(&mut d, command).unwrap();
        run(&mut d, unchecked).unwrap();
        assert_eq!(d.load(mptr, 64), expected);
        assert_eq!(d.load(buffer, 4096), [0; 4096]);
    }
    let checked = meta(zeroes, 0, PRACT | GUARD);
    let invalid = fails(Status::INVALID_PROTECTION_INFORMATION);
    assert_eq!(run(&mut d, checked), invalid);
    let range = d.pages(1);
    d.store(
        range,
        &[[0; 4], 8u32.to_le_bytes(), [0; 4], [0; 4]].concat(),
    );
    let mut deallocate = command(&mut d, io::DATASET_MANAGEMENT, 0, 1, 9, range);
    deallocate.cdw11 = 4.into();
    run(&mut d, deallocate).unwrap();
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 64), [0xff; 64]);
    // More blocks than the tuples are made for at a time.
    let many = meta(
        command(&mut d, io::WRITE_ZEROES, 8, 1500, 9, buffer),
        0,
        PRACT,
    );
    run(&mut d, many).unwrap();
    let read = meta(command(&mut d, io::READ, 1500, 8, 9, buffer), mptr, ALL);
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 64), tuples(&[0; 4096], 512, 0x1234, 1500));
}

#[test]
fn copies_move_protection_information() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Protection, 512);
    let (buffer, mptr, list) = (d.pages(2), d.pages(1), d.pages(1));
    let data = pattern(1, 8192);
    d.store(buffer, &data);
    let write = meta(command(&mut d, io::WRITE, 32, 16, 9, buffer), 0, PRACT);
    run(&mut d, write).unwrap();
    let mut range = CopyRange::new_zeroed();
    (range.slba, range.nlb_z) = (36.into(), 7.into());
    (range.eilbrt, range.elbat, range.elbatm) = (36.into(), 0x1234.into(), 0xffff.into());
    let copy = |prinfor: u32, prinfow: u32| Command {
        opcode: io::COPY,
        nsid: 1.into(),
        prp1: list.into(),
        cdw10: 100.into(),
        cdw12: (prinfor >> 14 | prinfow).into(),
        cdw14: 100.into(),
        cdw15: 0xffff_4321.into(),
        ..Command::default()
    };
    d.store(list, range.as_bytes());
    let read = meta(command(&mut d, io::READ, 100, 8, 9, buffer), mptr, 0);
    // Made anew for where they are now.
    run(&mut d, copy(PRACT | ALL, PRACT)).unwrap();
    run(&mut d, read).unwrap();
    assert_eq!(
        d.load(mptr, 64),
        tuples(&data[2048..6144], 512, 0x4321, 100)
    );
    assert!(d.load(buffer, 4096) == data[2048..6144]);
    // Passed on: what fitted the source does not fit the target.
    run(&mut d, copy(ALL, GUARD)).unwrap();
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 64), tuples(&data[2048..6144], 512, 0x1234, 36));
    let reference = fails(Status::REFERENCE_TAG_CHECK_ERROR);
    assert_eq!(run(&mut d, copy(ALL, REF)), reference);
    let application = fails(Status::APPLICATION_TAG_CHECK_ERROR);
    assert_eq!(run(&mut d, copy(0, APP)), application);
    assert_eq!(run(&mut d, copy(PRACT, 0)), fails(Status::INVALID_FIELD));
    range.elbat = 0x1235.into();
    d.store(list, range.as_bytes());
    assert_eq!(run(&mut d, copy(APP, 0)), application);
    range.eilbrt = 37.into();
    d.store(list, range.as_bytes());
    let invalid = fails(Status::INVALID_PROTECTION_INFORMATION);
    assert_eq!(run(&mut d, copy(REF, 0)), invalid);
}

/// Data and metadata of a block change together, whoever looks.
#[test]
fn writes_and_reads_of_protected_blocks_do_not_mix() {
    let mut rig = Rig::new();
    let mut d = plug_with(&mut rig, Metadata::Protection, 512);
    const BLOCKS: u32 = 128;
    let sides = [d.pages(16), d.pages(16)];
    let (target, mptr) = (d.pages(16), d.pages(1));
    for (seed, side) in sides.iter().enumerate() {
        d.store(*side, &pattern(seed as u64, 128 * 512));
    }
    let writes = sides.map(|side| meta(command(&mut d, io::WRITE, 0, BLOCKS, 9, side), 0, PRACT));
    let read = meta(command(&mut d, io::READ, 0, BLOCKS, 9, target), mptr, ALL);
    for _ in 0..40 {
        for i in 0..60 {
            d.push(1, writes[i % 2]);
            d.push(2, read);
        }
        d.ring_doorbell(1);
        d.ring_doorbell(2);
        // A poll would take one of the cores that the two workers are to race on.
        std::thread::sleep(std::time::Duration::from_millis(2));
        for _ in 0..60 {
            assert!(d.complete(1).status().is_success());
            let status = d.complete(2).status();
            assert!(status.is_success(), "{status:?}");
        }
    }
}

fn file_config(path: &std::path::Path, metadata: Metadata) -> NamespaceConfig {
    NamespaceConfig {
        metadata,
        backing: Backing::File {
            path: path.into(),
            size: Some(1 << 20),
            create: true,
        },
        ..NamespaceConfig::memory(0)
    }
}

/// The file of the blocks has the blocks and nothing else; metadata lasts as they do.
#[test]
fn metadata_of_a_file_is_in_a_file_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, beside) = (dir.path().join("disk"), dir.path().join("disk.meta"));
    let data = pattern(1, 8192);
    {
        let mut rig = Rig::new();
        let mut d = plug(&mut rig, |c| {
            c.namespaces[0] = file_config(&path, Metadata::Protection)
        });
        let buffer = d.pages(2);
        d.store(buffer, &data);
        let write = command(&mut d, io::WRITE, 3, 16, 9, buffer);
        run(&mut d, meta(write, 0, PRACT | 1 << 30)).unwrap();
    }
    let mut expected = vec![0; 1 << 20];
    expected[3 * 512..19 * 512].copy_from_slice(&data);
    assert!(std::fs::read(&path).unwrap() == expected);
    assert_eq!(std::fs::metadata(&beside).unwrap().len(), 2048 * 8);
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.namespaces[0] = file_config(&path, Metadata::Protection);
        c.namespaces[0].read_only = true;
    });
    let (buffer, mptr) = (d.pages(2), d.pages(1));
    let read = meta(command(&mut d, io::READ, 3, 16, 9, buffer), mptr, ALL);
    run(&mut d, read).unwrap();
    assert_eq!(d.load(mptr, 128), tuples(&data, 512, 0x1234, 3));
    drop((d, rig));
    // A format with metadata starts with none, and one without leaves none.
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.namespaces[0] = file_config(&path, Metadata::Protection);
    });
    format(&mut d, 1, PROTECTED_4096).unwrap();
    assert_eq!(std::fs::read(&beside).unwrap(), [0; 256 * 8]);
    format(&mut d, 1, 0).unwrap();
    assert!(!beside.exists());
    assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 20]);
    drop((d, rig));
    // Without metadata nothing is made beside a file.
    let mut cfg = config("a");
    cfg.namespaces[0] = file_config(&path, Metadata::None);
    NvmeController::new(cfg.clone()).unwrap();
    assert!(!beside.exists());
    cfg.namespaces[0] = file_config(&path, Metadata::Plain);
    cfg.namespaces[0].read_only = true;
    let error = NvmeController::new(cfg).err().unwrap().to_string();
    assert!(
        error.contains("no place for its metadata") && error.contains("disk.meta"),
        "{error}"
    );
}

#[test]
fn a_format_changes_the_blocks_and_erases_them() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let (buffer, mptr) = (d.pages(8), d.pages(1));
    for cdw10 in [
        1,
        PLAIN_512,
        3,
        PROTECTED_512,
        PROTECTED_4096 | 1 << 8,
        1 << 9,
    ] {
        let ns = identify_namespace(&mut d, 1);
        let shift = u32::from(ns.lbaf[usize::from(ns.flbas)].lbads);
        d.store(buffer, &pattern(1, 8 << shift));
        let write = command(&mut d, io::WRITE, 0, 8, shift, buffer);
        run(&mut d, meta(write, mptr, PRACT)).unwrap();
        let mark = command(&mut d, io::WRITE_UNCORRECTABLE, 4, 1, shift, buffer);
        run(&mut d, mark).unwrap();

        format(&mut d, 1, cdw10).unwrap();
        let ns = identify_namespace(&mut d, 1);
        assert_eq!(u32::from(ns.flbas), cdw10 & 0xf);
        assert_eq!(u32::from(ns.dps), cdw10 >> 5 & 7 | (cdw10 >> 8 & 1) << 3);
        let shift = u32::from(ns.lbaf[usize::from(ns.flbas)].lbads);
        assert_eq!(ns.nsze.get(), NAMESPACE_SIZE >> shift);
        let read = meta(command(&mut d, io::READ, 0, 8, shift, buffer), mptr, ALL);
        run(&mut d, read).unwrap();
        assert!(d.load(buffer, 8 << shift).iter().all(|byte| *byte == 0));
        let last = meta(
            command(&mut d, io::READ, ns.nsze.get(), 1, shift, buffer),
            mptr,
            0,
        );
        assert_eq!(run(&mut d, last), fails(Status::LBA_OUT_OF_RANGE));
    }
    // A reset changes nothing of it.
    format(&mut d, 1, PROTECTED_4096).unwrap();
    d.flr();
    d.restore_config_space();
    d.enable();
    let ns = identify_namespace(&mut d, 1);
    assert_eq!((ns.flbas, ns.dps), (3, 1));
}

#[test]
fn bad_formats_are_refused() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        let mut second = NamespaceConfig::memory(512 * 7);
        c.namespaces.push(second.clone());
        second.read_only = true;
        c.namespaces.push(second);
    });
    let page = d.pages(1);
    d.store(page, &[7; 512]);
    d.write(0, 1, page).unwrap();
    let invalid = fails(Status::INVALID_FORMAT);
    for cdw10 in [4, 15, 1 << 12, 2 | 1 << 4, 1 << 5, 2 | 2 << 5, 2 | 7 << 5] {
        assert_eq!(format(&mut d, 1, cdw10), invalid, "{cdw10:#x}");
    }
    for ses in 2..8 {
        assert_eq!(format(&mut d, 1, ses << 9), fails(Status::INVALID_FIELD));
    }
    // Smaller than a block; read-only, alone or among all.
    assert_eq!(format(&mut d, 2, 1), invalid);
    assert_eq!(format(&mut d, 3, 0), fails(Status::WRITE_PROTECTED));
    assert_eq!(format(&mut d, NSID_ALL, 0), fails(Status::WRITE_PROTECTED));
    assert_eq!(format(&mut d, 4, 0), fails(Status::INVALID_FIELD));
    assert_eq!(format(&mut d, 0, 0), fails(Status::INVALID_NAMESPACE));
    assert_eq!(format(&mut d, 257, 0), fails(Status::INVALID_NAMESPACE));
    d.read(0, 1, page).unwrap();
    assert_eq!(d.load(page, 512), [7; 512]);
}

/// The broadcast NSID formats all namespaces, while two queues work on them: each command ends, and the last format
/// leaves nothing of them.
#[test]
fn all_are_formatted_under_load() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.namespaces.push(NamespaceConfig::memory(1 << 20))
    });
    let buffer = d.pages(64);
    d.store(buffer, &vec![0xee; 64 * 4096]);
    let writes = [1, 2].map(|nsid| {
        let mut write = command(&mut d, io::WRITE, 0, 512, 9, buffer);
        write.nsid = nsid.into();
        write
    });
    for round in 0..20 {
        for _ in 0..50 {
            d.push(1, writes[0]);
            d.push(2, writes[1]);
        }
        d.ring_doorbell(1);
        d.ring_doorbell(2);
        format(&mut d, NSID_ALL, round % 2).unwrap();
        for _ in 0..50 {
            for queue in [1, 2] {
                let status = d.complete(queue).status().code();
                let formatting = Status::FORMAT_IN_PROGRESS.code();
                // Blocks eight times as large: more than MDTS or than there are.
                let expected = [0, formatting, 0x02, 0x80];
                assert!(expected.contains(&status), "{status:#x}");
            }
        }
    }
    format(&mut d, NSID_ALL, 0).unwrap();
    for nsid in [1, 2] {
        let mut read = command(&mut d, io::READ, 0, 512, 9, buffer);
        read.nsid = nsid.into();
        run(&mut d, read).unwrap();
        assert!(d.load(buffer, 512 * 512).iter().all(|byte| *byte == 0));
    }
}
