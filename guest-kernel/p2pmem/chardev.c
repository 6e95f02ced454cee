// SPDX-License-Identifier: GPL-2.0
/*
 * The character device: files and their mappings.
 *
 * Pages are mapped as they are touched, never in mmap(): a mapping under
 * construction is not yet found by unmap_mapping_range(), so what is mapped
 * then would stay when the device goes.
 */
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/slab.h>

#include "p2pmem.h"

/* Pages that a fault maps at once, from the one that was touched on. */
#define P2PMEM_FAULT_PAGES	256UL

/*
 * Counts a file of the inode: what is mapped of all of them is in one place,
 * and undone at once when the device goes.
 */
static struct p2pmem_inode *p2pmem_inode_get(struct p2pmem *p,
					     struct address_space *mapping)
{
	struct p2pmem_inode *inode;

	lockdep_assert_held(&p->list_lock);
	list_for_each_entry(inode, &p->inodes, node)
		if (inode->mapping == mapping)
			goto found;
	inode = kzalloc_obj(*inode, GFP_KERNEL_ACCOUNT);
	if (!inode)
		return NULL;
	inode->mapping = mapping;
	list_add(&inode->node, &p->inodes);
found:
	inode->files++;
	return inode;
}

static void p2pmem_inode_put(struct p2pmem *p, struct p2pmem_inode *inode)
{
	guard(mutex)(&p->list_lock);
	if (--inode->files)
		return;
	list_del(&inode->node);
	kfree(inode);
}

static int p2pmem_list_file(struct p2pmem_file *f)
{
	struct p2pmem *p = f->p;

	guard(p2pmem_stays)(p);
	if (!p->alive)
		return -ENODEV;
	guard(mutex)(&p->list_lock);
	f->inode = p2pmem_inode_get(p, f->filp->f_mapping);
	return f->inode ? 0 : -ENOMEM;
}

static int p2pmem_open(struct inode *inode, struct file *filp)
{
	struct p2pmem *p = container_of(inode->i_cdev, struct p2pmem, cdev);
	struct p2pmem_file *f;
	int ret;

	f = kzalloc_obj(*f, GFP_KERNEL_ACCOUNT);
	if (!f)
		return -ENOMEM;
	f->p = p;
	f->filp = filp;
	xa_init_flags(&f->handles, XA_FLAGS_ALLOC1 | XA_FLAGS_ACCOUNT);
	ret = p2pmem_list_file(f);
	if (ret) {
		kfree(f);
		return ret;
	}
	get_device(&p->dev);
	filp->private_data = f;
	return 0;
}

static int p2pmem_close(struct inode *inode, struct file *filp)
{
	struct p2pmem_file *f = filp->private_data;
	struct p2pmem *p = f->p;
	struct p2pmem_buffer *buf;
	unsigned long handle;

	p2pmem_inode_put(p, f->inode);
	xa_for_each(&f->handles, handle, buf)
		p2pmem_buffer_put(buf);
	xa_destroy(&f->handles);
	kfree(f);
	put_device(&p->dev);
	return 0;
}

static __poll_t p2pmem_poll(struct file *filp, poll_table *wait)
{
	struct p2pmem_file *f = filp->private_data;

	poll_wait(filp, &f->p->wait, wait);
	return READ_ONCE(f->p->gone) ? EPOLLHUP | EPOLLERR : 0;
}

static void p2pmem_vm_open(struct vm_area_struct *vma)
{
	p2pmem_buffer_get(vma->vm_private_data);
}

static void p2pmem_vm_close(struct vm_area_struct *vma)
{
	p2pmem_buffer_put(vma->vm_private_data);
}

static vm_fault_t p2pmem_vm_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct p2pmem_buffer *buf = vma->vm_private_data;
	unsigned long first = vmf->pgoff - buf->pgoff;
	unsigned long nr;
	int ret;

	guard(p2pmem_stays)(buf->p);
	if (!buf->p->alive || first >= buf->nr_pages)
		return VM_FAULT_SIGBUS;
	nr = min3(P2PMEM_FAULT_PAGES, buf->nr_pages - first,
		  (vma->vm_end - vmf->address) >> PAGE_SHIFT);
	ret = vm_insert_pages(vma, vmf->address, buf->pages + first, &nr);
	switch (ret) {
	case 0:
	case -EBUSY: /* another thread's fault was first, here or further on */
		return VM_FAULT_NOPAGE;
	case -ENOMEM:
		return VM_FAULT_OOM;
	default:
		return VM_FAULT_SIGBUS;
	}
}

static const struct vm_operations_struct p2pmem_vm_ops = {
	.open = p2pmem_vm_open,
	.close = p2pmem_vm_close,
	.fault = p2pmem_vm_fault,
};

/* A reference to the buffer that @vma is to map. */
static struct p2pmem_buffer *p2pmem_buffer_for(struct p2pmem_file *f,
					       struct vm_area_struct *vma)
{
	unsigned long pages = vma_pages(vma);
	struct p2pmem_buffer *buf;

	if (!vma->vm_pgoff) {
		if (!(f->filp->f_mode & FMODE_WRITE))
			return ERR_PTR(-EACCES);
		return p2pmem_buffer_alloc(f->p, (u64)pages << PAGE_SHIFT, 0);
	}
	buf = p2pmem_find(f, vma->vm_pgoff);
	if (!buf)
		return ERR_PTR(-EINVAL);
	if (vma->vm_pgoff - buf->pgoff + pages > buf->nr_pages) {
		p2pmem_buffer_put(buf);
		return ERR_PTR(-ENXIO);
	}
	return buf;
}

static int p2pmem_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct p2pmem_file *f = filp->private_data;
	struct p2pmem_buffer *buf;

	/*
	 * A private mapping would copy on write, into memory that is not the
	 * device's.
	 */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EACCES;
	if (!READ_ONCE(f->p->alive))
		return -ENODEV;
	buf = p2pmem_buffer_for(f, vma);
	if (IS_ERR(buf))
		return PTR_ERR(buf);
	vma->vm_private_data = buf;
	vma->vm_ops = &p2pmem_vm_ops;
	vm_flags_mod(vma, VM_MIXEDMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC);
	/* As in the kernel's own map of the memory. */
	vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
	return 0;
}

/**
 * p2pmem_zap_files - undo all mappings of the device
 * @p: the device, no longer alive, so that no page is mapped again
 */
void p2pmem_zap_files(struct p2pmem *p)
{
	struct p2pmem_inode *inode;

	guard(mutex)(&p->list_lock);
	list_for_each_entry(inode, &p->inodes, node)
		unmap_mapping_range(inode->mapping, 0, 0, 1);
}

const struct file_operations p2pmem_fops = {
	.owner = THIS_MODULE,
	.open = p2pmem_open,
	.release = p2pmem_close,
	.mmap = p2pmem_mmap,
	.poll = p2pmem_poll,
	.unlocked_ioctl = p2pmem_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};
