//! The tree of ports and the paths through it.
//!
//! Ports are numbered in the order in which they were added. Transactions travel between *stations*: the
//! slots that endpoints are plugged into, and the root complex. A path is a list of port crossings; all
//! paths are computed once, when the tree is finished, so that routing costs the same in a tree of 64 ports
//! as in one of 2.

use serde::{Deserialize, Serialize};

use crate::fabric::FabricError;

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PortKind {
    /// Root port of the root complex.
    Root,
    /// Upstream port of a switch (USP).
    Upstream,
    /// Downstream port of a switch (DSP).
    Downstream,
    /// The port of an endpoint.
    Endpoint,
}

/// Direction of a packet on a port's link, as the port sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Received from the link.
    Ingress,
    /// Transmitted on the link.
    Egress,
}

impl Direction {
    /// The other one.
    pub(crate) fn reverse(self) -> Self {
        match self {
            Direction::Ingress => Direction::Egress,
            Direction::Egress => Direction::Ingress,
        }
    }
}

/// A port of the tree; endpoints' own ports come and go and are not among them.
#[derive(Clone, Debug)]
pub(crate) struct TreePort {
    pub name: String,
    pub kind: PortKind,
    /// For an upstream port: the port above its link. For a downstream port: its switch's upstream port.
    pub above: Option<usize>,
    /// What is below the link of a root or downstream port: the name of a switch.
    pub switch_below: Option<String>,
}

/// Where a packet comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Station {
    RootComplex,
    /// The endpoint below this root or downstream port.
    Slot(usize),
}

/// One crossing of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crossing {
    pub port: usize,
    pub direction: Direction,
}

/// The tree, still growing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    pub ports: Vec<TreePort>,
}

impl Tree {
    pub(crate) fn find(&self, name: &str) -> Result<usize, FabricError> {
        self.ports
            .iter()
            .position(|port| port.name == name)
            .ok_or_else(|| FabricError::UnknownPort(name.to_owned()))
    }

    pub(crate) fn add(
        &mut self,
        name: &str,
        kind: PortKind,
        above: Option<usize>,
    ) -> Result<usize, FabricError> {
        if self.find(name).is_ok() {
            return Err(FabricError::DuplicateName(name.to_owned()));
        }
        self.ports.push(TreePort {
            name: name.to_owned(),
            kind,
            above,
            switch_below: None,
        });
        Ok(self.ports.len() - 1)
    }

    /// Whether an endpoint can be plugged in below `port`.
    pub(crate) fn is_slot(&self, port: usize) -> bool {
        self.ports.get(port).is_some_and(|p| {
            matches!(p.kind, PortKind::Root | PortKind::Downstream) && p.switch_below.is_none()
        })
    }

    /// Ports from a slot up to its root port, both included.
    fn ascent(&self, slot: usize) -> Vec<usize> {
        std::iter::successors(Some(slot), |&port| self.ports[port].above).collect()
    }

    /// The root port above `port`.
    pub(crate) fn root_of(&self, port: usize) -> usize {
        self.ascent(port).last().copied().unwrap_or(port)
    }

    fn upward(&self, port: usize) -> Crossing {
        let direction = match self.ports[port].kind {
            PortKind::Upstream | PortKind::Endpoint => Direction::Egress,
            PortKind::Root | PortKind::Downstream => Direction::Ingress,
        };
        Crossing { port, direction }
    }

    fn path(&self, from: Station, to: Station) -> Vec<Crossing> {
        let ascent = |station| match station {
            Station::Slot(slot) => self.ascent(slot),
            Station::RootComplex => Vec::new(),
        };
        let (mut up, mut down) = (ascent(from), ascent(to));
        // A switch turns the packet round at the lowest upstream port that both share: neither that port
        // nor anything above it is crossed.
        let turn = up
            .iter()
            .find(|port| self.ports[**port].kind == PortKind::Upstream && down.contains(port))
            .copied();
        if let Some(turn) = turn {
            up.truncate(up.iter().position(|p| *p == turn).unwrap_or(up.len()));
            down.truncate(down.iter().position(|p| *p == turn).unwrap_or(down.len()));
        }
        let descent = down.into_iter().rev().map(|port| {
            let up = self.upward(port);
            Crossing {
                port,
                direction: up.direction.reverse(),
            }
        });
        up.into_iter()
            .map(|port| self.upward(port))
            .chain(descent)
            .collect()
    }
}

/// All paths between stations.
#[derive(Debug)]
pub(crate) struct Paths {
    /// Row and column of each port that is a slot; 0 is the root complex.
    index: Vec<usize>,
    stations: usize,
    paths: Vec<Box<[Crossing]>>,
}

impl Paths {
    pub(crate) fn new(tree: &Tree) -> Self {
        let mut stations = vec![Station::RootComplex];
        let mut index = vec![0; tree.ports.len()];
        for (port, place) in index.iter_mut().enumerate() {
            if tree.is_slot(port) {
                *place = stations.len();
                stations.push(Station::Slot(port));
            }
        }
        let paths = stations
            .iter()
            .flat_map(|from| {
                stations
                    .iter()
                    .map(|to| tree.path(*from, *to).into_boxed_slice())
            })
            .collect();
        Self {
            index,
            stations: stations.len(),
            paths,
        }
    }

    fn row(&self, station: Station) -> usize {
        match station {
            Station::RootComplex => 0,
            Station::Slot(slot) => self.index.get(slot).copied().unwrap_or(0),
        }
    }

    pub(crate) fn between(&self, from: Station, to: Station) -> &[Crossing] {
        &self.paths[self.row(from) * self.stations + self.row(to)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn switch(tree: &mut Tree, name: &str, below: &str, ports: usize) {
        let above = tree.find(below).unwrap();
        tree.ports[above].switch_below = Some(name.to_owned());
        let usp = tree.add(name, PortKind::Upstream, Some(above)).unwrap();
        for port in 0..ports {
            tree.add(&format!("{name}.{port}"), PortKind::Downstream, Some(usp))
                .unwrap();
        }
    }

    fn two_roots() -> Tree {
        let mut tree = Tree::default();
        tree.add("rp0", PortKind::Root, None).unwrap();
        tree.add("rp1", PortKind::Root, None).unwrap();
        switch(&mut tree, "a", "rp0", 3);
        switch(&mut tree, "b", "a.2", 2);
        switch(&mut tree, "c", "rp1", 2);
        tree
    }

    fn show(tree: &Tree, from: Station, to: Station) -> String {
        Paths::new(tree)
            .between(from, to)
            .iter()
            .map(|c| {
                let sign = if c.direction == Direction::Ingress {
                    '>'
                } else {
                    '<'
                };
                format!("{sign}{}", tree.ports[c.port].name)
            })
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn paths_turn_at_the_lowest_common_switch() {
        let tree = two_roots();
        let slot = |name| Station::Slot(tree.find(name).unwrap());
        assert_eq!(show(&tree, slot("a.0"), slot("a.1")), ">a.0 <a.1");
        assert_eq!(
            show(&tree, slot("a.0"), Station::RootComplex),
            ">a.0 <a >rp0"
        );
        assert_eq!(
            show(&tree, Station::RootComplex, slot("b.1")),
            "<rp0 >a <a.2 >b <b.1"
        );
        assert_eq!(show(&tree, slot("a.0"), slot("b.1")), ">a.0 <a.2 >b <b.1");
        assert_eq!(show(&tree, slot("b.0"), slot("b.1")), ">b.0 <b.1");
        assert_eq!(
            show(&tree, slot("b.0"), slot("c.1")),
            ">b.0 <b >a.2 <a >rp0 <rp1 >c <c.1"
        );
    }

    proptest! {
        /// In a random tree, the way back is the way there reversed, and no port is crossed twice.
        #[test]
        fn paths_are_symmetric(parents in prop::collection::vec((0usize..100, 1usize..4), 1..8)) {
            let mut tree = Tree::default();
            tree.add("rp0", PortKind::Root, None).unwrap();
            tree.add("rp1", PortKind::Root, None).unwrap();
            for (number, (parent, ports)) in parents.into_iter().enumerate() {
                let free: Vec<_> = (0..tree.ports.len()).filter(|p| tree.is_slot(*p)).collect();
                let Some(above) = free.get(parent % free.len().max(1)) else { break };
                let below = tree.ports[*above].name.clone();
                switch(&mut tree, &format!("s{number}"), &below, ports);
            }
            let paths = Paths::new(&tree);
            let slots: Vec<_> = (0..tree.ports.len()).filter(|p| tree.is_slot(*p)).collect();
            for a in &slots {
                for b in &slots {
                    let there = paths.between(Station::Slot(*a), Station::Slot(*b));
                    let mut back = paths.between(Station::Slot(*b), Station::Slot(*a)).to_vec();
                    back.reverse();
                    if a != b {
                        let reversed: Vec<_> = back
                            .iter()
                            .map(|c| Crossing { port: c.port, direction: c.direction.reverse() })
                            .collect();
                        prop_assert_eq!(there, reversed.as_slice());
                        let mut seen: Vec<_> = there.iter().map(|c| c.port).collect();
                        seen.sort_unstable();
                        seen.dedup();
                        prop_assert_eq!(seen.len(), there.len());
                    }
                }
            }
        }
    }
}
