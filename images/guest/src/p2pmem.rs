//! `/dev/p2pmemN`: what `guest-kernel/p2pmem/include/uapi/linux/p2pmem.h` says, in Rust.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};

use libc::c_ulong;

/// `struct p2pmem_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Info {
    /// PCI domain.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device (bits 7:3) and function (bits 2:0).
    pub devfn: u8,
    /// BAR that the memory lies in.
    pub bar: u8,
    reserved: u8,
    /// PCI vendor ID.
    pub vendor: u16,
    /// PCI device ID.
    pub device: u16,
    /// PCI subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// PCI subsystem ID.
    pub subsystem_device: u16,
    /// PCI class code.
    pub class: u32,
    reserved2: u32,
    /// Where in the BAR the memory begins.
    pub offset: u64,
    /// Bytes of memory.
    pub size: u64,
    /// Bytes that are free.
    pub free: u64,
}

/// `struct p2pmem_alloc`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Alloc {
    /// Bytes wanted.
    pub size: u64,
    /// [`CONTIGUOUS`], [`ZERO`].
    pub flags: u32,
    /// Contiguous pieces that the memory is in.
    pub pieces: u32,
    /// What to map.
    pub offset: u64,
}

/// All in one piece.
pub const CONTIGUOUS: u32 = 1;
/// Cleared.
pub const ZERO: u32 = 2;

/// `struct p2pmem_address`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Address {
    /// PCI domain.
    pub domain: u32,
    /// Bus number.
    pub bus: u8,
    /// Device (bits 7:3) and function (bits 2:0).
    pub devfn: u8,
    /// 0.
    pub reserved: u16,
}

/// `struct p2pmem_distance`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Distance {
    /// Address of an array of [`Address`].
    pub clients: u64,
    /// Its length.
    pub nr_clients: u32,
    /// [`VERBOSE`].
    pub flags: u32,
    /// Hops, or -1.
    pub distance: i32,
    /// 0.
    pub reserved: u32,
}

/// The kernel log says why a path is refused.
pub const VERBOSE: u32 = 1;

/// `struct p2pmem_export`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Export {
    /// What an allocation returned, plus pages.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// `O_CLOEXEC`, or 0.
    pub flags: u32,
    /// The dma-buf.
    pub fd: i32,
}

const _: () = assert!(size_of::<Info>() == 48 && size_of::<Alloc>() == 24);
const _: () = assert!(size_of::<Distance>() == 24 && size_of::<Export>() == 24);
const _: () = assert!(size_of::<Address>() == 8);

const MAGIC: c_ulong = 0xf4;
const WRITE: c_ulong = 1;
const READ: c_ulong = 2;

const fn number<T>(direction: c_ulong, number: c_ulong) -> c_ulong {
    (direction << 30) | ((size_of::<T>() as c_ulong) << 16) | (MAGIC << 8) | number
}

/// `P2PMEM_IOC_INFO`.
pub const IOC_INFO: c_ulong = number::<Info>(READ, 0);
/// `P2PMEM_IOC_ALLOC`.
pub const IOC_ALLOC: c_ulong = number::<Alloc>(READ | WRITE, 1);
/// `P2PMEM_IOC_FREE`.
pub const IOC_FREE: c_ulong = number::<u64>(WRITE, 2);
/// `P2PMEM_IOC_DISTANCE`.
pub const IOC_DISTANCE: c_ulong = number::<Distance>(READ | WRITE, 3);
/// `P2PMEM_IOC_EXPORT`.
pub const IOC_EXPORT: c_ulong = number::<Export>(READ | WRITE, 4);

/// An argument of an ioctl of this device: plain data, of the size that its number says.
pub trait Argument {}
impl Argument for Info {}
impl Argument for Alloc {}
impl Argument for Distance {}
impl Argument for Export {}
impl Argument for u64 {}

/// An open `/dev/p2pmemN`.
#[derive(Debug)]
pub struct P2pmem {
    /// The file, to map.
    pub file: File,
}

impl P2pmem {
    /// Opens it for reading and writing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { file })
    }

    /// Any ioctl of the device with its argument.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Panics
    /// Where `command` is for an argument of another size.
    pub fn ioctl<T: Argument>(&self, command: c_ulong, argument: &mut T) -> io::Result<()> {
        assert_eq!((command >> 16) & 0x3fff, size_of::<T>() as c_ulong);
        // SAFETY: the kernel reads and writes as many bytes as the command says, which is the argument's size, and
        // the argument is plain data.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                command as _,
                std::ptr::from_mut(argument),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// An ioctl whose argument is an address that nothing is mapped at.
    ///
    /// # Errors
    /// The kernel's; EFAULT is expected.
    pub fn ioctl_nowhere(&self, command: c_ulong) -> io::Result<()> {
        // SAFETY: the kernel finds nothing at the first page and touches nothing of ours.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), command as _, 8usize) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// An ioctl whose argument the kernel can read but not write.
    ///
    /// # Errors
    /// The kernel's; EFAULT is expected.
    pub fn ioctl_read_only<T: Argument>(&self, command: c_ulong, argument: &T) -> io::Result<()> {
        let page = crate::sys::read_only_page(argument)?;
        // SAFETY: the kernel reads the argument from the page, which is as long as the mapping, and cannot write there.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), command as _, page.address()) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// What the memory is.
    ///
    /// # Errors
    /// The kernel's.
    pub fn info(&self) -> io::Result<Info> {
        let mut info = Info::default();
        self.ioctl(IOC_INFO, &mut info)?;
        Ok(info)
    }

    /// Allocates.
    ///
    /// # Errors
    /// The kernel's.
    pub fn alloc(&self, size: u64, flags: u32) -> io::Result<Alloc> {
        let mut alloc = Alloc {
            size,
            flags,
            ..Alloc::default()
        };
        self.ioctl(IOC_ALLOC, &mut alloc)?;
        Ok(alloc)
    }

    /// Frees what was allocated at `offset`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn free(&self, mut offset: u64) -> io::Result<()> {
        self.ioctl(IOC_FREE, &mut offset)
    }

    /// Hops to all of `clients`, or -1.
    ///
    /// # Errors
    /// The kernel's.
    pub fn distance(&self, clients: &[Address], flags: u32) -> io::Result<i32> {
        let mut distance = Distance {
            clients: clients.as_ptr() as u64,
            nr_clients: u32::try_from(clients.len()).map_err(io::Error::other)?,
            flags,
            ..Distance::default()
        };
        self.ioctl(IOC_DISTANCE, &mut distance)?;
        Ok(distance.distance)
    }

    /// A dma-buf of allocated memory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn export(&self, offset: u64, size: u64) -> io::Result<OwnedFd> {
        let mut export = Export {
            offset,
            size,
            flags: libc::O_CLOEXEC as u32,
            fd: -1,
        };
        self.ioctl(IOC_EXPORT, &mut export)?;
        // SAFETY: the kernel has just opened it for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(export.fd) })
    }
}
