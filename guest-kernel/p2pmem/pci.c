// SPDX-License-Identifier: GPL-2.0
/*
 * The PCI driver: publishes a BAR of a device that has no driver of its own as
 * peer-to-peer memory.
 *
 * It binds to the NVRAM card by itself, and to any other device by
 *
 *	echo 1234 5678 > /sys/bus/pci/drivers/p2pmem/new_id
 *
 * with the BAR that the module's parameter bar names then, or else the largest
 * one that is prefetchable.
 */
#include <linux/memremap.h>
#include <linux/module.h>

#include "p2pmem.h"

#define PCI_DEVICE_ID_MICROSEMI_NVRAM	0xf117

/* The card's memory is there; its registers are in another BAR. */
#define P2PMEM_NVRAM_BAR		4

/*
 * None has driver_data: where all of a table have some, new_id needs it, too,
 * and user space cannot know it.
 */
static const struct pci_device_id p2pmem_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_MICROSEMI, PCI_DEVICE_ID_MICROSEMI_NVRAM) },
	{ }
};
MODULE_DEVICE_TABLE(pci, p2pmem_ids);

static int p2pmem_bar = -1;
module_param_named(bar, p2pmem_bar, int, 0644);
MODULE_PARM_DESC(bar, "BAR of devices that new_id or driver_override names (default: the largest prefetchable)");

static int p2pmem_largest_bar(struct pci_dev *pdev)
{
	const unsigned long wanted = IORESOURCE_MEM | IORESOURCE_PREFETCH;
	int bar, best = -1;

	for (bar = 0; bar < PCI_STD_NUM_BARS; bar++) {
		if ((pci_resource_flags(pdev, bar) & wanted) != wanted)
			continue;
		if (best < 0 ||
		    pci_resource_len(pdev, bar) > pci_resource_len(pdev, best))
			best = bar;
	}
	return best;
}

static int p2pmem_choose_bar(struct pci_dev *pdev)
{
	int bar = READ_ONCE(p2pmem_bar);

	if (pci_match_id(p2pmem_ids, pdev))
		bar = P2PMEM_NVRAM_BAR;
	else if (bar < 0)
		bar = p2pmem_largest_bar(pdev);
	if (bar < 0 || bar >= PCI_STD_NUM_BARS ||
	    !pci_resource_len(pdev, bar) ||
	    !(pci_resource_flags(pdev, bar) & IORESOURCE_MEM)) {
		pci_err(pdev,
			"BAR %d is no memory; name one by the parameter bar of the module\n",
			bar);
		return -EINVAL;
	}
	return bar;
}

/*
 * The kernel adds and removes memory in sections, and warns loudly about what
 * is none.
 */
static int p2pmem_check_bar(struct pci_dev *pdev, int bar)
{
	resource_size_t start = pci_resource_start(pdev, bar);
	resource_size_t size = pci_resource_len(pdev, bar);
	unsigned long unit = memremap_compat_align();

	if (IS_ALIGNED(start | size, unit))
		return 0;
	pci_err(pdev,
		"BAR %d, %pR, cannot be peer-to-peer memory: give it a size and an address in multiples of %lu MiB\n",
		bar, pci_resource_n(pdev, bar), unit >> 20);
	return -EINVAL;
}

static int p2pmem_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int bar, ret;

	bar = p2pmem_choose_bar(pdev);
	if (bar < 0)
		return bar;
	ret = p2pmem_check_bar(pdev, bar);
	if (ret)
		return ret;
	ret = pcim_enable_device(pdev);
	if (ret)
		return ret;
	ret = pcim_request_region(pdev, bar, "p2pmem");
	if (ret)
		return ret;
	ret = pci_p2pdma_add_resource(pdev, bar, 0, 0);
	if (ret)
		return dev_err_probe(&pdev->dev, ret,
				     "BAR %d is not taken as peer-to-peer memory\n",
				     bar);
	pci_p2pmem_publish(pdev, true);
	return 0;
}

/*
 * Nothing to remove: all of it is undone when the device is unbound, and the
 * framework hears of that before.
 */
struct pci_driver p2pmem_pci_driver = {
	.name = "p2pmem",
	.id_table = p2pmem_ids,
	.probe = p2pmem_probe,
};
