//! Example 2 of the talk: a copy between two NVMe SSDs, through host memory and through a CMB.

use p2plab::scenarios::ScenarioOptions;
use p2plab::scenarios::copy::{CopyJob, compare};
use p2plab::topology::MIB;
use p2plab_images::Silent;
use p2plab_tests::{TestLab, two_ssds};

/// Peer to peer, the payload leaves the upstream port alone but for queues and interrupts.
#[test]
fn the_upstream_port_is_relieved() {
    let lab = TestLab::start("the_upstream_port_is_relieved", two_ssds("copy"));
    let options = ScenarioOptions {
        size: 64 * MIB,
        ..ScenarioOptions::default()
    };
    let job = CopyJob {
        scenario: "nvme-cmb-copy",
        description: "",
        source: "ssd0",
        destination: "ssd1",
        buffer: "ssd0",
    };
    let report = compare(&lab, &job, &options, &mut Silent).unwrap();
    let (classic, p2p) = (&report.modes["classic"], &report.modes["p2p"]);
    assert!(classic.verified && p2p.verified);
    assert!(classic.usp_payload_bytes >= 2 * options.size);
    assert!(
        p2p.usp_payload_bytes * 500 <= classic.usp_payload_bytes,
        "{report}"
    );
    lab.finish();
}
