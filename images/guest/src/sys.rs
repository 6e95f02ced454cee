//! The calls that need `unsafe`: waiting without reaping, signalling everything, memory mappings and
//! Linux AIO. Everything around them is safe code.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::mm::{MapFlags, ProtFlags};

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sets the wall clock to that many nanoseconds since 1970.
pub(crate) fn set_clock(nanoseconds: u64) -> io::Result<()> {
    const BILLION: u64 = 1_000_000_000;
    let part = |value: u64| libc::c_long::try_from(value).map_err(io::Error::other);
    let time = libc::timespec {
        tv_sec: part(nanoseconds / BILLION)?,
        tv_nsec: part(nanoseconds % BILLION)?,
    };
    // SAFETY: the pointer is valid for the call, which only reads through it.
    checked(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }.into()).map(drop)
}

/// Blocks until a child has ended (that one, or any with `None`), leaves it unreaped, returns its pid.
pub(crate) fn wait_ended(pid: Option<i32>) -> io::Result<i32> {
    let (kind, id) = match pid {
        Some(pid) => (
            libc::P_PID,
            libc::id_t::try_from(pid).map_err(io::Error::other)?,
        ),
        None => (libc::P_ALL, 0),
    };
    loop {
        // SAFETY: siginfo_t is plain data for which all zeroes is a value; waitid writes only into it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: as above; the pointer is valid for the call.
        let result = unsafe { libc::waitid(kind, id, &mut info, libc::WEXITED | libc::WNOWAIT) };
        match checked(result.into()) {
            // SAFETY: waitid succeeded with WEXITED, so the SIGCHLD fields are the ones set.
            Ok(_) => return Ok(unsafe { info.si_pid() }),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sends `signal` to every process but the caller. Only for the init process.
pub fn kill_everything(signal: i32) {
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(-1, signal) };
}

/// Brings the loopback interface up.
pub fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq; it is valid for the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
    checked(result.into()).map(drop)
}

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// MAP_SHARED, for reading and writing.
    Shared,
    /// MAP_PRIVATE, for reading and writing.
    Private,
    /// MAP_SHARED, for reading.
    ReadOnly,
    /// MAP_SHARED, for reading and executing.
    Executable,
}

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(i32),
    /// A signal ended it.
    Signalled(i32),
}

/// A copy of `value`, plain data of less than a page, at the begin of a page that cannot be written.
pub(crate) fn read_only_page<T>(value: &T) -> io::Result<Mapping> {
    const PAGE: usize = 4096;
    assert!(size_of::<T>() <= PAGE);
    let page = Mapping::anonymous(PAGE)?;
    // SAFETY: the page is ours, aligned and large enough; afterwards only the kernel looks at it.
    unsafe {
        std::ptr::copy_nonoverlapping(value, page.start.cast(), 1);
        rustix::mm::mprotect(page.start.cast(), PAGE, rustix::mm::MprotectFlags::READ)?;
    }
    Ok(page)
}

/// Runs `work` in a forked child, whose exit status it returns, and waits for its end. Only for programs of one thread.
pub fn in_child(work: impl FnOnce() -> i32) -> io::Result<Ended> {
    // SAFETY: the caller's process has one thread, so the child may do all that the parent may.
    let pid = unsafe { libc::fork() };
    if checked(pid.into())? == 0 {
        let status = work();
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: waitpid writes the status, which is valid for the call.
    checked(unsafe { libc::waitpid(pid, &mut status, 0) }.into())?;
    Ok(if libc::WIFSIGNALED(status) {
        Ended::Signalled(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    })
}

/// Gives up root, for good, and becomes the user and group `id`.
pub fn become_user(id: u32) -> io::Result<()> {
    // SAFETY: none of these touches memory: the list of groups is empty.
    unsafe {
        checked(libc::setgroups(0, std::ptr::null()).into())?;
        checked(libc::setgid(id).into())?;
        checked(libc::setuid(id).into()).map(drop)
    }
}

/// Waits up to `milliseconds` until `file` reports a hang-up; whether it did.
pub fn poll_hangup(file: &File, milliseconds: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: poll reads and writes the one entry, which is valid for the call.
    checked(unsafe { libc::poll(&mut poll, 1, milliseconds) }.into())?;
    Ok(poll.revents & libc::POLLHUP != 0)
}

/// A shared or anonymous mapping that threads may divide among themselves.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    length: usize,
    /// Bytes mapped, at least `length`.
    mapped: usize,
}

/// What x86-64's kernel makes one entry of the upper page table of.
const HUGE_PAGE: usize = 2 << 20;

// SAFETY: the mapping is plain memory owned by this value; access goes through raw addresses handed to
// the kernel or through `slice_mut`, which borrows the mapping exclusively.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared access only computes addresses.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from its beginning, shared (p2pmem refuses private mappings).
    pub fn of_file(file: &File, length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            length,
            mapped: length,
        })
    }

    /// Maps `length` bytes of ordinary memory, page aligned, in huge pages if the kernel likes: it aligns what is as
    /// large as one by itself, so smaller mappings are rounded up.
    pub fn anonymous(length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let mapped = length
            .checked_next_multiple_of(HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: as for `of_file`.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), mapped, protection, MapFlags::PRIVATE)
        }?;
        // SAFETY: advice about a range that we just mapped; it does not change the contents.
        let _ = unsafe { rustix::mm::madvise(start, mapped, rustix::mm::Advice::LinuxHugepage) };
        Ok(Self {
            start: start.cast(),
            length,
            mapped,
        })
    }

    /// Maps `length` bytes of `file` at `offset`, for reading and writing unless `sharing` says otherwise.
    pub fn of_file_at(
        file: &File,
        length: usize,
        offset: u64,
        sharing: Sharing,
    ) -> io::Result<Self> {
        let (protection, flags) = match sharing {
            Sharing::Shared => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
            Sharing::Private => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE),
            Sharing::ReadOnly => (ProtFlags::READ, MapFlags::SHARED),
            Sharing::Executable => (ProtFlags::READ | ProtFlags::EXEC, MapFlags::SHARED),
        };
        // SAFETY: as for `of_file`.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                flags,
                file.as_fd(),
                offset,
            )
        }?;
        Ok(Self {
            start: start.cast(),
            length,
            mapped: length,
        })
    }

    /// Unmaps the `length` bytes at `at`, page aligned, and keeps what is before them; what is behind is lost to
    /// this value, but stays mapped until the process ends.
    pub fn cut(&mut self, at: usize, length: usize) -> io::Result<()> {
        if at.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::Error::other("a cut outside of the mapping"));
        }
        // SAFETY: the range is a part of the mapping, which is borrowed exclusively, and shortened below.
        unsafe { rustix::mm::munmap(self.start.add(at).cast(), length) }?;
        (self.length, self.mapped) = (at, at);
        Ok(())
    }

    /// Takes away the right to write, and gives it back.
    pub fn protect_and_unprotect(&mut self) -> io::Result<()> {
        use rustix::mm::{MprotectFlags, mprotect};
        for flags in [
            MprotectFlags::READ,
            MprotectFlags::READ | MprotectFlags::WRITE,
        ] {
            // SAFETY: the mapping is borrowed exclusively, and has all of its rights again at the end.
            unsafe { mprotect(self.start.cast(), self.length, flags) }?;
        }
        Ok(())
    }

    /// Lets the kernel forget the pages: the next access faults them in again.
    pub fn forget_pages(&mut self) -> io::Result<()> {
        // SAFETY: of a shared mapping, as p2pmem's are, the contents stay.
        unsafe {
            rustix::mm::madvise(
                self.start.cast(),
                self.length,
                rustix::mm::Advice::LinuxDontNeed,
            )
        }?;
        Ok(())
    }

    /// Where it lies, for a system call.
    pub(crate) fn address(&self) -> usize {
        self.start as usize
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no bytes (the kernel maps none such).
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes.
    pub fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: the range is mapped for as long as self lives and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by the constructor, and no borrow outlives self.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.mapped) };
    }
}

/// Linux AIO (io_setup(2) and the rest), which P2P memory works with on any kernel.
pub mod aio {
    use super::*;

    const READ: u16 = 0;
    const WRITE: u16 = 1;

    /// `struct iocb` of linux/aio_abi.h, little-endian layout.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, Default)]
    struct Iocb {
        data: u64,
        key: u32,
        rw_flags: u32,
        opcode: u16,
        priority: i16,
        fd: u32,
        buffer: u64,
        bytes: u64,
        offset: i64,
        reserved: u64,
        flags: u32,
        event_fd: u32,
    }

    const _: () = assert!(size_of::<Iocb>() == 64 && cfg!(target_endian = "little"));

    /// `struct io_event`.
    #[repr(C)]
    #[derive(Debug, Clone, Copy, Default)]
    struct Event {
        data: u64,
        object: u64,
        result: i64,
        result2: i64,
    }

    /// Which way a transfer goes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Way {
        /// From the file into memory.
        Read,
        /// From memory into the file.
        Write,
    }

    /// A queue of transfers between files and a part of a mapping.
    #[derive(Debug)]
    pub struct Queue<'a> {
        context: libc::c_ulong,
        buffer: &'a Mapping,
        events: Vec<Event>,
        in_flight: usize,
    }

    impl<'a> Queue<'a> {
        /// A queue for `depth` transfers at once, all to and from `buffer`.
        pub fn new(buffer: &'a Mapping, depth: usize) -> io::Result<Self> {
            let mut context: libc::c_ulong = 0;
            let depth_wide = libc::c_long::try_from(depth).map_err(io::Error::other)?;
            // SAFETY: io_setup writes the context, which is valid for the call.
            checked(unsafe { libc::syscall(libc::SYS_io_setup, depth_wide, &mut context) })?;
            Ok(Self {
                context,
                buffer,
                events: vec![Event::default(); depth],
                in_flight: 0,
            })
        }

        /// Starts a transfer of `length` bytes between `file` at `offset` and the buffer at `at`; `tag`
        /// comes back with its end. The file must stay open until then.
        pub fn submit(
            &mut self,
            way: Way,
            file: &File,
            offset: u64,
            at: usize,
            length: usize,
            tag: u64,
        ) -> io::Result<()> {
            if at
                .checked_add(length)
                .is_none_or(|end| end > self.buffer.length)
            {
                return Err(io::Error::other("transfer outside of the buffer"));
            }
            let mut block = Iocb {
                data: tag,
                opcode: if way == Way::Read { READ } else { WRITE },
                fd: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
                buffer: self.buffer.start as u64 + at as u64,
                bytes: length as u64,
                offset: i64::try_from(offset).map_err(io::Error::other)?,
                ..Iocb::default()
            };
            let mut blocks = [std::ptr::from_mut(&mut block)];
            // SAFETY: the kernel copies the block during the call. The memory it names lies in the
            // mapping, which outlives the queue, and dropping the queue waits for all transfers.
            let started = checked(unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    1 as libc::c_long,
                    blocks.as_mut_ptr(),
                )
            })?;
            if started != 1 {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            self.in_flight += 1;
            Ok(())
        }

        /// Waits for at least one transfer and calls `ended` with tag and result of each that ended.
        /// Does nothing when none is in flight.
        pub fn wait(&mut self, mut ended: impl FnMut(u64, io::Result<usize>)) -> io::Result<()> {
            if self.in_flight == 0 {
                return Ok(());
            }
            let room = self.events.len() as libc::c_long;
            let count = loop {
                // SAFETY: the kernel writes at most `room` events into the vector of that length.
                let result = checked(unsafe {
                    libc::syscall(
                        libc::SYS_io_getevents,
                        self.context,
                        1 as libc::c_long,
                        room,
                        self.events.as_mut_ptr(),
                        std::ptr::null_mut::<libc::timespec>(),
                    )
                });
                match result {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    other => break other? as usize,
                }
            };
            for event in self.events.iter().take(count) {
                self.in_flight = self.in_flight.saturating_sub(1);
                let result = usize::try_from(event.result).map_err(|_| {
                    io::Error::from_raw_os_error(i32::try_from(-event.result).unwrap_or(libc::EIO))
                });
                ended(event.data, result);
            }
            Ok(())
        }
    }

    impl Drop for Queue<'_> {
        fn drop(&mut self) {
            // SAFETY: io_destroy cancels or waits for what is in flight before it returns.
            unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
        }
    }
}
