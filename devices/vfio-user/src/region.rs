//! The regions of a PCI device: its BARs and config space.

use p2plab_pcie::{BarBacking, CpuAccess, Function, OutOfBounds, initiates_flr};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_VGA_REGION_INDEX,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_user::Command;

use crate::session::{Attachment, check_argsz, exactly, prefix};
use crate::stream::Outbox;
use crate::target::Target;
use crate::version::Limits;
use crate::wire::{self, SparseArea};

/// Number of region indices; not every one has a region.
pub(crate) const COUNT: u32 = VFIO_PCI_VGA_REGION_INDEX + 1;

/// What the CPU may map is cut at pages of this size, x86's and the smallest of arm64.
const PAGE: u64 = 4096;

enum Region {
    Bar(u8),
    Config,
    Absent,
}

fn region(index: u32) -> Result<Region, Errno> {
    match index {
        0..=VFIO_PCI_BAR5_REGION_INDEX => u8::try_from(index)
            .map(Region::Bar)
            .map_err(|_| Errno::INVAL),
        VFIO_PCI_CONFIG_REGION_INDEX => Ok(Region::Config),
        // Expansion ROM and VGA.
        _ if index < COUNT => Ok(Region::Absent),
        _ => Err(Errno::INVAL),
    }
}

fn size(target: &dyn Target, region: &Region) -> u64 {
    match region {
        Region::Bar(bar) => target.bar_size(*bar),
        Region::Config => Function::CONFIG_SPACE_SIZE,
        Region::Absent => 0,
    }
}

/// DEVICE_GET_REGION_INFO. The capability and the descriptor come only where `argsz` has room for both;
/// the reply's `argsz` says how much that is, and the client asks again.
pub(crate) fn info(
    target: &dyn Target,
    payload: &[u8],
    limits: Limits,
    outbox: &mut Outbox,
) -> Result<Attachment, Errno> {
    let request: wire::RegionInfo = exactly(payload)?;
    let argsz = check_argsz::<wire::RegionInfo>(request.argsz)?;
    let region = region(request.index)?;
    let size = size(target, &region);
    let mut info = wire::RegionInfo {
        argsz: size_of::<wire::RegionInfo>() as u32,
        flags: 0,
        index: request.index,
        cap_offset: 0,
        size,
        offset: 0,
    };
    if size > 0 {
        info.flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    }
    let mapped = match region {
        Region::Bar(bar) if limits.fds > 0 => mappable(target, bar),
        _ => None,
    };
    let Some((memory, areas)) = mapped else {
        outbox.push(&info);
        return Ok(None);
    };
    let full = size_of::<wire::RegionInfo>()
        + size_of::<wire::SparseMmap>()
        + size_of_val(areas.as_slice());
    info.flags |= VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
    info.argsz = u32::try_from(full).map_err(|_| Errno::INVAL)?;
    // Also where the capability does not fit yet: QEMU 11.1 refuses a reply with the flag and no offset, and
    // on a hot-add crashes over it.
    info.cap_offset = size_of::<wire::RegionInfo>() as u32;
    if argsz < full {
        outbox.push(&info);
        return Ok(None);
    }
    outbox.push(&info);
    outbox.push(&wire::SparseMmap {
        id: VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16,
        version: 1,
        next: 0,
        areas: u32::try_from(areas.len()).map_err(|_| Errno::INVAL)?,
        reserved: 0,
    });
    for area in &areas {
        outbox.push(area);
    }
    Ok(Some(memory))
}

/// The memory behind a mapped BAR and its areas: all but the pages of the MSI-X table and PBA, which
/// must stay trapped.
fn mappable(
    target: &dyn Target,
    bar: u8,
) -> Option<(std::sync::Arc<p2plab_pcie::BarMemory>, Vec<SparseArea>)> {
    let declaration = target.declaration();
    let found = declaration.bars.iter().find(|found| found.index == bar)?;
    let BarBacking::Memory(memory) = &found.backing else {
        return None;
    };
    if found.cpu_access != CpuAccess::Mapped {
        return None;
    }
    let mut holes = Vec::new();
    if let Some(msix) = declaration.msix.filter(|msix| msix.bar == bar) {
        let vectors = u64::from(msix.vectors);
        holes.push((u64::from(msix.table_offset), vectors * 16));
        holes.push((u64::from(msix.pba_offset), vectors.div_ceil(64) * 8));
    }
    let areas = around(found.size, holes);
    (!areas.is_empty()).then(|| (memory.clone(), areas))
}

/// The whole pages of `0..size` outside `holes` of (offset, length).
fn around(size: u64, mut holes: Vec<(u64, u64)>) -> Vec<SparseArea> {
    holes.sort_unstable();
    let mut areas = Vec::new();
    let mut start = 0;
    for (offset, length) in holes {
        let end = offset / PAGE * PAGE;
        if end > start {
            areas.push(SparseArea {
                offset: start,
                size: end - start,
            });
        }
        start = start.max(
            offset
                .saturating_add(length)
                .div_ceil(PAGE)
                .saturating_mul(PAGE),
        );
    }
    let end = size / PAGE * PAGE;
    if end > start {
        areas.push(SparseArea {
            offset: start,
            size: end - start,
        });
    }
    areas
}

/// The region and length of an access that lies inside it and is no longer than agreed.
fn check(
    target: &dyn Target,
    access: &wire::RegionAccess,
    most: usize,
) -> Result<(Region, usize), Errno> {
    let region = region(access.region)?;
    let count = usize::try_from(access.count).map_err(|_| Errno::INVAL)?;
    if count > most {
        return Err(Errno::TOOBIG);
    }
    let inside = access
        .offset
        .checked_add(u64::from(access.count))
        .is_some_and(|end| end <= size(target, &region));
    if inside {
        Ok((region, count))
    } else {
        Err(Errno::INVAL)
    }
}

fn outside(_: OutOfBounds) -> Errno {
    Errno::INVAL
}

/// REGION_READ: straight into the reply.
pub(crate) fn read(
    target: &dyn Target,
    payload: &[u8],
    limits: Limits,
    outbox: &mut Outbox,
) -> Result<(), Errno> {
    let access: wire::RegionAccess = exactly(payload)?;
    let (region, count) = check(target, &access, limits.data)?;
    outbox.push(&access);
    let data = outbox.extend(count);
    if data.is_empty() {
        return Ok(());
    }
    match region {
        Region::Bar(bar) => target.bar_read(bar, access.offset, data).map_err(outside),
        Region::Config => target.config_read(access.offset, data).map_err(outside),
        Region::Absent => Err(Errno::INVAL),
    }
}

/// REGION_WRITE.
pub(crate) fn write(
    target: &dyn Target,
    payload: &[u8],
    limits: Limits,
    outbox: &mut Outbox,
) -> Result<(), Errno> {
    let (access, data): (wire::RegionAccess, _) = prefix(payload)?;
    write_one(target, &access, data, limits.data)?;
    outbox.push(&access);
    Ok(())
}

/// REGION_WRITE_MULTI: posted writes of up to 8 bytes, done in their order. QEMU 11.1 sends them without
/// having been invited to where its `x-send-queued` is on, so they are done although not announced.
pub(crate) fn write_multiple(target: &dyn Target, payload: &[u8]) -> Result<(), Errno> {
    let (count, mut rest): (u64, _) = prefix(payload)?;
    let fits = u64::try_from(rest.len() / size_of::<wire::SmallWrite>()).unwrap_or(0);
    if count != fits || rest.len() % size_of::<wire::SmallWrite>() != 0 {
        return Err(Errno::INVAL);
    }
    let mut result = Ok(());
    while !rest.is_empty() {
        let (write, next): (wire::SmallWrite, _) = prefix(rest)?;
        rest = next;
        let most = write.data.len();
        let data = usize::try_from(write.access.count)
            .ok()
            .and_then(|n| write.data.get(..n));
        // One bad write does not undo its neighbours, which QEMU posted one by one.
        let done = write_one(target, &write.access, data.unwrap_or_default(), most);
        result = result.and(done);
    }
    result
}

/// Base Address Registers in config space.
const BARS: (u64, usize) = (0x10, 24);

/// A Function Level Reset clears the BARs, and whoever asked for it sets them again. The guest of a client such as QEMU
/// does not: the client answers for the BARs itself and knows nothing of the reset, so the guest finds them as they
/// were. Linux's vfio-pci, behind which a device is reset in the same way, restores them, and so do we.
fn config_write(target: &dyn Target, offset: u64, data: &[u8]) -> Result<(), OutOfBounds> {
    let at = usize::try_from(offset).map_err(|_| OutOfBounds)?;
    if !initiates_flr(at, data) {
        return target.config_write(offset, data);
    }
    let mut bars = [0; BARS.1];
    target.config_read(BARS.0, &mut bars)?;
    target.config_write(offset, data)?;
    target.config_write(BARS.0, &bars)
}

/// Whether a message writes to memory behind a BAR, as far as can be said before it is looked at closely.
pub(crate) fn may_write_memory(target: &dyn Target, command: u16, payload: &[u8]) -> bool {
    if command == wire::REGION_WRITE_MULTI {
        return true;
    }
    let access = prefix::<wire::RegionAccess>(payload).ok();
    let written = access.filter(|_| command == Command::RegionWrite as u16);
    let Some(Ok(Region::Bar(bar))) = written.map(|(access, _)| region(access.region)) else {
        return false;
    };
    let bars = &target.declaration().bars;
    bars.iter()
        .any(|found| found.index == bar && matches!(found.backing, BarBacking::Memory(_)))
}

fn write_one(
    target: &dyn Target,
    access: &wire::RegionAccess,
    data: &[u8],
    most: usize,
) -> Result<(), Errno> {
    let (region, count) = check(target, access, most)?;
    if data.len() != count {
        return Err(Errno::INVAL);
    }
    if data.is_empty() {
        return Ok(());
    }
    match region {
        Region::Bar(bar) => target.bar_write(bar, access.offset, data).map_err(outside),
        Region::Config => config_write(target, access.offset, data).map_err(outside),
        Region::Absent => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(offset: u64, size: u64) -> SparseArea {
        SparseArea { offset, size }
    }

    #[test]
    fn msix_pages_are_left_out() {
        assert_eq!(around(0x10000, vec![]), [area(0, 0x10000)]);
        assert_eq!(
            around(0x10000, vec![(0x8800, 0x10), (0x2000, 0x1010)]),
            [area(0, 0x2000), area(0x4000, 0x4000), area(0x9000, 0x7000)]
        );
        assert_eq!(
            around(0x10000, vec![(0, 0x10), (0xf800, 8)]),
            [area(0x1000, 0xe000)]
        );
        assert_eq!(around(0x1000, vec![(0, 0x10), (0x800, 8)]), []);
    }
}
