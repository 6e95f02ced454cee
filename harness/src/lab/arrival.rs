//! Endpoints' arrival in a guest that was restored from a base image.
//!
//! Everything here asks the agent for files, and starts no process in the guest: after a restore the emulator has
//! translated nothing yet, and the first process takes it some tenths of a second.

use std::time::{Duration, Instant};

use p2plab_guest::protocol::EntryKind;
use p2plab_nvram::spec::{MEMORY_BAR, REGISTERS_BAR};

use super::{GuestNvme, GuestNvram, LabError};
use crate::agent::{AgentClient, AgentError};
use crate::shape::Slot;
use crate::wait;

/// How long until sysfs is looked at again: it has no notification for most of what drivers create.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Longest file of sysfs that is read.
const LONGEST: usize = 4096;

/// Has the guest scan the bus of each slot as soon as the slot has power.
///
/// Linux's pciehp would find the endpoints by itself, 1.1 s later: QEMU's xio3130 ports do not say that they
/// report an active link (Link Capabilities, bit 20), and then the kernel waits for as long as a link may take to
/// train. When it has waited, it finds the endpoint there and is content.
pub(super) fn scan(agent: &AgentClient, slots: &[(String, Slot)]) -> Result<(), LabError> {
    let until = Instant::now() + wait::HOTPLUG;
    for (name, slot) in slots {
        let folder = format!("/sys/bus/pci/slots/{}", slot.number);
        look_until(until, &format!("power in the slot of {name}"), || {
            let power = read(agent, &format!("{folder}/power"))?;
            Ok((power.as_deref() == Some("1")).then_some(()))
        })?;
        let address = read(agent, &format!("{folder}/address"))?;
        if let Some((bus, _)) = address.as_deref().and_then(|a| a.rsplit_once(':')) {
            let rescan = format!("/sys/class/pci_bus/{bus}/rescan");
            found(agent.write_attribute(b"1", &rescan, wait::AGENT_COMMAND))?;
        }
    }
    Ok(())
}

/// Waits until the nvme driver has bound the endpoint `name` in `slot` and its first namespace is a block device.
pub(super) fn nvme(agent: &AgentClient, name: &str, slot: &Slot) -> Result<GuestNvme, LabError> {
    let what = format!("the nvme driver to bind {name}");
    look_until(Instant::now() + wait::HOTPLUG, &what, || {
        look_for_nvme(agent, slot)
    })
}

/// Waits until the guest has found the NVRAM card `name` in `slot`, with the files of its BARs.
pub(super) fn nvram(agent: &AgentClient, name: &str, slot: &Slot) -> Result<GuestNvram, LabError> {
    let what = format!("the guest to find {name}");
    look_until(Instant::now() + wait::HOTPLUG, &what, || {
        let path = format!("/sys/bus/pci/slots/{}/address", slot.number);
        let Some(address) = read(agent, &path)? else {
            return Ok(None);
        };
        let address = format!("{address}.0");
        let folder = format!("/sys/bus/pci/devices/{address}");
        let memory = format!("resource{MEMORY_BAR}");
        // A BAR that got no address has no file.
        let file = entry(agent, &folder, |name| name == memory)?;
        Ok(file.map(|_| GuestNvram {
            registers: format!("{folder}/resource{REGISTERS_BAR}"),
            memory: format!("{folder}/{memory}"),
            address,
            folder,
        }))
    })
}

fn look_for_nvme(agent: &AgentClient, slot: &Slot) -> Result<Option<GuestNvme>, LabError> {
    let path = format!("/sys/bus/pci/slots/{}/address", slot.number);
    let Some(address) = read(agent, &path)? else {
        return Ok(None);
    };
    let address = format!("{address}.0");
    let device = format!("/sys/bus/pci/devices/{address}");
    let Some(controller) = entry(agent, &format!("{device}/nvme"), |name| {
        name.starts_with("nvme")
    })?
    else {
        return Ok(None);
    };
    let prefix = format!("{controller}n");
    let folder = format!("{device}/nvme/{controller}");
    let Some(disk) = entry(agent, &folder, |name| name.starts_with(&prefix))? else {
        return Ok(None);
    };
    let nodes = found(agent.list("/dev", wait::AGENT_COMMAND))?.unwrap_or_default();
    let is_there = |node: &p2plab_guest::protocol::Entry| {
        node.name == disk && node.kind == EntryKind::BlockDevice
    };
    // The node is there a moment before the disk can be opened; the disk's backing device says that it can.
    let disk_folder = format!("/sys/class/block/{disk}");
    if !nodes.iter().any(is_there) || entry(agent, &disk_folder, |name| name == "bdi")?.is_none() {
        return Ok(None);
    }
    let p2pmem = format!("{device}/p2pmem");
    let allocate = entry(agent, &p2pmem, |name| name == "allocate")?;
    Ok(Some(GuestNvme {
        address,
        controller,
        block_device: format!("/dev/{disk}"),
        p2pmem: allocate.map(|name| format!("{p2pmem}/{name}")),
    }))
}

/// Looks until something is there.
pub(super) fn look_until<T>(
    until: Instant,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>, LabError>,
) -> Result<T, LabError> {
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        if Instant::now() >= until {
            return Err(LabError::GuestCondition {
                what: what.to_owned(),
                source: Box::new(AgentError::Deadline {
                    what: "sysfs does not show it".to_owned(),
                    after: wait::HOTPLUG,
                }),
            });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// What the guest refuses is what is not there, or not there yet.
pub(super) fn found<T>(result: Result<T, AgentError>) -> Result<Option<T>, LabError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(AgentError::Guest { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn read(agent: &AgentClient, path: &str) -> Result<Option<String>, LabError> {
    let bytes = found(agent.get(path, LONGEST, wait::AGENT_COMMAND))?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
}

/// The first entry of a directory that `is_wanted`.
fn entry(
    agent: &AgentClient,
    directory: &str,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<Option<String>, LabError> {
    let entries = found(agent.list(directory, wait::AGENT_COMMAND))?.unwrap_or_default();
    let names = entries.into_iter().map(|entry| entry.name);
    Ok(names.into_iter().find(|name| is_wanted(name)))
}
