//! What is refused, and with which error.

use std::fs::{File, OpenOptions};
use std::io;

use p2plab_guest::p2pmem::{
    Address, Alloc, Distance, Export, IOC_ALLOC, IOC_DISTANCE, IOC_EXPORT, IOC_FREE, IOC_INFO,
    P2pmem, VERBOSE,
};
use p2plab_guest::{Ended, Mapping, Sharing, become_user, in_child};

use crate::cases::{Cases, Outcome, equal, refused};
use crate::works::{PAGE, PAGES};

/// The user that owns nothing.
const NOBODY: u32 = 65534;

/// All of it.
pub fn all(cases: &mut Cases, device: &str) {
    cases.case("mappings", || mappings(device));
    cases.case("mappings of a file for reading", || reader(device));
    cases.case("allocations", || allocations(device));
    cases.case("frees", || frees(device));
    cases.case("distances", || distances(device));
    cases.case("exports", || exports(device));
    cases.case("arguments that are not there", || nowhere(device));
    cases.case("unknown ioctls, read and write", || unknown(device));
    cases.case("users without permission", || nobody(device));
}

fn mappings(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let map = |length, offset, sharing| Mapping::of_file_at(&p2pmem.file, length, offset, sharing);
    let size = usize::try_from(p2pmem.info()?.size)?;
    refused(map(PAGES, 0, Sharing::Private), libc::EINVAL)?;
    refused(map(PAGES, 0, Sharing::Executable), libc::EACCES)?;
    refused(map(PAGES, PAGE, Sharing::Shared), libc::EINVAL)?;
    refused(map(PAGES, 1, Sharing::Shared), libc::EINVAL)?;
    refused(map(PAGES, 1 << 40, Sharing::Shared), libc::EINVAL)?;
    refused(map(size + PAGES, 0, Sharing::Shared), libc::ENOMEM)?;
    refused(map(0, 0, Sharing::Shared), libc::EINVAL)?;
    let alloc = p2pmem.alloc(2 * PAGE, 0)?;
    let at = alloc.offset;
    refused(map(3 * PAGES, at, Sharing::Shared), libc::ENXIO)?;
    refused(map(2 * PAGES, at + PAGE, Sharing::Shared), libc::ENXIO)?;
    refused(map(PAGES, at + 2 * PAGE, Sharing::Shared), libc::ENXIO)?;
    refused(map(PAGES, at, Sharing::Private), libc::EINVAL)?;
    refused(map(PAGES, at, Sharing::Executable), libc::EACCES)?;
    p2pmem.free(at)?;
    refused(map(PAGES, at, Sharing::Shared), libc::EINVAL)
}

fn reader(device: &str) -> Outcome {
    let p2pmem = P2pmem {
        file: File::open(device)?,
    };
    let map = |sharing| Mapping::of_file_at(&p2pmem.file, PAGES, 0, sharing);
    refused(map(Sharing::Shared), libc::EACCES)?;
    refused(map(Sharing::ReadOnly), libc::EACCES)?;
    refused(p2pmem.alloc(PAGE, 0), libc::EBADF)?;
    refused(p2pmem.export(1 << 40, PAGE), libc::EBADF)?;
    p2pmem.info()?;
    Ok(())
}

fn allocations(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    refused(p2pmem.alloc(0, 0), libc::EINVAL)?;
    refused(p2pmem.alloc(1, 0), libc::EINVAL)?;
    refused(p2pmem.alloc(PAGE + 512, 0), libc::EINVAL)?;
    refused(p2pmem.alloc(PAGE, 4), libc::EINVAL)?;
    refused(p2pmem.alloc(PAGE, u32::MAX), libc::EINVAL)?;
    refused(p2pmem.alloc(p2pmem.info()?.size + PAGE, 0), libc::ENOMEM)?;
    refused(p2pmem.alloc(u64::MAX - PAGE + 1, 0), libc::ENOMEM)
}

fn frees(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let other = P2pmem::open(device)?;
    let at = p2pmem.alloc(2 * PAGE, 0)?.offset;
    refused(p2pmem.free(at + PAGE), libc::EINVAL)?;
    refused(p2pmem.free(0), libc::ENOENT)?;
    refused(p2pmem.free(at + (1 << 40)), libc::ENOENT)?;
    refused(p2pmem.free(u64::MAX << 40), libc::ENOENT)?;
    refused(other.free(at), libc::ENOENT)?;
    p2pmem.free(at)?;
    refused(p2pmem.free(at), libc::ENOENT)
}

fn distances(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let absent = Address {
        domain: 0xffff,
        ..Address::default()
    };
    let reserved = Address {
        reserved: 1,
        ..Address::default()
    };
    refused(p2pmem.distance(&[], 0), libc::EINVAL)?;
    refused(p2pmem.distance(&[absent; 65], 0), libc::EINVAL)?;
    refused(p2pmem.distance(&[absent], 0), libc::ENXIO)?;
    refused(p2pmem.distance(&[reserved], 0), libc::EINVAL)?;
    refused(p2pmem.distance(&[absent], 2), libc::EINVAL)?;
    let mut nowhere = Distance {
        clients: 8,
        nr_clients: 1,
        ..Distance::default()
    };
    refused(p2pmem.ioctl(IOC_DISTANCE, &mut nowhere), libc::EFAULT)?;
    let mut padded = Distance {
        reserved: 1,
        ..nowhere
    };
    refused(p2pmem.ioctl(IOC_DISTANCE, &mut padded), libc::EINVAL)
}

fn exports(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let at = p2pmem.alloc(2 * PAGE, 0)?.offset;
    refused(p2pmem.export(at, 0), libc::EINVAL)?;
    refused(p2pmem.export(at, 512), libc::EINVAL)?;
    refused(p2pmem.export(at + 1, PAGE), libc::EINVAL)?;
    refused(p2pmem.export(at, 3 * PAGE), libc::ENXIO)?;
    refused(p2pmem.export(at + PAGE, 2 * PAGE), libc::ENXIO)?;
    refused(p2pmem.export(at + 2 * PAGE, PAGE), libc::ENXIO)?;
    refused(p2pmem.export(at, u64::MAX - PAGE + 1), libc::ENXIO)?;
    refused(p2pmem.export(0, PAGE), libc::ENOENT)?;
    refused(p2pmem.export(at + (1 << 40), PAGE), libc::ENOENT)?;
    let mut flags = Export {
        offset: at,
        size: PAGE,
        flags: 1,
        fd: -1,
    };
    refused(p2pmem.ioctl(IOC_EXPORT, &mut flags), libc::EINVAL)
}

fn nowhere(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let before = p2pmem.info()?.free;
    for command in [IOC_INFO, IOC_ALLOC, IOC_FREE, IOC_DISTANCE, IOC_EXPORT] {
        refused(p2pmem.ioctl_nowhere(command), libc::EFAULT)?;
    }
    // An allocation whose answer cannot be written is taken back.
    let alloc = Alloc {
        size: PAGE,
        ..Alloc::default()
    };
    refused(p2pmem.ioctl_read_only(IOC_ALLOC, &alloc), libc::EFAULT)?;
    equal(p2pmem.info()?.free, before)
}

fn unknown(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    for command in [0, 0x5401, IOC_EXPORT + 1, IOC_INFO | (1 << 16)] {
        refused(p2pmem.ioctl_nowhere(command), libc::ENOTTY)?;
    }
    let mut byte = [0];
    refused(io::Read::read(&mut &p2pmem.file, &mut byte), libc::EINVAL)?;
    refused(io::Write::write(&mut &p2pmem.file, &byte), libc::EINVAL)
}

/// The node is root's; and who was given the open file may still not fill the kernel's log.
fn nobody(device: &str) -> Outcome {
    let p2pmem = P2pmem::open(device)?;
    let ended = in_child(|| {
        if become_user(NOBODY).is_err() {
            return 1;
        }
        let opened = OpenOptions::new().read(true).open(device);
        if refused(opened, libc::EACCES).is_err() {
            return 2;
        }
        let verbose = p2pmem.distance(&[Address::default()], VERBOSE);
        if refused(verbose, libc::EPERM).is_err() {
            return 3;
        }
        0
    })?;
    equal(ended, Ended::Exited(0))
}
