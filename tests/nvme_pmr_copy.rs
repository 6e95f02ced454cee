//! A copy between two NVMe SSDs, through host memory and through the Persistent Memory Region of one of them.

use p2plab::report::TransferBy;
use p2plab::scenarios::{ScenarioOptions, nvme_pmr_copy};
use p2plab::topology::MIB;

use crate::nvme_cmb_copy::copied_in;

/// What ssd0 reads into its own region moves within ssd0, so one DMA crosses the switch: ssd1's read of it.
#[test]
fn a_region_of_the_source_is_the_bounce_buffer() {
    let options = ScenarioOptions {
        size: 64 * MIB,
        ..ScenarioOptions::default()
    };
    let topology = nvme_pmr_copy::topology("nvme-pmr-copy", &options).unwrap();
    let name = "a_region_of_the_source_is_the_bounce_buffer";
    let report = copied_in(name, topology, "ssd0", &options);
    let ways: Vec<_> = report
        .transfers
        .iter()
        .filter(|t| t.mode == "p2p")
        .map(|t| (&*t.from, &*t.to, t.by, t.payload_bytes))
        .collect();
    assert_eq!(
        ways,
        [("ssd0", "ssd1", TransferBy::MemRd, options.size)],
        "{report}"
    );
    assert!(report.modes["p2p"].usp_payload_bytes < MIB, "{report}");
}
