//! The commands beside Read and Write: Compare, Verify, Write Uncorrectable, Copy, Compare and Write.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::nvm::{code, command, fails, fused, identify, identify_controller, identify_namespace};
use driver::nvm::{plug, push_fused, run};
use driver::{Driver, NAMESPACE_SIZE, Rig, pattern};
use p2plab_nvme::NamespaceConfig;
use p2plab_nvme::spec::command::{Command, CopyRange, FUSE_FIRST, FUSE_SECOND, admin, cns, io};
use p2plab_nvme::spec::registers::offset;
use p2plab_nvme::spec::sgl::{SglDescriptor, kind};
use p2plab_nvme::spec::status::Status;
use zerocopy::{FromZeros, IntoBytes};

const SUCCESS: Status = Status::SUCCESS;

/// Writes `blocks` blocks of a pattern at `slba`, and leaves them at the address that it returns.
fn fill(d: &mut Driver, slba: u64, blocks: u32, seed: u64) -> u64 {
    let buffer = d.pages((u64::from(blocks) * 512).div_ceil(4096));
    d.store(buffer, &pattern(seed, blocks as usize * 512));
    d.write(slba, blocks, buffer).unwrap();
    buffer
}

#[test]
fn what_identify_claims() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let id = identify_controller(&mut d);
    let commands = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 8;
    assert_eq!(id.oncs.get() & commands, commands);
    assert_eq!(
        (id.fuses.get(), id.ocfs.get(), id.acwu_z.get()),
        (1, 1, 127)
    );
    let limits = identify(&mut d, cns::CONTROLLER_CSI, 0).unwrap();
    assert_eq!(
        limits[..16],
        [[11, 13, 0, 0], [0; 4], [0; 4], [0; 4]].concat()
    );
    let ns = identify_namespace(&mut d, 1);
    assert_eq!((ns.mssrl.get(), ns.mcl.get(), ns.msrc_z), (8192, 8192, 127));
}

#[test]
fn compare_tells_equal_from_different() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let buffer = fill(&mut d, 16, 1024, 1);
    d.controller.trace().enable(true);
    let compare = command(&mut d, io::COMPARE, 16, 1024, 9, buffer);
    run(&mut d, compare).unwrap();
    let log = d.controller.trace().take();
    assert_eq!(log.entries[0].blocks, 1024);
    assert_eq!(
        log.entries[0].data.iter().map(|r| r.length).sum::<u64>(),
        512 << 10
    );
    for at in [0, 511, 65_536, 300_000, (512 << 10) - 1] {
        let byte = d.load(buffer + at, 1)[0];
        d.store(buffer + at, &[!byte]);
        assert_eq!(
            run(&mut d, compare),
            fails(Status::COMPARE_FAILURE),
            "byte {at}"
        );
        d.store(buffer + at, &[byte]);
    }
    // With FUA, and with data by SGL of which a bucket drops nothing.
    let mut with_fua = compare;
    with_fua.cdw12 = (1023 | 1 << 30).into();
    run(&mut d, with_fua).unwrap();
    let segment = d.pages(1);
    let descriptors = [
        SglDescriptor::new(kind::DATA_BLOCK, buffer, 512 << 9),
        SglDescriptor::new(kind::BIT_BUCKET, 0, 4096),
        SglDescriptor::new(kind::DATA_BLOCK, buffer + (512 << 9), 512 << 9),
    ];
    d.store(segment, descriptors.as_bytes());
    let mut by_sgl = compare;
    by_sgl.set_sgl1(SglDescriptor::new(kind::LAST_SEGMENT, segment, 48));
    run(&mut d, by_sgl).unwrap();
}

#[test]
fn verify_reads_without_data() {
    let mut rig = Rig::new();
    // A file can lose its end; memory cannot.
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(NAMESPACE_SIZE).unwrap();
    let mut d = plug(&mut rig, |config| {
        config.namespaces = vec![NamespaceConfig::file(file.path())];
    });
    let verify = |slba: u64, blocks: u32| Command {
        opcode: io::VERIFY,
        nsid: 1.into(),
        cdw10: (slba as u32).into(),
        cdw12: (blocks - 1).into(),
        ..Command::default()
    };
    d.controller.trace().enable(true);
    run(&mut d, verify(0, 16_384)).unwrap();
    assert!(d.controller.trace().take().entries[0].data.is_empty());
    // VSL.
    assert_eq!(run(&mut d, verify(0, 16_385)), fails(Status::INVALID_FIELD));
    let last = NAMESPACE_SIZE / 512;
    run(&mut d, verify(last - 8, 8)).unwrap();
    assert_eq!(
        run(&mut d, verify(last - 8, 9)),
        fails(Status::LBA_OUT_OF_RANGE)
    );
    // What lies there cannot be read any more.
    d.controller
        .namespace_file(1)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let error = fails(Status::UNRECOVERED_READ_ERROR);
    assert_eq!(run(&mut d, verify(last - 8, 8)), error);
}

#[test]
fn uncorrectable_blocks_fail_reads_until_they_are_written() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let buffer = fill(&mut d, 0, 64, 1);
    let unreadable = fails(Status::UNRECOVERED_READ_ERROR);
    let mark = command(&mut d, io::WRITE_UNCORRECTABLE, 8, 8, 9, 0x1000);
    for heal in [io::WRITE, io::WRITE_ZEROES, io::DATASET_MANAGEMENT] {
        run(&mut d, mark).unwrap();
        for opcode in [io::READ, io::COMPARE, io::VERIFY] {
            let touching = command(&mut d, opcode, 0, 9, 9, buffer);
            assert_eq!(run(&mut d, touching), unreadable, "{opcode:#x}");
        }
        assert_eq!(copy(&mut d, 32, &[(0, 4), (12, 1)]), unreadable);
        d.read(0, 8, buffer).unwrap();
        d.read(16, 8, buffer).unwrap();
        // Half of them: the other half stays as it is.
        d.write(8, 4, buffer).unwrap();
        d.read(8, 4, buffer).unwrap();
        assert_eq!(d.read(12, 1, buffer).map(|_| ()), unreadable);
        let ranges = d.pages(1);
        let range = [[0; 4], 8u32.to_le_bytes(), 8u32.to_le_bytes(), [0; 4]].concat();
        d.store(ranges, &range);
        let mut healing = command(&mut d, heal, 8, 8, 9, ranges);
        if heal == io::DATASET_MANAGEMENT {
            (healing.cdw10, healing.cdw11) = (0.into(), 4.into());
        }
        run(&mut d, healing).unwrap();
        d.read(0, 64, buffer).unwrap();
    }
    // They stay marked through a reset of the controller, and SMART counts the errors.
    run(&mut d, mark).unwrap();
    d.disable();
    d.enable();
    d.create_queues(1, 64, None).unwrap();
    assert_eq!(d.read(8, 1, buffer).map(|_| ()), unreadable);
    let out = command(&mut d, io::WRITE_UNCORRECTABLE, u64::MAX, 1, 9, 0x1000);
    assert_eq!(run(&mut d, out), fails(Status::LBA_OUT_OF_RANGE));
}

fn source((slba, blocks): (u64, u32)) -> CopyRange {
    let mut range = CopyRange::new_zeroed();
    range.slba = slba.into();
    range.nlb_z = ((blocks - 1) as u16).into();
    range
}

fn copy_command(d: &mut Driver, target: u64, sources: &[(u64, u32)]) -> Command {
    let list = d.pages(2);
    let ranges: Vec<CopyRange> = sources.iter().copied().map(source).collect();
    d.store(list, ranges.as_bytes());
    Command {
        opcode: io::COPY,
        nsid: 1.into(),
        prp1: list.into(),
        prp2: (list + 4096).into(),
        cdw10: ((target & 0xffff_ffff) as u32).into(),
        cdw11: ((target >> 32) as u32).into(),
        cdw12: (sources.len() as u32 - 1).into(),
        ..Command::default()
    }
}

fn copy(d: &mut Driver, target: u64, sources: &[(u64, u32)]) -> Result<(), Status> {
    let command = copy_command(d, target, sources);
    run(d, command)
}

/// Blocks of several ranges land one behind the other, and only the list of ranges crosses the bus.
#[test]
fn copies_stay_in_the_device() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    fill(&mut d, 0, 64, 1);
    d.controller.trace().enable(true);
    copy(&mut d, 1000, &[(5, 3), (60, 4), (5, 1)]).unwrap();
    let log = d.controller.trace().take();
    assert_eq!(
        log.entries[0].data.iter().map(|r| r.length).sum::<u64>(),
        96
    );
    let buffer = d.pages(1);
    d.read(1000, 8, buffer).unwrap();
    let all = pattern(1, 64 * 512);
    let expected = [
        &all[5 * 512..8 * 512],
        &all[60 * 512..],
        &all[5 * 512..6 * 512],
    ]
    .concat();
    assert!(d.load(buffer, 4096) == expected);
    // A target within its sources.
    copy(&mut d, 2, &[(0, 16)]).unwrap();
    let buffer = d.pages(2);
    d.read(2, 16, buffer).unwrap();
    assert!(d.load(buffer, 8192) == all[..8192]);
    // As much as a command may copy, and by an SGL.
    copy(&mut d, 16_384, &[(0, 4096), (0, 4096)]).unwrap();
    let mut by_sgl = copy_command(&mut d, 2000, &[(0, 1); 128]);
    by_sgl.set_sgl1(SglDescriptor::new(
        kind::DATA_BLOCK,
        by_sgl.prp1.get(),
        4096,
    ));
    run(&mut d, by_sgl).unwrap();
}

#[test]
fn copies_have_limits() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let last = NAMESPACE_SIZE / 512;
    let limit = fails(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
    let outside = fails(Status::LBA_OUT_OF_RANGE);
    assert_eq!(copy(&mut d, 0, &[(0, 8193)]), limit);
    assert_eq!(copy(&mut d, 0, &[(0, 65_536); 128]), limit);
    assert_eq!(copy(&mut d, 0, &[(0, 1); 129]), limit);
    assert_eq!(copy(&mut d, 0, &[(0, 1), (last, 1)]), outside);
    assert_eq!(copy(&mut d, 0, &[(u64::MAX, 2)]), outside);
    assert_eq!(copy(&mut d, last - 1, &[(0, 2)]), outside);
    assert_eq!(copy(&mut d, u64::MAX, &[(0, 1)]), outside);
    for bad in [1 << 8, 1 << 20] {
        let mut command = copy_command(&mut d, 0, &[(0, 1)]);
        command.cdw12 = bad.into();
        assert_eq!(run(&mut d, command), fails(Status::INVALID_FIELD));
    }
}

fn pair(d: &mut Driver, slba: u64, blocks: u32, old: u64, new: u64) -> (Command, Command) {
    let compare = command(d, io::COMPARE, slba, blocks, 9, old);
    let write = command(d, io::WRITE, slba, blocks, 9, new);
    (compare, write)
}

#[test]
fn compare_and_write_writes_if_equal() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let old = fill(&mut d, 4, 8, 1);
    let new = d.pages(1);
    d.store(new, &pattern(2, 4096));
    let (compare, write) = pair(&mut d, 4, 8, old, new);
    d.controller.trace().enable(true);
    assert_eq!(fused(&mut d, 1, compare, write), [SUCCESS; 2]);
    let log = d.controller.trace().take();
    let data: Vec<u64> = log.entries.iter().map(|e| e.data[0].address).collect();
    assert_eq!((log.entries.len(), data), (2, vec![old, new]));
    let failed = [Status::COMPARE_FAILURE, Status::FAILED_FUSED_COMMAND].map(code);
    assert_eq!(fused(&mut d, 1, compare, write), failed);
    let buffer = d.pages(1);
    d.read(4, 8, buffer).unwrap();
    assert!(d.load(buffer, 4096) == pattern(2, 4096));
}

#[test]
fn a_fused_operation_is_two_commands_that_fit() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let buffer = fill(&mut d, 0, 512, 1);
    let (compare, write) = pair(&mut d, 0, 8, buffer, buffer);
    let failed = code(Status::FAILED_FUSED_COMMAND);
    let missing = code(Status::MISSING_FUSED_COMMAND);
    let invalid = code(Status::INVALID_FIELD);
    let with = |command: &Command, change: fn(&mut Command)| {
        let mut command = *command;
        change(&mut command);
        command
    };
    let cases = [
        (compare, with(&write, |c| c.cdw10 = 1.into()), invalid),
        (compare, with(&write, |c| c.cdw12 = 6.into()), invalid),
        (compare, with(&write, |c| c.nsid = 2.into()), invalid),
        (compare, with(&write, |c| c.opcode = io::READ), invalid),
        (write, write, invalid),
        (with(&compare, |c| c.flags = 0x80), write, invalid),
    ];
    for (first, second, status) in cases {
        assert_eq!(fused(&mut d, 1, first, second), [status, failed]);
    }
    let (compare, write) = pair(&mut d, 0, 129, buffer, buffer);
    let exceeded = code(Status::ATOMIC_WRITE_UNIT_EXCEEDED);
    assert_eq!(fused(&mut d, 1, compare, write), [exceeded, failed]);
    let (compare, write) = pair(&mut d, 0, 128, buffer, buffer);
    assert_eq!(fused(&mut d, 1, compare, write), [SUCCESS; 2]);
    let (compare, write) = pair(&mut d, NAMESPACE_SIZE / 512, 1, buffer, buffer);
    let outside = code(Status::LBA_OUT_OF_RANGE);
    assert_eq!(fused(&mut d, 1, compare, write), [outside, failed]);

    // The second half alone, the first half last in the queue, the first half before another command or another
    // first half.
    let (compare, write) = pair(&mut d, 0, 8, buffer, buffer);
    let first = with(&compare, |c| c.flags |= FUSE_FIRST);
    let second = with(&write, |c| c.flags |= FUSE_SECOND);
    let read = command(&mut d, io::READ, 0, 8, 9, buffer);
    let cases: [(&[Command], &[Status]); 4] = [
        (&[second], &[missing]),
        (&[first], &[missing]),
        (&[first, read, second], &[missing, SUCCESS, missing]),
        (
            &[first, first, second, read],
            &[missing, SUCCESS, SUCCESS, SUCCESS],
        ),
    ];
    for (commands, statuses) in cases {
        let cids: Vec<u16> = commands.iter().map(|c| d.push(1, *c)).collect();
        d.ring_doorbell(1);
        for (cid, status) in cids.into_iter().zip(statuses) {
            let completion = d.complete(1);
            assert_eq!(
                (completion.cid.get(), code(completion.status())),
                (cid, *status)
            );
        }
    }
}

/// The halves lie in the last and the first slot of the submission queue, and their completions need more slots than
/// the completion queue has.
#[test]
fn fused_commands_at_the_edges_of_queues() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let (cq, sq) = (d.pages(1), d.pages(1));
    let create = |opcode, size_z: u32, cdw11: u32, prp1: u64| Command {
        opcode,
        prp1: prp1.into(),
        cdw10: (3 | size_z << 16).into(),
        cdw11: cdw11.into(),
        ..Command::default()
    };
    d.admin(create(admin::CREATE_IO_CQ, 1, 1, cq)).unwrap();
    d.admin(create(admin::CREATE_IO_SQ, 2, 1 | 3 << 16, sq))
        .unwrap();
    let buffer = d.pages(1);
    let (mut compare, mut write) = pair(&mut d, 0, 8, buffer, buffer);
    compare.flags |= FUSE_FIRST;
    write.flags |= FUSE_SECOND;
    let (mut tail, mut head, mut phase) = (0u64, 0u32, 1u8);
    for round in 0..6u16 {
        for (half, command) in [compare, write].iter_mut().enumerate() {
            command.cid = (round * 2 + half as u16).into();
            d.store(sq + tail * 64, command.as_bytes());
            tail = (tail + 1) % 3;
        }
        d.write32(offset::DOORBELLS + 8 * 3, tail as u32);
        for half in 0..2 {
            let entry = driver::wait_until("a completion", || {
                let entry = d.load(cq + u64::from(head) * 16, 16);
                (entry[14] & 1 == phase).then_some(entry)
            });
            assert_eq!(u16::from_le_bytes([entry[12], entry[13]]), round * 2 + half);
            assert_eq!((entry[14] & 0xfe, entry[15]), (0, 0), "{entry:?}");
            head = (head + 1) % 2;
            phase ^= u8::from(head == 0);
            d.write32(offset::DOORBELLS + 8 * 3 + 4, head);
        }
    }
}

/// Two queues race for the same blocks: of two operations that expect the same value one succeeds, always.
#[test]
fn compare_and_write_is_atomic_between_queues() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    const BLOCKS: u32 = 64;
    let length = BLOCKS as usize * 512;
    let pages = u64::from(BLOCKS) / 8;
    let (old, new) = (d.pages(pages), [d.pages(pages), d.pages(pages)]);
    d.store(old, &pattern(0, length));
    d.write(0, BLOCKS, old).unwrap();
    let pairs = new.map(|new| pair(&mut d, 0, BLOCKS, old, new));
    for round in 0..400u64 {
        let values = [1, 2].map(|queue| pattern(round * 2 + queue, length));
        for queue in 0..2 {
            d.store(new[queue], &values[queue]);
            push_fused(&mut d, queue + 1, pairs[queue].0, pairs[queue].1);
        }
        d.ring_doorbell(1);
        d.ring_doorbell(2);
        let ended = [1, 2].map(|queue| [0, 1].map(|_| code(d.complete(queue).status())));
        let failed = [Status::COMPARE_FAILURE, Status::FAILED_FUSED_COMMAND].map(code);
        let winner = ended
            .iter()
            .position(|ended| *ended == [SUCCESS; 2])
            .unwrap();
        assert_eq!(ended[1 - winner], failed, "round {round}");
        d.store(old, &values[winner]);
    }
}

/// While one queue swaps blocks back and forth, the other sees them before or after, never in between.
#[test]
fn no_reader_sees_half_of_a_compare_and_write() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    const BLOCKS: u32 = 128;
    const READS: usize = 60;
    let length = BLOCKS as usize * 512;
    let pages = u64::from(BLOCKS) / 8;
    let sides = [d.pages(pages), d.pages(pages)];
    for (side, address) in sides.iter().enumerate() {
        d.store(*address, &vec![side as u8 + 1; length]);
    }
    d.write(0, BLOCKS, sides[0]).unwrap();
    let there = pair(&mut d, 0, BLOCKS, sides[0], sides[1]);
    let back = pair(&mut d, 0, BLOCKS, sides[1], sides[0]);
    let targets: Vec<u64> = (0..READS).map(|_| d.pages(pages)).collect();
    let read = |target: &u64| command(&mut d, io::READ, 0, BLOCKS, 9, *target);
    let reads: Vec<Command> = targets.iter().map(read).collect();
    for round in 0..40 {
        for (first, second) in [there, back].repeat(15) {
            push_fused(&mut d, 1, first, second);
        }
        reads.iter().for_each(|read| {
            d.push(2, *read);
        });
        d.ring_doorbell(1);
        d.ring_doorbell(2);
        // A poll would take one of the cores that the two workers are to race on.
        std::thread::sleep(std::time::Duration::from_millis(2));
        for _ in 0..60 {
            assert!(d.complete(1).status().is_success(), "round {round}");
        }
        for target in &targets {
            assert!(d.complete(2).status().is_success());
            let read = d.load(*target, length);
            assert!(
                read.iter().all(|byte| *byte == read[0]),
                "round {round}: torn"
            );
        }
    }
}
