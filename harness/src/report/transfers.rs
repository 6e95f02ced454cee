//! What became of the data: the DMAs that carried all of it, and what the talk measured.

use std::fmt;

use p2plab_pcie::{TlpKind, Traffic};
use serde::{Deserialize, Serialize};

/// A DMA that carried all bytes of a copy over the bus. What an SSD moves within itself is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// The mode.
    pub mode: String,
    /// Whose memory or blocks the data came from: an endpoint, or `memory`, the host's.
    pub from: String,
    /// Where it went.
    pub to: String,
    /// How it travelled.
    pub by: TransferBy,
    /// Payload bytes.
    pub payload_bytes: u64,
}

/// Who asked for a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransferBy {
    /// Who had the data wrote it: Memory Writes.
    MemWr,
    /// Who wanted it read it: Memory Reads, whose completions carried it.
    MemRd,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} by {:?}", self.from, self.to, self.by)
    }
}

/// The transfers of `size` bytes in `traffic`: whoever else sent as much is none that a copy knows.
pub(super) fn transfers(mode: &str, size: u64, traffic: &Traffic) -> Vec<Transfer> {
    let carried = traffic.matrix.iter().filter_map(|entry| {
        let by = match entry.kind {
            TlpKind::MWr => TransferBy::MemWr,
            TlpKind::CplD => TransferBy::MemRd,
            _ => return None,
        };
        (entry.tally.payload_bytes >= size).then(|| Transfer {
            mode: mode.to_owned(),
            from: entry.source.clone(),
            to: entry.destination.clone(),
            by,
            payload_bytes: entry.tally.payload_bytes,
        })
    });
    let mut transfers: Vec<Transfer> = carried.collect();
    // In, then out.
    transfers.sort_by_key(|transfer| transfer.by == TransferBy::MemRd);
    transfers
}

/// What the talk printed of the same example: "p2pmem: Enabling PCIe Peer-2-Peer in Linux", SDC 2017.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Talk {
    /// Bytes copied.
    pub size_bytes: u64,
    /// Throughput, peer to peer.
    pub p2p_bytes_per_second: u64,
    /// Bytes at the upstream port, through host memory, roughly.
    pub classic_usp_bytes: u64,
    /// And peer to peer.
    pub p2p_usp_bytes: u64,
}

impl Talk {
    /// A copy of 8 GB with this throughput; its upstream port saw the same in both examples.
    pub const fn example(p2p_bytes_per_second: u64) -> Self {
        Self {
            size_bytes: 8_000_000_000,
            p2p_bytes_per_second,
            classic_usp_bytes: 16_000_000_000,
            p2p_usp_bytes: 15_000_000,
        }
    }
}

impl fmt::Display for Talk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "The talk, on hardware of 2017, {} GB: about {} MB/s peer to peer; at the upstream port about {} GB classic, \
             {} MB peer to peer.",
            self.size_bytes / 1_000_000_000,
            self.p2p_bytes_per_second / 1_000_000,
            self.classic_usp_bytes / 1_000_000_000,
            self.p2p_usp_bytes / 1_000_000,
        )
    }
}
