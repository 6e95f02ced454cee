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
#include <linux/dma-resv.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "p2pmem.h"

/**
 * struct p2pmem_dmabuf - a dma-buf of a part of a buffer
 * @dmabuf: the dma-buf, whose priv this is
 * @buf: what it is a part of; referenced
 * @node: in &p2pmem.exports
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
	guard(rwsem_read)(&p->lock);
	if (!p->alive)
		return -ENODEV;
	if (!dev_is_pci(attach->dev) ||
	    pci_p2pdma_distance(p->pdev, attach->dev, true) < 0)
		return -EOPNOTSUPP;
	return 0;
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

	scoped_guard(mutex, &export->buf->p->list_lock)
		list_del(&export->node);
	p2pmem_buffer_put(export->buf);
	kvfree(export);
}

static const struct dma_buf_ops p2pmem_dmabuf_ops = {
	.attach = p2pmem_dmabuf_attach,
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

	export = kvzalloc(struct_size(export, pieces, nr_pieces), GFP_KERNEL);
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

/*
 * Lists the export, so that it is revoked when the device goes; too late if
 * that has happened.
 */
static int p2pmem_dmabuf_list(struct p2pmem_dmabuf *export)
{
	struct p2pmem *p = export->buf->p;

	guard(rwsem_read)(&p->lock);
	if (!p->alive)
		return -ENODEV;
	guard(mutex)(&p->list_lock);
	list_add(&export->node, &p->exports);
	return 0;
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
	int ret;

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
	ret = p2pmem_dmabuf_list(export);
	if (ret) {
		dma_buf_put(dmabuf);
		return ERR_PTR(ret);
	}
	atomic64_inc(&buf->p->exported);
	return dmabuf;
}

/* Returns when no importer uses the memory any more; none can map it again. */
static void p2pmem_revoke(struct p2pmem_dmabuf *export)
{
	struct dma_resv *resv = export->dmabuf->resv;

	dma_resv_lock(resv, NULL);
	export->revoked = true;
	dma_buf_invalidate_mappings(export->dmabuf);
	dma_resv_wait_timeout(resv, DMA_RESV_USAGE_BOOKKEEP, false,
			      MAX_SCHEDULE_TIMEOUT);
	dma_resv_unlock(resv);
	kref_put(&export->mappings, p2pmem_dmabuf_done);
	wait_for_completion(&export->unmapped);
}

/*
 * A dma-buf that is not revoked, with a reference of its file. One whose
 * release has begun has no mappings.
 */
static struct p2pmem_dmabuf *p2pmem_next_export(struct p2pmem *p)
{
	struct p2pmem_dmabuf *export;

	guard(mutex)(&p->list_lock);
	list_for_each_entry(export, &p->exports, node)
		if (!export->revoked && get_file_active(&export->dmabuf->file))
			return export;
	return NULL;
}

/**
 * p2pmem_revoke_exports - make all importers let go
 * @p: the device, no longer alive, so that nothing is exported any more
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
