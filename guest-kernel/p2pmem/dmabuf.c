// SPDX-License-Identifier: GPL-2.0
/*
 * Export as dma-buf.
 *
 * An importer gets bus addresses, no pages. It must be able to let go when the
 * device goes: only revocable attachments are taken, and the removal of the
 * device waits until each has unmapped.
 */
#include <linux/completion.h>
#include <linux/dma-buf.h>
#include <linux/dma-buf-mapping.h>
#include <linux/dma-fence.h>
#include <linux/dma-resv.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "p2pmem.h"

/* After so long the log says whom the removal of a device waits for. */
#define P2PMEM_PATIENCE		(30 * HZ)

/**
 * struct p2pmem_dmabuf - a dma-buf of a part of a buffer
 * @dmabuf: the dma-buf, whose priv this is
 * @buf: what it is a part of; referenced
 * @node: in &p2pmem.exports, while it is attached and not revoked
 * @attached: number of attachments
 * @mappings: of mappings, and one of the device that still lives
 * @unmapped: completed with the last of @mappings
 * @revoked: the device goes; protected by the dma-buf's reservation
 * @size: in bytes
 * @nr_pieces: length of @pieces
 * @pieces: physical addresses
 */
struct p2pmem_dmabuf {
	struct dma_buf *dmabuf;
	struct p2pmem_buffer *buf;
	struct list_head node;
	unsigned long attached;
	struct kref mappings;
	struct completion unmapped;
	bool revoked;
	size_t size;
	unsigned long nr_pieces;
	struct phys_vec pieces[] __counted_by(nr_pieces);
};

static int p2pmem_dmabuf_attach(struct dma_buf *dmabuf,
				struct dma_buf_attachment *attach)
{
	struct p2pmem_dmabuf *export = dmabuf->priv;
	struct p2pmem *p = export->buf->p;

	if (!attach->peer2peer || !dma_buf_attach_revocable(attach))
		return -EOPNOTSUPP;
	guard(p2pmem_stays)(p);
	if (!p->alive)
		return -ENODEV;
	if (!dev_is_pci(attach->dev) ||
	    pci_p2pdma_distance(p->pdev, attach->dev, false) < 0)
		return -EOPNOTSUPP;
	guard(mutex)(&p->list_lock);
	if (!export->attached++)
		list_add(&export->node, &p->exports);
	return 0;
}

static void p2pmem_dmabuf_detach(struct dma_buf *dmabuf,
				 struct dma_buf_attachment *attach)
{
	struct p2pmem_dmabuf *export = dmabuf->priv;

	guard(mutex)(&export->buf->p->list_lock);
	if (!--export->attached)
		list_del_init(&export->node);
}

static void p2pmem_dmabuf_done(struct kref *ref)
{
	complete(&container_of(ref, struct p2pmem_dmabuf, mappings)->unmapped);
}

static struct sg_table *p2pmem_dmabuf_map(struct dma_buf_attachment *attach,
					  enum dma_data_direction dir)
{
	struct p2pmem_dmabuf *export = attach->dmabuf->priv;
	struct p2pmem *p = export->buf->p;
	struct p2pdma_provider *provider;
	struct sg_table *sgt;

	dma_resv_assert_held(attach->dmabuf->resv);
	if (export->revoked)
		return ERR_PTR(-ENODEV);
	/*
	 * Lives until the driver is unbound, which waits until we have revoked.
	 */
	provider = pcim_p2pdma_provider(p->pdev, p->bar);
	if (!provider)
		return ERR_PTR(-ENODEV);
	sgt = dma_buf_phys_vec_to_sgt(attach, provider, export->pieces,
				      export->nr_pieces, export->size, dir);
	if (IS_ERR(sgt))
		return sgt;
	kref_get(&export->mappings);
	atomic64_inc(&p->peers);
	return sgt;
}

static void p2pmem_dmabuf_unmap(struct dma_buf_attachment *attach,
				struct sg_table *sgt,
				enum dma_data_direction dir)
{
	struct p2pmem_dmabuf *export = attach->dmabuf->priv;

	dma_resv_assert_held(attach->dmabuf->resv);
	dma_buf_free_sgt(attach, sgt, dir);
	atomic64_dec(&export->buf->p->peers);
	kref_put(&export->mappings, p2pmem_dmabuf_done);
}

static void p2pmem_dmabuf_release(struct dma_buf *dmabuf)
{
	struct p2pmem_dmabuf *export = dmabuf->priv;

	atomic64_dec(&export->buf->p->dmabufs);
	p2pmem_buffer_put(export->buf);
	kvfree(export);
}

static const struct dma_buf_ops p2pmem_dmabuf_ops = {
	.attach = p2pmem_dmabuf_attach,
	.detach = p2pmem_dmabuf_detach,
	.map_dma_buf = p2pmem_dmabuf_map,
	.unmap_dma_buf = p2pmem_dmabuf_unmap,
	.release = p2pmem_dmabuf_release,
};

static void p2pmem_fill_pieces(struct p2pmem_dmabuf *export,
			       struct page **pages, unsigned long nr)
{
	struct phys_vec *piece = export->pieces;
	unsigned long i;

	for (i = 0; i < nr; i++) {
		if (!i ||
		    page_to_pfn(pages[i]) != page_to_pfn(pages[i - 1]) + 1) {
			if (i)
				piece++;
			piece->paddr = page_to_phys(pages[i]);
		}
		piece->len += PAGE_SIZE;
	}
}

static struct p2pmem_dmabuf *p2pmem_dmabuf_new(struct p2pmem_buffer *buf,
					       unsigned long first,
					       unsigned long nr)
{
	unsigned long nr_pieces = p2pmem_buffer_pieces(buf, first, nr);
	struct p2pmem_dmabuf *export;

	export = kvzalloc(struct_size(export, pieces, nr_pieces),
			  GFP_KERNEL_ACCOUNT);
	if (!export)
		return NULL;
	INIT_LIST_HEAD(&export->node);
	kref_init(&export->mappings);
	init_completion(&export->unmapped);
	export->size = nr << PAGE_SHIFT;
	export->nr_pieces = nr_pieces;
	p2pmem_fill_pieces(export, buf->pages + first, nr);
	export->buf = p2pmem_buffer_get(buf);
	return export;
}

/**
 * p2pmem_export - make a dma-buf
 * @buf: the buffer
 * @first: the first page
 * @nr: number of pages, not 0, all of them in the buffer
 *
 * Return: a dma-buf with a reference of the buffer, or an error: -ENOMEM,
 * -ENODEV
 */
struct dma_buf *p2pmem_export(struct p2pmem_buffer *buf, unsigned long first,
			      unsigned long nr)
{
	DEFINE_DMA_BUF_EXPORT_INFO(info);
	struct p2pmem_dmabuf *export;
	struct dma_buf *dmabuf;

	/* One that goes later refuses attachments. */
	if (!READ_ONCE(buf->p->alive))
		return ERR_PTR(-ENODEV);
	export = p2pmem_dmabuf_new(buf, first, nr);
	if (!export)
		return ERR_PTR(-ENOMEM);
	info.ops = &p2pmem_dmabuf_ops;
	info.size = export->size;
	info.flags = O_RDWR;
	info.priv = export;
	dmabuf = dma_buf_export(&info);
	if (IS_ERR(dmabuf)) {
		p2pmem_buffer_put(buf);
		kvfree(export);
		return dmabuf;
	}
	export->dmabuf = dmabuf;
	atomic64_inc(&buf->p->exported);
	atomic64_inc(&buf->p->dmabufs);
	return dmabuf;
}

/* Says which devices are waited for, as it may be long. */
static void p2pmem_still_waits(struct p2pmem_dmabuf *export)
{
	struct dma_buf_attachment *attach;

	dma_resv_lock(export->dmabuf->resv, NULL);
	list_for_each_entry(attach, &export->dmabuf->attachments, node)
		dev_warn(attach->dev,
			 "is attached to memory of %s, which waits for transfers to end before it goes\n",
			 pci_name(export->buf->p->pdev));
	dma_resv_unlock(export->dmabuf->resv);
}

/*
 * Returns when all transfers that importers have announced are at their end.
 * Not under the reservation, if that can be: others want it to let go.
 */
static void p2pmem_wait_for_transfers(struct p2pmem_dmabuf *export)
{
	struct dma_resv *resv = export->dmabuf->resv;
	struct dma_fence *fence;

	for (;;) {
		dma_resv_lock(resv, NULL);
		if (dma_resv_get_singleton(resv, DMA_RESV_USAGE_BOOKKEEP,
					   &fence)) {
			dma_resv_wait_timeout(resv, DMA_RESV_USAGE_BOOKKEEP,
					      false, P2PMEM_PATIENCE);
			dma_resv_unlock(resv);
			continue;
		}
		dma_resv_unlock(resv);
		if (!fence)
			return;
		while (!dma_fence_wait_timeout(fence, false, P2PMEM_PATIENCE))
			p2pmem_still_waits(export);
		dma_fence_put(fence);
	}
}

/* Returns when no importer uses the memory any more; none can map it again. */
static void p2pmem_revoke(struct p2pmem_dmabuf *export)
{
	struct dma_resv *resv = export->dmabuf->resv;

	dma_resv_lock(resv, NULL);
	export->revoked = true;
	dma_buf_invalidate_mappings(export->dmabuf);
	dma_resv_unlock(resv);
	p2pmem_wait_for_transfers(export);
	kref_put(&export->mappings, p2pmem_dmabuf_done);
	while (!wait_for_completion_timeout(&export->unmapped,
					    P2PMEM_PATIENCE))
		p2pmem_still_waits(export);
	/* Who has unmapped only now may have begun another one before. */
	p2pmem_wait_for_transfers(export);
}

/*
 * Takes a dma-buf off the list, with a reference of its file: who has attached
 * holds one until the attachment has been taken off.
 */
static struct p2pmem_dmabuf *p2pmem_next_export(struct p2pmem *p)
{
	struct p2pmem_dmabuf *export;

	guard(mutex)(&p->list_lock);
	export = list_first_entry_or_null(&p->exports, struct p2pmem_dmabuf,
					  node);
	if (export) {
		get_file(export->dmabuf->file);
		list_del_init(&export->node);
	}
	return export;
}

/**
 * p2pmem_revoke_exports - make all importers let go
 * @p: the device, no longer alive, so that nobody attaches any more
 */
void p2pmem_revoke_exports(struct p2pmem *p)
{
	struct p2pmem_dmabuf *export;

	/*
	 * Not under the lock: an importer may drop its dma-buf from where it
	 * lets go.
	 */
	while ((export = p2pmem_next_export(p))) {
		struct file *file = export->dmabuf->file;

		p2pmem_revoke(export);
		fput(file);
	}
}
