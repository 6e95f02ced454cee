//! QEMU's arguments for a [`MachineShape`].

use p2plab_images::Accelerator;

use super::{MachineShape, PortShape, Slot, SwitchShape};
use crate::topology::sizes::MIB;

/// Device number of the first root port on the root complex's bus. Those below it are left for the devices
/// that the lab itself needs, those from 0x18 up for the chipset's.
const FIRST_ROOT_PORT: u8 = 0x08;

/// Address bits of the guest's processors. QEMU gives a TCG guest 40, and the firmware puts 64-bit windows
/// at the top: on a processor that calls itself AMD's, into the HyperTransport hole below 1 TiB, where the
/// kernel cannot assign BARs. 43 bits lead out of it.
const PHYSICAL_BITS: u32 = 43;

/// Before all devices that are to be behind it. With caching mode the guest's kernel announces what it maps, too, and
/// not only what it unmaps: QEMU passes each mapping on to the endpoints, as they look up addresses themselves.
const IOMMU: &str = "intel-iommu,caching-mode=on";

/// Something on a PCI bus of the machine.
pub(super) struct Placed<'a> {
    kind: Kind<'a>,
    /// QEMU's id, also of the bus below it.
    id: String,
    /// QEMU's id of the bus that it is on.
    bus: String,
    /// (device, function) of each bridge down to and including this one.
    path: Vec<(u8, u8)>,
    /// Physical slot number; 0 for an upstream port.
    number: u16,
    /// Port number (Link Capabilities), unique within its switch or the root complex.
    port_number: u8,
}

enum Kind<'a> {
    RootPort(&'a PortShape),
    Upstream,
    Downstream(&'a PortShape),
}

impl Placed<'_> {
    /// The slot that this is, if it is one.
    pub(super) fn into_slot(self) -> Option<Slot> {
        match self.kind {
            Kind::RootPort(port) | Kind::Downstream(port) if port.switch.is_none() => Some(Slot {
                port: port.name.clone(),
                bus: self.id,
                number: self.number,
                path: self.path,
            }),
            _ => None,
        }
    }

    fn argument(&self) -> String {
        let Self {
            id,
            bus,
            number,
            port_number,
            ..
        } = self;
        let (device, function) = self.path.last().copied().unwrap_or_default();
        let place = format!("id={id},bus={bus},addr={device:#04x}.{function}");
        // One chassis for all: QEMU wants (chassis, slot) unique, and the guest names slots by their number.
        let slot = format!("chassis=1,slot={number},port={port_number}");
        match self.kind {
            Kind::RootPort(_) => format!("pcie-root-port,{place},{slot}"),
            Kind::Upstream => format!("x3130-upstream,{place},port={port_number}"),
            Kind::Downstream(_) => format!("xio3130-downstream,{place},{slot}"),
        }
    }
}

/// All ports of the tree, each after the one above it.
pub(super) fn place(shape: &MachineShape) -> Vec<Placed<'_>> {
    let mut placed = Vec::new();
    for (port, device) in shape.root_ports.iter().zip(FIRST_ROOT_PORT..) {
        let id = port_id(&port.name);
        push(
            &mut placed,
            Kind::RootPort(port),
            id,
            "pcie.0",
            vec![(device, 0)],
            device,
        );
        place_below(&mut placed, port);
    }
    placed
}

/// The switch below the port that was placed last, if it has one.
fn place_below<'a>(placed: &mut Vec<Placed<'a>>, port: &'a PortShape) {
    let (Some(switch), Some(above)) = (&port.switch, placed.last()) else {
        return;
    };
    let bus = above.id.clone();
    let mut upstream = above.path.clone();
    upstream.push((0, 0));
    let id = switch_id(switch);
    push(
        placed,
        Kind::Upstream,
        id.clone(),
        &bus,
        upstream.clone(),
        0,
    );
    for (port, device) in switch.ports.iter().zip(0u8..) {
        let mut path = upstream.clone();
        path.push((device, 0));
        let kind = Kind::Downstream(port);
        push(
            placed,
            kind,
            port_id(&port.name),
            &id,
            path,
            device.saturating_add(1),
        );
        place_below(placed, port);
    }
}

fn push<'a>(
    placed: &mut Vec<Placed<'a>>,
    kind: Kind<'a>,
    id: String,
    bus: &str,
    path: Vec<(u8, u8)>,
    port_number: u8,
) {
    let ports = placed.iter().filter(|placed| placed.number > 0).count();
    let number = match kind {
        Kind::Upstream => 0,
        _ => u16::try_from(ports).unwrap_or(u16::MAX).saturating_add(1),
    };
    placed.push(Placed {
        kind,
        id,
        bus: bus.to_owned(),
        path,
        number,
        port_number,
    });
}

/// A topology's names may begin with any character, QEMU's ids with a letter only; and a port must not be
/// taken for one of QEMU's own buses.
fn port_id(name: &str) -> String {
    format!("port-{name}")
}

fn switch_id(switch: &SwitchShape) -> String {
    format!("switch-{}", switch.name)
}

impl MachineShape {
    /// QEMU's arguments for machine, memory, processors and ports. Kernel, console, accelerator and
    /// character devices are the caller's to add; device numbers 1 to 7 of bus `pcie.0` are free for them.
    pub fn qemu_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "-nodefaults".to_owned(),
            "-no-user-config".to_owned(),
            "-display".to_owned(),
            "none".to_owned(),
            "-machine".to_owned(),
            "q35,usb=off,vmport=off,sata=off,smbus=off,memory-backend=ram".to_owned(),
            // Shared, so that endpoints reach guest memory through the descriptor.
            "-object".to_owned(),
            format!("memory-backend-memfd,id=ram,size={},share=on", self.memory),
            "-m".to_owned(),
            format!("{}M", self.memory / MIB),
            "-smp".to_owned(),
            self.cpus.to_string(),
            "-cpu".to_owned(),
            cpu_argument(&self.cpu, &p2plab_images::accelerator()),
            "-global".to_owned(),
            "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off".to_owned(),
        ];
        if self.iommu {
            arguments.extend(["-device".to_owned(), IOMMU.to_owned()]);
        }
        for placed in place(self) {
            arguments.extend(["-device".to_owned(), placed.argument()]);
        }
        arguments
    }

    /// QEMU's arguments that put a placeholder into each slot, for the boot that base images are saved
    /// from: the firmware sizes each slot's window by it.
    pub fn placeholder_arguments(&self) -> Vec<String> {
        let window = self
            .window
            .checked_next_power_of_two()
            .unwrap_or(self.window);
        // Not pci-testdev: its I/O BAR takes 4 KiB of I/O space in every bridge above it, and the firmware
        // hangs without a word when the 64 KiB are used up, below 16 slots. The memory is never touched,
        // so the host does not provide any.
        let placeholder = |slot: Slot| {
            let id = super::placeholder_memory_id(&slot);
            [
                "-object".to_owned(),
                format!("memory-backend-ram,id={id},size={window},reserve=off"),
                "-device".to_owned(),
                format!("ivshmem-plain,memdev={id},master=on,bus={}", slot.bus),
            ]
        };
        self.slots().into_iter().flat_map(placeholder).collect()
    }
}

fn cpu_argument(model: &str, accelerator: &Accelerator) -> String {
    match accelerator {
        _ if model.contains("phys-bits") => model.to_owned(),
        // The processor translates the guest's addresses, and cannot translate more than it has.
        Accelerator::Kvm => format!("{model},host-phys-bits=on"),
        Accelerator::Tcg(_) => format!("{model},phys-bits={PHYSICAL_BITS}"),
    }
}
