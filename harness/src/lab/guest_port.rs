//! The hot-plug capable port above a slot, as the guest has it: its Slot Control register, and the thread of Linux's
//! pciehp that looks after it.

use std::time::Instant;

use super::arrival::{found, look_until, read};
use super::{LabError, wait};
use crate::agent::AgentClient;
use crate::shape::Slot;

/// Capabilities Pointer of the configuration header (PCI Express Base 6.0, section 7.5.1.1.11).
const CAPABILITIES_POINTER: usize = 0x34;
/// Capability ID of the PCI Express Capability structure (section 7.5.3.1).
const PCI_EXPRESS: u8 = 0x10;
/// Where Slot Control lies in it (section 7.5.3.10).
const SLOT_CONTROL: usize = 0x18;
/// Capabilities that fit into the 256 bytes: a longer list is a loop.
const MOST_CAPABILITIES: usize = 48;
/// Bytes of configuration space that capabilities lie in.
const CONFIGURATION: usize = 256;

/// Fields of Slot Control.
const HOT_PLUG_INTERRUPT_ENABLE: u16 = 1 << 5;
const POWER_INDICATOR_CONTROL: u16 = 3 << 8;
const POWER_INDICATOR_ON: u16 = 1 << 8;
const POWER_INDICATOR_OFF: u16 = 3 << 8;
/// Set: power is off.
const POWER_CONTROLLER_CONTROL: u16 = 1 << 10;

/// A port, found in the guest.
pub(super) struct GuestPort<'a> {
    agent: &'a AgentClient,
    slot: &'a Slot,
    /// Its configuration space in sysfs.
    config: String,
    /// Offset of Slot Control in it.
    slot_control: usize,
    /// What the kernel says of the thread of the port's hot-plug interrupt, and of those of other ports that share its
    /// number (which INTx may): nothing tells them apart.
    threads: Vec<String>,
}

impl<'a> GuestPort<'a> {
    /// Looks for the port of `slot`.
    pub(super) fn find(agent: &'a AgentClient, slot: &'a Slot) -> Result<Self, LabError> {
        let missing = |what: &str| {
            let number = slot.number;
            LabError::Unexpected(format!("the guest has no {what} for slot {number}"))
        };
        let path = format!("/sys/bus/pci/slots/{}/address", slot.number);
        let address = read(agent, &path)?.ok_or_else(|| missing("hot-plug driver (pciehp)"))?;
        let (bus, _) = address.rsplit_once(':').ok_or_else(|| missing("bus"))?;
        let folder = format!("/sys/class/pci_bus/{bus}/device");
        let config = format!("{folder}/config");
        let bytes = agent.get(&config, CONFIGURATION, wait::AGENT_COMMAND)?;
        let capability = express_capability(&bytes).ok_or_else(|| missing("port"))?;
        let threads = find_threads(agent, &folder)?;
        if threads.is_empty() {
            return Err(missing("hot-plug interrupt"));
        }
        Ok(Self {
            agent,
            slot,
            config,
            slot_control: capability.saturating_add(SLOT_CONTROL),
            threads,
        })
    }

    /// Waits until the slot has power and the guest is at rest about it.
    pub(super) fn wait_on(&self) -> Result<(), LabError> {
        self.wait_at_rest("have power", POWER_INDICATOR_ON)
    }

    /// Waits until the slot is empty, without power, and the guest is at rest about it. After a removal, pciehp takes
    /// a second to get there, and does not hear of what is plugged in meanwhile.
    pub(super) fn wait_off(&self) -> Result<(), LabError> {
        let off = POWER_INDICATOR_OFF | POWER_CONTROLLER_CONTROL;
        self.wait_at_rest("be without power", off)
    }

    /// Has QEMU take out what is in the slot, unnoticed by the guest until [`tell`](Self::tell).
    ///
    /// QEMU has no command for a removal that nobody was asked about. It takes a device out as soon as software turns
    /// the slot's power and its power indicator off, which a driver does last (hw/pci/pcie.c,
    /// pcie_cap_slot_write_config). Here it is written behind the driver's back, with the hot-plug interrupt off until
    /// the register has its old contents again. So all that pciehp finds is the end: Presence Detect Changed, nothing in
    /// the slot, and a slot control that says that the power was never turned off.
    pub(super) fn empty(&self) -> Result<(), LabError> {
        let before = self.control()?;
        let kept = before & !(HOT_PLUG_INTERRUPT_ENABLE | POWER_INDICATOR_CONTROL);
        self.set_control(kept | POWER_INDICATOR_OFF | POWER_CONTROLLER_CONTROL)
    }

    /// Has the guest find the slot empty, if [`empty`](Self::empty) has emptied it: the register gets back what it has
    /// while an endpoint is in use ([`wait_on`](Self::wait_on)). A guest that knows already is left alone.
    pub(super) fn tell(&self) -> Result<(), LabError> {
        let before = self.control()?;
        if before & HOT_PLUG_INTERRUPT_ENABLE != 0 {
            return Ok(());
        }
        let kept = before & !(POWER_INDICATOR_CONTROL | POWER_CONTROLLER_CONTROL);
        let in_use = kept | HOT_PLUG_INTERRUPT_ENABLE | POWER_INDICATOR_ON;
        // Twice: without it the slot is dead for the guest.
        self.set_control(in_use)
            .or_else(|_| self.set_control(in_use))
    }

    /// A thread that sleeps waits for its interrupt; in all other waits of pciehp it cannot be interrupted.
    fn wait_at_rest(&self, what: &str, expected: u16) -> Result<(), LabError> {
        let what = format!("slot {} to {what}", self.slot.number);
        let mask = POWER_INDICATOR_CONTROL | POWER_CONTROLLER_CONTROL;
        look_until(Instant::now() + wait::HOTPLUG, &what, || {
            if self.control()? & mask != expected {
                return Ok(None);
            }
            for thread in &self.threads {
                let stat = read(self.agent, thread)?.unwrap_or_default();
                let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
                if !state.is_some_and(|state| state.starts_with('S')) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    fn control(&self) -> Result<u16, LabError> {
        let bytes = self
            .agent
            .get(&self.config, CONFIGURATION, wait::AGENT_COMMAND)?;
        word(&bytes, self.slot_control).ok_or_else(|| {
            LabError::Unexpected(format!("{} has {} bytes", self.config, bytes.len()))
        })
    }

    fn set_control(&self, value: u16) -> Result<(), LabError> {
        let (bytes, at) = (value.to_le_bytes(), self.slot_control as u64);
        self.agent
            .write_at(&bytes, &self.config, at, wait::AGENT_COMMAND)?;
        Ok(())
    }
}

/// The states of the threads of pciehp's interrupt: `irq/NUMBER-pciehp`.
fn find_threads(agent: &AgentClient, folder: &str) -> Result<Vec<String>, LabError> {
    let mut threads = Vec::new();
    let messages = found(agent.list(&format!("{folder}/msi_irqs"), wait::AGENT_COMMAND))?;
    let mut numbers: Vec<String> = messages
        .unwrap_or_default()
        .into_iter()
        .map(|e| e.name)
        .collect();
    numbers.extend(read(agent, &format!("{folder}/irq"))?);
    for process in agent.list("/proc", wait::AGENT_COMMAND)? {
        if !process.name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let name = read(agent, &format!("/proc/{}/comm", process.name))?.unwrap_or_default();
        let number = name
            .strip_prefix("irq/")
            .and_then(|name| name.strip_suffix("-pciehp"));
        if number.is_some_and(|number| numbers.iter().any(|n| n == number)) {
            threads.push(format!("/proc/{}/stat", process.name));
        }
    }
    Ok(threads)
}

/// Offset of the PCI Express Capability structure.
fn express_capability(config: &[u8]) -> Option<usize> {
    let mut at = usize::from(*config.get(CAPABILITIES_POINTER)?);
    for _ in 0..MOST_CAPABILITIES {
        // The two lowest bits are reserved.
        at &= !3;
        let (id, next) = (*config.get(at)?, *config.get(at + 1)?);
        if at == 0 {
            return None;
        }
        if id == PCI_EXPRESS {
            return Some(at);
        }
        at = usize::from(next);
    }
    None
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_found_and_a_loop_ends() {
        let mut config = [0u8; CONFIGURATION];
        assert_eq!(express_capability(&config), None);
        config[CAPABILITIES_POINTER] = 0x40;
        config[0x40..0x42].copy_from_slice(&[5, 0x53]);
        config[0x50..0x52].copy_from_slice(&[PCI_EXPRESS, 0]);
        assert_eq!(express_capability(&config), Some(0x50));
        config[0x50..0x52].copy_from_slice(&[1, 0x40]);
        assert_eq!(express_capability(&config), None);
        assert_eq!(express_capability(&config[..0x41]), None);
    }
}
