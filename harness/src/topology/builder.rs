//! A topology written in Rust.

use std::path::PathBuf;

use super::device::{DeviceOptions, NvmeOptions};
use super::error::TopologyError;
use super::{EndpointOptions, Guest, RootPort, Switch, Topology};

/// Builds a [`Topology`] step by step; [`build`](Self::build) checks the whole.
#[derive(Clone, Debug)]
#[must_use = "call build() for the topology"]
pub struct TopologyBuilder {
    topology: Topology,
}

impl Topology {
    /// Starts a topology of that name with the default guest and no ports.
    pub fn builder(name: impl Into<String>) -> TopologyBuilder {
        TopologyBuilder {
            topology: Topology {
                name: name.into(),
                guest: Guest::default(),
                root_ports: Vec::new(),
                switches: Vec::new(),
                endpoints: Vec::new(),
            },
        }
    }
}

impl TopologyBuilder {
    /// Adds a root port.
    pub fn root_port(mut self, name: impl Into<String>) -> Self {
        self.topology
            .root_ports
            .push(RootPort { name: name.into() });
        self
    }

    /// Adds a switch below root or downstream port `below`; its downstream ports are called `NAME.0` to
    /// `NAME.(ports-1)`.
    pub fn switch(self, name: impl Into<String>, below: impl Into<String>, ports: usize) -> Self {
        let name = name.into();
        // One more than any limit is enough for the checks to refuse it.
        let names = (0..ports.min(256))
            .map(|port| format!("{name}.{port}"))
            .collect::<Vec<_>>();
        self.switch_with_ports(name, below, names)
    }

    /// Adds a switch whose downstream ports have names of their own.
    pub fn switch_with_ports(
        mut self,
        name: impl Into<String>,
        below: impl Into<String>,
        ports: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        self.topology.switches.push(Switch {
            name: name.into(),
            below: below.into(),
            ports: ports.into_iter().map(Into::into).collect(),
        });
        self
    }

    /// Plugs a device into a root or downstream port.
    pub fn endpoint(
        mut self,
        name: impl Into<String>,
        port: impl Into<String>,
        device: DeviceOptions,
    ) -> Self {
        self.topology.endpoints.push(EndpointOptions {
            name: name.into(),
            port: port.into(),
            device,
        });
        self
    }

    /// Plugs an NVMe SSD into a root or downstream port.
    pub fn nvme(
        self,
        name: impl Into<String>,
        port: impl Into<String>,
        options: NvmeOptions,
    ) -> Self {
        self.endpoint(name, port, DeviceOptions::Nvme(options))
    }

    /// Sets the guest's memory in bytes.
    pub fn guest_memory(mut self, bytes: u64) -> Self {
        self.topology.guest.memory = bytes;
        self
    }

    /// Sets the number of the guest's processors.
    pub fn guest_cpus(mut self, cpus: u32) -> Self {
        self.topology.guest.cpus = cpus;
        self
    }

    /// Sets QEMU's CPU model.
    pub fn guest_cpu(mut self, model: impl Into<String>) -> Self {
        self.topology.guest.cpu = model.into();
        self
    }

    /// Adds a word to the kernel's command line.
    pub fn kernel_argument(mut self, argument: impl Into<String>) -> Self {
        self.topology.guest.kernel_arguments.push(argument.into());
        self
    }

    /// Boots a kernel (bzImage) of one's own with its folder of modules.
    pub fn kernel(mut self, kernel: impl Into<PathBuf>, modules: impl Into<PathBuf>) -> Self {
        self.topology.guest.kernel = Some(kernel.into());
        self.topology.guest.modules = Some(modules.into());
        self
    }

    /// Loads a kernel module besides those that the endpoints need; parameters follow the name, as in
    /// `nvme use_cmb_sqes=0`.
    pub fn load_module(mut self, module: impl Into<String>) -> Self {
        self.topology.guest.load_modules.push(module.into());
        self
    }

    /// Builds a module of the project's `guest-kernel/` for the guest and loads it; parameters may follow the name.
    pub fn own_module(mut self, module: impl Into<String>) -> Self {
        self.topology.guest.own_modules.push(module.into());
        self
    }

    /// Gives the guest the system image: Debian's nvme-cli, fio, mkfs and more, for
    /// [`Guest::system`](crate::lab::Guest::system).
    pub fn system(mut self) -> Self {
        self.topology.guest.system = true;
        self
    }

    /// Gives the guest a system image with a Debian package more.
    pub fn package(mut self, name: impl Into<String>) -> Self {
        self.topology.guest.packages.push(name.into());
        self.system()
    }

    /// Runs a QEMU of one's own.
    pub fn qemu(mut self, program: impl Into<PathBuf>) -> Self {
        self.topology.guest.qemu = Some(program.into());
        self
    }

    /// Sets the bytes of 64-bit prefetchable address space behind each slot.
    pub fn window(mut self, bytes: u64) -> Self {
        self.topology.guest.window = bytes;
        self
    }

    /// The finished topology.
    ///
    /// # Errors
    /// The first rule that it breaks; see [`TopologyFault`](super::TopologyFault).
    pub fn build(self) -> Result<Topology, TopologyError> {
        self.topology.check()?;
        Ok(self.topology)
    }
}
