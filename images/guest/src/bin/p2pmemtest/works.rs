//! What works. Little memory is touched by the CPU: where the lab counts its accesses, each is a message.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use p2plab_guest::p2pmem::{Address, CONTIGUOUS, P2pmem, ZERO};
use p2plab_guest::{Ended, Mapping, Sharing, in_child};

use crate::cases::{Cases, Outcome, equal, refused};

pub const PAGE: u64 = 4096;
pub const PAGES: usize = 4096;
const MIB: u64 = 1 << 20;

/// All of it.
pub fn all(cases: &mut Cases, device: &str, disk: &str) {
    cases.case("mappings of one allocation share it", || shared(device));
    cases.case("a mapping outlives FREE and close", || outlives(device));
    cases.case("what is unmapped in part is free as a whole", || {
        partly_unmapped(device)
    });
    cases.case("pages that were forgotten come back", || forgotten(device));
    cases.case("pages are writable again after mprotect", || {
        protected(device)
    });
    cases.case("a child shares its parent's memory", || forked(device));
    cases.case("pieces, where one does not suffice", || pieces(device));
    cases.case("all of the memory, and not a page more", || whole(device));
    cases.case("cleared memory", || cleared(device));
    cases.case("direct transfers", || transfers(device, disk));
    cases.case("a read-only mapping of an allocation", || read_only(device));
    cases.case("a dma-buf keeps its memory", || exported(device));
    cases.case("the distance to itself", || itself(device));
    cases.case("offset 0 of two files is different memory", || {
        apart(device)
    });
}

fn map(p2pmem: &P2pmem, offset: u64, length: usize) -> std::io::Result<Mapping> {
    Mapping::of_file_at(&p2pmem.file, length, offset, Sharing::Shared)
}

/// A byte that tells pages and uses apart.
fn mark(mapping: &mut Mapping, page: usize, value: u8) {
    if let Some(byte) = mapping.slice_mut().get_mut(page * PAGES) {
        *byte = value;
    }
}

fn marked(mapping: &mut Mapping, page: usize) -> Option<u8> {
    mapping.slice_mut().get(page * PAGES).copied()
}

fn shared(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let alloc = p2pmem.alloc(4 * PAGE, 0)?;
    let mut all = map(&p2pmem, alloc.offset, 4 * PAGES)?;
    let mut end = map(&p2pmem, alloc.offset + 2 * PAGE, 2 * PAGES)?;
    for page in 0..4 {
        mark(&mut all, page, 0x10 + page as u8);
    }
    equal(marked(&mut end, 0), Some(0x12))?;
    mark(&mut end, 1, 0x55);
    equal(marked(&mut all, 3), Some(0x55))
}

fn outlives(device: &str) -> Outcome {
    let other = P2pmem::open(device)?;
    let before = other.info()?.free;
    let p2pmem = P2pmem::open(device)?;
    let alloc = p2pmem.alloc(2 * PAGE, 0)?;
    let mut mapping = map(&p2pmem, alloc.offset, 2 * PAGES)?;
    mark(&mut mapping, 0, 1);
    p2pmem.free(alloc.offset)?;
    drop(p2pmem);
    mark(&mut mapping, 1, 2);
    equal(
        (marked(&mut mapping, 0), marked(&mut mapping, 1)),
        (Some(1), Some(2)),
    )?;
    equal(other.info()?.free, before - 2 * PAGE)?;
    drop(mapping);
    equal(other.info()?.free, before)
}

fn partly_unmapped(device: &str) -> Outcome {
    let other = P2pmem::open(device)?;
    let before = other.info()?.free;
    let p2pmem = P2pmem::open(device)?;
    let mut mapping = map(&p2pmem, 0, 4 * PAGES)?;
    for page in 0..4 {
        mark(&mut mapping, page, 7 + page as u8);
    }
    mapping.cut(2 * PAGES, 2 * PAGES)?;
    equal(marked(&mut mapping, 1), Some(8))?;
    equal(other.info()?.free, before - 4 * PAGE)?;
    drop(mapping);
    equal(other.info()?.free, before)
}

fn forgotten(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let mut mapping = map(&p2pmem, 0, 3 * PAGES)?;
    for page in 0..3 {
        mark(&mut mapping, page, 0x60 + page as u8);
    }
    mapping.forget_pages()?;
    equal(marked(&mut mapping, 2), Some(0x62))?;
    equal(marked(&mut mapping, 0), Some(0x60))
}

fn protected(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let mut mapping = map(&p2pmem, 0, 2 * PAGES)?;
    mark(&mut mapping, 0, 3);
    mapping.protect_and_unprotect()?;
    mark(&mut mapping, 0, 4);
    mark(&mut mapping, 1, 5);
    equal(
        (marked(&mut mapping, 0), marked(&mut mapping, 1)),
        (Some(4), Some(5)),
    )
}

fn forked(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let mut mapping = map(&p2pmem, 0, 2 * PAGES)?;
    mark(&mut mapping, 0, 1);
    let ended = in_child(|| {
        let seen = marked(&mut mapping, 0);
        mark(&mut mapping, 1, 9);
        i32::from(seen != Some(1))
    })?;
    equal(ended, Ended::Exited(0))?;
    equal(marked(&mut mapping, 1), Some(9))
}

/// Takes all memory in pieces of a MiB and gives every second one back: what is free is in many pieces then.
fn pieces(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    equal(p2pmem.alloc(MIB, 0)?.pieces, 1)?;
    let mut taken = Vec::new();
    while let Ok(alloc) = p2pmem.alloc(MIB, CONTIGUOUS) {
        taken.push(alloc.offset);
    }
    for offset in taken.iter().step_by(2) {
        p2pmem.free(*offset)?;
    }
    refused(p2pmem.alloc(2 * MIB, CONTIGUOUS), libc::ENOMEM)?;
    let two = p2pmem.alloc(2 * MIB, 0)?;
    if two.pieces < 2 {
        return Err("2 MiB in one piece, where only single ones are free".into());
    }
    // The last page of the first piece and the first of the second are neighbours in the mapping.
    let mut mapping = map(&p2pmem, two.offset, 2 * MIB as usize)?;
    let half = MIB as usize / PAGES;
    for page in [0, half - 1, half, 2 * half - 1] {
        mark(&mut mapping, page, page as u8 ^ 0x3c);
    }
    for page in [0, half - 1, half, 2 * half - 1] {
        equal(marked(&mut mapping, page), Some(page as u8 ^ 0x3c))?;
    }
    Ok(())
}

fn whole(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let free = p2pmem.info()?.free;
    let all = p2pmem.alloc(free, 0)?;
    equal(p2pmem.info()?.free, 0)?;
    refused(p2pmem.alloc(PAGE, 0), libc::ENOMEM)?;
    refused(map(&p2pmem, 0, PAGES), libc::ENOMEM)?;
    p2pmem.free(all.offset)?;
    equal(p2pmem.info()?.free, free)
}

/// The only allocation of its size is found again by the next one.
fn cleared(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let free = p2pmem.info()?.free;
    let most = p2pmem.alloc(free - PAGE, 0)?;
    let first = p2pmem.alloc(PAGE, 0)?;
    let mut mapping = map(&p2pmem, first.offset, PAGES)?;
    mapping.slice_mut().fill(0xff);
    drop(mapping);
    p2pmem.free(first.offset)?;
    let second = p2pmem.alloc(PAGE, ZERO)?;
    let mut mapping = map(&p2pmem, second.offset, PAGES)?;
    equal(mapping.slice_mut().iter().any(|byte| *byte != 0), false)?;
    p2pmem.free(most.offset)?;
    Ok(())
}

pub fn direct(disk: &str) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(disk)
}

/// Out to the disk from one mapping and in to another: every byte arrives.
fn transfers(device: &str, disk: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let disk = direct(disk)?;
    let mut out = map(&p2pmem, 0, 4 * PAGES)?;
    for (at, byte) in out.slice_mut().iter_mut().enumerate() {
        *byte = (at / 7) as u8;
    }
    equal(disk.write_at(out.slice_mut(), 0)?, 4 * PAGES)?;
    // Never touched by the CPU: the transfer itself faults it in.
    let mut back = map(&p2pmem, 0, 4 * PAGES)?;
    equal(disk.read_at(back.slice_mut(), 0)?, 4 * PAGES)?;
    equal(out.slice_mut() == back.slice_mut(), true)
}

fn read_only(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let alloc = p2pmem.alloc(PAGE, 0)?;
    let mut writing = map(&p2pmem, alloc.offset, PAGES)?;
    mark(&mut writing, 0, 0x77);
    let mut reading = Mapping::of_file_at(&p2pmem.file, PAGES, alloc.offset, Sharing::ReadOnly)?;
    equal(marked(&mut reading, 0), Some(0x77))?;
    let ended = in_child(|| {
        mark(&mut reading, 0, 0);
        0
    })?;
    equal(ended, Ended::Signalled(libc::SIGSEGV))
}

fn exported(device: &str) -> Outcome {
    let other = P2pmem::open(device)?;
    let before = other.info()?.free;
    let p2pmem = P2pmem::open(device)?;
    let alloc = p2pmem.alloc(4 * PAGE, 0)?;
    let first = p2pmem.export(alloc.offset, 4 * PAGE)?;
    let second = p2pmem.export(alloc.offset + PAGE, 2 * PAGE)?;
    equal(File::from(second).metadata()?.len(), 2 * PAGE)?;
    p2pmem.free(alloc.offset)?;
    drop(p2pmem);
    equal(other.info()?.free, before - 4 * PAGE)?;
    drop(first);
    equal(other.info()?.free, before)
}

fn itself(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let info = p2pmem.info()?;
    let address = Address {
        domain: info.domain,
        bus: info.bus,
        devfn: info.devfn,
        reserved: 0,
    };
    equal(p2pmem.distance(&[address], 0)?, 0)?;
    equal(p2pmem.distance(&[address; 3], 0)?, 0)
}

fn apart(device: &str) -> Outcome {
    let (one, two) = (P2pmem::open(device)?, P2pmem::open(device)?);
    let mut first = map(&one, 0, PAGES)?;
    let mut second = map(&two, 0, PAGES)?;
    let mut third = map(&two, 0, PAGES)?;
    mark(&mut first, 0, 1);
    mark(&mut second, 0, 2);
    mark(&mut third, 0, 3);
    equal(
        [
            marked(&mut first, 0),
            marked(&mut second, 0),
            marked(&mut third, 0),
        ],
        [Some(1), Some(2), Some(3)],
    )
}

/// Scatters `size` bytes of memory over single pages, frees every other one, and takes them again as one allocation.
/// Prints in how many pieces that is.
pub fn scattered(device: &str, size: u64) -> Result<(), String> {
    let pieces = || -> std::io::Result<u32> {
        let p2pmem = P2pmem::open(device)?;
        let pages = (0..size / PAGE).map(|_| p2pmem.alloc(PAGE, 0).map(|alloc| alloc.offset));
        for offset in pages
            .collect::<std::io::Result<Vec<u64>>>()?
            .iter()
            .step_by(2)
        {
            p2pmem.free(*offset)?;
        }
        Ok(p2pmem.alloc(size / 2, 0)?.pieces)
    };
    println!("{}", pieces().map_err(|error| error.to_string())?);
    Ok(())
}

/// Maps all of the memory by mmap alone, as a program does that knows no ioctl; prints in how many of its pages the
/// first byte is not 0, and sets that byte to `value`.
pub fn dirty(device: &str, value: u8) -> Result<(), String> {
    let count = || -> std::io::Result<usize> {
        let p2pmem = P2pmem::open(device)?;
        let pages = usize::try_from(p2pmem.info()?.size).unwrap_or_default() / PAGES;
        let mut mapping = map(&p2pmem, 0, pages * PAGES)?;
        let mut dirty = 0;
        for page in 0..pages {
            dirty += usize::from(marked(&mut mapping, page) != Some(0));
            mark(&mut mapping, page, value);
        }
        Ok(dirty)
    };
    println!("{}", count().map_err(|error| error.to_string())?);
    Ok(())
}
