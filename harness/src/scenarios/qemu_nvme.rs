//! QEMU's own NVMe device, hot-added beside ours: what a user would take instead.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::MemfdFlags;
use serde_json::json;

use crate::lab::{Lab, LabError};
use crate::wait::{self, Deadline};

/// A file in memory that goes with this process.
pub(super) fn medium(name: &str, size: u64) -> Result<File, LabError> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|error| LabError::Medium(error.into()))?;
    file.set_len(size).map_err(LabError::Medium)?;
    Ok(file)
}

/// Hot-adds one of QEMU's own NVMe devices with `file` for a medium.
pub(super) fn add(
    lab: &Lab,
    id: &str,
    port: &str,
    file: &File,
    options: serde_json::Value,
) -> Result<(), LabError> {
    let slot = lab.devices().shape().slot(port);
    let bus = slot.map(|slot| slot.bus).unwrap_or_default();
    let qmp = &lab.qemu()?.qmp;
    let deadline = Deadline::new(format!("QEMU to add {id}"), wait::HOTPLUG);
    let node = format!("medium-{id}");
    // Our descriptor by its path in /proc: no name in any file system, and QEMU opens a file of its own.
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let medium = json!({
        "driver": "raw", "node-name": node, "file": { "driver": "file", "filename": path },
    });
    qmp.execute("blockdev-add", medium, &deadline)?;
    let mut device = json!({ "driver": "nvme", "id": id, "bus": bus, "serial": id, "drive": node });
    if let (Some(device), Some(options)) = (device.as_object_mut(), options.as_object()) {
        device.extend(options.clone());
    }
    qmp.device_add(device, &deadline)?;
    Ok(())
}
