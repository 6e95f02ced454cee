//! Namespaces that come and go, and where their blocks are.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::nvm::{attach, command, create, delete, fails, format, identify};
use driver::nvm::{identify_controller, identify_namespace, plug, run};
use driver::{Driver, NAMESPACE_SIZE, Rig, pattern};
use p2plab_nvme::spec::command::{Command, NSID_ALL, admin, cns, io, namespace_sel as sel};
use p2plab_nvme::spec::identify::IdentifyNamespace;
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Backing, Metadata, NamespaceConfig};
use zerocopy::{FromZeros, IntoBytes};

const MIB: u64 = 1 << 20;

fn numbers(page: &[u8]) -> Vec<u32> {
    let numbers = page
        .chunks_exact(4)
        .map(|n| u32::from_le_bytes(n.try_into().unwrap()));
    numbers.take_while(|n| *n != 0).collect()
}

/// Active and allocated NSIDs.
fn lists(d: &mut Driver) -> [Vec<u32>; 2] {
    [cns::ACTIVE_NAMESPACES, cns::ALLOCATED_NAMESPACES]
        .map(|cns| numbers(&identify(d, cns, 0).unwrap()))
}

fn capacities(d: &mut Driver) -> (u64, u64) {
    let id = identify_controller(d);
    (id.tnvmcap[0].get(), id.unvmcap[0].get())
}

fn on(nsid: u32, mut command: Command) -> Command {
    command.nsid = nsid.into();
    command
}

/// A namespace's whole life: created, attached, used, detached, deleted; and it counts against the capacity.
#[test]
fn a_namespace_is_created_attached_and_deleted() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| c.unallocated = 64 * MIB);
    let id = identify_controller(&mut d);
    assert_eq!((id.oacs.get() & 0b1010, id.nn.get()), (0b1010, 256));
    let total = NAMESPACE_SIZE + 64 * MIB;
    assert_eq!(capacities(&mut d), (total, 64 * MIB));
    // 4096 bytes with protection information.
    assert_eq!(create(&mut d, 2048, 3, 1), Ok(2));
    assert_eq!(capacities(&mut d), (total, 56 * MIB));
    assert_eq!(lists(&mut d), [vec![1], vec![1, 2]]);

    // Allocated, it is described; not active, it is not.
    let read = |d: &mut Driver, page| {
        let mut read = on(2, command(d, io::READ, 2047, 1, 12, page));
        read.cdw12 = (1u32 << 29).into();
        run(d, read)
    };
    let page = d.pages(1);
    assert_eq!(identify(&mut d, cns::NAMESPACE, 2), Ok(vec![0; 4096]));
    let described = identify(&mut d, cns::ALLOCATED_NAMESPACE, 2).unwrap();
    assert_eq!(described[..8], 2048u64.to_le_bytes());
    assert_eq!(read(&mut d, page), fails(Status::INVALID_FIELD));
    let controllers = |d: &mut Driver| identify(d, cns::ATTACHED_CONTROLLERS, 2).unwrap()[0];
    assert_eq!(controllers(&mut d), 0);

    attach(&mut d, 2, sel::ATTACH, &[0]).unwrap();
    assert_eq!(lists(&mut d), [vec![1, 2], vec![1, 2]]);
    assert_eq!(controllers(&mut d), 1);
    assert_eq!(
        identify(&mut d, cns::CONTROLLERS, 0).unwrap()[..4],
        [1, 0, 0, 0]
    );
    let ns = identify_namespace(&mut d, 2);
    assert_eq!((ns.flbas, ns.dps, ns.nvmcap[0].get()), (3, 1, 8 * MIB));
    d.store(page, &pattern(1, 4096));
    let mut write = on(2, command(&mut d, io::WRITE, 2047, 1, 12, page));
    write.cdw12 = (1u32 << 29).into();
    run(&mut d, write).unwrap();
    d.store(page, &[0; 4096]);
    read(&mut d, page).unwrap();
    assert!(d.load(page, 4096) == pattern(1, 4096));
    // It stays through a reset of the controller.
    d.disable();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    read(&mut d, page).unwrap();

    attach(&mut d, 2, sel::DETACH, &[0]).unwrap();
    assert_eq!(read(&mut d, page), fails(Status::INVALID_FIELD));
    attach(&mut d, 2, sel::ATTACH, &[0]).unwrap();
    read(&mut d, page).unwrap();
    let before = identify(&mut d, cns::NAMESPACE_DESCRIPTORS, 2).unwrap();
    delete(&mut d, 2).unwrap();
    assert_eq!(lists(&mut d), [vec![1], vec![1]]);
    assert_eq!(capacities(&mut d), (total, 64 * MIB));
    // Another one with its NSID is another one.
    assert_eq!(create(&mut d, 2048, 3, 1), Ok(2));
    attach(&mut d, 2, sel::ATTACH, &[0]).unwrap();
    assert_ne!(
        identify(&mut d, cns::NAMESPACE_DESCRIPTORS, 2).unwrap(),
        before
    );
    read(&mut d, page).unwrap();
    assert_eq!(d.load(page, 4096), [0; 4096]);
    // The broadcast NSID deletes all, the configured one, too.
    delete(&mut d, NSID_ALL).unwrap();
    assert_eq!(lists(&mut d), [Vec::<u32>::new(), vec![]]);
    assert_eq!(capacities(&mut d), (total, total));
    assert_eq!(create(&mut d, total / 512, 0, 0), Ok(1));
    assert_eq!(capacities(&mut d), (total, 0));
}

#[test]
fn bad_management_is_refused() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.unallocated = MIB;
        c.namespaces.push(NamespaceConfig {
            read_only: true,
            ..NamespaceConfig::memory(MIB)
        });
    });
    let full = fails(Status::NAMESPACE_INSUFFICIENT_CAPACITY);
    assert_eq!(create(&mut d, 2049, 0, 0), full);
    assert_eq!(create(&mut d, 257, 1, 0), full);
    assert_eq!(create(&mut d, u64::MAX, 1, 0), full);
    assert_eq!(create(&mut d, 1 << 55, 0, 0), full);
    assert_eq!(create(&mut d, 0, 0, 0), fails(Status::INVALID_FIELD));
    for (flbas, dps) in [(4, 0), (0x12, 0), (0, 1), (2, 2), (0x60, 0)] {
        assert_eq!(create(&mut d, 8, flbas, dps), fails(Status::INVALID_FORMAT));
    }
    let page = d.pages(1);
    let manage = |d: &mut Driver, cdw10: u32, cdw11: u32, change: fn(&mut IdentifyNamespace)| {
        let mut wanted = IdentifyNamespace::new_zeroed();
        (wanted.nsze, wanted.ncap) = (8.into(), 8.into());
        change(&mut wanted);
        d.store(page, wanted.as_bytes());
        d.admin(Command {
            opcode: admin::NAMESPACE_MANAGEMENT,
            nsid: 3.into(),
            prp1: page.into(),
            cdw10: cdw10.into(),
            cdw11: cdw11.into(),
            ..Command::default()
        })
    };
    let thin = fails(Status::THIN_PROVISIONING_NOT_SUPPORTED);
    assert_eq!(manage(&mut d, 0, 0, |w| w.ncap = 7.into()), thin);
    let invalid = fails(Status::INVALID_FIELD);
    assert_eq!(manage(&mut d, 0, 0, |w| w.nmic = 1), invalid);
    assert_eq!(manage(&mut d, 2, 0, |_| {}), invalid);
    let set = fails(Status::IO_COMMAND_SET_NOT_SUPPORTED);
    assert_eq!(manage(&mut d, 0, 2 << 24, |_| {}), set);
    assert_eq!(manage(&mut d, 0, 0, |_| {}), Ok(3));

    let list = fails(Status::CONTROLLER_LIST_INVALID);
    for controllers in [&[][..], &[1], &[0, 0], &[0, 1], &[0xffff]] {
        assert_eq!(
            attach(&mut d, 3, sel::ATTACH, controllers),
            list,
            "{controllers:?}"
        );
    }
    let detached = fails(Status::NAMESPACE_NOT_ATTACHED);
    assert_eq!(attach(&mut d, 3, sel::DETACH, &[0]), detached);
    let attached = fails(Status::NAMESPACE_ALREADY_ATTACHED);
    assert_eq!(attach(&mut d, 1, sel::ATTACH, &[0]), attached);
    assert_eq!(attach(&mut d, 1, 2, &[0]), invalid);
    for (nsid, status) in [
        (0, Status::INVALID_NAMESPACE),
        (4, Status::INVALID_FIELD),
        (257, Status::INVALID_NAMESPACE),
    ] {
        assert_eq!(attach(&mut d, nsid, sel::ATTACH, &[0]), fails(status));
        assert_eq!(delete(&mut d, nsid), fails(status));
    }
    assert_eq!(
        attach(&mut d, NSID_ALL, sel::ATTACH, &[0]),
        fails(Status::INVALID_NAMESPACE)
    );
    assert_eq!(delete(&mut d, 2), fails(Status::WRITE_PROTECTED));
    assert_eq!(lists(&mut d), [vec![1, 2], vec![1, 2, 3]]);
    // A namespace that is not attached is not formatted.
    assert_eq!(format(&mut d, 3, 0), invalid);
}

/// Namespaces are deleted and made again under two queues' load.
#[test]
fn deletion_under_load() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let buffer = d.pages(64);
    let write = command(&mut d, io::WRITE, 0, 512, 9, buffer);
    for _ in 0..20 {
        for _ in 0..50 {
            d.push(1, write);
            d.push(2, write);
        }
        d.ring_doorbell(1);
        d.ring_doorbell(2);
        let first = d.next_free_page();
        delete(&mut d, 1).unwrap();
        assert_eq!(create(&mut d, NAMESPACE_SIZE / 512, 0, 0), Ok(1));
        attach(&mut d, 1, sel::ATTACH, &[0]).unwrap();
        d.rewind(first);
        for _ in 0..50 {
            for queue in [1, 2] {
                let status = d.complete(queue).status();
                let gone = status.code() == Status::INVALID_FIELD.code();
                assert!(status.is_success() || gone, "{status:?}");
            }
        }
    }
}

/// Nothing is kept, nothing is refused, and every block there is reads as zeros.
#[test]
fn a_null_namespace_forgets() {
    for (metadata, block_size, shift) in
        [(Metadata::None, 512, 9), (Metadata::Protection, 4096, 12)]
    {
        let mut rig = Rig::new();
        let mut d = plug(&mut rig, |c| {
            c.namespaces[0] = NamespaceConfig {
                backing: Backing::Null { size: 1 << 50 },
                block_size,
                metadata,
                ..NamespaceConfig::memory(0)
            };
        });
        let blocks = (1 << 50) >> shift;
        assert_eq!(identify_namespace(&mut d, 1).nsze.get(), blocks);
        let page = d.pages(1);
        let count = 4096 >> shift;
        d.store(page, &pattern(1, 4096));
        for opcode in [io::WRITE, io::WRITE_ZEROES, io::VERIFY] {
            let mut command = command(
                &mut d,
                opcode,
                blocks - u64::from(count),
                count,
                shift,
                page,
            );
            command.cdw12 = (command.cdw12.get() | 1 << 29).into();
            run(&mut d, command).unwrap();
        }
        let mut read = command(
            &mut d,
            io::READ,
            blocks - u64::from(count),
            count,
            shift,
            page,
        );
        // Checked, too.
        read.cdw12 = (read.cdw12.get() | 1 << 29 | 1 << 28).into();
        run(&mut d, read).unwrap();
        assert_eq!(d.load(page, 4096), [0; 4096]);
        // In no time, large as it is.
        format(&mut d, 1, 1).unwrap();
        format(&mut d, 1, if shift == 9 { 0 } else { 3 | 1 << 5 }).unwrap();
        let outside = command(&mut d, io::READ, blocks, 1, shift, page);
        assert_eq!(run(&mut d, outside), fails(Status::LBA_OUT_OF_RANGE));
    }
}

/// A namespace larger than any memory takes what is written to it, in memory and in a file.
#[test]
fn sparse_namespaces() {
    const SIZE: u64 = 1 << 43;
    let dir = tempfile::tempdir().unwrap();
    let file = Backing::File {
        path: dir.path().join("disk"),
        size: Some(SIZE),
        create: true,
    };
    for backing in [Backing::Memory { size: SIZE }, file] {
        let mut rig = Rig::new();
        let mut d = plug(&mut rig, |c| {
            c.namespaces[0] = NamespaceConfig {
                backing,
                block_size: 4096,
                ..NamespaceConfig::memory(0)
            };
        });
        let (page, target) = (d.pages(1), d.pages(1));
        d.store(page, &pattern(1, 4096));
        for slba in [0, SIZE / 4096 / 2, SIZE / 4096 - 1] {
            let write = command(&mut d, io::WRITE, slba, 1, 12, page);
            run(&mut d, write).unwrap();
            let read = command(&mut d, io::READ, slba, 1, 12, target);
            run(&mut d, read).unwrap();
            assert!(d.load(target, 4096) == pattern(1, 4096));
        }
        use std::os::unix::fs::MetadataExt;
        let file = d.controller.namespace_file(1).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < MIB);
        format(&mut d, 1, 1).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }
}

/// Deleting a namespace gives its capacity back and leaves the user's file alone.
#[test]
fn a_deleted_namespace_leaves_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, pattern(1, MIB as usize)).unwrap();
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| c.namespaces[0] = NamespaceConfig::file(&path));
    delete(&mut d, 1).unwrap();
    assert_eq!(capacities(&mut d), (MIB, MIB));
    assert_eq!(create(&mut d, MIB / 4096, 1, 0), Ok(1));
    attach(&mut d, 1, sel::ATTACH, &[0]).unwrap();
    let page = d.pages(1);
    let write = command(&mut d, io::WRITE, 0, 1, 12, page);
    run(&mut d, write).unwrap();
    assert!(std::fs::read(&path).unwrap() == pattern(1, MIB as usize));
}
