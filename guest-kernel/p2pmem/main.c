// SPDX-License-Identifier: GPL-2.0
/*
 * p2pmem: peer-to-peer memory of PCI devices for user space.
 *
 * Two things in one module. A framework gives every memory BAR that a driver
 * has published to P2PDMA a character device (provider.c and what it uses). A
 * small PCI driver publishes BARs of devices that have no other driver (pci.c);
 * to the framework it is a driver like any other.
 *
 * There is no notification for pci_p2pmem_publish(). Drivers publish in probe,
 * so a device is looked at when it has been bound; who publishes later is found
 * by writing 1 to /sys/class/p2pmem_dev/rescan.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/device/bus.h>
#include <linux/device/class.h>
#include <linux/kdev_t.h>
#include <linux/module.h>

#include "p2pmem.h"

static dev_t p2pmem_first;

/*
 * Root's, as the kernel's own p2pmem/allocate is: who can open the device can
 * take all of its memory.
 */
static char *p2pmem_devnode(const struct device *dev, umode_t *mode)
{
	if (mode)
		*mode = 0660;
	return NULL;
}

static int p2pmem_scan(void)
{
	struct pci_dev *pdev = NULL;
	int ret;

	for_each_pci_dev(pdev) {
		/* A device that is being unbound may wait for long. */
		ret = device_lock_interruptible(&pdev->dev);
		if (ret) {
			pci_dev_put(pdev);
			return ret;
		}
		if (device_is_bound(&pdev->dev))
			p2pmem_add_providers(pdev);
		device_unlock(&pdev->dev);
	}
	return 0;
}

static ssize_t rescan_store(const struct class *class,
			    const struct class_attribute *attr, const char *buf,
			    size_t count)
{
	bool yes;
	int ret;

	ret = kstrtobool(buf, &yes);
	if (ret)
		return ret;
	if (yes)
		ret = p2pmem_scan();
	return ret ? ret : count;
}
static CLASS_ATTR_WO(rescan);

static struct attribute *p2pmem_class_attrs[] = {
	&class_attr_rescan.attr,
	NULL,
};
ATTRIBUTE_GROUPS(p2pmem_class);

static ssize_t bar_show(struct device *dev, struct device_attribute *attr,
			char *buf)
{
	struct p2pmem *p = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%d\n", p->bar);
}
static DEVICE_ATTR_RO(bar);

static ssize_t size_show(struct device *dev, struct device_attribute *attr,
			 char *buf)
{
	struct p2pmem *p = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%llu\n", p->size);
}
static DEVICE_ATTR_RO(size);

static struct attribute *p2pmem_attrs[] = {
	&dev_attr_bar.attr,
	&dev_attr_size.attr,
	NULL,
};
ATTRIBUTE_GROUPS(p2pmem);

/*
 * Not just "p2pmem": the devices' folder below the PCI device has the name of
 * the class, and P2PDMA has a folder p2pmem there already.
 */
const struct class p2pmem_class = {
	.name = "p2pmem_dev",
	.devnode = p2pmem_devnode,
	.class_groups = p2pmem_class_groups,
	.dev_groups = p2pmem_groups,
};

/**
 * p2pmem_devt - the first of the two device numbers of a device
 * @id: N of p2pmemN
 *
 * Return: that of /dev/p2pmemN; the next one is that of its name by address
 */
dev_t p2pmem_devt(int id)
{
	return MKDEV(MAJOR(p2pmem_first),
		     MINOR(p2pmem_first) + P2PMEM_MINORS * id);
}

/* Called with the device locked, in both cases. */
static int p2pmem_bus_notify(struct notifier_block *nb, unsigned long action,
			     void *data)
{
	struct pci_dev *pdev = to_pci_dev(data);

	switch (action) {
	case BUS_NOTIFY_BOUND_DRIVER:
		p2pmem_add_providers(pdev);
		break;
	case BUS_NOTIFY_UNBIND_DRIVER:
		p2pmem_remove_providers(pdev);
		break;
	}
	return NOTIFY_DONE;
}

static struct notifier_block p2pmem_notifier = {
	.notifier_call = p2pmem_bus_notify,
};

static int __init p2pmem_init(void)
{
	int ret;

	ret = alloc_chrdev_region(&p2pmem_first, 0,
				  P2PMEM_DEVICES * P2PMEM_MINORS, "p2pmem");
	if (ret)
		return ret;
	ret = class_register(&p2pmem_class);
	if (ret)
		goto unregister_chrdev;
	p2pmem_debugfs_init();
	ret = bus_register_notifier(&pci_bus_type, &p2pmem_notifier);
	if (ret)
		goto unregister_class;
	ret = pci_register_driver(&p2pmem_pci_driver);
	if (ret)
		goto unregister_notifier;
	/*
	 * Last, and never a failure: once there is a device somebody may have
	 * it open, and then the module must stay.
	 */
	p2pmem_start();
	if (p2pmem_scan())
		pr_info("interrupted; write 1 to /sys/class/%s/rescan\n",
			p2pmem_class.name);
	return 0;

unregister_notifier:
	bus_unregister_notifier(&pci_bus_type, &p2pmem_notifier);
unregister_class:
	p2pmem_debugfs_exit();
	class_unregister(&p2pmem_class);
unregister_chrdev:
	unregister_chrdev_region(p2pmem_first, P2PMEM_DEVICES * P2PMEM_MINORS);
	return ret;
}

static void __exit p2pmem_exit(void)
{
	pci_unregister_driver(&p2pmem_pci_driver);
	/*
	 * Nobody has a file, mapping or dma-buf of ours: none of the providers
	 * that remain has to wait for us. Until all are gone the notifier takes
	 * those away whose provider goes meanwhile.
	 */
	p2pmem_remove_all();
	bus_unregister_notifier(&pci_bus_type, &p2pmem_notifier);
	p2pmem_debugfs_exit();
	class_unregister(&p2pmem_class);
	unregister_chrdev_region(p2pmem_first, P2PMEM_DEVICES * P2PMEM_MINORS);
}

module_init(p2pmem_init);
module_exit(p2pmem_exit);

MODULE_DESCRIPTION("Peer-to-peer memory of PCI devices for user space");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS("DMA_BUF");
