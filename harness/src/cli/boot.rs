//! `p2plab boot`: a guest to use by hand, or for one command.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use p2plab::agent::{Command, Exit, Stream};
use p2plab::lab::Lab;
use p2plab::topology::Topology;
use p2plab::wait::{self, Deadline};
use p2plab_images::Terminal;

use super::{CliError, OwnArgs};

#[derive(Debug, Args)]
pub(super) struct BootArgs {
    /// A topology file; harness/topologies/ has examples
    topology: PathBuf,
    /// Put a file of the host into the guest first; may be given several times
    #[arg(long, value_name = "HOST:GUEST")]
    put: Vec<String>,
    /// Run this line of shell in the guest instead of giving a shell, and exit with its status
    #[arg(long, value_name = "CMD")]
    exec: Option<String>,
    /// Seconds after which --exec's command is killed
    #[arg(long, default_value_t = 3600, requires = "exec")]
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
    let mut options = Lab::options(topology).cold(args.cold);
    for put in &args.put {
        let (host, guest) = split_put(put)?;
        options = options.put(host, guest);
    }
    let lab = options.start_with(&mut Terminal::new())?;
    let status = match &args.exec {
        Some(line) => exec(&lab, line, args.deadline)?,
        None => shell(&lab)?,
    };
    if args.traffic {
        eprint!("{}", lab.traffic());
    }
    lab.finish()?;
    Ok(status)
}

fn split_put(put: &str) -> Result<(PathBuf, String), CliError> {
    match put.split_once(':') {
        Some((host, guest)) if guest.starts_with('/') => {
            let host = PathBuf::from(host);
            if host.is_file() {
                return Ok((host, guest.to_owned()));
            }
            Err(CliError::Input(format!(
                "--put {put}: {} is no file",
                host.display()
            )))
        }
        _ => Err(CliError::Input(format!(
            "--put {put} does not say where to; write HOST:GUEST, for instance ./test:/root/test"
        ))),
    }
}

fn exec(lab: &Lab, line: &str, deadline: u64) -> Result<ExitCode, CliError> {
    let command = Command::shell(line).deadline(std::time::Duration::from_secs(deadline));
    let exit = lab.agent()?.run_streaming(&command, |stream, bytes| {
        // Whoever reads our output may have gone; the command goes on to its end all the same.
        let _ = match stream {
            Stream::Stdout => std::io::stdout()
                .write_all(bytes)
                .and_then(|()| std::io::stdout().flush()),
            Stream::Stderr => std::io::stderr().write_all(bytes),
        };
    })?;
    match exit {
        Exit::Status(status) => Ok(ExitCode::from(u8::try_from(status).unwrap_or(1))),
        Exit::Signal(signal) => Ok(ExitCode::from(128 | u8::try_from(signal).unwrap_or(0))),
        Exit::Deadline => Err(CliError::Failed(format!(
            "the command did not end within {deadline} s: {line}"
        ))),
    }
}

fn shell(lab: &Lab) -> Result<ExitCode, CliError> {
    eprintln!(
        "The guest's shell follows; leave it with Ctrl-]. Logs: {}",
        lab.run_directory().display()
    );
    let failed = |error: std::io::Error| CliError::Failed(format!("the console: {error}"));
    let console = &lab.qemu()?.console;
    let (attachment, _detach) = console.attach(console.mark()).map_err(failed)?;
    // The shell has printed its prompt long ago; an empty line makes it print another.
    let deadline = Deadline::new("the console to take a line", wait::QMP_COMMAND);
    console
        .write(b"\r", &deadline)
        .map_err(|error| CliError::Failed(error.to_string()))?;
    attachment
        .run(std::io::stdin(), std::io::stdout())
        .map_err(failed)?;
    eprintln!();
    Ok(ExitCode::SUCCESS)
}
