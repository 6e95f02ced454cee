//! DMA_MAP and DMA_UNMAP: the client's memory comes and goes.

use std::os::fd::OwnedFd;

use p2plab_pcie::{Access, MapError};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::VFIO_DMA_UNMAP_FLAG_ALL;
use vfio_user::DmaMapFlags;

use crate::server::Status;
use crate::session::{check_argsz, exactly};
use crate::stream::Outbox;
use crate::target::Target;
use crate::wire;

/// Without a descriptor the range is another device's BAR, or memory that QEMU cannot share: remembered
/// as not ours to touch.
pub(crate) fn map(
    target: &dyn Target,
    status: &Status,
    payload: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<(), Errno> {
    let request: wire::DmaMap = exactly(payload)?;
    check_argsz::<wire::DmaMap>(request.argsz)?;
    let flags = DmaMapFlags::from_bits_retain(request.flags);
    if flags.bits() & !DmaMapFlags::READ_WRITE.bits() != 0 {
        return Err(Errno::INVAL);
    }
    check_pages(request.address, request.size)?;
    let mut fds = fds.into_iter();
    let file = fds.next();
    if fds.next().is_some() {
        return Err(Errno::INVAL);
    }
    let access = Access {
        read: flags.contains(DmaMapFlags::READ),
        write: flags.contains(DmaMapFlags::WRITE),
    };
    tracing::debug!(
        function = target.name(),
        address = format_args!("{:#x}", request.address),
        size = format_args!("{:#x}", request.size),
        shared = file.is_some(),
        "DMA_MAP"
    );
    target
        .map_host_memory(request.address, request.size, access, file, request.offset)
        .map_err(|error| refused(target, status, &error))
}

/// The flag of vfio-bindings, not of crate vfio_user 0.1.7, whose `DmaUnmapFlags` are one bit too high
/// (vfio-user specification 0.9.1, VFIO_USER_DMA_UNMAP, and QEMU: bit 0 dirty pages, bit 1 all).
pub(crate) fn unmap(
    target: &dyn Target,
    status: &Status,
    payload: &[u8],
    outbox: &mut Outbox,
) -> Result<(), Errno> {
    let request: wire::DmaUnmap = exactly(payload)?;
    check_argsz::<wire::DmaUnmap>(request.argsz)?;
    tracing::debug!(
        function = target.name(),
        address = format_args!("{:#x}", request.address),
        size = format_args!("{:#x}", request.size),
        flags = request.flags,
        "DMA_UNMAP"
    );
    check_pages(request.address, request.size)?;
    match request.flags {
        0 => match target.unmap_host_memory(request.address, request.size) {
            // As VFIO in the kernel has it: a guest's IOMMU that changes its tables unmaps all that there could be.
            Ok(()) | Err(MapError::NotMapped) => {}
            Err(error) => return Err(refused(target, status, &error)),
        },
        VFIO_DMA_UNMAP_FLAG_ALL if request.address == 0 && request.size == 0 => {
            target.unmap_all_host_memory();
        }
        _ => return Err(Errno::INVAL),
    }
    outbox.push(&request);
    Ok(())
}

/// The page size that was announced (capability `pgsizes`). Smaller mappings would let a client make a page of many
/// parts, and a transfer of as many more.
fn check_pages(address: u64, size: u64) -> Result<(), Errno> {
    if address.is_multiple_of(wire::PAGE_SIZE) && size.is_multiple_of(wire::PAGE_SIZE) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

fn refused(target: &dyn Target, status: &Status, error: &MapError) -> Errno {
    if status.mistakes.is_worth_a_line() {
        tracing::warn!(function = target.name(), %error, "host memory was refused");
    }
    match error {
        MapError::BadRange | MapError::FileTooShort | MapError::NotSealed => Errno::INVAL,
        MapError::Overlap => Errno::EXIST,
        MapError::TooMany => Errno::NOSPC,
        MapError::NotMapped => Errno::NOENT,
        MapError::Os(error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}
