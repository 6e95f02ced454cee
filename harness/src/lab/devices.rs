//! The host's half of a lab: fabric, endpoints, and the sockets that they are served on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use p2plab_nvme::{Backing, CmbConfig, NamespaceConfig, NvmeConfig, NvmeController, PmrConfig};
use p2plab_nvram::{NvramCard, NvramConfig};
use p2plab_pcie::{
    CpuAccess, Endpoint, Fabric, FabricBuilder, FabricError, Function, MemoryBacking, Traffic,
};
use p2plab_vfio_user::{Server, SocketAddress};

use super::LabError;
use crate::shape::{self, MachineShape, PortShape, Slot};
use crate::topology::{
    self, DeviceOptions, EndpointOptions, NamespaceOptions, NvmeOptions, NvramOptions, Topology,
};

/// Fabric, endpoints and servers of one topology. Dropping it ends them all.
pub struct Devices {
    fabric: Arc<Fabric>,
    devices: Vec<Device>,
    /// What was taken out, to be plugged in again.
    removed: Vec<Removed>,
    shape: MachineShape,
    /// Whether SSDs offer shadow doorbells.
    shadow_doorbells: bool,
}

/// One endpoint with its server.
pub struct Device {
    name: String,
    port: String,
    function: Arc<Function>,
    model: Model,
    socket: PathBuf,
    server: Option<Server>,
}

/// An endpoint in no slot.
struct Removed {
    name: String,
    /// The port that it was, and belongs, below.
    port: String,
    model: Model,
}

/// The device models that a lab knows.
#[derive(Clone)]
enum Model {
    Nvme(Arc<NvmeController>),
    Nvram(Arc<NvramCard>),
}

impl Model {
    fn endpoint(&self) -> Arc<dyn Endpoint> {
        match self {
            Self::Nvme(controller) => controller.clone(),
            Self::Nvram(card) => card.clone(),
        }
    }

    /// It was taken out of its slot.
    fn lose_power(&self) {
        match self {
            // With its link, which to a controller is the machine around it.
            Self::Nvme(_) => {}
            Self::Nvram(card) => card.power_cut(),
        }
    }
}

impl Devices {
    /// Builds the fabric of `topology`, plugs its endpoints in and serves each on a socket: one that has no file
    /// and leaves nothing behind, or `NAME.sock` in `socket_directory`.
    ///
    /// # Errors
    /// A topology that is not sound, or what the host refuses.
    pub fn start(topology: &Topology, socket_directory: Option<&Path>) -> Result<Self, LabError> {
        topology.check()?;
        topology.check_host()?;
        let shape = topology.shape();
        let mut devices = Self {
            fabric: build_fabric(&shape)?,
            devices: Vec::new(),
            removed: Vec::new(),
            shape,
            shadow_doorbells: !topology
                .endpoints
                .iter()
                .any(|e| has_trapped_memory(&e.device)),
        };
        for endpoint in &topology.endpoints {
            let address = match socket_directory {
                Some(directory) => {
                    SocketAddress::Path(directory.join(format!("{}.sock", endpoint.name)))
                }
                None => SocketAddress::Unlinked,
            };
            let model = devices.model(endpoint)?;
            devices.plug(&endpoint.name, &endpoint.port, model, address)?;
        }
        Ok(devices)
    }

    fn model(&self, options: &EndpointOptions) -> Result<Model, LabError> {
        match &options.device {
            DeviceOptions::Nvme(nvme) => {
                let mut config = nvme_config(&options.name, nvme);
                config.shadow_doorbells = self.shadow_doorbells;
                Ok(Model::Nvme(Arc::new(NvmeController::new(config)?)))
            }
            DeviceOptions::Nvram(nvram) => {
                let card = NvramCard::new(nvram_config(&options.name, nvram))?;
                Ok(Model::Nvram(Arc::new(card)))
            }
        }
    }

    fn plug(
        &mut self,
        name: &str,
        port: &str,
        model: Model,
        address: SocketAddress,
    ) -> Result<(), LabError> {
        let function = self.fabric.plug(port, name, model.endpoint())?;
        // What nobody can reach is not plugged in.
        let server = Server::bind(address, function.clone())
            .inspect_err(|_| drop(self.fabric.unplug(name)))?;
        let socket = server.path().map(Path::to_owned).unwrap_or_default();
        self.devices.push(Device {
            name: name.to_owned(),
            port: port.to_owned(),
            function,
            model,
            socket,
            server: Some(server),
        });
        Ok(())
    }

    /// The fabric.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// The tree of ports that the guest's machine must have.
    pub fn shape(&self) -> &MachineShape {
        &self.shape
    }

    /// All counters, of this moment.
    pub fn traffic(&self) -> Traffic {
        self.fabric.traffic()
    }

    /// All endpoints in the order of the topology.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// The endpoint `name`.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub fn device(&self, name: &str) -> Result<&Device, LabError> {
        self.devices
            .iter()
            .find(|device| device.name == name)
            .ok_or_else(|| {
                let names = self.devices.iter().map(|d| d.name.clone()).collect();
                LabError::UnknownEndpoint {
                    name: name.to_owned(),
                    names,
                }
            })
    }

    /// The argument of QEMU's `device_add` (and of `-device`) that plugs endpoint `name` in.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub fn device_argument(&self, name: &str) -> Result<serde_json::Value, LabError> {
        let device = self.device(name)?;
        let slot = self
            .shape
            .slot(&device.port)
            .ok_or_else(|| LabError::UnknownEndpoint {
                name: device.port.clone(),
                names: self
                    .shape
                    .slots()
                    .into_iter()
                    .map(|slot| slot.port)
                    .collect(),
            })?;
        Ok(shape::endpoint_device_json(
            &slot,
            &device.qemu_id(),
            &device.socket,
        ))
    }

    /// Stops the server of endpoint `name` and leaves the endpoint in the fabric.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub(super) fn stop_server(&mut self, name: &str) -> Result<(), LabError> {
        self.device(name)?;
        let device = self.devices.iter_mut().find(|device| device.name == name);
        if let Some(server) = device.and_then(|device| device.server.take()) {
            server.stop();
        }
        Ok(())
    }

    /// Takes the link of endpoint `name` down, as a card's that is pulled out: it does no more DMA, and its server answers
    /// as an empty slot does. QEMU, which does not know, is to be told. Does nothing where it is down.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub(super) fn link_down(&self, name: &str) -> Result<(), LabError> {
        self.device(name)?;
        if self.has_link(name) {
            self.fabric.unplug(name)?;
        }
        Ok(())
    }

    /// Whether the link of endpoint `name` is up.
    pub(super) fn has_link(&self, name: &str) -> bool {
        self.fabric.find(name).is_some()
    }

    /// Stops the server of endpoint `name` and unplugs it from the fabric; it loses its power. A QEMU that still has the
    /// device does not survive this: unplug it there first.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub fn remove(&mut self, name: &str) -> Result<(), LabError> {
        self.device(name)?;
        let (removed, kept) = std::mem::take(&mut self.devices)
            .into_iter()
            .partition::<Vec<_>, _>(|device| device.name == name);
        self.devices = kept;
        self.removed.extend(removed.iter().map(Device::removed));
        // Ends the server.
        drop(removed);
        if self.has_link(name) {
            self.fabric.unplug(name)?;
        }
        if let Some(removed) = self.find_removed(name) {
            removed.model.lose_power();
        }
        Ok(())
    }

    fn find_removed(&self, name: &str) -> Option<&Removed> {
        self.removed.iter().find(|removed| removed.name == name)
    }

    /// The slot that endpoint `name`, which was taken out, belongs into.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`], or [`LabError::BadOption`] for one that is plugged in.
    pub(super) fn slot_of_removed(&self, name: &str) -> Result<Slot, LabError> {
        if self.device(name).is_ok() {
            return Err(LabError::BadOption(format!(
                "endpoint {name} is plugged in; detach or remove it before it is attached again"
            )));
        }
        let removed = self.find_removed(name);
        let slot = removed.and_then(|removed| self.shape.slot(&removed.port));
        slot.ok_or_else(|| LabError::UnknownEndpoint {
            name: name.to_owned(),
            names: self.removed.iter().map(|r| r.name.clone()).collect(),
        })
    }

    /// Plugs endpoint `name`, which was taken out, into the fabric again, and serves it.
    ///
    /// # Errors
    /// As [`slot_of_removed`](Self::slot_of_removed), or what the host refuses.
    pub(super) fn plug_again(&mut self, name: &str) -> Result<(), LabError> {
        let slot = self.slot_of_removed(name)?;
        let removed = self.find_removed(name);
        if let Some(model) = removed.map(|removed| removed.model.clone()) {
            self.plug(name, &slot.port, model, SocketAddress::Unlinked)?;
            self.removed.retain(|removed| removed.name != name);
        }
        Ok(())
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // Servers first, so that no message arrives at an endpoint that has been unplugged.
        self.devices.clear();
        self.fabric.unplug_all();
    }
}

impl Device {
    /// Name in the topology.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Port that it is plugged into.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// Its config space and BARs, as a transport sees them.
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// The NVMe controller, where it is one.
    pub fn nvme(&self) -> Option<&Arc<NvmeController>> {
        match &self.model {
            Model::Nvme(controller) => Some(controller),
            Model::Nvram(_) => None,
        }
    }

    /// The NVRAM card, where it is one.
    pub fn nvram(&self) -> Option<&Arc<NvramCard>> {
        match &self.model {
            Model::Nvram(card) => Some(card),
            Model::Nvme(_) => None,
        }
    }

    /// Path of the socket that it is served on.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// QEMU's id for it.
    pub fn qemu_id(&self) -> String {
        shape::endpoint_id(&self.name)
    }

    fn removed(&self) -> Removed {
        Removed {
            name: self.name.clone(),
            port: self.port.clone(),
            model: self.model.clone(),
        }
    }

    /// Whether a client, QEMU, is connected.
    pub(super) fn is_connected(&self) -> bool {
        self.wait_disconnected(Instant::now()).is_err()
    }

    /// Waits until no client is connected and the function was reset after the last one.
    ///
    /// # Errors
    /// The wait's, with its reason.
    pub fn wait_disconnected(&self, deadline: Instant) -> Result<(), LabError> {
        match &self.server {
            Some(server) => Ok(server.wait_disconnected(deadline)?),
            None => Ok(()),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// Whether the CPU writes into memory of the device by messages, which doorbells in the guest's memory would overtake
/// (see [`NvmeConfig::shadow_doorbells`]).
fn has_trapped_memory(device: &DeviceOptions) -> bool {
    let trapped = |access| access == CpuAccess::Trapped;
    match device {
        DeviceOptions::Nvme(nvme) => {
            nvme.cmb.is_some_and(|cmb| trapped(cmb.cpu_access))
                || nvme.pmr.as_ref().is_some_and(|pmr| trapped(pmr.cpu_access))
        }
        // Data and lists of an SSD may lie in it as in a CMB.
        DeviceOptions::Nvram(card) => trapped(card.cpu_access),
    }
}

fn nvram_config(name: &str, options: &NvramOptions) -> NvramConfig {
    let mut config = NvramConfig::memory(name, options.size);
    config.backing = memory_backing(&options.backing);
    config.cpu_access = options.cpu_access;
    config.armed = options.armed;
    config.msix = options.interrupts == topology::Interrupts::MsiX;
    config.faults.clone_from(&options.faults);
    config
}

fn memory_backing(backing: &topology::Backing) -> MemoryBacking {
    match backing {
        // The check of a topology lets no null backing pass.
        topology::Backing::Memory | topology::Backing::Null => MemoryBacking::Memory,
        topology::Backing::File { path, create } => MemoryBacking::File {
            path: path.clone(),
            create: *create,
        },
    }
}

fn nvme_config(name: &str, options: &NvmeOptions) -> NvmeConfig {
    let mut config = NvmeConfig::new(options.serial.clone().unwrap_or_else(|| name.to_owned()));
    config.namespaces = options.namespaces.iter().map(namespace_config).collect();
    config.unallocated = options.unallocated;
    config.write_cache = options.write_cache;
    config.io_queues = options.io_queues;
    config.msix = options.interrupts == topology::Interrupts::MsiX;
    config.cmb = options.cmb.map(|cmb| CmbConfig {
        size: cmb.size,
        offset: cmb.offset,
        cpu_access: cmb.cpu_access,
        scheme: cmb.scheme,
        sqs: cmb.submission_queues,
        cqs: cmb.completion_queues,
        lists: cmb.lists,
        rds: cmb.read_data,
        wds: cmb.write_data,
        cdpmls: cmb.mixed_lists,
        cdpcils: cmb.independent_lists,
    });
    config.pmr = options.pmr.as_ref().map(|pmr| PmrConfig {
        backing: memory_backing(&pmr.backing),
        cpu_access: pmr.cpu_access,
        rds: pmr.read_data,
        wds: pmr.write_data,
        ready_after: pmr.ready_after,
        elasticity_buffer: pmr.elasticity_buffer,
        sustained_throughput: pmr.sustained_throughput,
        ..PmrConfig::memory(pmr.size)
    });
    config.faults.clone_from(&options.faults);
    config
}

fn namespace_config(options: &NamespaceOptions) -> NamespaceConfig {
    let backing = match &options.backing {
        topology::Backing::Memory => Backing::Memory { size: options.size },
        topology::Backing::Null => Backing::Null { size: options.size },
        topology::Backing::File { path, create } => Backing::File {
            path: path.clone(),
            size: Some(options.size),
            create: *create,
        },
    };
    NamespaceConfig {
        backing,
        block_size: options.block_size,
        read_only: options.read_only,
        metadata: options.metadata,
    }
}

fn build_fabric(shape: &MachineShape) -> Result<Arc<Fabric>, FabricError> {
    fn below(builder: &mut FabricBuilder, port: &PortShape) -> Result<(), FabricError> {
        if let Some(switch) = &port.switch {
            builder.switch(&switch.name, &port.name)?;
            for downstream in &switch.ports {
                builder.downstream_port(&switch.name, &downstream.name)?;
                below(builder, downstream)?;
            }
        }
        Ok(())
    }
    let mut builder = FabricBuilder::new();
    for port in &shape.root_ports {
        builder.root_port(&port.name)?;
        below(&mut builder, port)?;
    }
    Ok(builder.build())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::topology::{CmbOptions, MIB, Nvme, Nvram};

    /// Doorbells in the guest's memory would overtake what the CPU writes to any trapped memory of the lab.
    #[test]
    fn trapped_memory_keeps_shadow_doorbells_off() {
        let cmb = CmbOptions::new(2 * MIB);
        for (ssd, card, expected) in [
            (Nvme::memory(MIB), None, true),
            (Nvme::memory(MIB).cmb_with(cmb), None, false),
            (Nvme::memory(MIB).cmb_with(cmb.mapped()), None, true),
            (Nvme::memory(MIB), Some(Nvram::memory(64 * MIB)), false),
            (
                Nvme::memory(MIB),
                Some(Nvram::memory(64 * MIB).mapped()),
                true,
            ),
        ] {
            let mut builder = Topology::builder("t")
                .root_port("rp0")
                .root_port("rp1")
                .nvme("ssd0", "rp0", ssd);
            if let Some(card) = card.clone() {
                builder = builder.nvram("nv0", "rp1", card);
            }
            let devices = Devices::start(&builder.build().unwrap(), None).unwrap();
            assert_eq!(devices.shadow_doorbells, expected, "{card:?}");
            assert_eq!(
                devices.device("nv0").is_ok_and(|d| d.nvram().is_some()),
                card.is_some()
            );
        }
    }

    /// The same one, with its medium, on a socket of its own.
    #[test]
    fn what_was_taken_out_is_plugged_in_again() {
        let topology = Topology::builder("t")
            .root_port("rp0")
            .nvram("nv0", "rp0", Nvram::memory(64 * MIB))
            .build()
            .unwrap();
        let mut devices = Devices::start(&topology, None).unwrap();
        let card = devices.device("nv0").unwrap().nvram().unwrap().clone();
        assert!(devices.slot_of_removed("nv0").is_err(), "it is plugged in");
        devices.link_down("nv0").unwrap();
        assert!(!devices.has_link("nv0"));
        devices.link_down("nv0").unwrap();
        devices.remove("nv0").unwrap();
        assert!(devices.device("nv0").is_err());
        assert!(devices.plug_again("nv1").is_err());
        assert_eq!(devices.slot_of_removed("nv0").unwrap().port, "rp0");
        devices.plug_again("nv0").unwrap();
        let device = devices.device("nv0").unwrap();
        assert!(Arc::ptr_eq(device.nvram().unwrap(), &card));
        assert!(device.socket().exists());
        assert!(devices.plug_again("nv0").is_err(), "only once");
        assert!(devices.has_link("nv0"));
    }

    /// A card in no slot has no power: what it held is there if it was armed.
    #[test]
    fn what_is_taken_out_loses_its_power() {
        for (card, expected) in [
            (Nvram::memory(64 * MIB), 0x5a),
            (Nvram::memory(64 * MIB).disarmed(), 0xff),
        ] {
            let builder = Topology::builder("t").root_port("rp0");
            let topology = builder.nvram("nv0", "rp0", card).build().unwrap();
            let mut devices = Devices::start(&topology, None).unwrap();
            let card = devices.device("nv0").unwrap().nvram().unwrap().clone();
            card.memory().file().write_all_at(&[0x5a], 4096).unwrap();
            devices.remove("nv0").unwrap();
            let mut byte = [0];
            card.memory().file().read_exact_at(&mut byte, 4096).unwrap();
            assert_eq!(byte[0], expected);
            devices.plug_again("nv0").unwrap();
            let dump = devices.device("nv0").unwrap().function().dump();
            assert_eq!(
                dump["endpoint"]["registers"]["POWER_CUTS"], "0x1",
                "{dump:#}"
            );
        }
    }

    /// An endpoint that cannot be served is in no port, and can be plugged in when it can.
    #[test]
    fn what_cannot_be_served_is_not_plugged_in() {
        let builder = Topology::builder("t").root_port("rp0");
        let builder = builder.nvram("nv0", "rp0", Nvram::memory(64 * MIB));
        let mut devices = Devices::start(&builder.build().unwrap(), None).unwrap();
        let model = devices.devices[0].model.clone();
        devices.remove("nv0").unwrap();
        let nowhere = SocketAddress::Path("/nonexistent/nv0.sock".into());
        assert!(devices.plug("nv0", "rp0", model, nowhere).is_err());
        assert!(!devices.has_link("nv0") && devices.device("nv0").is_err());
        devices.plug_again("nv0").unwrap();
    }
}
