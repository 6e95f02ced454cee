//! What unit tests of functions share.

use std::fs::File;
use std::io::Read;

use rustix::event::EventfdFlags;

/// An eventfd, twice: one for the test, one to hand over.
pub(crate) fn eventfd() -> (File, File) {
    let fd = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let ours = File::from(fd);
    let theirs = ours.try_clone().unwrap();
    (ours, theirs)
}

/// Takes the count of an eventfd, 0 where nobody wrote to it.
pub(crate) fn count(mut file: &File) -> u64 {
    let mut bytes = [0; 8];
    match file.read(&mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
        Err(error) => panic!("an eventfd that cannot be read: {error}"),
    }
}
