// SPDX-License-Identifier: GPL-2.0
/*
 * The ioctls; linux/p2pmem.h says what they do.
 */
#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/dma-buf.h>
#include <linux/fcntl.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include <linux/p2pmem.h>

#include "p2pmem.h"

static long p2pmem_ioc_info(struct p2pmem *p, void __user *arg)
{
	struct pci_dev *pdev = p->pdev;
	struct p2pmem_info info = {
		.bus = pdev->bus->number,
		.devfn = pdev->devfn,
		.bar = p->bar,
		.vendor = pdev->vendor,
		.device = pdev->device,
		.subsystem_vendor = pdev->subsystem_vendor,
		.subsystem_device = pdev->subsystem_device,
		.class = pdev->class,
		.offset = p->offset,
		.size = p->size,
	};

	scoped_guard(p2pmem_stays, p) {
		if (!p->alive)
			return -ENODEV;
		info.domain = pci_domain_nr(pdev->bus);
		info.free = p2pmem_pool_free(p);
	}
	return copy_to_user(arg, &info, sizeof(info)) ? -EFAULT : 0;
}

/* What mmap() can name: in 32-bit programs a page offset has 32 bits. */
static u32 p2pmem_last_handle(void)
{
	if (in_compat_syscall())
		return (1ULL << 32) / P2PMEM_HANDLE_PAGES - 1;
	return P2PMEM_HANDLE_MAX;
}

static long p2pmem_ioc_alloc(struct p2pmem_file *f, void __user *arg)
{
	struct p2pmem_alloc alloc;
	struct p2pmem_buffer *buf;
	u32 handle;
	int ret;

	if (copy_from_user(&alloc, arg, sizeof(alloc)))
		return -EFAULT;
	if (alloc.flags & ~(P2PMEM_ALLOC_CONTIGUOUS | P2PMEM_ALLOC_ZERO))
		return -EINVAL;
	if (!alloc.size || !PAGE_ALIGNED(alloc.size))
		return -EINVAL;
	if (!(f->filp->f_mode & FMODE_WRITE))
		return -EBADF;

	buf = p2pmem_buffer_alloc(f->p, alloc.size, alloc.flags);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	/*
	 * Reserved first and filled last: nobody finds a buffer whose offset is
	 * not set, or frees it under us.
	 */
	ret = xa_alloc(&f->handles, &handle, NULL,
		       XA_LIMIT(1, p2pmem_last_handle()), GFP_KERNEL);
	if (ret) {
		p2pmem_buffer_put(buf);
		return ret == -EBUSY ? -ENOSPC : ret;
	}
	buf->pgoff = (pgoff_t)handle * P2PMEM_HANDLE_PAGES;
	alloc.offset = (u64)buf->pgoff << PAGE_SHIFT;
	alloc.pieces = p2pmem_buffer_pieces(buf, 0, buf->nr_pages);
	if (copy_to_user(arg, &alloc, sizeof(alloc))) {
		xa_erase(&f->handles, handle);
		p2pmem_buffer_put(buf);
		return -EFAULT;
	}
	xa_store(&f->handles, handle, buf, GFP_KERNEL);
	return 0;
}

static long p2pmem_ioc_free(struct p2pmem_file *f, void __user *arg)
{
	struct p2pmem_buffer *buf;
	u64 offset;

	if (copy_from_user(&offset, arg, sizeof(offset)))
		return -EFAULT;
	if (offset & (BIT_ULL(P2PMEM_HANDLE_SHIFT) - 1))
		return -EINVAL;
	xa_lock(&f->handles);
	/* A number that is reserved and not yet told counts as free. */
	buf = xa_load(&f->handles, offset >> P2PMEM_HANDLE_SHIFT);
	if (buf)
		__xa_erase(&f->handles, offset >> P2PMEM_HANDLE_SHIFT);
	xa_unlock(&f->handles);
	if (!buf)
		return -ENOENT;
	p2pmem_buffer_put(buf);
	return 0;
}

/* The distance to one client, added to @sum; -1 stays -1. */
static int p2pmem_add_distance(struct p2pmem *p,
			       const struct p2pmem_address *client,
			       bool verbose, int *sum)
{
	struct pci_dev *pdev;
	int distance;

	if (client->reserved)
		return -EINVAL;
	pdev = pci_get_domain_bus_and_slot(client->domain, client->bus,
					   client->devfn);
	if (!pdev)
		return -ENXIO;
	distance = pci_p2pdma_distance(p->pdev, &pdev->dev, verbose);
	pci_dev_put(pdev);
	*sum = distance < 0 || *sum < 0 ? -1 : *sum + distance;
	return 0;
}

static long p2pmem_ioc_distance(struct p2pmem *p, void __user *arg)
{
	struct p2pmem_address *clients __free(kfree) = NULL;
	struct p2pmem_distance distance;
	bool verbose;
	u32 i;
	int ret;

	if (copy_from_user(&distance, arg, sizeof(distance)))
		return -EFAULT;
	if (distance.flags & ~P2PMEM_DISTANCE_VERBOSE || distance.reserved)
		return -EINVAL;
	if (!distance.nr_clients || distance.nr_clients > P2PMEM_MAX_CLIENTS)
		return -EINVAL;
	verbose = distance.flags & P2PMEM_DISTANCE_VERBOSE;
	if (verbose && !capable(CAP_SYS_ADMIN))
		return -EPERM;
	clients = memdup_array_user(u64_to_user_ptr(distance.clients),
				    distance.nr_clients, sizeof(*clients));
	if (IS_ERR(clients))
		return PTR_ERR(no_free_ptr(clients));

	distance.distance = 0;
	scoped_guard(p2pmem_stays, p) {
		if (!p->alive)
			return -ENODEV;
		for (i = 0; i < distance.nr_clients; i++) {
			ret = p2pmem_add_distance(p, &clients[i], verbose,
						  &distance.distance);
			if (ret)
				return ret;
		}
	}
	return copy_to_user(arg, &distance, sizeof(distance)) ? -EFAULT : 0;
}

static struct dma_buf *p2pmem_export_part(struct p2pmem_file *f,
					  const struct p2pmem_export *export)
{
	pgoff_t pgoff = export->offset >> PAGE_SHIFT;
	struct p2pmem_buffer *buf;
	struct dma_buf *dmabuf;
	unsigned long first;

	buf = p2pmem_find(f, pgoff);
	if (!buf)
		return ERR_PTR(-ENOENT);
	first = pgoff - buf->pgoff;
	if (first >= buf->nr_pages ||
	    export->size >> PAGE_SHIFT > buf->nr_pages - first)
		dmabuf = ERR_PTR(-ENXIO);
	else
		dmabuf = p2pmem_export(buf, first, export->size >> PAGE_SHIFT);
	p2pmem_buffer_put(buf);
	return dmabuf;
}

static long p2pmem_ioc_export(struct p2pmem_file *f, void __user *arg)
{
	struct p2pmem_export export;
	struct dma_buf *dmabuf;
	int fd;

	if (copy_from_user(&export, arg, sizeof(export)))
		return -EFAULT;
	if (export.flags & ~O_CLOEXEC || !export.size ||
	    !PAGE_ALIGNED(export.size) || !PAGE_ALIGNED(export.offset))
		return -EINVAL;
	if (!(f->filp->f_mode & FMODE_WRITE))
		return -EBADF;
	dmabuf = p2pmem_export_part(f, &export);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	fd = get_unused_fd_flags(export.flags);
	if (fd < 0) {
		dma_buf_put(dmabuf);
		return fd;
	}
	export.fd = fd;
	if (copy_to_user(arg, &export, sizeof(export))) {
		put_unused_fd(fd);
		dma_buf_put(dmabuf);
		return -EFAULT;
	}
	fd_install(fd, dmabuf->file);
	return 0;
}

/**
 * p2pmem_ioctl - the ioctls of the character device
 * @filp: the open file
 * @cmd: P2PMEM_IOC_*
 * @arg: address of the argument, in user space
 *
 * Return: 0, or an error; linux/p2pmem.h has those of each ioctl
 */
long p2pmem_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct p2pmem_file *f = filp->private_data;
	void __user *to = (void __user *)arg;

	switch (cmd) {
	case P2PMEM_IOC_INFO:
		return p2pmem_ioc_info(f->p, to);
	case P2PMEM_IOC_ALLOC:
		return p2pmem_ioc_alloc(f, to);
	case P2PMEM_IOC_FREE:
		return p2pmem_ioc_free(f, to);
	case P2PMEM_IOC_DISTANCE:
		return p2pmem_ioc_distance(f->p, to);
	case P2PMEM_IOC_EXPORT:
		return p2pmem_ioc_export(f, to);
	default:
		return -ENOTTY;
	}
}
