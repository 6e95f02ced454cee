//! `p2plab serve`: switch and endpoints without a guest.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use p2plab::lab::Devices;
use p2plab::topology::Topology;

use super::interrupt::Interrupt;
use super::{CliError, error};

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// A topology file; harness/topologies/ has examples
    topology: PathBuf,
    /// Put the sockets into this folder, as NAME.sock, instead of at paths that vanish with this process
    #[arg(long, value_name = "DIR")]
    socket_dir: Option<PathBuf>,
    /// Write the traffic as JSON at the end
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// `p2plab serve`.
pub(super) fn serve(args: &ServeArgs) -> Result<ExitCode, CliError> {
    let topology = Topology::from_toml(&args.topology)?;
    if let Some(directory) = args
        .socket_dir
        .as_ref()
        .filter(|directory| !directory.is_dir())
    {
        return Err(CliError::Input(format!(
            "--socket-dir {} is no folder; make it first",
            directory.display()
        )));
    }
    let mut interrupt = Interrupt::new()?;
    let devices = Devices::start(&topology, args.socket_dir.as_deref())?;
    println!("# sockets");
    for device in devices.iter() {
        println!("{:16} {}", device.name(), device.socket().display());
    }
    println!("\n# QEMU arguments: the machine, then its endpoints");
    for argument in devices.shape().qemu_arguments() {
        print!(
            "{argument}{}",
            if argument.starts_with('-') { ' ' } else { '\n' }
        );
    }
    for device in devices.iter() {
        println!("-device '{}'", devices.device_argument(device.name())?);
    }
    eprintln!("\nServing; end with Ctrl-C.");
    interrupt.wait();
    let traffic = devices.traffic();
    println!("\n# traffic\n{traffic}");
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&traffic)
            .map_err(std::io::Error::other)
            .and_then(|json| std::fs::write(path, json));
        json.map_err(|error| {
            error::CliError::Input(format!(
                "--json {} cannot be written: {error}",
                path.display()
            ))
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
