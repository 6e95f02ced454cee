/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the p2pmem driver share.
 *
 * Locks, outermost first:
 *
 *	mmap_lock		held by the core around mmap and fault
 *	p2pmem.lock		read: the device stays; write: it goes
 *	p2pmem_pool.search	one search for memory at a time
 *	p2pmem.list_lock	files, buffers and exports of a device
 *
 * Reclaim under p2pmem.lock must not wait for the device, whose removal may
 * wait for the lock: guard(p2pmem_stays) sees to it.
 *
 * Nothing copies to or from user space under any of them: the fault could be
 * one of ours.
 */
#ifndef _P2PMEM_H
#define _P2PMEM_H

#include <linux/atomic.h>
#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/pci-p2pdma.h>
#include <linux/pci.h>
#include <linux/rwsem.h>
#include <linux/sched/mm.h>
#include <linux/wait.h>
#include <linux/xarray.h>

#if !IS_ENABLED(CONFIG_PCI_P2PDMA)
#error "p2pmem needs a kernel with CONFIG_PCI_P2PDMA=y"
#endif

/*
 * An offset of the file is the number of an allocation (0: a new one for this
 * mapping) and an offset within.
 */
#define P2PMEM_HANDLE_SHIFT	40
#define P2PMEM_HANDLE_MAX	((1U << (63 - P2PMEM_HANDLE_SHIFT)) - 1)
#define P2PMEM_HANDLE_PAGES	(1UL << (P2PMEM_HANDLE_SHIFT - PAGE_SHIFT))

/* Each device takes two minors: /dev/p2pmemN and its name by address. */
#define P2PMEM_DEVICES		512
#define P2PMEM_MINORS		2

/*
 * The most that is allocated at once: a mapping of it ends before the offsets
 * of the next allocation, and its table of pages is no longer than the kernel
 * allocates.
 */
#define P2PMEM_MAX_ALLOC	BIT_ULL(P2PMEM_HANDLE_SHIFT - 1)

/**
 * struct p2pmem_pool - what the devices of one PCI function share
 * @ref: of each device
 * @search: what one search has put aside would make another one fail
 */
struct p2pmem_pool {
	struct kref ref;
	struct mutex search; /* one search for memory at a time */
};

/**
 * struct p2pmem - peer-to-peer memory of one BAR
 * @dev: the character device's, below the PCI device
 * @cdev: serves both minors
 * @by_address: the device whose node is named by PCI address and BAR
 * @node: in the list of all
 * @id: N of p2pmemN
 * @pool: shared with other BARs of @pdev; referenced
 * @pdev: the provider; referenced, so that pci_name() is good for the
 *	messages of late users
 * @bar: BAR that the memory lies in
 * @offset: where in it the memory begins
 * @size: bytes of memory
 * @lock: held for reading by who needs the memory to stay
 * @going: set when somebody waits for @lock to clear @alive
 * @alive: cleared, under @lock held for writing, before the provider's
 *	driver is unbound
 * @gone: set when nothing of the memory is in use any more
 * @wait: woken when @gone is set
 * @list_lock: protects the lists, &p2pmem_buffer.revoked and
 *	&p2pmem_dmabuf.attached
 * @inodes: those with open files
 * @buffers: allocations
 * @exports: dma-bufs with attachments
 * @debugfs: directory of the device
 * @allocations: allocations that succeeded
 * @failures: allocations that failed
 * @exported: dma-bufs that were made
 * @dmabufs: dma-bufs that there are now
 * @pages: pages that are allocated now
 * @peers: devices that have a dma-buf mapped now
 */
struct p2pmem {
	struct device dev;
	struct cdev cdev;
	struct device *by_address;
	struct list_head node;
	int id;

	struct p2pmem_pool *pool;
	struct pci_dev *pdev;
	int bar;
	u64 offset;
	u64 size;

	struct rw_semaphore lock;
	bool going;
	bool alive;
	bool gone;
	wait_queue_head_t wait;

	struct mutex list_lock; /* the lists below */
	struct list_head inodes;
	struct list_head buffers;
	struct list_head exports;

	struct dentry *debugfs;
	atomic64_t allocations;
	atomic64_t failures;
	atomic64_t exported;
	atomic64_t dmabufs;
	atomic64_t pages;
	atomic64_t peers;
};

static inline unsigned int p2pmem_hold(struct p2pmem *p)
{
	unsigned int noio = memalloc_noio_save();

	down_read(&p->lock);
	return noio;
}

static inline void p2pmem_let_go(struct p2pmem *p, unsigned int noio)
{
	up_read(&p->lock);
	memalloc_noio_restore(noio);
}

/* A device that is alive stays until the end of the scope. */
DEFINE_LOCK_GUARD_1(p2pmem_stays, struct p2pmem,
		    _T->noio = p2pmem_hold(_T->lock),
		    p2pmem_let_go(_T->lock, _T->noio), unsigned int noio)

/**
 * struct p2pmem_inode - an inode of the device with open files
 * @node: in &p2pmem.inodes
 * @mapping: where the mappings of its files are
 * @files: number of them
 */
struct p2pmem_inode {
	struct list_head node;
	struct address_space *mapping;
	unsigned long files;
};

/**
 * struct p2pmem_buffer - memory that is allocated
 * @ref: of the file (by handle), mappings and dma-bufs
 * @p: where it comes from; referenced
 * @node: in &p2pmem.buffers
 * @revoked: the pages have been given back, as the provider goes
 * @pgoff: page offset of the first page in the file
 * @nr_pages: number of @pages
 * @pages: each holds a reference of ours, and returns to the pool with its
 *	last
 */
struct p2pmem_buffer {
	struct kref ref;
	struct p2pmem *p;
	struct list_head node;
	bool revoked;
	pgoff_t pgoff;
	unsigned long nr_pages;
	struct page *pages[] __counted_by(nr_pages);
};

/**
 * struct p2pmem_file - an open file
 * @p: the device; referenced
 * @inode: what it is a file of
 * @filp: the file
 * @handles: allocations by number, each with a reference
 */
struct p2pmem_file {
	struct p2pmem *p;
	struct p2pmem_inode *inode;
	struct file *filp;
	struct xarray handles;
};

/* main.c */
extern const struct class p2pmem_class;
dev_t p2pmem_devt(int id);

/* provider.c */
void p2pmem_start(void);
void p2pmem_add_providers(struct pci_dev *pdev);
void p2pmem_remove_providers(struct pci_dev *pdev);
void p2pmem_remove_all(void);

/* pool.c */
int p2pmem_get_pages(struct p2pmem *p, struct page **pages, unsigned long nr,
		     bool contiguous);
u64 p2pmem_pool_free(struct p2pmem *p);

/* buffer.c */
struct p2pmem_buffer *p2pmem_buffer_alloc(struct p2pmem *p, u64 size,
					  u32 flags);
struct p2pmem_buffer *p2pmem_buffer_get(struct p2pmem_buffer *buf);
void p2pmem_buffer_put(struct p2pmem_buffer *buf);
void p2pmem_revoke_buffers(struct p2pmem *p);
unsigned long p2pmem_buffer_pieces(struct p2pmem_buffer *buf,
				   unsigned long first, unsigned long nr);
struct p2pmem_buffer *p2pmem_find(struct p2pmem_file *f, pgoff_t pgoff);

/* chardev.c */
extern const struct file_operations p2pmem_fops;
void p2pmem_zap_files(struct p2pmem *p);

/* ioctl.c */
long p2pmem_ioctl(struct file *filp, unsigned int cmd, unsigned long arg);

/* dmabuf.c */
struct dma_buf *p2pmem_export(struct p2pmem_buffer *buf, unsigned long first,
			      unsigned long nr);
void p2pmem_revoke_exports(struct p2pmem *p);

/* debugfs.c */
void p2pmem_debugfs_init(void);
void p2pmem_debugfs_exit(void);
void p2pmem_debugfs_add(struct p2pmem *p);
void p2pmem_debugfs_remove(struct p2pmem *p);

/* pci.c */
extern struct pci_driver p2pmem_pci_driver;

#endif /* _P2PMEM_H */
