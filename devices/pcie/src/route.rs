//! Routing by address: which function decodes a bus address.

use std::sync::Arc;

use crate::config::DecodeState;
use crate::memory::BarMemory;
use crate::port::PortInner;
use crate::tlp::LinkSettings;

/// What the switch knows of one plugged function.
#[derive(Clone)]
pub(crate) struct Member {
    /// The function's own port. One of the same number that is not this one belongs to an endpoint that was
    /// unplugged.
    pub owner: Arc<PortInner>,
    /// Slot (port number in the tree).
    pub slot: usize,
    /// Whether a guest is connected.
    pub link_up: bool,
    /// Whether its requests may pass: Bus Master Enable and D0.
    pub may_request: bool,
    /// Packet sizes.
    pub settings: LinkSettings,
}

/// One memory BAR in the address map.
pub(crate) struct Decoder {
    pub start: u64,
    pub length: u64,
    /// The function's number.
    pub endpoint: usize,
    /// The function's own port: the way to its registers.
    pub owner: Arc<PortInner>,
    pub bar: u8,
    /// Memory Space Enable and D0. While off, the range still lies in the bridge windows above the
    /// function, so requests go there and the function answers Unsupported Request.
    pub enabled: bool,
    /// Memory behind the BAR; none for registers.
    pub memory: Option<Arc<BarMemory>>,
    /// The CPU writes to it by messages of the transport.
    pub trapped: bool,
}

impl Decoder {
    fn end(&self) -> u64 {
        // Cannot overflow: `update` leaves out BARs that wrap.
        self.start + self.length
    }

    fn covers(&self, address: u64) -> bool {
        (self.start..self.end()).contains(&address)
    }
}

/// The address map of a fabric.
#[derive(Default)]
pub(crate) struct RouteTable {
    /// By endpoint number; `None` while unplugged.
    pub members: Vec<Option<Member>>,
    /// The BARs, sorted by start.
    decoders: Vec<Decoder>,
    /// Which BAR answers where, sorted, without overlaps; made of `decoders`.
    segments: Vec<Segment>,
}

/// A range of bus addresses that one BAR answers.
struct Segment {
    start: u64,
    end: u64,
    /// Index of the decoder.
    decoder: usize,
}

impl RouteTable {
    /// Replaces all that is known of function `endpoint`.
    pub(crate) fn update(&mut self, owner: &Arc<PortInner>, state: &DecodeState, bars: &Bars) {
        let endpoint = owner.endpoint;
        if self.members.len() <= endpoint {
            self.members.resize(endpoint + 1, None);
        }
        self.members[endpoint] = Some(Member {
            owner: owner.clone(),
            slot: owner.slot,
            link_up: state.link_up,
            may_request: state.may_send(),
            settings: LinkSettings {
                max_payload_size: state.max_payload_size,
                max_read_request_size: state.max_read_request_size,
                read_completion_boundary: state.read_completion_boundary,
            },
        });
        self.decoders.retain(|decoder| decoder.endpoint != endpoint);
        for bar in bars {
            let Some(start) = state.bar_address(bar.index).filter(|start| *start != 0) else {
                continue;
            };
            if start.checked_add(bar.length).is_none() {
                continue;
            }
            self.decoders.push(Decoder {
                start,
                length: bar.length,
                endpoint,
                owner: owner.clone(),
                bar: bar.index,
                enabled: state.decodes(),
                memory: bar.memory.clone(),
                trapped: bar.trapped,
            });
        }
        self.arrange();
    }

    /// Forgets function `endpoint`.
    pub(crate) fn remove(&mut self, endpoint: usize) {
        if let Some(member) = self.members.get_mut(endpoint) {
            *member = None;
        }
        self.decoders.retain(|decoder| decoder.endpoint != endpoint);
        self.arrange();
    }

    /// Decides who answers where. Real hardware leaves open what overlapping BARs do. Here those that are
    /// switched on go before those that are not (software that sizes a new function's BARs must not disturb
    /// the others), then the one that starts last.
    fn arrange(&mut self) {
        self.decoders.sort_by_key(|decoder| decoder.start);
        let overlap = |pair: &[Decoder]| matches!(pair, [a, b] if a.end() > b.start);
        if !self.decoders.windows(2).any(overlap) {
            let whole = |(decoder, d): (usize, &Decoder)| Segment {
                start: d.start,
                end: d.end(),
                decoder,
            };
            self.segments = self.decoders.iter().enumerate().map(whole).collect();
            return;
        }
        let edges = self.decoders.iter().flat_map(|d| [d.start, d.end()]);
        let mut edges: Vec<u64> = edges.collect();
        edges.sort_unstable();
        edges.dedup();
        self.segments.clear();
        for (&start, &end) in edges.iter().zip(edges.iter().skip(1)) {
            let covering = self
                .decoders
                .iter()
                .enumerate()
                .filter(|(_, d)| d.covers(start));
            let Some((decoder, _)) = covering.max_by_key(|(_, d)| (d.enabled, d.start)) else {
                continue;
            };
            match self.segments.last_mut() {
                Some(last) if last.decoder == decoder && last.end == start => last.end = end,
                _ => self.segments.push(Segment {
                    start,
                    end,
                    decoder,
                }),
            }
        }
    }

    /// The BAR that answers at `address`, and how many bytes it answers from there on.
    pub(crate) fn lookup(&self, address: u64) -> Option<(&Decoder, u64)> {
        let after = self.segments.partition_point(|s| s.start <= address);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let left = segment.end.checked_sub(address).filter(|left| *left > 0)?;
        Some((self.decoders.get(segment.decoder)?, left))
    }

    /// First decoded address above `address`: a range that starts outside all BARs may run into one.
    pub(crate) fn next_start(&self, address: u64) -> Option<u64> {
        let after = self.segments.partition_point(|s| s.start <= address);
        self.segments.get(after).map(|segment| segment.start)
    }

    pub(crate) fn member(&self, endpoint: usize) -> Option<&Member> {
        self.members.get(endpoint)?.as_ref()
    }
}

/// A memory BAR of a function, as the address map needs it.
#[derive(Clone, Debug)]
pub(crate) struct BarRoute {
    pub index: u8,
    pub length: u64,
    pub memory: Option<Arc<BarMemory>>,
    pub trapped: bool,
}

/// A function's memory BARs.
pub(crate) type Bars = Vec<BarRoute>;

#[cfg(test)]
mod tests {
    use std::sync::{OnceLock, Weak};

    use proptest::prelude::*;

    use super::*;
    use crate::host_memory::HostMemory;

    fn owner() -> Arc<PortInner> {
        Arc::new(PortInner {
            name: String::new(),
            endpoint: 0,
            slot: 0,
            core: Weak::new(),
            host: Arc::new(HostMemory::new()),
            function: OnceLock::new(),
        })
    }

    proptest! {
        /// However BARs overlap, the table answers at every address what a look at all of them does: one that is
        /// switched on before one that is not, then the one that starts last.
        #[test]
        fn lookup_equals_a_look_at_every_bar(
            bars in prop::collection::vec((0u64..64, 1u64..24, any::<bool>()), 0..12),
        ) {
            let owner = owner();
            let mut table = RouteTable::default();
            let decoders = bars.iter().enumerate().map(|(endpoint, (start, length, enabled))| Decoder {
                start: *start,
                length: *length,
                endpoint,
                owner: owner.clone(),
                bar: 0,
                enabled: *enabled,
                memory: None,
                trapped: true,
            });
            table.decoders.extend(decoders);
            table.arrange();
            for address in 0..100 {
                let covering = bars.iter().enumerate().filter(|(_, (start, length, _))| {
                    (*start..start + length).contains(&address)
                });
                let best = covering.map(|(_, (start, _, enabled))| (*enabled, *start)).max();
                let found = table.lookup(address);
                prop_assert_eq!(found.map(|(d, _)| (d.enabled, d.start)), best);
                if let Some((decoder, answers)) = found {
                    // As far as it says, and no further: one answers up to its end or to another that goes before.
                    for inside in address..address + answers {
                        let (d, left) = table.lookup(inside).unwrap();
                        prop_assert_eq!((d.endpoint, left), (decoder.endpoint, address + answers - inside));
                    }
                    let behind = table.lookup(address + answers);
                    prop_assert!(behind.is_none_or(|(d, _)| d.endpoint != decoder.endpoint));
                } else {
                    let next = table.next_start(address);
                    let nearest = (address + 1..100).find(|a| table.lookup(*a).is_some());
                    prop_assert_eq!(next, nearest);
                }
            }
        }
    }
}
