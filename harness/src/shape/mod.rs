//! The machine without its endpoints, as QEMU needs it, and the key that saved base images go by.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::topology::Topology;

/// The tree of ports, the memory and the processors of a machine: all that a saved base image depends on
/// besides QEMU, kernel and initramfs. Topologies that differ only in endpoints have the same shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineShape {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u32,
    /// QEMU's CPU model as the topology gives it.
    pub cpu: String,
    /// Bytes of 64-bit prefetchable address space behind each slot, a power of two.
    pub window: u64,
    /// Root ports with what hangs below them.
    pub root_ports: Vec<PortShape>,
}

/// A root port or downstream port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortShape {
    /// Name in the topology.
    pub name: String,
    /// The switch connected to it; a port without one is a slot.
    pub switch: Option<SwitchShape>,
}

/// A switch.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SwitchShape {
    /// Name in the topology.
    pub name: String,
    /// Downstream ports.
    pub ports: Vec<PortShape>,
}

/// A port that can hold an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Name of the port in the topology.
    pub port: String,
    /// QEMU's id of the port, which is the id of the bus below it.
    pub bus: String,
    /// Physical slot number (Slot Capabilities, PCI Express Base 6.0, section 7.5.3.9): the guest's
    /// `/sys/bus/pci/slots/NUMBER`.
    pub number: u16,
    /// Device and function numbers of the bridges from the root complex down to the port, as (device,
    /// function); bus numbers are the guest's choice.
    pub path: Vec<(u8, u8)>,
}

/// Where an endpoint's vfio-user server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointSocket<'a> {
    /// In Linux's abstract namespace, under this name (without the leading zero byte).
    Abstract(&'a str),
    /// In the file system.
    Path(&'a Path),
}

impl Topology {
    /// The machine without its endpoints.
    pub fn shape(&self) -> MachineShape {
        unimplemented!()
    }
}

impl MachineShape {
    /// Canonical JSON: equal for equal shapes only. Part of the key of a saved base image.
    pub fn canonical(&self) -> String {
        unimplemented!()
    }

    /// QEMU's arguments for machine, memory, processors and ports. Kernel, console, accelerator and
    /// character devices are the caller's to add.
    pub fn qemu_arguments(&self) -> Vec<String> {
        unimplemented!()
    }

    /// QEMU's arguments that put a placeholder into each slot, for the boot that base images are saved
    /// from: the firmware sizes each slot's window by it.
    pub fn placeholder_arguments(&self) -> Vec<String> {
        unimplemented!()
    }

    /// Every port that can hold an endpoint, in the order of the tree.
    pub fn slots(&self) -> Vec<Slot> {
        unimplemented!()
    }

    /// The slot at `port`, if it is one.
    pub fn slot(&self, port: &str) -> Option<Slot> {
        self.slots().into_iter().find(|slot| slot.port == port)
    }
}

/// The arguments of `device_add`, and of `-device` in its JSON form, that plug the vfio-user device at
/// `socket` into `slot` under QEMU id `id`.
pub fn endpoint_device_json(
    slot: &Slot,
    id: &str,
    socket: EndpointSocket<'_>,
) -> serde_json::Value {
    let _ = (slot, id, socket);
    unimplemented!()
}
