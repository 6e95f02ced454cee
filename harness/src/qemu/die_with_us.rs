//! The one unsafe step of starting a child: what runs between fork and exec.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Arranges that the child is killed when the *thread* that spawns it ends, that it has a process group
/// of its own, and that it inherits `descriptors` under their present numbers.
///
/// The caller must keep `descriptors` open until the child has been spawned.
pub(super) fn prepare(command: &mut Command, descriptors: &[OwnedFd]) {
    let us = getpid();
    let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let before_exec = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If we died between fork and prctl, nobody will send the signal any more.
        if getppid() != Some(us) {
            return Err(Errno::SRCH.into());
        }
        for &number in &numbers {
            // SAFETY: the child has a copy of the parent's descriptor table, in which the caller keeps
            // this number open until the spawn is over.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Ok(())
    };
    command.process_group(0);
    // SAFETY: the closure runs in a forked child of a multi-threaded process, where only
    // async-signal-safe work is allowed: it makes three kinds of system calls and neither allocates nor
    // locks (an io::Error from an error number does not allocate).
    unsafe {
        command.pre_exec(before_exec);
    }
}
