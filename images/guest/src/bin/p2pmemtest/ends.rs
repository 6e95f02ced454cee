//! The first and the last page of a memory, and those around its middle, by a disk's DMA alone.

use std::os::unix::fs::FileExt as _;

use p2plab_guest::p2pmem::{CONTIGUOUS, P2pmem};
use p2plab_guest::{Mapping, Sharing};

use crate::cases::{Outcome, equal};
use crate::works::{PAGE, PAGES, direct};

/// What the first page is filled with; the next is filled with the next number.
const FIRST: u8 = 0xe0;
/// Where on the disk the pages come from, and where they go.
const FROM: u64 = 0;
const TO: u64 = 1 << 20;

/// See the program's description. Prints which pages hold what, by their distance from the beginning.
pub fn ends(device: &str, disk: &str) -> Result<(), String> {
    fill(device, disk).map_err(|error| error.to_string())
}

fn fill(device: &str, disk: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let size = p2pmem.info()?.free;
    let all = p2pmem.alloc(size, CONTIGUOUS)?;
    let middle = size / 2;
    let places = [0, middle - PAGE, middle, size - PAGE];
    let disk = direct(disk)?;
    let mut page = Mapping::anonymous(PAGES)?;
    for (number, place) in (0u8..).zip(places) {
        let (content, at) = (FIRST + number, u64::from(number) * PAGE);
        page.slice_mut().fill(content);
        equal(disk.write_at(page.slice_mut(), FROM + at)?, PAGES)?;
        // Never touched by the CPU.
        let offset = all.offset + place;
        let mut peer = Mapping::of_file_at(&p2pmem.file, PAGES, offset, Sharing::Shared)?;
        equal(disk.read_at(peer.slice_mut(), FROM + at)?, PAGES)?;
        equal(disk.write_at(peer.slice_mut(), TO + at)?, PAGES)?;
    }
    for (number, place) in (0u8..).zip(places) {
        let content = FIRST + number;
        page.slice_mut().fill(0);
        equal(
            disk.read_at(page.slice_mut(), TO + u64::from(number) * PAGE)?,
            PAGES,
        )?;
        equal(page.slice_mut().iter().all(|byte| *byte == content), true)?;
        println!("{place} {content:#04x}");
    }
    Ok(())
}
