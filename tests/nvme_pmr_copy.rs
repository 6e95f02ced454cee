//! A copy between two NVMe SSDs, through host memory and through the Persistent Memory Region of one of them.

use p2plab::report::TransferBy;
use p2plab::scenarios::copy::{CopyJob, compare};
use p2plab::scenarios::{ScenarioOptions, nvme_pmr_copy};
use p2plab::topology::MIB;
use p2plab_images::Silent;
use p2plab_tests::TestLab;

/// What ssd0 reads into its own region moves within ssd0, so one DMA crosses the switch: ssd1's read of it.
#[test]
fn a_region_of_the_source_is_the_bounce_buffer() {
    let options = ScenarioOptions {
        size: 64 * MIB,
        ..ScenarioOptions::default()
    };
    let topology = nvme_pmr_copy::topology("nvme-pmr-copy", &options).unwrap();
    let lab = TestLab::start("a_region_of_the_source_is_the_bounce_buffer", topology);
    let job = CopyJob {
        scenario: "nvme-pmr-copy",
        description: "",
        source: "ssd0",
        destination: "ssd1",
        buffer: "ssd0",
        talk: None,
    };
    let report = compare(&lab, &job, &options, &mut Silent).unwrap();
    assert!(report.modes.values().all(|mode| mode.verified), "{report}");
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
    lab.finish();
}
