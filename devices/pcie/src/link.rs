//! A function's [`Link`] into its fabric: what the CPU does to the function is counted, and what the
//! function's config space says goes into the address map.

use std::sync::Arc;

use crate::config::DecodeState;
use crate::counters::{HostParty, Movement, Party, PortError};
use crate::fabric::Core;
use crate::function::FunctionLink;
use crate::port::PortInner;
use crate::route::Bars;
use crate::tlp::{self, HEADER_3DW, Tally, TlpKind};
use crate::tree::Station;

/// A function's link into the fabric: counts what the CPU does to it, and keeps the address map.
pub(crate) struct Link {
    pub(crate) port: Arc<PortInner>,
    pub(crate) bars: Bars,
}

impl Link {
    fn core(&self) -> Option<Arc<Core>> {
        self.port.core.upgrade()
    }

    /// Counts a request of the CPU and what comes back.
    fn count(&self, request: (TlpKind, Tally), completion: Option<(TlpKind, Tally)>) {
        let Some(core) = self.core() else { return };
        let me = Party::endpoint(self.port.endpoint);
        let cpu = HostParty::Cpu.into();
        let slot = Station::Slot(self.port.slot);
        let down = core.paths.between(Station::RootComplex, slot);
        let up = core.paths.between(slot, Station::RootComplex);
        let request = Movement {
            from: cpu,
            to: me,
            kind: request.0,
            tally: request.1,
            path: down,
        };
        match completion {
            Some((kind, tally)) => core.ledger.record(&[
                request,
                Movement {
                    from: me,
                    to: cpu,
                    kind,
                    tally,
                    path: up,
                },
            ]),
            None => core.ledger.record(&[request]),
        }
    }
}

/// The CPU's own limit on a request: a cache line.
const CPU_REQUEST: u32 = 64;

impl FunctionLink for Link {
    fn count_config(&self, write: bool, length: usize) {
        // Configuration requests carry one DW; software's longer accesses are several.
        let tlps = (length as u64).div_ceil(4);
        let bytes = length as u64;
        let header_bytes = tlps * HEADER_3DW;
        if write {
            self.count(
                (
                    TlpKind::CfgWr,
                    Tally {
                        tlps,
                        payload_bytes: bytes,
                        header_bytes,
                        requested_bytes: 0,
                    },
                ),
                Some((
                    TlpKind::Cpl,
                    Tally {
                        tlps,
                        payload_bytes: 0,
                        header_bytes,
                        requested_bytes: 0,
                    },
                )),
            );
        } else {
            self.count(
                (
                    TlpKind::CfgRd,
                    Tally {
                        tlps,
                        payload_bytes: 0,
                        header_bytes,
                        requested_bytes: bytes,
                    },
                ),
                Some((
                    TlpKind::CplD,
                    Tally {
                        tlps,
                        payload_bytes: bytes,
                        header_bytes,
                        requested_bytes: 0,
                    },
                )),
            );
        }
    }

    fn count_cpu_read(&self, address: u64, length: usize) {
        let length = length as u64;
        let request = tlp::memory_reads(address, length, CPU_REQUEST);
        let completion = tlp::read_completions(
            address,
            length,
            CPU_REQUEST,
            128,
            tlp::ENDPOINT_READ_COMPLETION_BOUNDARY,
        );
        self.count((TlpKind::MRd, request), Some((TlpKind::CplD, completion)));
    }

    fn count_cpu_write(&self, address: u64, length: usize) {
        let request = tlp::memory_writes(address, length as u64, CPU_REQUEST);
        self.count((TlpKind::MWr, request), None);
    }

    fn decode_changed(&self, state: &DecodeState) {
        if let Some(core) = self.core() {
            core.routes_mut().update(&self.port, state, &self.bars);
        }
    }

    fn count_delayed_msix(&self, messages: usize) {
        for _ in 0..messages {
            self.port.count_msi();
        }
    }

    fn count_cpu_refused(&self, write: bool, address: u64, length: usize) {
        if write {
            self.count_cpu_write(address, length);
        } else {
            let request = tlp::memory_reads(address, length as u64, CPU_REQUEST);
            let refusals = Tally {
                tlps: request.tlps,
                payload_bytes: 0,
                header_bytes: request.tlps.wrapping_mul(HEADER_3DW),
                requested_bytes: request.requested_bytes,
            };
            self.count((TlpKind::MRd, request), Some((TlpKind::Cpl, refusals)));
        }
        if let Some(core) = self.core() {
            core.ledger
                .record_endpoint_error(self.port.endpoint, PortError::UnsupportedRequest);
        }
    }
}
