//! The machine without its endpoints, as QEMU needs it, and the key that saved base images go by.
//!
//! Every port below which no switch hangs is a slot. For the boot that a base image is saved from, each slot
//! holds a placeholder whose BAR makes the firmware give the slot a window in the 64-bit prefetchable address
//! space; endpoints that are hot-added later find room there.
//!
//! Slots are hot-plugged by PCI Express's own means (pciehp) and not by ACPI, so that root ports and
//! switch ports behave alike and the guest sees what a real machine's guest sees.

mod arguments;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::topology::{Switch, Topology};

/// Most switches on a path from the root complex to a slot.
pub const MAX_DEPTH: usize = 4;
/// Most root ports.
pub const MAX_ROOT_PORTS: usize = 16;
/// Most downstream ports of one switch: one for each device number of its internal bus.
pub const MAX_SWITCH_PORTS: usize = 32;
/// Most slots: each takes a bus number, a 32-bit window and a 64-bit window.
pub const MAX_SLOTS: usize = 64;

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
    /// The machine has an IOMMU. Not in the key of a machine without: there was none when the first images were saved.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
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
    /// Device and function number of each bridge from the root complex down to the port: root port, then
    /// for each switch its upstream and downstream port. Bus numbers are the guest's choice.
    pub path: Vec<(u8, u8)>,
}

/// How long QEMU waits for an endpoint's answer, in milliseconds: after a timeout it gives the device up for
/// good, and a loaded CI machine may keep a thread waiting for longer than the default of 5 s.
const MESSAGE_TIMEOUT: u32 = 60_000;

impl Topology {
    /// The machine without its endpoints.
    pub fn shape(&self) -> MachineShape {
        MachineShape {
            memory: self.guest.memory,
            cpus: self.guest.cpus,
            cpu: self.guest.cpu.clone(),
            window: self.guest.window,
            iommu: self.guest.iommu,
            root_ports: self
                .root_ports
                .iter()
                .map(|port| port_shape(&self.switches, &port.name, MAX_DEPTH))
                .collect(),
        }
    }
}

/// The port `name` with all below it. `depth` bounds the recursion also for a topology nobody has checked.
fn port_shape(switches: &[Switch], name: &str, depth: usize) -> PortShape {
    let switch = switches
        .iter()
        .find(|switch| switch.below == name)
        .filter(|_| depth > 0);
    PortShape {
        name: name.to_owned(),
        switch: switch.map(|switch| SwitchShape {
            name: switch.name.clone(),
            ports: switch
                .ports
                .iter()
                .map(|port| port_shape(switches, port, depth - 1))
                .collect(),
        }),
    }
}

impl MachineShape {
    /// Canonical JSON, part of the key of a saved base image: equal for machines that QEMU cannot tell
    /// apart. Names do not count, so topologies that call their ports differently share an image; what
    /// QEMU is told does, so an image ends with the version of this code that it was made for.
    pub fn canonical(&self) -> String {
        let nameless = Self {
            root_ports: self.root_ports.iter().enumerate().map(nameless).collect(),
            ..self.clone()
        };
        let arguments = nameless.qemu_arguments();
        let placeholders = nameless.placeholder_arguments();
        json!({ "shape": nameless, "arguments": arguments, "placeholders": placeholders })
            .to_string()
    }

    /// Every port that can hold an endpoint, in the order of the tree.
    pub fn slots(&self) -> Vec<Slot> {
        let placed = arguments::place(self);
        placed
            .into_iter()
            .filter_map(arguments::Placed::into_slot)
            .collect()
    }

    /// The slot at `port`, if it is one.
    pub fn slot(&self, port: &str) -> Option<Slot> {
        self.slots().into_iter().find(|slot| slot.port == port)
    }
}

/// `port` with positions for names.
fn nameless((index, port): (usize, &PortShape)) -> PortShape {
    fn below(name: String, port: &PortShape) -> PortShape {
        let switch = port.switch.as_ref().map(|switch| SwitchShape {
            name: format!("{name}s"),
            ports: switch
                .ports
                .iter()
                .enumerate()
                .map(|(index, port)| below(format!("{name}.{index}"), port))
                .collect(),
        });
        PortShape { name, switch }
    }
    below(index.to_string(), port)
}

/// QEMU's id for the endpoint called `name`.
pub fn endpoint_id(name: &str) -> String {
    format!("endpoint-{name}")
}

/// QEMU's id for the memory object of the placeholder in `slot`.
pub(crate) fn placeholder_memory_id(slot: &Slot) -> String {
    format!("placeholder-{}", slot.number)
}

/// The arguments of `device_add`, and of `-device` in its JSON form, that plug the vfio-user device at
/// `socket` into `slot` under QEMU id `id` (see [`endpoint_id`]). A path that is not UTF-8 cannot be said
/// in JSON; it is passed on with replacement characters, and QEMU will not find it.
pub fn endpoint_device_json(slot: &Slot, id: &str, socket: &Path) -> serde_json::Value {
    json!({
        "driver": "vfio-user-pci",
        "id": id,
        "bus": slot.bus,
        "socket": { "type": "unix", "path": socket.to_string_lossy() },
        "x-msg-timeout": MESSAGE_TIMEOUT,
        // No endpoint has an option ROM; looking for one costs time and a line in the log.
        "rombar": 0,
    })
}

#[cfg(test)]
mod tests;
