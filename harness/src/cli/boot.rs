//! `p2plab boot`: a guest to use by hand, or for one command.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use p2plab::agent::{Command, Exit, Stream};
use p2plab::lab::{Lab, LabError};
use p2plab::topology::{DeviceOptions, Topology};
use p2plab_images::Terminal;

use super::shell::{powered_off, shell};
use super::{CliError, OwnArgs};

#[derive(Debug, Args)]
pub(super) struct BootArgs {
    /// A topology file; harness/topologies/ has examples
    topology: PathBuf,
    /// Put a file of the host into the guest first, with its permissions; may be given several times
    #[arg(long, value_name = "HOST:GUEST", value_parser = put)]
    put: Vec<(PathBuf, String)>,
    /// Run this line of shell in the guest instead of giving a shell, and exit with its status
    #[arg(long, value_name = "CMD")]
    exec: Option<String>,
    /// Seconds after which --exec's command is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, requires = "exec",
          value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    deadline: u64,
    /// Boot from scratch instead of restoring a base image
    #[arg(long)]
    cold: bool,
    /// Print what crossed the switch's ports, at the end, on standard error
    #[arg(long)]
    traffic: bool,
    #[command(flatten)]
    own: OwnArgs,
}

/// `p2plab boot`.
pub(super) fn boot(args: &BootArgs) -> Result<ExitCode, CliError> {
    let mut topology = Topology::from_toml(&args.topology)?;
    args.own.own().apply(&mut topology);
    let mut options = Lab::options(topology.clone()).cold(args.cold);
    for (host, guest) in &args.put {
        options = options.put(host, guest);
    }
    let lab = options.start_with(&mut Terminal::new())?;
    await_endpoints(&lab, &topology)?;
    let traffic = args.traffic.then(|| lab.devices().fabric().clone());
    let status = match &args.exec {
        Some(line) => exec(lab, line, args.deadline)?,
        None => {
            shell(lab)?;
            ExitCode::SUCCESS
        }
    };
    if let Some(fabric) = traffic {
        eprint!("{}", fabric.traffic());
    }
    Ok(status)
}

/// Whoever boots a topology wants its endpoints there; a lab that has just started is still binding them.
/// One that does not come up may be the very thing that the user is after, so it is only a warning.
fn await_endpoints(lab: &Lab, topology: &Topology) -> Result<(), CliError> {
    let guest = lab.guest()?;
    let has_driver = guest.try_sh("[ -d /sys/bus/pci/drivers/nvme ]")?;
    let has_driver = has_driver.status.success();
    let is_nvme = |device: &DeviceOptions| matches!(device, DeviceOptions::Nvme(_));
    if let Some(ssd) = topology.endpoints.iter().find(|e| is_nvme(&e.device))
        && !has_driver
    {
        eprintln!(
            "p2plab: warning: the guest's kernel has no nvme driver, so its SSDs (such as {}) are no disks; \
             give the kernel's modules with --modules, or build it with CONFIG_BLK_DEV_NVME=y",
            ssd.name
        );
    }
    for endpoint in &topology.endpoints {
        let found = match &endpoint.device {
            DeviceOptions::Nvme(_) if has_driver => guest.nvme(&endpoint.name).map(drop),
            DeviceOptions::Nvram(_) => guest.nvram(&endpoint.name).map(drop),
            _ => Ok(()),
        };
        if let Err(error) = found {
            if matches!(error, LabError::Fault(_)) {
                return Err(error.into());
            }
            eprintln!("p2plab: warning: {error}");
        }
    }
    Ok(())
}

/// `HOST:GUEST`.
fn put(text: &str) -> Result<(PathBuf, String), String> {
    // The last one: names on the host may hold a colon.
    let Some((host, guest)) = text.rfind(":/").map(|at| text.split_at(at)) else {
        return Err(
            "it does not say where to; write HOST:GUEST, for instance ./test:/root/test".into(),
        );
    };
    let guest = guest.trim_start_matches(':');
    if guest.ends_with('/') {
        return Err(format!(
            "{guest} is a folder; name the file in it, for instance {guest}test"
        ));
    }
    match std::fs::File::open(host).and_then(|file| file.metadata()) {
        Ok(found) if found.is_file() => Ok((host.into(), guest.to_owned())),
        Ok(_) => Err(format!(
            "{host} is no file; pack a folder with tar and unpack it in the guest"
        )),
        Err(error) => Err(format!("{host} cannot be read: {error}")),
    }
}

fn exec(mut lab: Lab, line: &str, deadline: u64) -> Result<ExitCode, CliError> {
    let command = Command::shell(line).deadline(Duration::from_secs(deadline));
    let exit = lab.agent()?.run_streaming(&command, |stream, bytes| {
        // Whoever reads our output may have gone; the command goes on to its end all the same.
        let _ = match stream {
            Stream::Stdout => std::io::stdout()
                .write_all(bytes)
                .and_then(|()| std::io::stdout().flush()),
            Stream::Stderr => std::io::stderr().write_all(bytes),
        };
    });
    let status = match exit {
        Ok(Exit::Status(status)) => u8::try_from(status).unwrap_or(1),
        Ok(Exit::Signal(signal)) => u8::try_from(signal).unwrap_or(0).saturating_add(128),
        Ok(Exit::Deadline) => {
            return Err(CliError::Failed(format!(
                "the command did not end within {deadline} s: {line}"
            )));
        }
        // `poweroff` as a command, or as its last: the guest has gone before it could give a status.
        Err(error) => {
            if lab.qemu()?.faults.first().is_none() || powered_off(lab.qemu()?).is_err() {
                return Err(error.into());
            }
            lab.kill_qemu()?;
            0
        }
    };
    lab.finish_if_running()?;
    Ok(ExitCode::from(status))
}
