// SPDX-License-Identifier: GPL-2.0
/*
 * debugfs: p2pmem/p2pmemN/stats.
 */
#include <linux/debugfs.h>
#include <linux/mm.h>
#include <linux/seq_file.h>

#include "p2pmem.h"

static struct dentry *p2pmem_debugfs;

/* Counted when asked: the kernel tells nobody that it unmaps a page. */
static unsigned long p2pmem_mapped_pages(struct p2pmem *p)
{
	struct p2pmem_buffer *buf;
	unsigned long i, mapped = 0;

	lockdep_assert_held(&p->list_lock);
	list_for_each_entry(buf, &p->buffers, node) {
		for (i = 0; i < buf->nr_pages; i++)
			mapped += folio_mapped(page_folio(buf->pages[i]));
		cond_resched();
	}
	return mapped;
}

static unsigned long p2pmem_open_files(struct p2pmem *p)
{
	struct p2pmem_inode *inode;
	unsigned long files = 0;

	lockdep_assert_held(&p->list_lock);
	list_for_each_entry(inode, &p->inodes, node)
		files += inode->files;
	return files;
}

static int stats_show(struct seq_file *m, void *unused)
{
	struct p2pmem *p = m->private;

	guard(p2pmem_stays)(p);
	if (!p->alive)
		return -ENODEV;
	guard(mutex)(&p->list_lock);
	seq_printf(m, "size %llu\n", p->size);
	seq_printf(m, "free %llu\n", p2pmem_pool_free(p));
	seq_printf(m, "allocated pages %lld\n", atomic64_read(&p->pages));
	seq_printf(m, "mapped pages %lu\n", p2pmem_mapped_pages(p));
	seq_printf(m, "open files %lu\n", p2pmem_open_files(p));
	seq_printf(m, "buffers %zu\n", list_count_nodes(&p->buffers));
	seq_printf(m, "allocations %lld\n", atomic64_read(&p->allocations));
	seq_printf(m, "failures %lld\n", atomic64_read(&p->failures));
	seq_printf(m, "exports %lld\n", atomic64_read(&p->exported));
	seq_printf(m, "dma-bufs %lld\n", atomic64_read(&p->dmabufs));
	seq_printf(m, "mapped peers %lld\n", atomic64_read(&p->peers));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

/**
 * p2pmem_debugfs_add - add the directory of a device
 * @p: the device, which is registered
 */
void p2pmem_debugfs_add(struct p2pmem *p)
{
	p->debugfs = debugfs_create_dir(dev_name(&p->dev), p2pmem_debugfs);
	debugfs_create_file("stats", 0444, p->debugfs, p, &stats_fops);
}

/**
 * p2pmem_debugfs_remove - remove it again; waits for who is reading
 * @p: the device
 */
void p2pmem_debugfs_remove(struct p2pmem *p)
{
	debugfs_remove(p->debugfs);
}

/**
 * p2pmem_debugfs_init - add the directory of the module
 */
void p2pmem_debugfs_init(void)
{
	p2pmem_debugfs = debugfs_create_dir("p2pmem", NULL);
}

/**
 * p2pmem_debugfs_exit - remove it again
 */
void p2pmem_debugfs_exit(void)
{
	debugfs_remove(p2pmem_debugfs);
}
