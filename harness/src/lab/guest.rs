//! The guest's half of a lab, as a scenario uses it: commands, and what the guest calls the endpoints.

use std::time::Duration;

use super::{LabError, arrival};
use crate::agent::{AgentClient, Command, Output};
use crate::shape::Slot;

/// A running guest.
pub struct Guest<'a> {
    pub(super) agent: &'a AgentClient,
    pub(super) slots: &'a [(String, Slot)],
    pub(super) has_system: bool,
}

/// Where the agent mounts the system image.
pub(super) const SYSTEM_ROOT: &str = "/system";

/// What the guest calls an NVMe endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNvme {
    /// PCI address, such as `0000:04:00.0`.
    pub address: String,
    /// Controller, such as `nvme0`.
    pub controller: String,
    /// Block device of its first namespace, such as `/dev/nvme0n1`.
    pub block_device: String,
    /// The file whose mapping is memory of its CMB, where the kernel has registered one; with our patches to the nvme
    /// driver, of its PMR where it has no CMB, or the CMB is full.
    pub p2pmem: Option<String>,
}

/// What the guest calls an NVRAM card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNvram {
    /// PCI address, such as `0000:04:00.0`.
    pub address: String,
    /// The function's folder in sysfs.
    pub folder: String,
    /// The file whose mapping is its registers, once the function is enabled.
    pub registers: String,
    /// The file whose mapping is its memory, once the function is enabled.
    pub memory: String,
}

impl Guest<'_> {
    /// The agent's client, for all that has no short form here.
    pub fn agent(&self) -> &AgentClient {
        self.agent
    }

    /// Runs a line of shell, which must exit with status 0, and returns its standard output.
    ///
    /// # Errors
    /// The agent's; a status other than 0 comes with standard error.
    pub fn sh(&self, line: &str) -> Result<String, LabError> {
        Ok(self.agent.check(&Command::shell(line))?.text())
    }

    /// Runs a line of shell, whatever its status.
    ///
    /// # Errors
    /// The agent's.
    pub fn try_sh(&self, line: &str) -> Result<Output, LabError> {
        Ok(self.agent.run(&Command::shell(line))?)
    }

    /// Runs a line of shell with a deadline of its own.
    ///
    /// # Errors
    /// The agent's.
    pub fn sh_within(&self, line: &str, deadline: Duration) -> Result<String, LabError> {
        Ok(self
            .agent
            .check(&Command::shell(line).deadline(deadline))?
            .text())
    }

    /// Runs a line of shell in the system image, where Debian's tools are: `nvme list`, `fio ...`. It must exit with
    /// status 0; returns its standard output. The image has the guest's `/dev`, `/proc`, `/sys` and `/tmp`,
    /// and is writable: what is written is kept in memory.
    ///
    /// # Errors
    /// [`LabError::BadOption`] where the topology asks for no system image; otherwise as [`sh`](Self::sh).
    pub fn system(&self, line: &str) -> Result<String, LabError> {
        Ok(self.agent.check(&self.in_system(line)?)?.text())
    }

    /// Runs a line of shell in the system image, whatever its status.
    ///
    /// # Errors
    /// As [`system`](Self::system), but for the status.
    pub fn try_system(&self, line: &str) -> Result<Output, LabError> {
        Ok(self.agent.run(&self.in_system(line)?)?)
    }

    /// Runs a line of shell in the system image with a deadline of its own.
    ///
    /// # Errors
    /// As [`system`](Self::system).
    pub fn system_within(&self, line: &str, deadline: Duration) -> Result<String, LabError> {
        let command = self.in_system(line)?.deadline(deadline);
        Ok(self.agent.check(&command)?.text())
    }

    fn in_system(&self, line: &str) -> Result<Command, LabError> {
        if !self.has_system {
            return Err(LabError::BadOption(
                "this guest has no system image; write `.system()` in its topology, or `system = true` under \
                 [guest] in its file"
                    .to_owned(),
            ));
        }
        let arguments = [SYSTEM_ROOT, "/bin/sh", "-c", line];
        Ok(Command::new("chroot").args(arguments))
    }

    /// Waits in the guest until the shell condition `condition` holds. The guest looks every 10 ms: sysfs has
    /// no notification for most of what drivers create.
    ///
    /// # Errors
    /// The agent's; a passed deadline names `what`.
    pub fn wait_until(
        &self,
        what: &str,
        condition: &str,
        deadline: Duration,
    ) -> Result<(), LabError> {
        let line = format!("until {condition}; do usleep 10000; done");
        self.agent
            .check(&Command::shell(line).deadline(deadline))
            .map_err(|error| LabError::GuestCondition {
                what: what.to_owned(),
                source: Box::new(error),
            })?;
        Ok(())
    }

    /// PCI address (`0000:04:00.0`) of the endpoint `name`.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`], or the agent's.
    pub fn pci_address(&self, name: &str) -> Result<String, LabError> {
        let slot = self.slot(name)?;
        let text = self.sh(&format!("cat /sys/bus/pci/slots/{}/address", slot.number))?;
        Ok(format!("{}.0", text.trim()))
    }

    pub(super) fn slot(&self, name: &str) -> Result<&Slot, LabError> {
        self.slots
            .iter()
            .find(|(endpoint, _)| endpoint == name)
            .map(|(_, slot)| slot)
            .ok_or_else(|| LabError::UnknownEndpoint {
                name: name.to_owned(),
                names: self
                    .slots
                    .iter()
                    .map(|(endpoint, _)| endpoint.clone())
                    .collect(),
            })
    }

    /// Waits until the nvme driver has bound endpoint `name` and its first namespace is a block device.
    ///
    /// # Errors
    /// The agent's.
    pub fn nvme(&self, name: &str) -> Result<GuestNvme, LabError> {
        self.nvme_in_slot(name, self.slot(name)?)
    }

    /// Waits until the guest has found the NVRAM card `name` and given its BARs addresses. A driver may bind it
    /// meanwhile, or not.
    ///
    /// # Errors
    /// The agent's.
    pub fn nvram(&self, name: &str) -> Result<GuestNvram, LabError> {
        arrival::nvram(self.agent, name, self.slot(name)?)
    }

    /// As [`nvme`](Self::nvme), for a device that is not the lab's: hot-added through the monitor into `slot`.
    ///
    /// # Errors
    /// The agent's.
    pub fn nvme_in_slot(&self, name: &str, slot: &Slot) -> Result<GuestNvme, LabError> {
        arrival::nvme(self.agent, name, slot)
    }
}
