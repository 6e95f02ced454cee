// SPDX-License-Identifier: GPL-2.0
/*
 * Pages from P2PDMA's pool.
 *
 * The kernel keeps one pool for each PCI device. Where several BARs of a device
 * have memory (an NVMe controller with CMB and PMR), it gives from any of them;
 * a BAR is chosen by asking until the answer suits.
 */
#include <linux/kernfs.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/sysfs.h>

#include "p2pmem.h"

/*
 * One search at a time: what one has put aside would make another one fail, in
 * this BAR or in another one of the same pool.
 */
static DEFINE_MUTEX(p2pmem_search);

/*
 * Memory of another BAR, kept until the search has ended so that it is not
 * found again.
 */
struct p2pmem_aside {
	struct list_head node;
	void *addr;
};

static bool p2pmem_in_bar(struct p2pmem *p, void *addr)
{
	phys_addr_t phys = page_to_phys(virt_to_page(addr));

	return phys >= pci_resource_start(p->pdev, p->bar) &&
	       phys <= pci_resource_end(p->pdev, p->bar);
}

/*
 * @size bytes of our BAR in one piece, or NULL. Ends when the pool has no more,
 * at the latest.
 */
static void *p2pmem_get_piece(struct p2pmem *p, size_t size)
{
	struct p2pmem_aside *aside, *next;
	LIST_HEAD(others);
	void *addr;

	while ((addr = pci_alloc_p2pmem(p->pdev, size))) {
		if (p2pmem_in_bar(p, addr))
			break;
		/*
		 * The removal of the device may wait for us: no reclaim that
		 * may wait for the device.
		 */
		aside = kmalloc_obj(*aside, GFP_NOIO);
		if (!aside) {
			pci_free_p2pmem(p->pdev, addr, size);
			addr = NULL;
			break;
		}
		aside->addr = addr;
		list_add(&aside->node, &others);
		cond_resched();
	}
	list_for_each_entry_safe(aside, next, &others, node) {
		pci_free_p2pmem(p->pdev, aside->addr, size);
		kfree(aside);
	}
	return addr;
}

/*
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

/**
 * p2pmem_get_pages - allocate pages, each with one reference
 * @p: the device, whose lock is held for reading
 * @pages: where the pages go
 * @nr: how many
 * @contiguous: all in one piece; otherwise in as few as possible
 *
 * Return: 0, or -ENOMEM
 */
int p2pmem_get_pages(struct p2pmem *p, struct page **pages, unsigned long nr,
		     bool contiguous)
{
	unsigned long got = 0, piece = nr;
	void *addr;

	guard(mutex)(&p2pmem_search);
	while (got < nr) {
		piece = min(piece, nr - got);
		addr = p2pmem_get_piece(p, piece << PAGE_SHIFT);
		if (addr) {
			p2pmem_split_piece(addr, pages + got, piece);
			got += piece;
			continue;
		}
		if (contiguous || piece == 1)
			goto give_back;
		piece = DIV_ROUND_UP(piece, 2);
	}
	return 0;

give_back:
	while (got)
		put_page(pages[--got]);
	return -ENOMEM;
}

/* P2PDMA tells how much of a pool is free in sysfs only. */
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
 * @p: the device, whose lock is held for reading
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
