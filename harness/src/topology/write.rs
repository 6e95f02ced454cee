//! The TOML form, written.

use std::fmt::{Display, Write as _};
use std::path::Path;

use p2plab_pcie::CpuAccess;

use super::device::{Backing, CmbOptions, DeviceOptions, NvmeOptions};
use super::sizes;
use super::{EndpointOptions, Guest, Topology};

impl Topology {
    /// The topology as a file that reads back to the same, with every default written out.
    pub fn to_toml(&self) -> String {
        let mut text = format!("name = {}\n\n[guest]\n", quoted(&self.name));
        write_guest(&mut text, &self.guest);
        for port in &self.root_ports {
            text.push_str("\n[[root_port]]\n");
            field(&mut text, "name", quoted(&port.name));
        }
        for switch in &self.switches {
            text.push_str("\n[[switch]]\n");
            field(&mut text, "name", quoted(&switch.name));
            field(&mut text, "below", quoted(&switch.below));
            field(&mut text, "ports", list(&switch.ports));
        }
        for endpoint in &self.endpoints {
            text.push_str("\n[[endpoint]]\n");
            write_endpoint(&mut text, endpoint);
        }
        text
    }
}

fn write_guest(text: &mut String, guest: &Guest) {
    field(text, "memory", size(guest.memory));
    field(text, "cpus", guest.cpus);
    field(text, "cpu", quoted(&guest.cpu));
    field(text, "window", size(guest.window));
    field(text, "kernel_arguments", list(&guest.kernel_arguments));
    field(text, "load_modules", list(&guest.load_modules));
    field(text, "system", guest.system);
    field(text, "packages", list(&guest.packages));
    for (name, path) in [
        ("kernel", &guest.kernel),
        ("modules", &guest.modules),
        ("qemu", &guest.qemu),
    ] {
        if let Some(path) = path {
            field(text, name, quoted_path(path));
        }
    }
}

fn write_endpoint(text: &mut String, endpoint: &EndpointOptions) {
    field(text, "name", quoted(&endpoint.name));
    field(text, "port", quoted(&endpoint.port));
    field(text, "device", quoted(endpoint.device.kind()));
    match &endpoint.device {
        DeviceOptions::Nvme(options) => write_nvme(text, options),
    }
}

fn write_nvme(text: &mut String, options: &NvmeOptions) {
    field(text, "size", size(options.size));
    if let Backing::File { path, create } = &options.backing {
        field(text, "file", quoted_path(path));
        field(text, "create", create);
    }
    field(text, "read_only", options.read_only);
    field(text, "block_size", options.block_size);
    field(text, "io_queues", options.io_queues);
    field(text, "interrupts", quoted(options.interrupts.word()));
    if let Some(serial) = &options.serial {
        field(text, "serial", quoted(serial));
    }
    if let Some(CmbOptions {
        size: bytes,
        cpu_access,
        submission_queues,
    }) = options.cmb
    {
        let cpu = match cpu_access {
            CpuAccess::Trapped => "trapped",
            CpuAccess::Mapped => "mapped",
        };
        let bytes = size(bytes);
        field(
            text,
            "cmb",
            format!("{{ size = {bytes}, cpu = \"{cpu}\", sqs = {submission_queues} }}"),
        );
    }
}

fn field(text: &mut String, name: &str, value: impl Display) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{name} = {value}");
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn size(bytes: u64) -> String {
    quoted(&sizes::format(bytes))
}

fn list(words: &[String]) -> String {
    toml::Value::from(words.to_vec()).to_string()
}
