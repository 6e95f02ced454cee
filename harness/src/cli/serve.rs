//! `p2plab serve`: switch and endpoints without a guest.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use p2plab::lab::Devices;
use p2plab::topology::Topology;

use super::CliError;
use super::interrupt::Interrupt;
use super::run::{not_written, writable};

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
    if let Some(path) = &args.json {
        writable(path)?;
    }
    let mut interrupt = Interrupt::new()?;
    let devices = Devices::start(&topology, args.socket_dir.as_deref())?;
    print_addresses(&devices)?;
    eprintln!("p2plab: serving; Ctrl-C ends it and prints the traffic");
    interrupt.wait();
    let traffic = devices.traffic();
    say!("\n# traffic\n{traffic}");
    for violation in traffic.check().err().unwrap_or_default() {
        eprintln!("p2plab: the counters contradict each other: {violation}");
    }
    if let Some(path) = &args.json {
        serde_json::to_string_pretty(&traffic)
            .map_err(std::io::Error::other)
            .and_then(|json| std::fs::write(path, json + "\n"))
            .map_err(|error| not_written(path, &error))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The sockets for any client, and a command line for QEMU: both go into a shell as they are.
fn print_addresses(devices: &Devices) -> Result<(), CliError> {
    say!("# sockets");
    for device in devices.iter() {
        say!("{:16} {}", device.name(), device.socket().display());
    }
    say!("\n# QEMU: this machine with these endpoints; add what it is to boot");
    let mut command = "qemu-system-x86_64".to_owned();
    for argument in devices.shape().qemu_arguments() {
        command.push_str(if argument.starts_with('-') {
            " \\\n  "
        } else {
            " "
        });
        command.push_str(&quote(&argument));
    }
    for device in devices.iter() {
        let argument = devices.device_argument(device.name())?.to_string();
        command.push_str(" \\\n  -device ");
        command.push_str(&quote(&argument));
    }
    say!("{command}");
    Ok(())
}

/// A word as a POSIX shell takes it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,.:/+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        for word in ["-m", "", "{\"a\":\"it's\"}", "a b", "$(id)`id`\\"] {
            let line = format!("printf %s {}", quote(word));
            let out = std::process::Command::new("sh")
                .args(["-c", &line])
                .output();
            assert_eq!(out.unwrap().stdout, word.as_bytes(), "{line}");
        }
        assert_eq!(quote("id=ram,size=512"), "id=ram,size=512");
    }
}
