//! The messages' fixed parts, as they lie on the wire: native byte order (vfio-user specification 0.9.1,
//! "Message sizes" and the section of each command).
//!
//! Crate vfio_user keeps its own structures private; those of vfio-bindings have no safe conversion from
//! bytes. The sizes are checked against the latter below.

use vfio_bindings::bindings::vfio;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The only page size that mappings of memory have: their addresses and sizes are multiples of it.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// Low bits of [`Header::flags`]: kind of message.
pub(crate) const TYPE_MASK: u32 = 0xf;
/// A request.
pub(crate) const TYPE_COMMAND: u32 = 0;
/// A reply.
pub(crate) const TYPE_REPLY: u32 = 1;
/// The sender wants no reply: a posted write.
pub(crate) const NO_REPLY: u32 = 1 << 4;
/// The reply is an error; [`Header::error`] has the errno.
pub(crate) const ERROR: u32 = 1 << 5;

/// VFIO_USER_REGION_WRITE_MULTI of QEMU 11.1, which crate vfio_user does not know.
pub(crate) const REGION_WRITE_MULTI: u16 = 15;

/// Begins every message.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) message_id: u16,
    pub(crate) command: u16,
    pub(crate) message_size: u32,
    pub(crate) flags: u32,
    pub(crate) error: u32,
}

/// VERSION, before the JSON.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Version {
    pub(crate) major: u16,
    pub(crate) minor: u16,
}

/// DMA_MAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DmaMap {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// DMA_UNMAP, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DmaUnmap {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// DEVICE_GET_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DeviceInfo {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) num_regions: u32,
    pub(crate) num_irqs: u32,
}

/// DEVICE_GET_REGION_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RegionInfo {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) cap_offset: u32,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// The sparse mmap capability of a region, before its areas.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SparseMmap {
    pub(crate) id: u16,
    pub(crate) version: u16,
    pub(crate) next: u32,
    pub(crate) areas: u32,
    pub(crate) reserved: u32,
}

/// One area that may be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SparseArea {
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// DEVICE_GET_IRQ_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IrqInfo {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) count: u32,
}

/// DEVICE_SET_IRQS, before the booleans.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SetIrqs {
    pub(crate) argsz: u32,
    pub(crate) flags: u32,
    pub(crate) index: u32,
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// REGION_READ and REGION_WRITE, before the data; the replies begin alike.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RegionAccess {
    pub(crate) offset: u64,
    pub(crate) region: u32,
    pub(crate) count: u32,
}

/// One write of REGION_WRITE_MULTI; a u64 with their number comes first.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct SmallWrite {
    pub(crate) access: RegionAccess,
    pub(crate) data: [u8; 8],
}

/// Size of [`Header`].
pub(crate) const HEADER_SIZE: usize = size_of::<Header>();

const _: () = assert!(HEADER_SIZE == 16);
const _: () = assert!(size_of::<DmaMap>() == size_of::<vfio::vfio_iommu_type1_dma_map>());
const _: () = assert!(size_of::<DmaUnmap>() == size_of::<vfio::vfio_iommu_type1_dma_unmap>());
const _: () = assert!(size_of::<RegionInfo>() == size_of::<vfio::vfio_region_info>());
const _: () = assert!(size_of::<IrqInfo>() == size_of::<vfio::vfio_irq_info>());
const _: () = assert!(size_of::<SetIrqs>() == size_of::<vfio::vfio_irq_set>());
const _: () = assert!(size_of::<SparseArea>() == size_of::<vfio::vfio_region_sparse_mmap_area>());
