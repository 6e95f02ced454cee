//! The rules that every topology keeps.

mod nvme;

use std::collections::HashMap;

use super::device::DeviceOptions;
use super::error::{TopologyError, TopologyFault, hint};
use super::sizes::{self, GIB, MIB};
use super::{Guest, Topology};
use crate::shape::{MAX_DEPTH, MAX_ROOT_PORTS, MAX_SLOTS, MAX_SWITCH_PORTS};

/// Least and most guest memory. Whether the host has as much is the lab's to check.
const MEMORY: (u64, u64) = (128 * MIB, 1 << 40);
const MAX_CPUS: u32 = 64;
/// Packages that a topology adds to the system image.
const MAX_PACKAGES: usize = 256;
/// A Linux guest adds memory as peer-to-peer memory in units of this size.
const P2P_UNIT: u64 = 2 * MIB;
/// Address space for all windows together; the guest's processors have 43 address bits (8 TiB).
const MAX_WINDOWS: u64 = 1 << 40;

/// What a fault was found in, so that a file's reader can point at the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Topology,
    Guest,
    RootPort(usize),
    Switch(usize),
    Endpoint(usize),
}

/// A fault, the thing that has it, and the thing's field.
pub(super) struct Finding {
    pub(super) subject: Subject,
    pub(super) field: &'static str,
    pub(super) fault: Box<TopologyFault>,
}

type Checked = Result<(), Finding>;

impl Subject {
    fn finds(self, field: &'static str, fault: TopologyFault) -> Finding {
        Finding {
            subject: self,
            field,
            fault: fault.into(),
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Topology => "the topology",
            Self::Guest => "the guest",
            Self::RootPort(_) => "a root port",
            Self::Switch(_) => "a switch",
            Self::Endpoint(_) => "an endpoint",
        }
    }
}

impl Topology {
    /// Checks every rule that does not depend on the host.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), TopologyError> {
        self.find_fault().map_err(|finding| TopologyError {
            place: None,
            fault: finding.fault,
        })
    }

    pub(super) fn find_fault(&self) -> Checked {
        check_name(Subject::Topology, "name", &self.name)?;
        check_guest(&self.guest)?;
        self.check_counts()?;
        self.check_names()?;
        self.check_connections()?;
        self.check_depth()?;
        self.check_windows()?;
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            match &endpoint.device {
                DeviceOptions::Nvme(options) => {
                    nvme::check(
                        Subject::Endpoint(index),
                        endpoint,
                        options,
                        self.guest.window,
                    )?;
                }
            }
        }
        Ok(())
    }

    fn check_counts(&self) -> Checked {
        let count = |subject: Subject, field, what: String, count, max| {
            if (1..=max).contains(&count) {
                return Ok(());
            }
            Err(subject.finds(
                field,
                TopologyFault::BadCount {
                    what,
                    count,
                    min: 1,
                    max,
                },
            ))
        };
        let ports = self.root_ports.len();
        count(
            Subject::Topology,
            "root_port",
            "root ports".to_owned(),
            ports,
            MAX_ROOT_PORTS,
        )?;
        for (index, switch) in self.switches.iter().enumerate() {
            let what = format!("downstream ports on switch `{}`", switch.name);
            count(
                Subject::Switch(index),
                "ports",
                what,
                switch.ports.len(),
                MAX_SWITCH_PORTS,
            )?;
        }
        let ports = ports
            + self
                .switches
                .iter()
                .map(|switch| switch.ports.len())
                .sum::<usize>();
        // A switch takes a port; what remains are slots. Without any, nothing could be plugged in.
        let slots = ports.saturating_sub(self.switches.len());
        count(
            Subject::Topology,
            "root_port",
            "slots".to_owned(),
            slots,
            MAX_SLOTS,
        )
    }

    /// Names of all ports with what they are, in the order of the topology.
    fn names(&self) -> impl Iterator<Item = (Subject, &'static str, &'static str, &str)> {
        let root_ports = self.root_ports.iter().enumerate().map(|(index, port)| {
            (
                Subject::RootPort(index),
                "name",
                Subject::RootPort(index).what(),
                &*port.name,
            )
        });
        let switches = self
            .switches
            .iter()
            .enumerate()
            .flat_map(|(index, switch)| {
                let subject = Subject::Switch(index);
                std::iter::once((subject, "name", subject.what(), &*switch.name)).chain(
                    switch
                        .ports
                        .iter()
                        .map(move |port| (subject, "ports", "a downstream port", &**port)),
                )
            });
        let endpoints = self.endpoints.iter().enumerate().map(|(index, endpoint)| {
            (
                Subject::Endpoint(index),
                "name",
                Subject::Endpoint(index).what(),
                &*endpoint.name,
            )
        });
        root_ports.chain(switches).chain(endpoints)
    }

    fn check_names(&self) -> Checked {
        let mut owners = HashMap::new();
        for (subject, field, what, name) in self.names() {
            check_name(subject, field, name)?;
            if let Some(first) = owners.insert(name, what) {
                let name = name.to_owned();
                let fault = TopologyFault::DuplicateName {
                    name,
                    first,
                    second: what,
                };
                return Err(subject.finds(field, fault));
            }
        }
        Ok(())
    }

    fn ports(&self) -> Vec<&str> {
        let downstream = self.switches.iter().flat_map(|switch| &switch.ports);
        self.root_ports
            .iter()
            .map(|port| &port.name)
            .chain(downstream)
            .map(|name| &**name)
            .collect()
    }

    /// Everything that is connected to a port: subject, field, own name, name of the port.
    fn connections(&self) -> impl Iterator<Item = (Subject, &'static str, &str, &str)> {
        let switches = self.switches.iter().enumerate().map(|(index, switch)| {
            (
                Subject::Switch(index),
                "below",
                &*switch.name,
                &*switch.below,
            )
        });
        let endpoints = self.endpoints.iter().enumerate().map(|(index, endpoint)| {
            (
                Subject::Endpoint(index),
                "port",
                &*endpoint.name,
                &*endpoint.port,
            )
        });
        switches.chain(endpoints)
    }

    fn check_connections(&self) -> Checked {
        let ports = self.ports();
        let mut taken: HashMap<&str, &str> = HashMap::new();
        for (subject, field, user, port) in self.connections() {
            if !ports.contains(&port) {
                let fault = TopologyFault::UnknownPort {
                    user: user.to_owned(),
                    port: port.to_owned(),
                    hint: hint(port, "port", &ports),
                };
                return Err(subject.finds(field, fault));
            }
            if let Some(first) = taken.insert(port, user) {
                let fault = TopologyFault::PortTaken {
                    port: port.to_owned(),
                    first: first.to_owned(),
                    second: user.to_owned(),
                };
                return Err(subject.finds(field, fault));
            }
        }
        Ok(())
    }

    /// Follows each switch up to a root port: it must get there, and within the supported depth.
    fn check_depth(&self) -> Checked {
        for (index, switch) in self.switches.iter().enumerate() {
            let subject = Subject::Switch(index);
            let mut depth = 1;
            let mut below = &switch.below;
            while let Some(above) = self
                .switches
                .iter()
                .find(|other| other.ports.contains(below))
            {
                depth += 1;
                below = &above.below;
                if depth > self.switches.len() {
                    return Err(subject.finds("below", TopologyFault::Loop(switch.name.clone())));
                }
            }
            if depth > MAX_DEPTH {
                let switch = switch.name.clone();
                let fault = TopologyFault::TooDeep {
                    switch,
                    depth,
                    limit: MAX_DEPTH,
                };
                return Err(subject.finds("below", fault));
            }
        }
        Ok(())
    }

    fn check_windows(&self) -> Checked {
        let slots = self.ports().len().saturating_sub(self.switches.len());
        let window = self.guest.window;
        let total = window.saturating_mul(u64::try_from(slots).unwrap_or(u64::MAX));
        if total <= MAX_WINDOWS {
            return Ok(());
        }
        let fault = TopologyFault::WindowsTooLarge {
            slots,
            window,
            total,
            limit: MAX_WINDOWS,
        };
        Err(Subject::Guest.finds("window", fault))
    }
}

fn check_name(subject: Subject, field: &'static str, name: &str) -> Checked {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if (1..=32).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    let shown = name.chars().take(40).collect();
    Err(subject.finds(field, TopologyFault::BadName(shown)))
}

fn check_guest(guest: &Guest) -> Checked {
    let subject = Subject::Guest;
    check_size_bounds(subject, "memory", guest.memory, MEMORY)?;
    check_multiple(subject, "memory", guest.memory, P2P_UNIT)?;
    let number = |field, value: u64, max: u64| check_bounds(subject, field, value, (1, max));
    number("cpus", guest.cpus.into(), MAX_CPUS.into())?;
    check_size_bounds(subject, "window", guest.window, (P2P_UNIT, 256 * GIB))?;
    check_power_of_two(subject, "window", guest.window)?;
    let text = |field, value: &str, rule, allowed: fn(char) -> bool| {
        if !value.is_empty() && value.len() <= 2048 && value.chars().all(allowed) {
            return Ok(());
        }
        let value = value.chars().take(80).collect();
        Err(subject.finds(field, TopologyFault::BadText { field, value, rule }))
    };
    text(
        "cpu",
        &guest.cpu,
        "give a model that `qemu-system-x86_64 -cpu help` lists",
        |c| c.is_ascii_alphanumeric() || "._,=+-".contains(c),
    )?;
    for argument in &guest.kernel_arguments {
        text(
            "kernel_arguments",
            argument,
            "write it on one line, without control characters",
            |c| !c.is_control(),
        )?;
    }
    let lists = [
        ("load_modules", &guest.load_modules),
        ("own_modules", &guest.own_modules),
    ];
    for (field, module) in lists
        .iter()
        .flat_map(|(field, list)| list.iter().map(move |m| (*field, m)))
    {
        // The first word is a name, the others are the module's parameters.
        let name = module.split(' ').next().unwrap_or_default();
        let rule =
            "give a module's name, with parameters if need be, such as `nvme use_cmb_sqes=0`";
        text(field, name, rule, |c| {
            c.is_ascii_alphanumeric() || "_-".contains(c)
        })?;
        text(field, module, rule, |c| !c.is_control())?;
    }
    check_packages(guest)?;
    if guest.kernel.is_none() && guest.modules.is_some() {
        let fault = TopologyFault::Needs {
            field: "modules",
            needs: "kernel",
        };
        return Err(subject.finds("modules", fault));
    }
    for (field, path) in [
        ("kernel", &guest.kernel),
        ("modules", &guest.modules),
        ("qemu", &guest.qemu),
    ] {
        if let Some(path) = path {
            check_path(subject, field, path)?;
        }
    }
    Ok(())
}

/// Names as Debian has them (Policy 5.6.1): what else there may be, apt would take for an option or a request to
/// leave a package out.
fn check_packages(guest: &Guest) -> Checked {
    let subject = Subject::Guest;
    let finds = |fault| Err(subject.finds("packages", fault));
    if !guest.packages.is_empty() && !guest.system {
        return finds(TopologyFault::Needs {
            field: "packages",
            needs: "system = true",
        });
    }
    if guest.packages.len() > MAX_PACKAGES {
        return finds(TopologyFault::BadCount {
            what: "packages".to_owned(),
            count: guest.packages.len(),
            min: 0,
            max: MAX_PACKAGES,
        });
    }
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    for name in &guest.packages {
        if (2..=100).contains(&name.len())
            && name.starts_with(lower)
            && !name.ends_with('-')
            && name.chars().all(|c| lower(c) || "+.-".contains(c))
        {
            continue;
        }
        return finds(TopologyFault::BadText {
            field: "packages",
            value: name.chars().take(80).collect(),
            rule: "give the name of a Debian package, such as `strace`",
        });
    }
    Ok(())
}

fn check_path(subject: Subject, field: &'static str, path: &std::path::Path) -> Checked {
    if path
        .to_str()
        .is_some_and(|path| !path.is_empty() && !path.contains('\0'))
    {
        return Ok(());
    }
    let value = path.to_string_lossy().into_owned();
    let rule = "a path must be valid UTF-8 and not empty";
    Err(subject.finds(field, TopologyFault::BadText { field, value, rule }))
}

fn check_bounds(subject: Subject, field: &'static str, value: u64, bounds: (u64, u64)) -> Checked {
    bounded(subject, field, value, bounds, |number| number.to_string())
}

fn check_size_bounds(
    subject: Subject,
    field: &'static str,
    value: u64,
    bounds: (u64, u64),
) -> Checked {
    bounded(subject, field, value, bounds, sizes::format)
}

fn bounded(
    subject: Subject,
    field: &'static str,
    value: u64,
    (min, max): (u64, u64),
    show: fn(u64) -> String,
) -> Checked {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let fault = TopologyFault::OutOfBounds {
        field,
        value: show(value),
        min: show(min),
        max: show(max),
    };
    Err(subject.finds(field, fault))
}

fn check_multiple(subject: Subject, field: &'static str, value: u64, unit: u64) -> Checked {
    if value.is_multiple_of(unit) {
        return Ok(());
    }
    Err(subject.finds(field, TopologyFault::NotMultiple { field, value, unit }))
}

fn check_power_of_two(subject: Subject, field: &'static str, value: u64) -> Checked {
    if value.is_power_of_two() {
        return Ok(());
    }
    let nearest = value.checked_next_power_of_two().unwrap_or(1 << 63);
    Err(subject.finds(
        field,
        TopologyFault::NotPowerOfTwo {
            field,
            value,
            nearest,
        },
    ))
}
