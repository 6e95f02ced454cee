// SPDX-License-Identifier: GPL-2.0
/*
 * Allocations: pages that belong together, shared by a file's handle, mappings
 * and dma-bufs.
 */
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/overflow.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>

#include <linux/p2pmem.h>

#include "p2pmem.h"

static bool p2pmem_clear_all;
module_param_named(clear, p2pmem_clear_all, bool, 0644);
MODULE_PARM_DESC(clear, "clear all memory before it is given to a user, over the bus (default: what P2PMEM_ALLOC_ZERO asks for)");

/*
 * Words, not bytes: each store is a write on the bus. The lock is taken for each
 * page, as all of them may take longer than the device should have to wait when
 * it goes.
 */
static int p2pmem_clear(struct p2pmem_buffer *buf)
{
	unsigned long i;

	for (i = 0; i < buf->nr_pages; i++) {
		scoped_guard(p2pmem_stays, buf->p) {
			if (!buf->p->alive)
				return -ENODEV;
			memset64(page_address(buf->pages[i]), 0,
				 PAGE_SIZE / sizeof(u64));
		}
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

static int p2pmem_buffer_fill(struct p2pmem_buffer *buf, u32 flags)
{
	struct p2pmem *p = buf->p;
	int ret;

	guard(p2pmem_stays)(p);
	if (!p->alive)
		return -ENODEV;
	ret = p2pmem_get_pages(p, buf->pages, buf->nr_pages,
			       flags & P2PMEM_ALLOC_CONTIGUOUS);
	if (ret)
		return ret;
	atomic64_add(buf->nr_pages, &p->pages);
	guard(mutex)(&p->list_lock);
	list_add(&buf->node, &p->buffers);
	return 0;
}

/**
 * p2pmem_buffer_alloc - allocate memory
 * @p: where from
 * @size: bytes, a multiple of the page size and not 0
 * @flags: P2PMEM_ALLOC_*
 *
 * Return: a buffer with one reference, or an error: -ENOMEM, -ENODEV; -EINTR
 * when killed
 */
struct p2pmem_buffer *p2pmem_buffer_alloc(struct p2pmem *p, u64 size, u32 flags)
{
	struct p2pmem_buffer *buf;
	int ret = -ENOMEM;

	/*
	 * Before the table of pages is allocated, which the size is good for.
	 */
	if (size > min(p->size, P2PMEM_MAX_ALLOC))
		goto fail;
	buf = kvzalloc(struct_size(buf, pages, size >> PAGE_SHIFT),
		       GFP_KERNEL_ACCOUNT);
	if (!buf)
		goto fail;
	kref_init(&buf->ref);
	buf->p = p;
	buf->nr_pages = size >> PAGE_SHIFT;
	ret = p2pmem_buffer_fill(buf, flags);
	if (ret) {
		kvfree(buf);
		goto fail;
	}
	get_device(&p->dev);
	if (flags & P2PMEM_ALLOC_ZERO || READ_ONCE(p2pmem_clear_all)) {
		ret = p2pmem_clear(buf);
		if (ret) {
			p2pmem_buffer_put(buf);
			goto fail;
		}
	}
	atomic64_inc(&p->allocations);
	return buf;

fail:
	atomic64_inc(&p->failures);
	return ERR_PTR(ret);
}

/**
 * p2pmem_buffer_get - take a reference
 * @buf: the buffer
 *
 * Return: @buf
 */
struct p2pmem_buffer *p2pmem_buffer_get(struct p2pmem_buffer *buf)
{
	kref_get(&buf->ref);
	return buf;
}

/*
 * Drops our references. Pages under DMA are returned to the pool when that
 * ends.
 */
static void p2pmem_buffer_drop(struct p2pmem_buffer *buf)
{
	unsigned long i;

	lockdep_assert_held(&buf->p->list_lock);
	if (buf->revoked)
		return;
	buf->revoked = true;
	for (i = 0; i < buf->nr_pages; i++)
		put_page(buf->pages[i]);
	atomic64_sub(buf->nr_pages, &buf->p->pages);
}

static void p2pmem_buffer_release(struct kref *ref)
{
	struct p2pmem_buffer *buf =
		container_of(ref, struct p2pmem_buffer, ref);
	struct p2pmem *p = buf->p;

	scoped_guard(mutex, &p->list_lock) {
		list_del(&buf->node);
		p2pmem_buffer_drop(buf);
	}
	kvfree(buf);
	put_device(&p->dev);
}

/**
 * p2pmem_buffer_put - drop a reference; the last one gives the memory back
 * @buf: the buffer
 */
void p2pmem_buffer_put(struct p2pmem_buffer *buf)
{
	kref_put(&buf->ref, p2pmem_buffer_release);
}

/**
 * p2pmem_revoke_buffers - drop the pages of all buffers
 * @p: the device, no longer alive, with no mapping or dma-buf in use
 */
void p2pmem_revoke_buffers(struct p2pmem *p)
{
	struct p2pmem_buffer *buf;

	guard(mutex)(&p->list_lock);
	list_for_each_entry(buf, &p->buffers, node)
		p2pmem_buffer_drop(buf);
}

/**
 * p2pmem_buffer_pieces - in how many contiguous pieces a part of a buffer lies
 * @buf: the buffer
 * @first: the part's first page
 * @nr: its number of pages
 *
 * Return: their number, 1 at least
 */
unsigned long p2pmem_buffer_pieces(struct p2pmem_buffer *buf,
				   unsigned long first, unsigned long nr)
{
	unsigned long i, pieces = 1;

	for (i = first + 1; i < first + nr; i++)
		if (page_to_pfn(buf->pages[i]) !=
		    page_to_pfn(buf->pages[i - 1]) + 1)
			pieces++;
	return pieces;
}

/**
 * p2pmem_find - the buffer at an offset of the file
 * @f: the file
 * @pgoff: the offset in pages, anywhere in the buffer
 *
 * Return: the buffer with a reference, or NULL
 */
struct p2pmem_buffer *p2pmem_find(struct p2pmem_file *f, pgoff_t pgoff)
{
	struct p2pmem_buffer *buf;

	xa_lock(&f->handles);
	buf = xa_load(&f->handles, pgoff / P2PMEM_HANDLE_PAGES);
	if (buf)
		p2pmem_buffer_get(buf);
	xa_unlock(&f->handles);
	return buf;
}
