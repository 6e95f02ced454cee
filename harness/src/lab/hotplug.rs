//! Endpoints leave a running guest, by request or by surprise, and come back.

use std::time::{Duration, Instant};

use super::guest_port::GuestPort;
use super::machine::Machine;
use super::{Lab, LabError, arrival, wait};
use crate::qemu::qmp::QmpError;
use crate::wait::Deadline;

/// Until a slot whose power indicator blinks is asked again.
const SLOT_BUSY: Duration = Duration::from_millis(50);

impl Lab {
    /// Unplugs endpoint `name` from the guest in order, then stops its server and removes it from the fabric.
    /// [`attach`](Self::attach) plugs it in again.
    ///
    /// # Errors
    /// A guest that does not let go, no such endpoint, or one with MSI-X, whose unplug QEMU does not survive. Another call
    /// asks again.
    pub fn detach(&mut self, name: &str) -> Result<(), LabError> {
        self.check_can_leave(name)?;
        let device = self.devices.device(name)?;
        let deadline = Deadline::new(format!("the guest to let go of {name}"), wait::HOTPLUG);
        let machine = self.machine()?;
        // A guest that took too long for a call before this one may have let go since.
        if device.is_connected() {
            unplug(machine, &device.qemu_id(), &deadline).map_err(|e| machine.cause(e.into()))?;
        }
        self.put_away(name)?;
        self.device_log
            .note(&format!("{name} is detached and its server stopped"));
        Ok(())
    }

    /// Takes endpoint `name` out without a word to the guest: a surprise removal (PCI Express Base 6.0, section 6.7.6,
    /// "Async Removal"). [`attach`](Self::attach) plugs it in again.
    ///
    /// First its link goes down: its DMA stops wherever it is, what the CPU reads from it by counted accesses is all ones,
    /// and requests of peers to it end as Unsupported Request. Then its slot is empty, and the guest is told that presence
    /// has changed. Linux's pciehp calls that "Card not present", marks the device as disconnected and unbinds its driver,
    /// all after this has returned: what the guest makes of it is the scenario's to wait for.
    ///
    /// A BAR that is mapped into the guest is out of its CPU's reach when QEMU lets go of the device, some milliseconds
    /// after the link went down and before this returns. Until then the CPU reads what is in the memory, and its stores
    /// land there; afterwards it reads all ones.
    ///
    /// Waits first until the guest is done with what it does about the slot; after an `attach`, pciehp takes a second.
    ///
    /// # Errors
    /// As [`detach`](Self::detach); a guest without pciehp. If it failed with the link down, another call does the rest.
    pub fn surprise_remove(&mut self, name: &str) -> Result<(), LabError> {
        self.check_can_leave(name)?;
        let device = self.devices.device(name)?;
        let id = device.qemu_id();
        let slot = self.guest()?.slot(name)?.clone();
        let machine = self.machine()?;
        let port = GuestPort::find(&machine.agent, &slot).map_err(|e| machine.cause(e))?;
        if self.devices.has_link(name) {
            port.wait_on().map_err(|e| machine.cause(e))?;
            self.device_log
                .note(&format!("{name} is removed by surprise"));
        }
        // From here on nothing of the guest's memory is touched: the guest takes it for free soon.
        self.devices.link_down(name)?;
        let mut events = machine.qemu.qmp.events();
        // Else a call before this one got as far as that.
        let is_in_qemu = device.is_connected();
        if is_in_qemu {
            port.empty().map_err(|e| machine.cause(e))?;
        }
        port.tell().map_err(|e| machine.cause(e))?;
        if is_in_qemu {
            let deadline = Deadline::new(format!("QEMU to let go of {name}"), wait::HOTPLUG);
            events
                .wait("DEVICE_DELETED", &deadline, |data| data["device"] == id)
                .map_err(|e| machine.cause(e.into()))?;
        }
        self.put_away(name)
    }

    /// Plugs endpoint `name`, which was detached or removed, into its slot again, and has the guest look for it: a
    /// hot-add. It is the same one, after a loss of power: an SSD in memory has what it held, but for what a `write_cache`
    /// or a PMR forgets, and counts an unsafe shutdown if its driver was not asked; an NVRAM card has what it held if it
    /// was armed, and 0xff everywhere if it was not.
    ///
    /// Waits first until the guest has turned the slot off; after a surprise removal, pciehp takes a second.
    ///
    /// # Errors
    /// What is no endpoint of the lab, or is plugged in; a guest without pciehp. What QEMU refuses is out of the lab as
    /// before; if it is the guest that does not find the endpoint, that is plugged in.
    pub fn attach(&mut self, name: &str) -> Result<(), LabError> {
        let slot = self.devices.slot_of_removed(name)?;
        let machine = self.machine()?;
        let port = GuestPort::find(&machine.agent, &slot).map_err(|e| machine.cause(e))?;
        port.wait_off().map_err(|e| machine.cause(e))?;
        self.devices.plug_again(name)?;
        let deadline = Deadline::new("QEMU to add an endpoint", wait::HOTPLUG);
        let argument = self.devices.device_argument(name)?;
        let machine = self.machine()?;
        let added = machine.qemu.qmp.device_add(argument, &deadline);
        if let Err(error @ QmpError::Refused { .. }) = added {
            let error = machine.cause(error.into());
            self.devices.remove(name)?;
            return Err(error);
        }
        // Also where it is not known whether QEMU has it: it must not lose the server.
        let arrived = [(name.to_owned(), slot)];
        self.slots.extend_from_slice(&arrived);
        self.device_log.note(&format!("{name} is plugged in again"));
        let machine = self.machine()?;
        added
            .map_err(LabError::from)
            .and_then(|()| arrival::scan(&machine.agent, &arrived))
            .map_err(|error| machine.cause(error))
    }

    /// QEMU 11.1.3 (hw/vfio-user) takes the Pending Bit Array's region out of a BAR that its own teardown has freed
    /// before, and aborts on an assertion, whenever a vfio-user device with MSI-X is unplugged.
    fn check_can_leave(&self, name: &str) -> Result<(), LabError> {
        if self.devices.device(name)?.function().msix_vectors() == 0 {
            return Ok(());
        }
        Err(LabError::BadOption(format!(
            "QEMU aborts when an endpoint with MSI-X is unplugged, so {name} cannot be detached; give it \
             interrupts = \"intx\" in the topology"
        )))
    }

    /// After QEMU has let go of `name`.
    fn put_away(&mut self, name: &str) -> Result<(), LabError> {
        let device = self.devices.device(name)?;
        device.wait_disconnected(Instant::now() + wait::HOTPLUG)?;
        self.devices.remove(name)?;
        self.slots.retain(|(endpoint, _)| endpoint != name);
        Ok(())
    }
}

/// Unplugs device `id`. Its slot takes no request while its power indicator blinks, for some seconds after a
/// hot-add (PCI Express Base 6.0, section 6.7.1.1.2); nothing tells when it stops.
fn unplug(machine: &Machine, id: &str, deadline: &Deadline) -> Result<(), QmpError> {
    loop {
        match machine.qemu.qmp.device_del(id, deadline) {
            Err(QmpError::Refused { description, .. })
                if description.contains("blinking") && deadline.check().is_ok() =>
            {
                std::thread::sleep(SLOT_BUSY);
            }
            other => return other,
        }
    }
}
