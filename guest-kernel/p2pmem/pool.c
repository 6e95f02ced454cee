// SPDX-License-Identifier: GPL-2.0
/*
 * Pages from P2PDMA's pool.
 *
 * The kernel keeps one pool for each PCI device. Where several BARs of a device
 * have memory (an NVMe controller with CMB and PMR), it gives from any of them;
 * a BAR is chosen by asking until the answer suits.
 */
#include <linux/kernfs.h>
#include <linux/log2.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "p2pmem.h"

/*
 * Memory of another BAR, kept until the search has ended so that it is not
 * found again.
 */
struct p2pmem_aside {
	struct list_head node;
	void *addr;
	size_t size;
};

static bool p2pmem_in_bar(struct p2pmem *p, void *addr)
{
	phys_addr_t phys = page_to_phys(virt_to_page(addr));

	return phys >= pci_resource_start(p->pdev, p->bar) &&
	       phys <= pci_resource_end(p->pdev, p->bar);
}

/* Whether it is time to give up: what is asked for may be long to find. */
static int p2pmem_search_ends(struct p2pmem *p)
{
	cond_resched();
	if (READ_ONCE(p->going))
		return -ENODEV;
	return fatal_signal_pending(current) ? -EINTR : 0;
}

static int p2pmem_put_aside(void *addr, size_t size, struct list_head *others)
{
	struct p2pmem_aside *aside;

	aside = kmalloc_obj(*aside, GFP_KERNEL_ACCOUNT);
	if (!aside)
		return -ENOMEM;
	aside->addr = addr;
	aside->size = size;
	list_add(&aside->node, others);
	return 0;
}

/*
 * Memory of our BAR, of which @size bytes are wanted, when the pool gives that
 * of others first: theirs is put aside, in pieces that are as large as they
 * have them, so that there are few.
 */
static void *p2pmem_get_behind_others(struct p2pmem *p, size_t size,
				      struct list_head *others)
{
	int order = ilog2(P2PMEM_MAX_ALLOC / size);
	void *addr;
	int ret;

	for (; order >= 0; order--) {
		while ((addr = pci_alloc_p2pmem(p->pdev, size << order))) {
			if (p2pmem_in_bar(p, addr)) {
				if (!order)
					return addr;
				pci_free_p2pmem(p->pdev, addr, size << order);
				break;
			}
			ret = p2pmem_put_aside(addr, size << order, others);
			if (ret) {
				pci_free_p2pmem(p->pdev, addr, size << order);
				return ERR_PTR(ret);
			}
			ret = p2pmem_search_ends(p);
			if (ret)
				return ERR_PTR(ret);
		}
	}
	return ERR_PTR(-ENOSPC);
}

/*
 * @size bytes of our BAR in one piece. -ENOSPC: the pool has no such piece, or
 * none that is not among the @others now.
 */
static void *p2pmem_get_piece(struct p2pmem *p, size_t size,
			      struct list_head *others)
{
	void *addr = pci_alloc_p2pmem(p->pdev, size);

	if (!addr)
		return ERR_PTR(-ENOSPC);
	if (p2pmem_in_bar(p, addr))
		return addr;
	pci_free_p2pmem(p->pdev, addr, size);
	return p2pmem_get_behind_others(p, size, others);
}

static void p2pmem_free_others(struct p2pmem *p, struct list_head *others)
{
	struct p2pmem_aside *aside, *next;

	list_for_each_entry_safe(aside, next, others, node) {
		pci_free_p2pmem(p->pdev, aside->addr, aside->size);
		kfree(aside);
		cond_resched();
	}
}

/*
 * To be a function of P2PDMA, as p2pmem_alloc_mmap() does the same in there.
 *
 * Gives each page of a piece a life of its own, which ends in P2PDMA's
 * folio_free(): that returns one page to the pool and drops one reference of
 * the page map. pci_alloc_p2pmem() has taken one reference for the piece.
 */
static void p2pmem_split_piece(void *addr, struct page **pages,
			       unsigned long nr)
{
	struct page *first = virt_to_page(addr);
	unsigned long i;

	percpu_ref_get_many(&page_pgmap(first)->ref, nr - 1);
	for (i = 0; i < nr; i++) {
		pages[i] = first + i;
		VM_WARN_ON_ONCE_PAGE(page_ref_count(pages[i]), pages[i]);
		set_page_count(pages[i], 1);
	}
}

static int p2pmem_search(struct p2pmem *p, struct page **pages,
			 unsigned long nr, bool contiguous,
			 struct list_head *others)
{
	unsigned long got = 0, piece = nr;
	void *addr;
	int ret;

	while (got < nr) {
		piece = min(piece, nr - got);
		addr = p2pmem_get_piece(p, piece << PAGE_SHIFT, others);
		if (!IS_ERR(addr)) {
			p2pmem_split_piece(addr, pages + got, piece);
			got += piece;
		} else if (addr != ERR_PTR(-ENOSPC)) {
			ret = PTR_ERR(addr);
			goto give_back;
		} else if (contiguous || piece == 1) {
			ret = -ENOMEM;
			goto give_back;
		} else {
			piece = DIV_ROUND_UP(piece, 2);
		}
		ret = p2pmem_search_ends(p);
		if (ret)
			goto give_back;
	}
	return 0;

give_back:
	while (got)
		put_page(pages[--got]);
	return ret;
}

/**
 * p2pmem_get_pages - allocate pages, each with one reference
 * @p: the device, which stays meanwhile
 * @pages: where the pages go
 * @nr: how many
 * @contiguous: all in one piece; otherwise in as few as possible
 *
 * Return: 0, or -ENOMEM; -EINTR when killed, -ENODEV when somebody waits for
 * the device to go
 */
int p2pmem_get_pages(struct p2pmem *p, struct page **pages, unsigned long nr,
		     bool contiguous)
{
	LIST_HEAD(others);
	int ret;

	ret = mutex_lock_killable(&p->pool->search);
	if (ret)
		return ret;
	ret = p2pmem_search(p, pages, nr, contiguous, &others);
	p2pmem_free_others(p, &others);
	mutex_unlock(&p->pool->search);
	return ret;
}

/*
 * P2PDMA tells how much of a pool is free in sysfs only; to be a function of it,
 * pci_p2pmem_available().
 */
static int p2pmem_read_available(struct pci_dev *pdev, u64 *available)
{
	struct device_attribute *attr;
	struct kernfs_node *dir, *file;
	char *text;
	int ret = -ENOENT;

	dir = sysfs_get_dirent(pdev->dev.kobj.sd, "p2pmem");
	if (!dir)
		return ret;
	file = sysfs_get_dirent(dir, "available");
	kernfs_put(dir);
	if (!file)
		return ret;
	text = (char *)get_zeroed_page(GFP_KERNEL);
	if (!text) {
		ret = -ENOMEM;
		goto put_file;
	}
	attr = container_of(file->priv, struct device_attribute, attr);
	ret = attr->show(&pdev->dev, attr, text);
	if (ret >= 0)
		ret = kstrtou64(text, 10, available);
	free_page((unsigned long)text);
put_file:
	kernfs_put(file);
	return ret;
}

/**
 * p2pmem_pool_free - bytes that are free
 * @p: the device, which stays meanwhile
 *
 * Return: what is free in the pool, but no more than we have left in our BAR
 */
u64 p2pmem_pool_free(struct p2pmem *p)
{
	u64 ours = atomic64_read(&p->pages) << PAGE_SHIFT;
	u64 free = ours < p->size ? p->size - ours : 0;
	u64 available;

	if (p2pmem_read_available(p->pdev, &available))
		return free;
	return min(free, available);
}
