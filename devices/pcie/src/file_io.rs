//! Positioned, vectored file I/O straight into and out of shared memory.
//!
//! The memory is a guest's or a peer's and changes under us, so no `&mut [u8]` to it may exist, which is what
//! the standard library's (and rustix's) vectored calls take. Hence the raw system calls.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

/// Linux's UIO_MAXIOV (include/uapi/linux/uio.h).
const MAX_IOVECS: usize = 1024;

type VectoredCall = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
) -> libc::ssize_t;

/// Fills `slices` from `file` at `offset`.
pub(crate) fn read_exact_at(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    transfer(
        file,
        slices,
        offset,
        libc::preadv,
        io::ErrorKind::UnexpectedEof,
    )
}

/// Writes `slices` to `file` at `offset`.
pub(crate) fn write_all_at(
    file: &File,
    slices: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<()> {
    transfer(
        file,
        slices,
        offset,
        libc::pwritev,
        io::ErrorKind::WriteZero,
    )
}

fn transfer(
    file: &File,
    slices: &[VolatileSlice<'_>],
    mut offset: u64,
    call: VectoredCall,
    exhausted: io::ErrorKind,
) -> io::Result<()> {
    // Guards keep what the slices point to in place for the duration of the call.
    let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut iovecs: Vec<libc::iovec> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let mut rest = iovecs.as_mut_slice();
    while !rest.is_empty() {
        let position = libc::off_t::try_from(offset)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let count = rest.len().min(MAX_IOVECS);
        // SAFETY: the first `count` iovecs describe memory that is mapped for as long as `guards` lives
        // and that everyone treats as volatile; `count` fits a c_int; the descriptor is open.
        let moved = unsafe {
            call(
                file.as_raw_fd(),
                rest.as_ptr(),
                count as libc::c_int,
                position,
            )
        };
        if moved < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if moved == 0 {
            return Err(io::Error::from(exhausted));
        }
        offset += moved as u64;
        rest = advance(rest, moved as usize);
    }
    Ok(())
}

/// Size of a page as mincore(2) counts them on the project's machines; with larger ones it refuses most ranges.
pub(crate) const PAGE: u64 = 4096;

/// Which pages of `slice`, which begins at a page and has at most 64, are in memory, the first in bit 0: touching those
/// allocates nothing. None where the host does not say.
pub(crate) fn resident_pages(slice: &VolatileSlice<'_>) -> u64 {
    let mut pages = [0u8; 64];
    let guard = slice.ptr_guard_mut();
    let count = guard.len().div_ceil(PAGE as usize);
    if count > pages.len() {
        return 0;
    }
    // SAFETY: the range is mapped for as long as `guard` lives, and mincore(2) writes one byte for each of its pages,
    // of which `pages` has room for all; it reads and writes nothing of the range itself.
    let done = unsafe { libc::mincore(guard.as_ptr().cast(), guard.len(), pages.as_mut_ptr()) };
    let bits = pages.iter().take(count).zip(0u32..);
    let found = bits.map(|(page, number)| u64::from(page & 1) << number);
    if done == 0 { found.sum() } else { 0 }
}

/// Drops the first `moved` bytes of `iovecs`.
fn advance(mut iovecs: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        if moved < first.iov_len {
            // SAFETY: `moved` is less than the length, so the pointer stays inside the same memory.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(moved) }.cast();
            first.iov_len -= moved;
            break;
        }
        moved -= first.iov_len;
        iovecs = &mut iovecs[1..];
    }
    iovecs
}
