//! The TOML form, written.

use std::fmt::{Display, Write as _};
use std::path::Path;

use p2plab_nvme::{CmbScheme, Fault, FaultEffect};
use p2plab_pcie::CpuAccess;

use super::device::{
    Backing, CmbOptions, DeviceOptions, NamespaceOptions, NvmeOptions, PmrOptions,
};
use super::read::EFFECTS;
use super::{EndpointOptions, Guest, Topology};
use super::{sizes, times};

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
    field(text, "own_modules", list(&guest.own_modules));
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
    match options.namespaces.as_slice() {
        [only] => {
            for (name, value) in namespace(only) {
                field(text, name, value);
            }
        }
        several => field(text, "namespaces", tables(several.iter().map(namespace))),
    }
    field(text, "unallocated", size(options.unallocated));
    field(text, "io_queues", options.io_queues);
    field(text, "interrupts", quoted(options.interrupts.word()));
    if let Some(serial) = &options.serial {
        field(text, "serial", quoted(serial));
    }
    if let Some(options) = &options.cmb {
        field(text, "cmb", table(cmb(options)));
    }
    if let Some(options) = &options.pmr {
        field(text, "pmr", table(pmr(options)));
    }
    if !options.faults.is_empty() {
        field(text, "faults", tables(options.faults.iter().map(fault)));
    }
}

type Pairs = Vec<(&'static str, String)>;

fn namespace(options: &NamespaceOptions) -> Pairs {
    let mut pairs = vec![("size", size(options.size))];
    pairs.extend(backing(&options.backing));
    pairs.push(("read_only", options.read_only.to_string()));
    pairs.push(("block_size", options.block_size.to_string()));
    pairs
}

fn backing(backing: &Backing) -> Pairs {
    match backing {
        Backing::Memory => Vec::new(),
        Backing::File { path, create } => {
            vec![("file", quoted_path(path)), ("create", create.to_string())]
        }
    }
}

fn cpu(access: CpuAccess) -> (&'static str, String) {
    let word = match access {
        CpuAccess::Trapped => "trapped",
        CpuAccess::Mapped => "mapped",
    };
    ("cpu", quoted(word))
}

fn cmb(options: &CmbOptions) -> Pairs {
    let scheme = match options.scheme {
        CmbScheme::V1_4 => "1.4",
        CmbScheme::V1_3 => "1.3",
    };
    let mut pairs = vec![
        ("size", size(options.size)),
        ("offset", size(options.offset)),
        cpu(options.cpu_access),
        ("scheme", quoted(scheme)),
    ];
    let flags = [
        ("sqs", options.submission_queues),
        ("cqs", options.completion_queues),
        ("lists", options.lists),
        ("rds", options.read_data),
        ("wds", options.write_data),
        ("cdpmls", options.mixed_lists),
        ("cdpcils", options.independent_lists),
    ];
    pairs.extend(flags.map(|(name, flag)| (name, flag.to_string())));
    pairs
}

fn pmr(options: &PmrOptions) -> Pairs {
    let mut pairs = vec![("size", size(options.size))];
    pairs.extend(backing(&options.backing));
    pairs.push(cpu(options.cpu_access));
    pairs.push(("rds", options.read_data.to_string()));
    pairs.push(("wds", options.write_data.to_string()));
    pairs.push(("ready_after", quoted(&times::format(options.ready_after))));
    pairs
}

fn fault(fault: &Fault) -> Pairs {
    let mut pairs = Pairs::new();
    let queue = fault.queue.map(|queue| match queue {
        0 => quoted("admin"),
        queue => queue.to_string(),
    });
    pairs.extend(queue.map(|queue| ("queue", queue)));
    pairs.extend(fault.opcode.map(|opcode| ("opcode", opcode.to_string())));
    pairs.extend(fault.nsid.map(|nsid| ("nsid", nsid.to_string())));
    let lba = fault.lba.as_ref();
    pairs.extend(lba.map(|lba| ("lba", format!("[{}, {}]", lba.start(), lba.end()))));
    pairs.push(("after", fault.after.to_string()));
    pairs.extend(fault.count.map(|count| ("count", count.to_string())));
    pairs.push(match fault.effect {
        FaultEffect::Status(status) => ("status", status.0.to_string()),
        FaultEffect::Delay(time) => ("delay", quoted(&times::format(time))),
        effect => {
            let named = EFFECTS.iter().find(|(_, named)| *named == effect);
            ("effect", quoted(named.map_or("", |(name, _)| name)))
        }
    });
    pairs
}

fn table(pairs: Pairs) -> String {
    let pairs = pairs
        .into_iter()
        .map(|(name, value)| format!("{name} = {value}"));
    format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
}

fn tables(tables: impl Iterator<Item = Pairs>) -> String {
    format!("[{}]", tables.map(table).collect::<Vec<_>>().join(", "))
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
