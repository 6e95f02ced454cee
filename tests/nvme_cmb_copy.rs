//! Example 2 of the talk: a copy between two NVMe SSDs, through host memory and through a CMB.

use p2plab::lab::LabError;
use p2plab::report::{CopyReport, TransferBy};
use p2plab::scenarios::copy::{CopyJob, compare};
use p2plab::scenarios::{BufferOwner, ScenarioOptions, nvme_cmb_copy};
use p2plab::topology::{MIB, Topology};
use p2plab_images::Silent;
use p2plab_tests::TestLab;

/// A copy through the memory of `buffer`.
fn options(buffer: BufferOwner) -> ScenarioOptions {
    ScenarioOptions {
        size: 64 * MIB,
        buffer,
        ..ScenarioOptions::default()
    }
}

/// A copy from ssd0 to ssd1 through the memory of `buffer` in a lab of its own; every byte was compared.
pub(crate) fn copied_in(
    name: &str,
    topology: Topology,
    buffer: &str,
    options: &ScenarioOptions,
) -> CopyReport {
    let lab = TestLab::start(name, topology);
    let job = CopyJob {
        scenario: name,
        description: "",
        source: "ssd0",
        destination: "ssd1",
        buffer,
        talk: None,
    };
    let report = compare(&lab, &job, options, &mut Silent).unwrap();
    lab.finish();
    assert!(report.modes.values().all(|mode| mode.verified), "{report}");
    report
}

/// The DMAs that carried the data in `mode`: from, to, how.
fn transfers<'a>(report: &'a CopyReport, mode: &str) -> Vec<(&'a str, &'a str, TransferBy)> {
    let mine = report.transfers.iter().filter(|t| t.mode == mode);
    mine.map(|t| (t.from.as_str(), t.to.as_str(), t.by))
        .collect()
}

/// Peer to peer, the payload leaves the upstream port alone but for queues and interrupts.
#[test]
fn the_upstream_port_is_relieved() {
    let options = options(BufferOwner::Source);
    let topology = nvme_cmb_copy::topology("copy", &options).unwrap();
    let report = copied_in("the_upstream_port_is_relieved", topology, "ssd0", &options);
    let (classic, p2p) = (&report.modes["classic"], &report.modes["p2p"]);
    assert!(classic.usp_payload_bytes >= 2 * report.size_bytes);
    assert!(
        p2p.usp_payload_bytes * 500 <= classic.usp_payload_bytes,
        "{report}"
    );
}

/// A buffer in an SSD that takes part is one DMA over the switch, as the other is within that SSD; a buffer elsewhere
/// is two, as host memory is.
#[test]
fn a_buffer_in_a_device_that_takes_part_saves_a_dma() {
    each_buffer_has_its_dmas("cmb", nvme_cmb_copy::topology);
}

/// Copies through the memory of the source, of the destination, and of a third SSD, each in a lab of `topology`.
pub(crate) fn each_buffer_has_its_dmas(
    memory: &str,
    topology: impl Fn(&str, &ScenarioOptions) -> Result<Topology, LabError>,
) {
    use TransferBy::{MemRd, MemWr};
    for (whose, owner, buffer, expected) in [
        (
            "the_source",
            BufferOwner::Source,
            "ssd0",
            vec![("ssd0", "ssd1", MemRd)],
        ),
        (
            "the_destination",
            BufferOwner::Destination,
            "ssd1",
            vec![("ssd0", "ssd1", MemWr)],
        ),
        (
            "a_third_ssd",
            BufferOwner::Third,
            "ssd2",
            vec![("ssd0", "ssd2", MemWr), ("ssd2", "ssd1", MemRd)],
        ),
    ] {
        let options = options(owner);
        let topology = topology("copy", &options).unwrap();
        let report = copied_in(&format!("{memory}_of_{whose}"), topology, buffer, &options);
        assert_eq!(transfers(&report, "p2p"), expected, "{report}");
        assert_eq!(
            transfers(&report, "classic"),
            [("ssd0", "memory", MemWr), ("memory", "ssd1", MemRd)],
            "{report}"
        );
        // All of the data went that way, once: no DMA of it is more than it.
        for transfer in report.transfers.iter().filter(|t| t.mode == "p2p") {
            assert_eq!(transfer.payload_bytes, report.size_bytes, "{report}");
        }
        assert!(report.modes["p2p"].usp_payload_bytes < MIB, "{report}");
    }
}
