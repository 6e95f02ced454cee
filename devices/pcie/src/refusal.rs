//! Requests that nobody takes: who answers them with Unsupported Request, and what that leaves in the counters
//! and in the error registers of both sides (PCI Express Base 6.0, sections 2.3.1 and 6.2).

use std::sync::Arc;

use crate::config::memory_request_header;
use crate::counters::{HostParty, Movement, Party};
use crate::fabric::Core;
use crate::port::{Dma, DmaError, Port, PortInner};
use crate::route::{Decoder, Member, RouteTable};
use crate::tlp::{self, LinkSettings, TlpKind, completion_without_data};
use crate::tree::Station;

/// Why a DMA stopped.
pub(crate) enum Stopped {
    /// It had no request to send.
    Failed(DmaError),
    /// Its request was refused. To be counted once the address map is free again.
    Refused(Refusal),
}

impl<E: Into<DmaError>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Stopped::Failed(error.into())
    }
}

/// The first request of a DMA that nobody took.
pub(crate) struct Refusal {
    dma: Dma,
    address: u64,
    /// Bytes of the range from there on.
    left: u64,
    slot: usize,
    settings: LinkSettings,
    party: Party,
    station: Station,
    /// The function that answers, unless the root complex does.
    completer: Option<Arc<PortInner>>,
}

impl Refusal {
    /// The request for `left` bytes at `address`, where `decoder` is the BAR that lies there, if it is a
    /// peer's.
    pub(crate) fn new(
        dma: Dma,
        address: u64,
        left: u64,
        member: &Member,
        decoder: Option<&Decoder>,
        routes: &RouteTable,
    ) -> Self {
        let peer = decoder.and_then(|d| Some((d, routes.member(d.endpoint)?.slot)));
        Self {
            dma,
            address,
            left,
            slot: member.slot,
            settings: member.settings,
            party: peer.map_or(HostParty::Unclaimed.into(), |(d, _)| {
                Party::endpoint(d.endpoint)
            }),
            station: peer.map_or(Station::RootComplex, |(_, slot)| Station::Slot(slot)),
            completer: peer.map(|(d, _)| d.owner.clone()),
        }
    }

    /// Length of the one request that is sent before the requester learns that nobody takes it.
    fn length(&self) -> u64 {
        let limit = match self.dma {
            Dma::Write => self.settings.max_payload_size,
            Dma::Read => self.settings.max_read_request_size,
        };
        let to_page_end = 4096 - self.address % 4096;
        self.left.min(to_page_end).min(u64::from(limit))
    }
}

impl Port {
    /// Counts and logs what stopped a DMA. Neither the address map nor host memory may be held: logging takes
    /// functions' locks.
    pub(crate) fn report(&self, core: &Core, stopped: Stopped) -> DmaError {
        let refusal = match stopped {
            Stopped::Failed(error) => return error,
            Stopped::Refused(refusal) => refusal,
        };
        self.count_refused(core, &refusal);
        let posted = refusal.dma == Dma::Write;
        let completer = refusal.completer.as_ref();
        if let Some(function) = completer.and_then(|port| port.function()) {
            let length = usize::try_from(refusal.length()).unwrap_or(usize::MAX);
            let header = memory_request_header(posted, refusal.address, length);
            function.record_unsupported_request(header, posted);
        }
        if !posted && let Some(function) = self.inner.function() {
            function.record_master_abort();
        }
        DmaError::UnsupportedRequest {
            address: refusal.address,
        }
    }

    /// Counts the first request of a refused range, its Unsupported Request completion if it was a read, and
    /// the error at the port that answered.
    fn count_refused(&self, core: &Core, refusal: &Refusal) {
        let me = Party::endpoint(self.inner.endpoint);
        let mine = Station::Slot(refusal.slot);
        let (address, length) = (refusal.address, refusal.length());
        let request = |kind, tally| Movement {
            from: me,
            to: refusal.party,
            kind,
            tally,
            path: core.paths.between(mine, refusal.station),
        };
        match refusal.dma {
            Dma::Write => {
                let tally = tlp::memory_writes(address, length, refusal.settings.max_payload_size);
                core.ledger.record(&[request(TlpKind::MWr, tally)]);
            }
            Dma::Read => {
                let mrrs = refusal.settings.max_read_request_size;
                core.ledger.record(&[
                    request(TlpKind::MRd, tlp::memory_reads(address, length, mrrs)),
                    Movement {
                        from: refusal.party,
                        to: me,
                        kind: TlpKind::Cpl,
                        tally: completion_without_data(length),
                        path: core.paths.between(refusal.station, mine),
                    },
                ]);
            }
        }
        core.count_refusal(refusal.party, refusal.slot);
    }
}
