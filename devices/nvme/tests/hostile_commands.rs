//! I/O commands that mean harm: each gets the status that the specification names, changes nothing, and the next good
//! one succeeds.

#![allow(clippy::unwrap_used, reason = "outside #[test] functions, too")]

mod driver;

use driver::nvm::{code, command, fails, plug, run};
use driver::{CMB_SIZE, Driver, NAMESPACE_SIZE, Rig, pattern};
use p2plab_nvme::spec::command::{Command, CopyRange, DatasetRange, NSID_ALL, PSDT_SGL, io};
use p2plab_nvme::spec::sgl::{SglDescriptor, kind};
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Metadata, NamespaceConfig};
use zerocopy::{FromZeros, IntoBytes};

const BLOCKS: u64 = NAMESPACE_SIZE / 512;

/// Commands that address blocks by dwords 10 to 12.
const ADDRESSING: [u8; 6] = [
    io::READ,
    io::WRITE,
    io::WRITE_UNCORRECTABLE,
    io::COMPARE,
    io::WRITE_ZEROES,
    io::VERIFY,
];

/// Fills the first MiB of the namespace, and checks that it is still there.
struct Witness {
    address: u64,
    data: Vec<u8>,
}

impl Witness {
    fn new(d: &mut Driver) -> Self {
        let (address, data) = (d.pages(256), pattern(77, 1 << 20));
        d.store(address, &data);
        d.write(0, 2048, address).unwrap();
        Self { address, data }
    }

    fn check(&self, d: &mut Driver) {
        d.store(self.address, &vec![0; self.data.len()]);
        d.read(0, 2048, self.address).unwrap();
        assert!(d.load(self.address, self.data.len()) == self.data);
        assert!(!d.status().cfs());
    }
}

#[test]
fn blocks_that_there_are_not() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let witness = Witness::new(&mut d);
    let page = d.pages(8);
    let outside = fails(Status::LBA_OUT_OF_RANGE);
    for opcode in ADDRESSING {
        for (slba, count) in [
            (BLOCKS, 1),
            (BLOCKS - 1, 2),
            (BLOCKS - 7, 8),
            (1 << 32, 1),
            (u64::MAX, 1),
            (u64::MAX, 8),
            (u64::MAX - 7, 8),
            (u64::MAX >> 9, 8),
            ((u64::MAX >> 9) + 1, 8),
        ] {
            let bad = command(&mut d, opcode, slba, count, 9, page);
            assert_eq!(run(&mut d, bad), outside, "{opcode:#x} {slba:#x} {count}");
        }
    }
    witness.check(&mut d);
}

#[test]
fn namespaces_that_there_are_not() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let witness = Witness::new(&mut d);
    let page = d.pages(1);
    for opcode in ADDRESSING
        .into_iter()
        .chain([io::COPY, io::DATASET_MANAGEMENT, io::FLUSH])
    {
        for (nsid, status) in [
            (0, Status::INVALID_NAMESPACE),
            (2, Status::INVALID_FIELD),
            (256, Status::INVALID_FIELD),
            (257, Status::INVALID_NAMESPACE),
            (NSID_ALL - 1, Status::INVALID_NAMESPACE),
            (NSID_ALL, Status::INVALID_NAMESPACE),
        ] {
            let mut bad = command(&mut d, opcode, 0, 1, 9, page);
            bad.nsid = nsid.into();
            let expected = if opcode == io::FLUSH && nsid == NSID_ALL {
                Ok(())
            } else {
                fails(status)
            };
            assert_eq!(run(&mut d, bad), expected, "{opcode:#x} {nsid:#x}");
        }
    }
    witness.check(&mut d);
}

/// MDTS, the limits of Identify, and 65536 blocks of everything.
#[test]
fn commands_that_are_too_large() {
    for (metadata, block_size, shift) in
        [(Metadata::None, 512, 9), (Metadata::Protection, 4096, 12)]
    {
        let mut rig = Rig::new();
        let mut d = plug(&mut rig, |c| {
            c.max_transfer = 64 << 10;
            c.namespaces[0] = NamespaceConfig {
                metadata,
                block_size,
                ..NamespaceConfig::memory(1 << 30)
            };
        });
        let page = d.pages(32);
        let most = (64 << 10) >> shift;
        for opcode in [io::READ, io::WRITE, io::COMPARE] {
            let mut fits = command(&mut d, opcode, 0, most, shift, page);
            // PRACT: no metadata.
            fits.cdw12 = (fits.cdw12.get() | 1 << 29).into();
            run(&mut d, fits).unwrap();
            for count_z in [most, 0xffff] {
                fits.cdw12 = (count_z | 1 << 29).into();
                assert_eq!(run(&mut d, fits), fails(Status::INVALID_FIELD));
            }
        }
        let mut all = command(&mut d, io::VERIFY, 0, 1, shift, page);
        all.cdw12 = 0xffff.into();
        assert_eq!(run(&mut d, all), fails(Status::INVALID_FIELD));
        all.opcode = io::WRITE_ZEROES;
        let zeroed = if shift == 9 {
            Ok(())
        } else {
            fails(Status::INVALID_FIELD)
        };
        assert_eq!(run(&mut d, all), zeroed);
        all.opcode = io::WRITE_UNCORRECTABLE;
        run(&mut d, all).unwrap();
    }
}

fn dataset(d: &mut Driver, ranges: &[(u64, u32)]) -> Command {
    let list = d.pages(1);
    let ranges: Vec<DatasetRange> = ranges
        .iter()
        .map(|(slba, count)| {
            let mut range = DatasetRange::new_zeroed();
            (range.slba, range.nlb) = ((*slba).into(), (*count).into());
            range
        })
        .collect();
    d.store(list, ranges.as_bytes());
    Command {
        opcode: io::DATASET_MANAGEMENT,
        nsid: 1.into(),
        prp1: list.into(),
        cdw10: (ranges.len() as u32 - 1).into(),
        cdw11: 4.into(),
        ..Command::default()
    }
}

#[test]
fn lists_of_ranges() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let witness = Witness::new(&mut d);
    let outside = fails(Status::LBA_OUT_OF_RANGE);
    for bad in [
        (BLOCKS, 1),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (BLOCKS - 1, 2),
    ] {
        // The last of as many as there may be.
        let mut ranges = vec![(0, 2048); 255];
        ranges.push(bad);
        let refused = dataset(&mut d, &ranges);
        assert_eq!(run(&mut d, refused), outside, "{bad:?}");
    }
    let mut nothing = dataset(&mut d, &[(BLOCKS, 0), (0, 0)]);
    run(&mut d, nothing).unwrap();
    witness.check(&mut d);
    // All that cdw10 can say beside the number of ranges is reserved.
    nothing.cdw10 = 0xffff_ff01.into();
    run(&mut d, nothing).unwrap();
    // Lists that are nowhere, or half there.
    let lost = fails(Status::DATA_TRANSFER_ERROR);
    for opcode in [io::DATASET_MANAGEMENT, io::COPY] {
        let mut command = dataset(&mut d, &[(0, 8); 128]);
        command.opcode = opcode;
        for (prp1, status) in [
            (1 << 40, lost),
            (!3, lost),
            (driver::HOST_MEMORY - 4, lost),
            (
                d.cmb_address + CMB_SIZE - 16,
                fails(Status::INVALID_USE_OF_CMB),
            ),
            (0x1001, fails(Status::PRP_OFFSET_INVALID)),
        ] {
            command.prp1 = prp1.into();
            command.prp2 = (1u64 << 40).into();
            if opcode == io::COPY {
                (command.cdw10, command.cdw12) = (0.into(), 127.into());
            }
            assert_eq!(run(&mut d, command), status, "{opcode:#x} {prp1:#x}");
        }
    }
    witness.check(&mut d);
}

/// PRP lists that run in circles end after the command's data; lists that leave memory fail.
#[test]
fn lists_of_pages() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let witness = Witness::new(&mut d);
    let (page, list) = (d.pages(1), d.pages(1));
    d.store(list, &list.to_le_bytes().repeat(512));
    for opcode in [io::READ, io::COMPARE, io::WRITE] {
        let mut circle = command(&mut d, opcode, 4096, 8192, 9, page);
        circle.prp2 = list.into();
        let ended = run(&mut d, circle);
        // A read overwrites the list with zeros on its way: page 0 is as good as any.
        let fine = [Ok(()), fails(Status::COMPARE_FAILURE)];
        assert!(fine.contains(&ended), "{opcode:#x}: {ended:?}");
        d.store(list, &list.to_le_bytes().repeat(512));
        circle.prp2 = (list + 4).into();
        assert_eq!(run(&mut d, circle), fails(Status::PRP_OFFSET_INVALID));
        circle.prp2 = (1u64 << 40).into();
        assert_eq!(run(&mut d, circle), fails(Status::DATA_TRANSFER_ERROR));
        let entries = [page, 1 << 40, page, page, page, page, page];
        d.store(list, entries.as_bytes());
        let mut hole = command(&mut d, opcode, 4096, 64, 9, page);
        hole.prp2 = list.into();
        assert_eq!(run(&mut d, hole), fails(Status::DATA_TRANSFER_ERROR));
        d.store(list, &list.to_le_bytes().repeat(512));
    }
    witness.check(&mut d);
}

/// SGLs with metadata: where it lies is MPTR's to say, and an SGL for it is refused.
#[test]
fn metadata_pointers() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |c| {
        c.namespaces.push(NamespaceConfig {
            metadata: Metadata::Plain,
            ..NamespaceConfig::memory(1 << 20)
        });
    });
    let witness = Witness::new(&mut d);
    let (page, meta, cmb) = (d.pages(2), d.pages(1), d.cmb_address);
    for opcode in [io::READ, io::WRITE, io::COMPARE] {
        let mut good = command(&mut d, opcode, 0, 8, 9, page);
        good.nsid = 2.into();
        good.mptr = meta.into();
        for psdt in [0x80, 0xc0] {
            let mut bad = good;
            bad.flags = psdt;
            assert_eq!(run(&mut d, bad), fails(Status::INVALID_FIELD));
        }
        let by_sgl = |descriptor| {
            let mut command = good;
            command.set_sgl1(descriptor);
            command
        };
        let block = |address, length| SglDescriptor::new(kind::DATA_BLOCK, address, length);
        let wrong_length = fails(Status::DATA_SGL_LENGTH_INVALID);
        // Metadata has no part in the SGL's length.
        for length in [0, 512, 4095, 4097, 4096 + 64, u32::MAX] {
            let bad = by_sgl(block(page, length));
            assert_eq!(run(&mut d, bad), wrong_length, "{length}");
        }
        for (data, mptr, status) in [
            (page, 1 << 40, Status::DATA_TRANSFER_ERROR),
            (page, u64::MAX, Status::DATA_TRANSFER_ERROR),
            (page, cmb, Status::INVALID_USE_OF_CMB),
            (cmb, meta, Status::INVALID_USE_OF_CMB),
            (cmb, cmb + CMB_SIZE - 63, Status::INVALID_USE_OF_CMB),
            (cmb, cmb - 1, Status::INVALID_USE_OF_CMB),
        ] {
            let mut bad = by_sgl(block(data, 4096));
            bad.mptr = mptr.into();
            assert_eq!(run(&mut d, bad), fails(status), "{data:#x} {mptr:#x}");
        }
        let mut odd = good;
        odd.mptr = (meta + 2).into();
        assert_eq!(run(&mut d, odd), fails(Status::INVALID_FIELD));
        let mut at_any_byte = by_sgl(block(page + 1, 4096));
        at_any_byte.mptr = (meta + 1).into();
        run(&mut d, at_any_byte).unwrap();
        assert_eq!(at_any_byte.flags, PSDT_SGL);
        // Without metadata the pointer is nobody's.
        let mut other = good;
        (other.nsid, other.mptr) = (1.into(), u64::MAX.into());
        (other.cdw10, other.cdw12) = (4096.into(), 0.into());
        run(&mut d, other).unwrap();
    }
    witness.check(&mut d);
}

/// A namespace takes marks of Write Uncorrectable up to a number, refuses more, and goes on.
#[test]
fn marks_without_end() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let page = d.pages(1);
    let mark = |slba: u32| Command {
        opcode: io::WRITE_UNCORRECTABLE,
        nsid: 1.into(),
        cdw10: slba.into(),
        ..Command::default()
    };
    let mut refused = 0;
    for i in 0..5000 {
        let result = run(&mut d, mark(i * 2));
        refused += u32::from(result == fails(Status::INTERNAL_ERROR));
        assert!(result.is_ok() || refused > 0);
    }
    assert_eq!(refused, 5000 - 4096);
    d.read(9000, 1, page).unwrap();
    d.read(1, 1, page).unwrap();
    assert_eq!(
        d.read(2, 1, page).map(|_| ()),
        fails(Status::UNRECOVERED_READ_ERROR)
    );
    d.write(0, 8, page).unwrap();
    d.read(0, 8, page).unwrap();
    run(&mut d, mark(9000)).unwrap();
}

/// The host changes the list of sources while a copy runs: it was read once, and only once.
#[test]
fn lists_are_read_once() {
    let mut rig = Rig::new();
    let mut d = plug(&mut rig, |_| {});
    let list = d.pages(1);
    let mut ranges = [CopyRange::new_zeroed(); 128];
    for range in &mut ranges {
        range.nlb_z = 63.into();
    }
    d.store(list, ranges.as_bytes());
    let copy = Command {
        opcode: io::COPY,
        nsid: 1.into(),
        prp1: list.into(),
        cdw10: 10_000.into(),
        cdw12: 127.into(),
        ..Command::default()
    };
    for round in 0..50u64 {
        for _ in 0..4 {
            d.push(1, copy);
        }
        d.ring_doorbell(1);
        // Out of the namespace, too many, and back.
        for change in [u64::MAX, round, 0] {
            d.store(list + 8, &change.to_le_bytes());
            d.store(list + 32 + 16, &(change as u16).to_le_bytes());
        }
        d.store(list, ranges.as_bytes());
        for _ in 0..4 {
            let status = code(d.complete(1).status());
            let limit = code(Status::COMMAND_SIZE_LIMIT_EXCEEDED);
            let fine = [Status::SUCCESS, limit, code(Status::LBA_OUT_OF_RANGE)];
            assert!(fine.contains(&status), "{status:?}");
        }
    }
}
