/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Peer-to-peer memory for user space.
 *
 * Each memory BAR of which a driver has published memory to the kernel's P2PDMA
 * code (an NVRAM card, the CMB or the PMR of an NVMe controller) has a
 * character device:
 *
 *	/dev/p2pmemN					N counts up from 0 as devices come
 *	/dev/p2pmem/by-address/0000:03:00.0-bar4	the same by PCI address and BAR
 *
 * What is mapped from it is memory of that BAR. It can be the buffer of
 * O_DIRECT transfers: data then goes from device to device, where the kernel
 * finds that the two can reach each other.
 *
 * There are two ways to get memory.
 *
 *	mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
 *
 * allocates; the memory lives as long as the mapping. This is what programs do
 * that know nothing of this header, such as fio with
 * --iomem=mmapshared:/dev/p2pmem0.
 *
 *	P2PMEM_IOC_ALLOC, then mmap(..., fd, alloc.offset)
 *
 * is for memory that several mappings share, that is exported, that has to be
 * in one piece or cleared. It lives until P2PMEM_IOC_FREE or close(), and
 * beyond that as long as it is mapped or exported.
 *
 * Memory that a device still transfers to or from is free only after that. It
 * is not cleared on its way from one user to the next unless P2PMEM_ALLOC_ZERO
 * asks for it, or the module's parameter clear is set: do that where users may
 * open the device who should not read each other's data. Pages are mapped when
 * they are touched, by the CPU or by a transfer; MAP_POPULATE does not get all
 * of them.
 *
 * When the device goes away (unbound, unplugged), existing mappings give
 * SIGBUS, the kernel answers EFAULT for transfers that name them, poll()
 * reports POLLHUP, and all but close(), munmap() and P2PMEM_IOC_FREE fails with
 * ENODEV.
 *
 * Errors of mmap():
 *	EINVAL	a private mapping; an offset that no P2PMEM_IOC_ALLOC returned
 *	ENXIO	the mapping is longer than what was allocated at that offset
 *	EACCES	PROT_EXEC; a file that is not open for writing, at offset 0
 *	ENOMEM	not that much memory is free
 *	EINTR	killed while memory was looked for, or cleared
 *	ENODEV	the device is gone
 *
 * Errors of all ioctls:
 *	EINVAL	unknown flags, reserved fields that are not 0, sizes or offsets
 *		that are not multiples of the page size
 *	EFAULT	the argument cannot be read or written
 *	ENODEV	the device is gone
 *	ENOTTY	not an ioctl of this device
 */
#ifndef _UAPI_LINUX_P2PMEM_H
#define _UAPI_LINUX_P2PMEM_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * struct p2pmem_info - what the memory is
 * @domain: PCI domain of the device
 * @bus: its bus number
 * @devfn: its device (bits 7:3) and function number (bits 2:0)
 * @bar: the BAR that the memory lies in
 * @reserved: 0
 * @vendor: PCI vendor ID
 * @device: PCI device ID
 * @subsystem_vendor: PCI subsystem vendor ID
 * @subsystem_device: PCI subsystem ID
 * @class: PCI class code, 24 bits
 * @reserved2: 0
 * @offset: where in the BAR the memory begins
 * @size: bytes of memory
 * @free: bytes that are not allocated now, by whomever. Where several BARs
 *	of a device have memory, the kernel keeps one account for all of them,
 *	and this is an upper bound.
 */
struct p2pmem_info {
	__u32 domain;
	__u8 bus;
	__u8 devfn;
	__u8 bar;
	__u8 reserved;
	__u16 vendor;
	__u16 device;
	__u16 subsystem_vendor;
	__u16 subsystem_device;
	__u32 class;
	__u32 reserved2;
	__u64 offset;
	__u64 size;
	__u64 free;
};

/* All in one piece, or ENOMEM. */
#define P2PMEM_ALLOC_CONTIGUOUS	0x1
/* Cleared by the CPU, over the bus. */
#define P2PMEM_ALLOC_ZERO	0x2

/**
 * struct p2pmem_alloc - an allocation
 * @size: bytes wanted, a multiple of the page size
 * @flags: P2PMEM_ALLOC_*
 * @pieces: returned: number of contiguous pieces that the memory is in; as
 *	few as possible
 * @offset: returned: what to give mmap() and the other ioctls
 */
struct p2pmem_alloc {
	__u64 size;
	__u32 flags;
	__u32 pieces;
	__u64 offset;
};

/**
 * struct p2pmem_address - a PCI device
 * @domain: PCI domain
 * @bus: bus number
 * @devfn: device (bits 7:3) and function number (bits 2:0)
 * @reserved: 0
 */
struct p2pmem_address {
	__u32 domain;
	__u8 bus;
	__u8 devfn;
	__u16 reserved;
};

#define P2PMEM_MAX_CLIENTS	64

/* The kernel log says why a path is refused. Needs CAP_SYS_ADMIN. */
#define P2PMEM_DISTANCE_VERBOSE	0x1

/**
 * struct p2pmem_distance - how far devices are from the memory
 * @clients: address of an array of &struct p2pmem_address
 * @nr_clients: its length, 1 to P2PMEM_MAX_CLIENTS
 * @flags: P2PMEM_DISTANCE_*
 * @distance: returned: the sum of the hops between the memory's device and
 *	each client (0: the same device, 4: below the same switch), or -1 where
 *	the kernel does not let one of them reach the memory
 * @reserved: 0
 */
struct p2pmem_distance {
	__u64 clients;
	__u32 nr_clients;
	__u32 flags;
	__s32 distance;
	__u32 reserved;
};

/**
 * struct p2pmem_export - a dma-buf of allocated memory
 * @offset: what P2PMEM_IOC_ALLOC returned, plus a multiple of the page size
 * @size: bytes, a multiple of the page size
 * @flags: O_CLOEXEC or 0
 * @fd: returned: the dma-buf
 *
 * Only importers that take peer-to-peer memory and let it be revoked can
 * attach; a device that cannot reach the memory is refused with EOPNOTSUPP.
 */
struct p2pmem_export {
	__u64 offset;
	__u64 size;
	__u32 flags;
	__s32 fd;
};

#define P2PMEM_IOC_MAGIC	0xf4

#define P2PMEM_IOC_INFO		_IOR(P2PMEM_IOC_MAGIC, 0, struct p2pmem_info)

/*
 * EBADF: not open for writing. ENOMEM: not that much is free. ENOSPC: too many
 * allocations of this file (15 in programs of 32 bits). EINTR: killed while
 * memory was looked for, or cleared.
 */
#define P2PMEM_IOC_ALLOC	_IOWR(P2PMEM_IOC_MAGIC, 1, struct p2pmem_alloc)

/* Takes the offset that was returned. ENOENT: nothing is allocated there. */
#define P2PMEM_IOC_FREE		_IOW(P2PMEM_IOC_MAGIC, 2, __u64)

/* ENXIO: there is no such PCI device. EPERM: verbose without CAP_SYS_ADMIN. */
#define P2PMEM_IOC_DISTANCE	_IOWR(P2PMEM_IOC_MAGIC, 3, struct p2pmem_distance)

/*
 * EBADF: not open for writing. ENOENT: nothing is allocated there. ENXIO: what
 * is allocated there is shorter.
 */
#define P2PMEM_IOC_EXPORT	_IOWR(P2PMEM_IOC_MAGIC, 4, struct p2pmem_export)

#endif /* _UAPI_LINUX_P2PMEM_H */
