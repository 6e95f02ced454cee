//! A lab: fabric and endpoints in this process, and a guest that uses them.
//!
//! ```no_run
//! use p2plab::lab::Lab;
//! use p2plab::topology::{GIB, MIB, Nvme, Topology};
//!
//! let topology = Topology::builder("two-ssds")
//!     .root_port("rp0")
//!     .switch("sw0", "rp0", 4)
//!     .nvme("ssd0", "sw0.0", Nvme::memory(GIB).cmb(64 * MIB))
//!     .nvme("ssd1", "sw0.1", Nvme::memory(GIB))
//!     .build()?;
//! let lab = Lab::options(topology).start()?;
//! let ssd = lab.guest()?.nvme("ssd0")?;
//! let before = lab.traffic();
//! lab.guest()?.sh(&format!("dd if={} of=/dev/null bs=1M count=16", ssd.block_device))?;
//! println!("{}", lab.traffic().since(&before));
//! lab.finish()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod agent_port;
mod arrival;
mod base_image;
pub mod device_log;
mod devices;
mod error;
mod guest;
mod guest_port;
mod hotplug;
mod machine;
mod memory;
mod own_modules;
mod phases;
mod suspend;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use p2plab_images::{
    Artifacts, Cache, Initramfs, InitramfsSpec, Overrides, Progress, resolve_with_system,
};
use p2plab_pcie::Traffic;

pub use devices::{Device, Devices};
pub use error::LabError;
pub use guest::{Guest, GuestNvme, GuestNvram};
pub use phases::Phase;

use crate::agent::AgentClient;
use crate::qemu::Qemu;
use crate::run_directory::{Outcome, RunDirectory};
use crate::shape::Slot;
use crate::topology::Topology;
use crate::wait::{self, Deadline};
use device_log::DeviceLog;
use machine::{Begin, Machine, MachinePlan};
use own_modules::OwnModules;
use phases::Phases;

/// Kernel modules of the guest's drivers for all kinds of endpoint: loaded before a base image is saved, so
/// that every scenario finds them there.
const DRIVERS: [&str; 1] = ["nvme"];
/// What a guest mounts the system image with.
const SYSTEM_MODULES: [&str; 3] = ["virtio_blk", "erofs", "overlay"];
/// What its tools are used with, where the kernel has it.
const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];

/// How a lab is started.
pub struct LabOptions {
    topology: Topology,
    cold: bool,
    run_directory: Option<PathBuf>,
    put: Vec<(PathBuf, String)>,
}

/// A running lab. Dropping it ends everything at once; [`finish`](Lab::finish) ends it in order.
pub struct Lab {
    // In the order in which they must end: the guest first.
    machine: Option<Machine>,
    devices: Devices,
    plan: MachinePlan,
    artifacts: Artifacts,
    own_modules: OwnModules,
    slots: Vec<(String, Slot)>,
    device_log: Arc<DeviceLog>,
    run: RunDirectory,
    began: Instant,
    ready_after: Duration,
    phases: Vec<Phase>,
}

impl LabOptions {
    /// Boots the guest from scratch, with the endpoints plugged in from the start, where otherwise it is
    /// restored from a base image and the endpoints are hot-added.
    #[must_use]
    pub fn cold(mut self, cold: bool) -> Self {
        self.cold = cold;
        self
    }

    /// Where the run's logs go: this folder, emptied first. Otherwise a new one among the cache's `runs`.
    #[must_use]
    pub fn run_directory(mut self, path: impl Into<PathBuf>) -> Self {
        self.run_directory = Some(path.into());
        self
    }

    /// Puts a file of the host into the guest before anything else runs there.
    #[must_use]
    pub fn put(mut self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        self.put.push((host.into(), guest.into()));
        self
    }

    /// Starts the lab; the guest's agent answers and all endpoints are plugged in when this returns.
    ///
    /// # Errors
    /// See [`LabError`]; the run directory then holds the logs.
    pub fn start(self) -> Result<Lab, LabError> {
        self.start_with(&mut p2plab_images::Silent)
    }

    /// As [`start`](Self::start); `progress` hears of downloads and other long work.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(self, progress: &mut dyn Progress) -> Result<Lab, LabError> {
        let began = Instant::now();
        self.topology.check()?;
        self.topology.check_host()?;
        memory::check(&self.topology)?;
        let cache = Cache::open()?;
        let mut artifacts = resolve(&cache, &self.topology, progress)?;
        let wanted = &self.topology.guest.own_modules;
        let own_modules = own_modules::build(&cache, &mut artifacts, wanted, progress)?;
        let run = open_run_directory(&cache, self.run_directory.as_deref())?;
        run.write_topology(&self.topology.to_toml())?;
        let path = run.path().to_owned();
        self.start_in(began, &cache, (artifacts, own_modules), run, progress)
            .map_err(|error| error.in_run(&path))
    }

    fn start_in(
        self,
        began: Instant,
        cache: &Cache,
        (artifacts, own_modules): (Artifacts, OwnModules),
        run: RunDirectory,
        progress: &mut dyn Progress,
    ) -> Result<Lab, LabError> {
        let mut phases = Phases::begin(began);
        let guest = &self.topology.guest;
        let mut spec = InitramfsSpec {
            modules: modules(&guest.load_modules, &own_modules.at_boot),
            ..Default::default()
        };
        if guest.system {
            spec.modules.extend(SYSTEM_MODULES.map(str::to_owned));
            spec.optional_modules = FILE_SYSTEMS.map(str::to_owned).into();
        }
        let initramfs = Initramfs::build(cache, &artifacts, &spec)?;
        let shape = self.topology.shape();
        let slots: Vec<_> = self
            .topology
            .endpoints
            .iter()
            .filter_map(|e| Some((e.name.clone(), shape.slot(&e.port)?)))
            .collect();
        let plan = MachinePlan::new(&artifacts, initramfs, shape, &guest.kernel_arguments);
        let device_log = open_device_log(&self.topology, &run)?;
        let devices = Devices::start(&self.topology, None)?;
        for device in devices.iter() {
            device_log.note(&format!(
                "{} is served for {}",
                device.name(),
                device.port()
            ));
        }
        let arguments = devices
            .iter()
            .map(|device| devices.device_argument(device.name()))
            .collect::<Result<Vec<_>, _>>()?;
        phases.end("artifacts, endpoints");
        let machine = if self.cold {
            progress.step("booting the guest", None);
            let machine = plan.start(&Begin::Boot(&arguments), &run, &mut phases)?;
            own_modules.load(&machine)?;
            machine
        } else {
            let images = cache.directory("base-images")?;
            let announce = || progress.step("booting the guest once, to save its base image", None);
            let image = base_image::ensure(&images, &plan, &artifacts.identity(), announce)?;
            phases.end("base image");
            let machine = plan.start(&Begin::Restore(&image, &arguments), &run, &mut phases)?;
            set_clock(&machine)?;
            phases.end("clock set");
            own_modules.load(&machine)?;
            for argument in arguments {
                let deadline = Deadline::new("QEMU to add an endpoint", wait::HOTPLUG);
                machine
                    .qemu
                    .qmp
                    .device_add(argument, &deadline)
                    .map_err(|error| machine.cause(error.into()))?;
            }
            phases.end("endpoints hot-added");
            arrival::scan(&machine.agent, &slots).map_err(|e| machine.cause(e))?;
            phases.end("buses scanned");
            machine
        };
        for (host, guest) in &self.put {
            let failed = |source| LabError::Directory {
                path: host.clone(),
                source,
            };
            let mode = std::fs::metadata(host)
                .map_err(failed)?
                .permissions()
                .mode()
                & 0o7777;
            machine.agent.put_file(host, guest, mode, wait::BOOT)?;
        }
        progress.finish();
        let ready_after = began.elapsed();
        Ok(Lab {
            machine: Some(machine),
            devices,
            plan,
            artifacts,
            own_modules,
            slots,
            device_log,
            run,
            began,
            ready_after,
            phases: phases.into_vec(),
        })
    }
}

impl Lab {
    /// A lab of `topology`, to be started.
    pub fn options(topology: Topology) -> LabOptions {
        LabOptions {
            topology,
            cold: false,
            run_directory: None,
            put: Vec::new(),
        }
    }

    /// The guest.
    ///
    /// # Errors
    /// [`LabError::Unexpected`] between [`kill_qemu`](Self::kill_qemu) and
    /// [`boot_again`](Self::boot_again).
    pub fn guest(&self) -> Result<Guest<'_>, LabError> {
        Ok(Guest {
            agent: &self.machine()?.agent,
            slots: &self.slots,
            has_system: self.plan.system.is_some(),
        })
    }

    fn machine(&self) -> Result<&Machine, LabError> {
        self.machine
            .as_ref()
            .ok_or_else(|| LabError::Unexpected("this lab's QEMU was stopped".into()))
    }

    /// QEMU: monitor, console, faults.
    ///
    /// # Errors
    /// As [`guest`](Self::guest).
    pub fn qemu(&self) -> Result<&Qemu, LabError> {
        Ok(&self.machine()?.qemu)
    }

    /// The agent's client.
    ///
    /// # Errors
    /// As [`guest`](Self::guest).
    pub fn agent(&self) -> Result<&AgentClient, LabError> {
        Ok(&self.machine()?.agent)
    }

    /// Fabric and endpoints.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// All counters, of this moment.
    pub fn traffic(&self) -> Traffic {
        self.devices.traffic()
    }

    /// What the lab runs on.
    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// The folder with this run's logs.
    pub fn run_directory(&self) -> &Path {
        self.run.path()
    }

    /// How long the start took, until the agent answered and the endpoints were plugged in; and how long
    /// ago it began.
    pub fn start_time(&self) -> (Duration, Duration) {
        (self.ready_after, self.began.elapsed())
    }

    /// What the start consisted of, in order.
    pub fn start_phases(&self) -> &[Phase] {
        &self.phases
    }

    /// Waits until the guest, which is rebooting, answers again.
    ///
    /// # Errors
    /// The agent's, or the fault that ended the guest.
    pub fn wait_ready(&self) -> Result<(), LabError> {
        let machine = self.machine()?;
        machine.hello(wait::BOOT)?;
        self.own_modules.load(machine)
    }

    /// Reboots the guest and waits until it answers again.
    ///
    /// # Errors
    /// As [`wait_ready`](Self::wait_ready).
    pub fn reboot(&self) -> Result<(), LabError> {
        self.device_log.note("the guest is told to reboot");
        let machine = self.machine()?;
        machine.reboot()?;
        self.own_modules.load(machine)
    }

    /// Suspends the guest to idle, its drivers with it, and resumes it after two seconds; waits until it answers again.
    /// When all its devices are suspended `meanwhile` is called, with the guest's processors stopped, so that it may take as
    /// long as it likes. Programs that run in the guest's background are frozen and go on.
    ///
    /// # Errors
    /// A guest that does not suspend or resume, with what it said; a host so busy that the guest had resumed before the lab
    /// could stop it.
    pub fn suspend(&self, meanwhile: impl FnOnce()) -> Result<(), LabError> {
        self.device_log.note("the guest is suspended");
        self.machine()?.suspend(meanwhile)
    }

    /// Kills QEMU, as a crash would; the endpoints go on.
    ///
    /// # Errors
    /// An endpoint that does not notice.
    pub fn kill_qemu(&mut self) -> Result<(), LabError> {
        self.device_log.note("QEMU is killed");
        drop(self.machine.take());
        let deadline = Instant::now() + wait::HOTPLUG;
        for device in self.devices.iter() {
            device.wait_disconnected(deadline)?;
        }
        Ok(())
    }

    /// Boots a new QEMU on the same endpoints, after [`kill_qemu`](Self::kill_qemu).
    ///
    /// # Errors
    /// As a cold start.
    pub fn boot_again(&mut self) -> Result<(), LabError> {
        let arguments = self
            .devices
            .iter()
            .map(|device| self.devices.device_argument(device.name()))
            .collect::<Result<Vec<_>, _>>()?;
        let mut phases = Phases::begin(Instant::now());
        let begin = Begin::Boot(&arguments);
        self.device_log
            .note("a new QEMU boots on the same endpoints");
        let machine = self.plan.start(&begin, &self.run, &mut phases)?;
        self.own_modules.load(self.machine.insert(machine))
    }

    /// Stops the server of endpoint `name` under the running guest, as if its process had died. QEMU goes on
    /// until the next change of its memory map (a reboot is one) and then aborts; the fault says why.
    ///
    /// # Errors
    /// [`LabError::UnknownEndpoint`].
    pub fn stop_server(&mut self, name: &str) -> Result<(), LabError> {
        self.devices.stop_server(name)?;
        let note = format!(
            "the server of endpoint {name} was stopped while QEMU used it, which QEMU does not survive"
        );
        self.device_log.note(&note);
        if let Some(machine) = &self.machine {
            machine.qemu.faults.note(note);
        }
        Ok(())
    }

    /// Powers the guest off, checks that the counters obey their laws, and marks the run as passed.
    ///
    /// # Errors
    /// A guest that does not power off, or [`LabError::Conservation`].
    pub fn finish(mut self) -> Result<(), LabError> {
        if let Some(machine) = self.machine.take() {
            if let Some(fault) = machine.qemu.faults.first() {
                return Err(LabError::Fault(fault));
            }
            machine.power_off()?;
        }
        self.end()
    }

    /// As [`finish`](Self::finish), but a guest that has powered itself off, or is about to, is as good.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn finish_if_running(mut self) -> Result<(), LabError> {
        if let Some(machine) = self.machine.take() {
            let faults = &machine.qemu.faults;
            if let Some(fault) = faults.first().filter(|fault| !fault.is_power_off()) {
                return Err(LabError::Fault(fault));
            }
            if let Err(error) = machine.power_off() {
                let deadline = Deadline::new("the guest to power off", wait::SHUTDOWN);
                let fault = faults.wait(&deadline).map_err(|_| error)?;
                if !fault.is_power_off() {
                    return Err(LabError::Fault(fault));
                }
            }
        }
        self.end()
    }

    fn end(mut self) -> Result<(), LabError> {
        self.write_counters();
        self.traffic().check().map_err(LabError::Conservation)?;
        self.run.finish(Outcome::Passed);
        Ok(())
    }

    fn write_counters(&self) {
        let devices: serde_json::Map<String, serde_json::Value> = self
            .devices
            .iter()
            .map(|device| (device.name().to_owned(), device.function().dump()))
            .collect();
        let counters = serde_json::json!({ "traffic": self.traffic(), "devices": devices });
        let written = serde_json::to_string_pretty(&counters)
            .map_err(|error| error.to_string())
            .and_then(|json| {
                self.run
                    .write_counters(&json)
                    .map_err(|error| error.to_string())
            });
        if let Err(error) = written {
            tracing::warn!("the counters are not in the run directory: {error}");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.write_counters();
    }
}

/// The drivers, what the topology adds, and what the lab has built in the place of the kernel's own; each comes once,
/// with the parameters that it was last given.
fn modules(added: &[String], own: &[String]) -> Vec<String> {
    let mut modules: Vec<String> = DRIVERS.map(str::to_owned).into();
    for item in added.iter().chain(own) {
        let name = own_modules::name_of(item);
        match modules.iter_mut().find(|m| own_modules::name_of(m) == name) {
            Some(module) if item.as_str() != name => module.clone_from(item),
            Some(_) => {}
            None => modules.push(item.clone()),
        }
    }
    modules
}

/// What the topology and the cache give to run on, fetched where it is missing.
pub(crate) fn resolve(
    cache: &Cache,
    topology: &Topology,
    progress: &mut dyn Progress,
) -> Result<Artifacts, LabError> {
    let overrides = Overrides {
        qemu: topology.guest.qemu.clone(),
        kernel: topology.guest.kernel.clone(),
        modules: topology.guest.modules.clone(),
    };
    let guest = &topology.guest;
    let artifacts = if guest.system {
        resolve_with_system(cache, &overrides, &guest.packages, progress)
    } else {
        p2plab_images::resolve(cache, &overrides, progress)
    };
    Ok(artifacts?)
}

fn open_device_log(topology: &Topology, run: &RunDirectory) -> Result<Arc<DeviceLog>, LabError> {
    let path = run.device_log();
    let names = topology.endpoints.iter().map(|e| e.name.clone()).collect();
    DeviceLog::create(&path, names).map_err(|source| LabError::Directory { path, source })
}

fn open_run_directory(cache: &Cache, path: Option<&Path>) -> Result<RunDirectory, LabError> {
    let run = match path.and_then(|path| Some((path.parent()?, path.file_name()?))) {
        Some((base, name)) => RunDirectory::named(base, &name.to_string_lossy())?,
        None => RunDirectory::dated(&cache.directory("runs")?)?,
    };
    Ok(run)
}

/// A restored guest's wall clock stands where the image was saved.
fn set_clock(machine: &Machine) -> Result<(), LabError> {
    machine
        .agent
        .set_clock(std::time::SystemTime::now(), wait::AGENT_COMMAND)
        .map_err(|error| machine.cause(error.into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_once_with_the_parameters_it_was_last_given() {
        let list = |items: &[&str]| items.iter().map(|&i| i.to_owned()).collect::<Vec<_>>();
        assert_eq!(modules(&[], &[]), ["nvme"]);
        assert_eq!(
            modules(&list(&["nvmet"]), &list(&["nvme"])),
            ["nvme", "nvmet"]
        );
        assert_eq!(
            modules(&list(&["nvme a=1"]), &list(&["nvme"])),
            ["nvme a=1"]
        );
        assert_eq!(
            modules(&list(&["nvme a=1"]), &list(&["nvme b=2"])),
            ["nvme b=2"]
        );
    }
}
