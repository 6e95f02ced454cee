//! Example 1 of the talk: a copy between two plain NVMe SSDs, through host memory and through an NVRAM card.

use p2plab::report::TransferBy;
use p2plab::scenarios::{ScenarioOptions, nvram_copy};
use p2plab::topology::MIB;

use crate::nvme_cmb_copy::copied_in;

/// One DMA into the card by Memory Writes and one out of it by Memory Reads, and the upstream port sees queues and
/// interrupts only.
#[test]
fn a_card_is_the_bounce_buffer_of_two_plain_ssds() {
    let options = ScenarioOptions {
        size: 64 * MIB,
        ..ScenarioOptions::default()
    };
    let topology = nvram_copy::topology("nvram-copy", &options).unwrap();
    let name = "a_card_is_the_bounce_buffer_of_two_plain_ssds";
    let report = copied_in(name, topology, "nv0", &options);
    let of = |mode: &str| {
        let mine = report.transfers.iter().filter(|t| t.mode == mode);
        let ways = mine.map(|t| (&*t.from, &*t.to, t.by, t.payload_bytes));
        ways.collect::<Vec<_>>()
    };
    assert_eq!(
        of("p2p"),
        [
            ("ssd0", "nv0", TransferBy::MemWr, options.size),
            ("nv0", "ssd1", TransferBy::MemRd, options.size)
        ],
        "{report}"
    );
    let classic: Vec<_> = of("classic").into_iter().map(|t| (t.0, t.1, t.2)).collect();
    assert_eq!(
        classic,
        [
            ("ssd0", "memory", TransferBy::MemWr),
            ("memory", "ssd1", TransferBy::MemRd)
        ],
        "{report}"
    );
    assert!(report.modes["p2p"].usp_payload_bytes < MIB, "{report}");
}
