//! The guest's half of a lab: QEMU with an agent in it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use p2plab_images::{Accelerator, Artifacts};

use super::LabError;
use super::agent_port::{self, GoingDown};
use super::guest::SYSTEM_ROOT;
use super::phases::Phases;
use crate::agent::{AgentClient, AgentError};
use crate::qemu::fault::Fault;
use crate::qemu::{Links, Qemu, snapshot};
use crate::run_directory::RunDirectory;
use crate::shape::MachineShape;
use crate::wait;

/// All that a machine is started from; two machines of equal plans are interchangeable.
#[derive(Clone, Debug)]
pub(super) struct MachinePlan {
    /// QEMU, its own arguments that find its files.
    pub qemu: Vec<OsString>,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub kernel_arguments: Vec<String>,
    /// The system image, a disk that the agent mounts.
    pub system: Option<PathBuf>,
    pub shape: MachineShape,
}

/// What the machine is to do first.
pub(super) enum Begin<'a> {
    /// Boot, with a placeholder in each slot: the boot that a base image is saved from.
    BootForImage,
    /// Boot, with these endpoints (`-device` in JSON) plugged in from the start.
    Boot(&'a [serde_json::Value]),
    /// Go on from a base image, with empty slots, into which the caller hot-adds these endpoints.
    Restore(&'a Path, &'a [serde_json::Value]),
}

/// A running machine.
pub(super) struct Machine {
    pub qemu: Qemu,
    pub agent: Arc<AgentClient>,
    /// From QEMU's start to the agent's first answer.
    pub ready_after: Duration,
    pub(super) going_down: GoingDown,
}

/// Words on the kernel's command line of every guest. No `quiet`: the console is the record of a run. No
/// `panic=`: a panicked guest stays where it is until the lab, which reads the panic on the console, ends it;
/// with a reboot instead, a guest that panics at boot would go round in circles. A task that hangs is reported
/// after 40 to 45 s: before the 60 s that a command has by default, and after the 30 s that the nvme driver gives a
/// command. The kernel's own default is 120 s. Processors that stall are reported after a minute, three times the
/// default: under emulation, a busy host takes that long from a guest. The last three let an idle guest sleep, where it
/// would wake tens of times a second: for DAMON's statistics, for memory to compact, and to compare clocks (which under
/// emulation come from one).
pub(super) const KERNEL_ARGUMENTS: &str = "console=ttyS0 rdinit=/init printk.time=1 random.trust_cpu=on \
     mitigations=off audit=0 sysctl.kernel.hung_task_timeout_secs=40 \
     sysctl.kernel.hung_task_check_interval_secs=5 rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30 \
     damon_stat.enabled=0 sysctl.vm.compaction_proactiveness=0 tsc=nowatchdog";

/// Tells the agent which disk the system image is (the guest's only virtio disk), and the kernel that its tools may
/// map registers that a driver uses, as `nvme show-regs` does.
pub(super) const SYSTEM_ARGUMENT: &str = " p2plab.system=vda iomem=relaxed";

/// Has the kernel use an IOMMU, whatever its default.
pub(super) const IOMMU_ARGUMENT: &str = " intel_iommu=on";

/// What QEMU's exit status may take to be known after its sockets have closed.
const LAST_WORDS: Duration = Duration::from_secs(10);

impl MachinePlan {
    pub(super) fn new(
        artifacts: &Artifacts,
        initramfs: PathBuf,
        shape: MachineShape,
        kernel_arguments: &[String],
    ) -> Self {
        Self {
            qemu: qemu_command(artifacts),
            kernel: artifacts.kernel.image.clone(),
            initramfs,
            kernel_arguments: kernel_arguments.to_vec(),
            system: artifacts.system.as_ref().map(|image| image.path.clone()),
            shape,
        }
    }

    /// The command line without our own sockets.
    fn arguments(&self, begin: &Begin<'_>) -> Vec<OsString> {
        let mut argv = self.qemu.clone();
        let mut push = |words: &[&str]| argv.extend(words.iter().map(OsString::from));
        for argument in self.shape.qemu_arguments() {
            push(&[&argument]);
        }
        push(&["-accel", accelerator(), "-serial", "chardev:console"]);
        push(&[
            "-device",
            "virtio-serial-pci,id=serial,bus=pcie.0,addr=0x03",
        ]);
        let (id, name) = (agent_port::PORT_ID, p2plab_guest::protocol::PORT_NAME);
        push(&[
            "-device",
            &format!("virtserialport,id={id},chardev=agent,name={name}"),
        ]);
        if let Some(image) = &self.system {
            for argument in system_disk(image) {
                push(&[&argument]);
            }
        }
        let mut append = KERNEL_ARGUMENTS.to_owned();
        if self.system.is_some() {
            append.push_str(SYSTEM_ARGUMENT);
        }
        if self.shape.iommu {
            append.push_str(IOMMU_ARGUMENT);
        }
        for argument in &self.kernel_arguments {
            append.push(' ');
            append.push_str(argument);
        }
        push(&["-append", &append]);
        match begin {
            Begin::BootForImage => {
                for argument in self.shape.placeholder_arguments() {
                    push(&[&argument]);
                }
            }
            Begin::Boot(devices) => {
                for device in *devices {
                    push(&["-device", &device.to_string()]);
                }
            }
            Begin::Restore(..) => push(&["-incoming", "defer"]),
        }
        argv.extend(["-kernel".into(), self.kernel.clone().into_os_string()]);
        argv.extend(["-initrd".into(), self.initramfs.clone().into_os_string()]);
        argv
    }

    /// Starts the machine and returns once its agent answers.
    pub(super) fn start(
        &self,
        begin: &Begin<'_>,
        run: &RunDirectory,
        phases: &mut Phases,
    ) -> Result<Machine, LabError> {
        let since = Instant::now();
        let links = Links::new().map_err(crate::qemu::StartError::Io)?;
        let mut argv = self.arguments(begin);
        argv.extend(links.arguments());
        run.write_command_line(&argv, &notes(begin))?;
        let mut qemu = Qemu::start(argv, links, &run.qemu_log(), &run.console_log())?;
        let stream = qemu.take_agent().ok_or_else(|| {
            LabError::Unexpected("the agent's stream was taken before the lab had it".into())
        })?;
        let faults = qemu.faults.clone();
        let cause = move || {
            let deadline = wait::Deadline::new("the reason of the port's end", LAST_WORDS);
            faults.wait(&deadline).ok().map(|fault| fault.to_string())
        };
        let agent = Arc::new(AgentClient::with_log(stream, &run.agent_log(), cause)?);
        phases.end("QEMU started");
        let patience = match begin {
            Begin::Restore(image, _) => {
                snapshot::load(&qemu.qmp, image)?;
                qemu.qmp.cont()?;
                phases.end("guest restored");
                wait::RESTORED_AGENT
            }
            Begin::Boot(_) | Begin::BootForImage => wait::BOOT,
        };
        let machine = Machine {
            qemu,
            agent,
            ready_after: Duration::ZERO,
            going_down: GoingDown::default(),
        };
        machine.watch_faults();
        machine.hello(patience)?;
        // Only now: before the agent's first answer nothing says that it was ever there.
        agent_port::watch(&machine.qemu, machine.going_down.clone())
            .map_err(crate::qemu::StartError::Io)?;
        if self.system.is_some() && !matches!(begin, Begin::Restore(..)) {
            machine.require_system()?;
        }
        phases.end("agent answers");
        Ok(Machine {
            ready_after: since.elapsed(),
            ..machine
        })
    }
}

/// What the command line does not say: how to do the same again, and what followed through the monitor.
fn notes(begin: &Begin<'_>) -> Vec<String> {
    let mut notes = vec![
        "The same lab again: p2plab boot topology.toml (in this folder). QEMU was started with the arguments below; \
         the descriptors (fd=) were the lab's."
            .to_owned(),
    ];
    if let Begin::Restore(image, endpoints) = begin {
        notes.push(format!(
            "Then, through the monitor, migrate-incoming of {} (mapped-ram), and device_add of:",
            image.display()
        ));
        notes.extend(endpoints.iter().map(ToString::to_string));
    }
    notes
}

/// QEMU's arguments for the system image: a disk on the root complex, of which the fabric knows nothing. The file
/// is shared by all labs, and none writes it.
fn system_disk(image: &Path) -> [String; 4] {
    let file = serde_json::json!({
        "driver": "raw",
        "node-name": "system",
        "read-only": true,
        "file": {
            "driver": "file",
            "filename": image.to_string_lossy(),
            "read-only": true,
        },
    });
    [
        "-blockdev".to_owned(),
        file.to_string(),
        "-device".to_owned(),
        "virtio-blk-pci,id=system-disk,drive=system,bus=pcie.0,addr=0x04".to_owned(),
    ]
}

/// QEMU's command with its environment, which keeps it from modules of a QEMU installed on the host.
fn qemu_command(artifacts: &Artifacts) -> Vec<OsString> {
    let mut argv = Vec::new();
    if !artifacts.qemu.env.is_empty() {
        argv.push("env".into());
    }
    for (name, value) in &artifacts.qemu.env {
        let mut assignment = name.clone();
        assignment.push("=");
        assignment.push(value);
        argv.push(assignment);
    }
    argv.extend(artifacts.qemu.argv_prefix.iter().cloned());
    argv
}

impl Machine {
    /// Begins (or, after a reboot, begins again) the conversation with the agent.
    pub(super) fn hello(&self, patience: Duration) -> Result<(), LabError> {
        // A guest can be lost before the first word to it: QEMU runs it while the lab still greets QMP.
        let lost = || self.qemu.faults.first().map(|fault| fault.to_string());
        match self.agent.hello_unless(patience, lost) {
            Ok(hello) => {
                if !hello.status.failed_modules.is_empty() {
                    let failed = &hello.status.failed_modules;
                    tracing::warn!(?failed, "the guest could not load modules");
                }
                Ok(())
            }
            Err(error @ AgentError::Deadline { .. }) => {
                // What the guest said last is all that is known of its silence.
                let told = agent_port::last_lines(&self.qemu.console);
                Err(self.cause(LabError::Unexpected(format!("{error}{told}"))))
            }
            Err(error) => Err(self.cause(error.into())),
        }
    }

    /// A guest that was to mount the system image and has not is of no use, least of all as a base image.
    fn require_system(&self) -> Result<(), LabError> {
        let programs = format!("{SYSTEM_ROOT}/usr/bin");
        match self.agent.list(&programs, wait::AGENT_COMMAND) {
            Ok(entries) if !entries.is_empty() => Ok(()),
            Ok(_) | Err(AgentError::Guest { .. }) => {
                Err(self.cause(LabError::Unexpected(format!(
                    "the guest has not mounted the system image; its kernel needs virtio_blk, erofs and overlay, built \
                     in or among the modules that the lab is given{}",
                    agent_port::last_lines(&self.qemu.console)
                ))))
            }
            Err(error) => Err(self.cause(error.into())),
        }
    }

    /// Every request to the agent fails with what ended the guest, not with a passed deadline.
    fn watch_faults(&self) {
        // Weak: the board may outlive the client, on the client's own thread too.
        let agent = Arc::downgrade(&self.agent);
        self.qemu.faults.subscribe(move |fault| {
            if let Some(agent) = agent.upgrade() {
                agent.fail(&fault.to_string());
            }
        });
    }

    /// The fault that explains `error`, if there is one.
    pub(super) fn cause(&self, error: LabError) -> LabError {
        match self.qemu.faults.first() {
            Some(fault) => LabError::Fault(fault),
            None => error,
        }
    }

    /// Reboots the guest and waits until it answers again.
    pub(super) fn reboot(&self) -> Result<(), LabError> {
        let mut events = self.qemu.qmp.events();
        let deadline = wait::Deadline::new("the guest to reset its machine", wait::SHUTDOWN);
        self.going_down.set(true);
        let again = self
            .agent
            .shutdown(p2plab_guest::protocol::Power::Reboot, wait::AGENT_COMMAND)
            .map_err(LabError::from)
            .and_then(|()| Ok(events.wait("RESET", &deadline, |_| true)?))
            .map_err(|error| self.cause(error))
            .and_then(|_| self.hello(wait::BOOT));
        self.going_down.set(false);
        again
    }

    /// Powers the guest off and waits for QEMU to end.
    pub(super) fn power_off(&self) -> Result<(), LabError> {
        let deadline = wait::Deadline::new("the guest to power off", wait::SHUTDOWN);
        self.going_down.set(true);
        self.agent
            .shutdown(p2plab_guest::protocol::Power::Poweroff, wait::AGENT_COMMAND)
            .map_err(|error| self.cause(error.into()))?;
        let status = self
            .qemu
            .child
            .wait(&deadline)
            .map_err(|error| LabError::Unexpected(error.to_string()))?;
        if status.success() {
            return Ok(());
        }
        Err(match self.qemu.faults.first().as_deref() {
            Some(Fault::Guest(_)) | None => {
                LabError::Unexpected(format!("QEMU ended with {status}"))
            }
            Some(fault) => LabError::Unexpected(fault.to_string()),
        })
    }
}

/// KVM where it can boot a kernel, else emulation with a thread for each of the guest's CPUs.
pub(super) fn accelerator() -> &'static str {
    match p2plab_images::accelerator() {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg(_) => "tcg,thread=multi",
    }
}
