//! Routing by address: which function decodes a bus address.

use std::sync::Arc;

use crate::config::DecodeState;
use crate::memory::BarMemory;
use crate::port::PortInner;
use crate::tlp::LinkSettings;

/// What the switch knows of one plugged function.
#[derive(Clone, Debug)]
pub(crate) struct Member {
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
#[derive(Clone)]
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
}

/// The address map of a fabric.
#[derive(Default)]
pub(crate) struct RouteTable {
    /// By endpoint number; `None` while unplugged.
    pub members: Vec<Option<Member>>,
    /// Sorted by start. Where a guest programs overlapping BARs, the one with the highest start below the
    /// address answers; real hardware leaves that open.
    decoders: Vec<Decoder>,
}

impl RouteTable {
    /// Replaces all that is known of function `endpoint`.
    pub(crate) fn update(&mut self, owner: &Arc<PortInner>, state: &DecodeState, bars: &Bars) {
        let endpoint = owner.endpoint;
        if self.members.len() <= endpoint {
            self.members.resize(endpoint + 1, None);
        }
        self.members[endpoint] = Some(Member {
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
            });
        }
        self.decoders.sort_by_key(|decoder| decoder.start);
    }

    /// Forgets function `endpoint`.
    pub(crate) fn remove(&mut self, endpoint: usize) {
        if let Some(member) = self.members.get_mut(endpoint) {
            *member = None;
        }
        self.decoders.retain(|decoder| decoder.endpoint != endpoint);
    }

    /// The BAR that `address` lies in.
    pub(crate) fn lookup(&self, address: u64) -> Option<&Decoder> {
        let after = self
            .decoders
            .partition_point(|decoder| decoder.start <= address);
        self.decoders
            .get(after.checked_sub(1)?)
            .filter(|decoder| address - decoder.start < decoder.length)
    }

    /// First decoded address above `address`: a range that starts outside all BARs may run into one.
    pub(crate) fn next_start(&self, address: u64) -> Option<u64> {
        let after = self
            .decoders
            .partition_point(|decoder| decoder.start <= address);
        self.decoders.get(after).map(|decoder| decoder.start)
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
}

/// A function's memory BARs.
pub(crate) type Bars = Vec<BarRoute>;
