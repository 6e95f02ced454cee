//! A copy between two NVMe SSDs, through host memory and through the Persistent Memory Region of one of them, or of a third.

use p2plab::scenarios::nvme_pmr_copy;

use crate::nvme_cmb_copy::each_buffer_has_its_dmas;

/// What an SSD moves between its media and its own region stays within it; the other SSD's DMA crosses the switch, or
/// both do.
#[test]
fn a_region_in_a_device_that_takes_part_saves_a_dma() {
    each_buffer_has_its_dmas("pmr", nvme_pmr_copy::topology);
}
