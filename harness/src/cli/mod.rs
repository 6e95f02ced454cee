//! Commands of the command line: one file each for what is more than a call into the library.
//!
//! Exit status: 0 for success, 1 where the lab or its guest failed, 2 where the user or the host must mend
//! something, and for `boot --exec` the command's own.

/// `println!` for a reader that may go away, as `head` does: nobody is left to be told.
macro_rules! say {
    ($($words:tt)*) => {
        $crate::cli::say(format_args!($($words)*))
    };
}

mod artifacts;
mod boot;
mod error;
mod interrupt;
mod modules;
mod run;
mod serve;
mod shell;

use std::fmt;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use p2plab::scenarios::OwnArtifacts;
use p2plab_images::Overrides;

use error::CliError;

/// PCIe peer-to-peer labs in software: a guest, endpoints, and a switch that counts every transaction.
#[derive(Debug, Parser)]
#[command(name = "p2plab", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario and print its table
    Run(run::RunArgs),
    /// List the scenarios
    List,
    /// Boot a topology: a shell in its guest, or one command
    Boot(boot::BootArgs),
    /// Host a topology's switch and endpoints for a QEMU, or other vfio-user client, of your own
    Serve(serve::ServeArgs),
    /// Fetch what a lab runs on: QEMU, guest kernel, programs for the guest
    Fetch(artifacts::FetchArgs),
    /// Build the kernel modules of guest-kernel/, without root
    Modules(modules::ModulesArgs),
    /// Say what this host has, what will be used, and what is missing
    Doctor(OwnArgs),
    /// Remove the cache: fetched artifacts, base images, logs of runs
    Clean,
}

/// What a user brings along.
#[derive(Clone, Debug, Default, Args)]
struct OwnArgs {
    /// A qemu-system-x86_64 (11.1 or newer, with vfio-user-pci) instead of the lab's own
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// A kernel instead of the lab's own
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<PathBuf>,
    /// The modules of the kernel (--kernel's or the topology's): what its `make modules_install` made
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
}

impl OwnArgs {
    fn own(&self) -> OwnArtifacts {
        OwnArtifacts {
            qemu: self.qemu.clone(),
            kernel: self.kernel.clone(),
            modules: self.modules.clone(),
        }
    }

    fn overrides(&self) -> Overrides {
        Overrides {
            qemu: self.qemu.clone(),
            kernel: self.kernel.clone(),
            modules: self.modules.clone(),
        }
    }
}

/// Runs the command line and gives its exit status.
pub(crate) fn main() -> ExitCode {
    p2plab::lab::device_log::install("warn");
    let cli = Cli::parse();
    let result = run_command(&cli.command).unwrap_or_else(|error| {
        // What a signal broke off fails in some way or other; how does not matter.
        if interrupt::exit_code().is_none() {
            eprintln!("p2plab: {error}");
        }
        error.exit_code()
    });
    interrupt::exit_code().unwrap_or(result)
}

fn run_command(command: &Command) -> Result<ExitCode, CliError> {
    if matches!(
        command,
        Command::Run(_) | Command::Boot(_) | Command::Fetch(_) | Command::Modules(_)
    ) {
        interrupt::end_on_signals()?;
    }
    match command {
        Command::Run(args) => run::run(args),
        Command::List => {
            run::list();
            Ok(ExitCode::SUCCESS)
        }
        Command::Boot(args) => boot::boot(args),
        Command::Serve(args) => serve::serve(args),
        Command::Fetch(args) => artifacts::fetch(args),
        Command::Modules(args) => modules::modules(args),
        Command::Doctor(own) => artifacts::doctor(&own.overrides()),
        Command::Clean => artifacts::clean(),
    }
}

/// See [`say!`].
fn say(line: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    let said = out.write_fmt(line).and_then(|()| out.write_all(b"\n"));
    if let Err(error) = said
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        eprintln!("p2plab: standard output: {error}");
    }
}

/// A size such as `1GiB` on the command line.
fn size(text: &str) -> Result<u64, String> {
    p2plab::topology::sizes::parse(text).map_err(|error| error.to_string())
}
