// SPDX-License-Identifier: GPL-2.0
/*
 * Providers of peer-to-peer memory: how they are found, and what happens when
 * they go.
 *
 * A provider goes in this order, all of it before its driver's remove: no more
 * allocations and faults; mappings are undone; importers of dma-bufs let go;
 * our references of its pages are dropped. What then still holds pages is DMA
 * in flight, and P2PDMA waits for that when it takes the memory down after
 * remove.
 */
#include <linux/idr.h>
#include <linux/memremap.h>
#include <linux/slab.h>

#include "p2pmem.h"

static DEFINE_MUTEX(p2pmem_mutex);
static LIST_HEAD(p2pmem_list);
static DEFINE_IDA(p2pmem_ida);
/* Whether the bus tells us when a provider goes. Under the mutex. */
static bool p2pmem_started;

/*
 * Whether the device has published memory: it is then the memory nearest to
 * itself. (With ACS redirection at the device itself, as functions of a
 * multi-function device may have behind an IOMMU, the kernel does not think
 * so.)
 */
static bool p2pmem_published(struct pci_dev *pdev)
{
	struct pci_dev *nearest;

	if (!rcu_access_pointer(pdev->p2pdma))
		return false;
	nearest = pci_p2pmem_find(&pdev->dev);
	pci_dev_put(nearest);
	return nearest == pdev;
}

/*
 * The first range of P2PDMA memory in the BAR at or after @start, which is
 * moved behind it.
 */
static bool p2pmem_next_range(struct pci_dev *pdev, int bar,
			      resource_size_t *start, struct range *range)
{
	resource_size_t end = pci_resource_end(pdev, bar);

	while (*start < end) {
		struct dev_pagemap *pgmap = get_dev_pagemap(PHYS_PFN(*start));
		bool found = pgmap && pgmap->type == MEMORY_DEVICE_PCI_P2PDMA;

		if (found)
			*range = pgmap->range;
		if (pgmap)
			put_dev_pagemap(pgmap);
		if (found) {
			*start = range->end + 1;
			return true;
		}
		*start += memremap_compat_align();
	}
	return false;
}

/* Looks for the memory of a BAR. False where there is none. */
static bool p2pmem_measure(struct pci_dev *pdev, int bar, u64 *offset,
			   u64 *size)
{
	resource_size_t at = pci_resource_start(pdev, bar);
	struct range range;

	*size = 0;
	if (!(pci_resource_flags(pdev, bar) & IORESOURCE_MEM))
		return false;
	while (p2pmem_next_range(pdev, bar, &at, &range)) {
		if (!*size)
			*offset = range.start - pci_resource_start(pdev, bar);
		*size += range_len(&range);
	}
	return *size;
}

/* That of the device's other BARs, or a new one. Under the mutex. */
static struct p2pmem_pool *p2pmem_pool_get(struct pci_dev *pdev)
{
	struct p2pmem_pool *pool;
	struct p2pmem *p;

	list_for_each_entry(p, &p2pmem_list, node) {
		if (p->pdev == pdev) {
			kref_get(&p->pool->ref);
			return p->pool;
		}
	}
	pool = kzalloc_obj(*pool);
	if (pool) {
		kref_init(&pool->ref);
		mutex_init(&pool->search);
	}
	return pool;
}

static void p2pmem_pool_release(struct kref *ref)
{
	kfree(container_of(ref, struct p2pmem_pool, ref));
}

static void p2pmem_release(struct device *dev)
{
	struct p2pmem *p = container_of(dev, struct p2pmem, dev);

	ida_free(&p2pmem_ida, p->id);
	kref_put(&p->pool->ref, p2pmem_pool_release);
	pci_dev_put(p->pdev);
	kfree(p);
}

static struct p2pmem *p2pmem_new(struct pci_dev *pdev, int bar)
{
	struct p2pmem *p;
	int ret = -ENOMEM;

	p = kzalloc_obj(*p);
	if (!p)
		return ERR_PTR(ret);
	p->pool = p2pmem_pool_get(pdev);
	if (!p->pool)
		goto free;
	ret = ida_alloc_max(&p2pmem_ida, P2PMEM_DEVICES - 1, GFP_KERNEL);
	if (ret < 0)
		goto put_pool;
	p->id = ret;
	p->pdev = pci_dev_get(pdev);
	p->bar = bar;
	p->alive = true;
	init_rwsem(&p->lock);
	init_waitqueue_head(&p->wait);
	mutex_init(&p->list_lock);
	INIT_LIST_HEAD(&p->inodes);
	INIT_LIST_HEAD(&p->buffers);
	INIT_LIST_HEAD(&p->exports);

	device_initialize(&p->dev);
	p->dev.class = &p2pmem_class;
	p->dev.parent = &pdev->dev;
	p->dev.devt = p2pmem_devt(p->id);
	p->dev.release = p2pmem_release;
	dev_set_drvdata(&p->dev, p);
	return p;

put_pool:
	kref_put(&p->pool->ref, p2pmem_pool_release);
free:
	kfree(p);
	return ERR_PTR(ret);
}

/* One cdev serves both nodes; udev is not needed for the one by address. */
static int p2pmem_register(struct p2pmem *p)
{
	int ret;

	ret = dev_set_name(&p->dev, "p2pmem%d", p->id);
	if (ret)
		return ret;
	cdev_init(&p->cdev, &p2pmem_fops);
	p->cdev.owner = THIS_MODULE;
	cdev_set_parent(&p->cdev, &p->dev.kobj);
	ret = cdev_add(&p->cdev, p->dev.devt, P2PMEM_MINORS);
	if (ret)
		return ret;
	ret = device_add(&p->dev);
	if (ret)
		goto del_cdev;
	p->by_address = device_create(&p2pmem_class, &p->dev, p->dev.devt + 1,
				      p, "p2pmem/by-address/%s-bar%d",
				      pci_name(p->pdev), p->bar);
	if (IS_ERR(p->by_address)) {
		ret = PTR_ERR(p->by_address);
		goto del_device;
	}
	return 0;

del_device:
	device_del(&p->dev);
del_cdev:
	cdev_del(&p->cdev);
	return ret;
}

/* Ends all use of the memory. Files that are open stay, with nothing. */
static void p2pmem_take_back(struct p2pmem *p)
{
	WRITE_ONCE(p->going, true);
	down_write(&p->lock);
	WRITE_ONCE(p->alive, false);
	up_write(&p->lock);

	p2pmem_zap_files(p);
	p2pmem_revoke_exports(p);
	p2pmem_revoke_buffers(p);
	WRITE_ONCE(p->gone, true);
	wake_up_all(&p->wait);
}

/* What somebody may have opened before it failed is put on @failed. */
static int p2pmem_add(struct pci_dev *pdev, int bar, u64 offset, u64 size,
		      struct list_head *failed)
{
	struct p2pmem *p;
	int ret;

	p = p2pmem_new(pdev, bar);
	if (IS_ERR(p))
		return PTR_ERR(p);
	p->offset = offset;
	p->size = size;
	ret = p2pmem_register(p);
	if (ret) {
		list_add(&p->node, failed);
		return ret;
	}
	p2pmem_debugfs_add(p);
	list_add_tail(&p->node, &p2pmem_list);
	pci_info(pdev, "%s: %llu MiB of peer-to-peer memory in BAR %d\n",
		 dev_name(&p->dev), size >> 20, bar);
	return 0;
}

static void p2pmem_remove(struct p2pmem *p)
{
	list_del(&p->node);
	device_unregister(p->by_address);
	cdev_del(&p->cdev);
	p2pmem_debugfs_remove(p);

	p2pmem_take_back(p);
	device_unregister(&p->dev);
}

static struct p2pmem *p2pmem_lookup(struct pci_dev *pdev, int bar)
{
	struct p2pmem *p;

	list_for_each_entry(p, &p2pmem_list, node)
		if (p->pdev == pdev && p->bar == bar)
			return p;
	return NULL;
}

static void p2pmem_add_bars(struct pci_dev *pdev, struct list_head *failed)
{
	u64 offset, size;
	int bar, ret;

	for (bar = 0; bar < PCI_STD_NUM_BARS; bar++) {
		if (p2pmem_lookup(pdev, bar) ||
		    !p2pmem_measure(pdev, bar, &offset, &size))
			continue;
		ret = p2pmem_add(pdev, bar, offset, size, failed);
		if (ret)
			pci_err(pdev,
				"no device for the peer-to-peer memory in BAR %d: %pe\n",
				bar, ERR_PTR(ret));
	}
}

/**
 * p2pmem_add_providers - give each BAR with published memory its device, where
 * it has none yet
 * @pdev: the PCI device, bound and locked
 */
void p2pmem_add_providers(struct pci_dev *pdev)
{
	struct p2pmem *p, *next;
	LIST_HEAD(failed);

	if (!p2pmem_published(pdev))
		return;
	scoped_guard(mutex, &p2pmem_mutex)
		if (p2pmem_started)
			p2pmem_add_bars(pdev, &failed);
	list_for_each_entry_safe(p, next, &failed, node) {
		p2pmem_take_back(p);
		put_device(&p->dev);
	}
}

/**
 * p2pmem_remove_providers - take back what p2pmem_add_providers() gave, whoever
 * uses it
 * @pdev: the PCI device, locked and still bound
 *
 * Waits as long as importers of dma-bufs transfer, and without the mutex: other
 * devices come and go meanwhile. (Unless somebody registers a notifier of the
 * bus: that waits for us, and they for that.) The lock of @pdev keeps it from
 * being added again before we are done.
 */
void p2pmem_remove_providers(struct pci_dev *pdev)
{
	struct p2pmem *p, *next;
	LIST_HEAD(going);

	scoped_guard(mutex, &p2pmem_mutex)
		list_for_each_entry_safe(p, next, &p2pmem_list, node)
			if (p->pdev == pdev)
				list_move_tail(&p->node, &going);
	/* One may wait for a search in the pool that it shares with others. */
	list_for_each_entry(p, &going, node)
		WRITE_ONCE(p->going, true);
	list_for_each_entry_safe(p, next, &going, node)
		p2pmem_remove(p);
}

/**
 * p2pmem_start - from now on devices are added
 *
 * For when the bus tells us what goes.
 */
void p2pmem_start(void)
{
	guard(mutex)(&p2pmem_mutex);
	p2pmem_started = true;
}

/**
 * p2pmem_remove_all - remove all devices, and add no more
 *
 * For the end of the module: nobody has one open then, and nothing is waited
 * for. Under the mutex, so that a PCI device that is unbound meanwhile does not
 * go before what hangs on it has gone.
 */
void p2pmem_remove_all(void)
{
	struct p2pmem *p, *next;

	guard(mutex)(&p2pmem_mutex);
	p2pmem_started = false;
	list_for_each_entry_safe(p, next, &p2pmem_list, node)
		p2pmem_remove(p);
}
