// SPDX-License-Identifier: GPL-2.0
/*
 * An importer of dma-bufs, for tests: it maps one for a PCI device, as that
 * device's driver would, tells the addresses, and lets go when it is asked to.
 *
 *	echo FD ADDRESS > /dev/dmabuf_importer	with FD of the writer and ADDRESS
 *						such as 0000:03:00.0
 *
 *	echo busy > the same open file		pretends that the device transfers
 *						until the file is closed
 *
 * The import belongs to the open file. Reading it gives "dma ADDRESS LENGTH" for
 * each segment, or "revoked" after the exporter has revoked it.
 */
#include <linux/dma-buf.h>
#include <linux/dma-fence.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define IMPORTER_LINE	64

/**
 * struct importer - an open file
 * @lock: of @attach, and so of the one import that there can be
 * @pdev: the device that the dma-buf is mapped for; referenced
 * @attach: the attachment, or NULL before the write
 * @sgt: the mapping, under the dma-buf's reservation; NULL when revoked
 * @busy: what the exporter has to wait for, or NULL; referenced
 */
struct importer {
	struct mutex lock; /* of the fields below */
	struct pci_dev *pdev;
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;
	struct dma_fence *busy;
};

static const char *importer_fence_name(struct dma_fence *fence)
{
	return "dmabuf_importer";
}

/* Neither wait nor release: the kernel needs no ops after the signal. */
static const struct dma_fence_ops importer_fence_ops = {
	.get_driver_name = importer_fence_name,
	.get_timeline_name = importer_fence_name,
};

/* @imp->attach may not be set yet. */
static void importer_unmap(struct dma_buf_attachment *attach)
{
	struct importer *imp = attach->importer_priv;

	dma_resv_assert_held(attach->dmabuf->resv);
	if (!imp->sgt)
		return;
	dma_buf_unmap_attachment(attach, imp->sgt, DMA_BIDIRECTIONAL);
	imp->sgt = NULL;
}

static const struct dma_buf_attach_ops importer_attach_ops = {
	.allow_peer2peer = true,
	.invalidate_mappings = importer_unmap,
};

static int importer_map(struct importer *imp, struct dma_buf *dmabuf)
{
	struct dma_buf_attachment *attach;
	struct sg_table *sgt;

	attach = dma_buf_dynamic_attach(dmabuf, &imp->pdev->dev,
					&importer_attach_ops, imp);
	if (IS_ERR(attach))
		return PTR_ERR(attach);
	dma_resv_lock(dmabuf->resv, NULL);
	sgt = dma_buf_map_attachment(attach, DMA_BIDIRECTIONAL);
	if (!IS_ERR(sgt)) {
		imp->attach = attach;
		imp->sgt = sgt;
	}
	dma_resv_unlock(dmabuf->resv);
	if (IS_ERR(sgt))
		dma_buf_detach(dmabuf, attach);
	return PTR_ERR_OR_ZERO(sgt);
}

static int importer_import(struct importer *imp, const char *line)
{
	unsigned int domain, bus, slot, function;
	struct dma_buf *dmabuf;
	int fd, ret;

	if (sscanf(line, "%d %x:%x:%x.%u", &fd, &domain, &bus, &slot,
		   &function) != 5)
		return -EINVAL;
	if (imp->attach)
		return -EBUSY;
	imp->pdev = pci_get_domain_bus_and_slot(domain, bus,
						PCI_DEVFN(slot, function));
	if (!imp->pdev)
		return -ENXIO;
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf)) {
		ret = PTR_ERR(dmabuf);
		goto put_device;
	}
	ret = importer_map(imp, dmabuf);
	if (!ret)
		return 0;
	dma_buf_put(dmabuf);
put_device:
	pci_dev_put(imp->pdev);
	imp->pdev = NULL;
	return ret;
}

static int importer_busy(struct importer *imp)
{
	struct dma_fence *fence;
	struct dma_resv *resv;
	int ret;

	if (!imp->attach || imp->busy)
		return -EINVAL;
	fence = kzalloc_obj(*fence);
	if (!fence)
		return -ENOMEM;
	dma_fence_init(fence, &importer_fence_ops, NULL,
		       dma_fence_context_alloc(1), 1);
	resv = imp->attach->dmabuf->resv;
	dma_resv_lock(resv, NULL);
	ret = dma_resv_reserve_fences(resv, 1);
	if (!ret)
		dma_resv_add_fence(resv, fence, DMA_RESV_USAGE_BOOKKEEP);
	dma_resv_unlock(resv);
	if (ret) {
		dma_fence_signal(fence);
		dma_fence_put(fence);
		return ret;
	}
	imp->busy = fence;
	return 0;
}

static ssize_t importer_write(struct file *filp, const char __user *from,
			      size_t count, loff_t *pos)
{
	struct importer *imp = filp->private_data;
	char line[IMPORTER_LINE] = {};
	int ret;

	if (count >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, from, count))
		return -EFAULT;
	guard(mutex)(&imp->lock);
	if (sysfs_streq(line, "busy"))
		ret = importer_busy(imp);
	else
		ret = importer_import(imp, line);
	return ret ? ret : count;
}

static ssize_t importer_tell(struct importer *imp, char *text, size_t room)
{
	struct dma_resv *resv = imp->attach->dmabuf->resv;
	struct scatterlist *sg;
	ssize_t length = 0;
	int i, ret;

	/* The exporter may hold it until this file is closed. */
	ret = dma_resv_lock_interruptible(resv, NULL);
	if (ret)
		return ret;
	if (!imp->sgt)
		length = scnprintf(text, room, "revoked\n");
	else
		for_each_sgtable_dma_sg(imp->sgt, sg, i)
			length += scnprintf(text + length, room - length,
					    "dma %#llx %u\n",
					    (u64)sg_dma_address(sg),
					    sg_dma_len(sg));
	dma_resv_unlock(resv);
	return length;
}

static ssize_t importer_read(struct file *filp, char __user *to, size_t count,
			     loff_t *pos)
{
	struct importer *imp = filp->private_data;
	char *text;
	ssize_t ret;

	guard(mutex)(&imp->lock);
	if (!imp->attach)
		return 0;
	text = kzalloc(PAGE_SIZE, GFP_KERNEL);
	if (!text)
		return -ENOMEM;
	ret = importer_tell(imp, text, PAGE_SIZE);
	if (ret > 0)
		ret = simple_read_from_buffer(to, count, pos, text, ret);
	kfree(text);
	return ret;
}

static int importer_open(struct inode *inode, struct file *filp)
{
	struct importer *imp;

	imp = kzalloc_obj(*imp);
	if (!imp)
		return -ENOMEM;
	mutex_init(&imp->lock);
	filp->private_data = imp;
	return 0;
}

static int importer_release(struct inode *inode, struct file *filp)
{
	struct importer *imp = filp->private_data;

	/* First: the exporter may hold the reservation while it waits. */
	if (imp->busy) {
		dma_fence_signal(imp->busy);
		dma_fence_put(imp->busy);
	}
	if (imp->attach) {
		struct dma_buf *dmabuf = imp->attach->dmabuf;

		dma_resv_lock(dmabuf->resv, NULL);
		importer_unmap(imp->attach);
		dma_resv_unlock(dmabuf->resv);
		dma_buf_detach(dmabuf, imp->attach);
		dma_buf_put(dmabuf);
	}
	pci_dev_put(imp->pdev);
	kfree(imp);
	return 0;
}

static const struct file_operations importer_fops = {
	.owner = THIS_MODULE,
	.open = importer_open,
	.release = importer_release,
	.read = importer_read,
	.write = importer_write,
	.llseek = default_llseek,
};

static struct miscdevice importer_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "dmabuf_importer",
	.fops = &importer_fops,
};
module_misc_device(importer_device);

MODULE_DESCRIPTION("Importer of dma-bufs for PCI devices, for tests");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS("DMA_BUF");
