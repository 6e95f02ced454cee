//! `fetch`, `doctor` and `clean`.

use std::process::ExitCode;

use clap::Args;
use p2plab_images::{Cache, HostReport, Overrides, Terminal, resolve, resolve_with_system};

use super::modules::fetch_toolchain;
use super::{CliError, OwnArgs};

#[derive(Debug, Args)]
pub(super) struct FetchArgs {
    /// Make the system image, too: for topologies with `system = true`
    #[arg(long)]
    system: bool,
    /// Fetch what kernel modules are built with and against, too: for `p2plab modules` and `own_modules`
    #[arg(long)]
    toolchain: bool,
    #[command(flatten)]
    own: OwnArgs,
}

/// `p2plab fetch`.
pub(super) fn fetch(args: &FetchArgs) -> Result<ExitCode, CliError> {
    let cache = Cache::open()?;
    let overrides = args.own.overrides();
    let artifacts = if args.system {
        resolve_with_system(&cache, &overrides, &[], &mut Terminal::new())?
    } else {
        resolve(&cache, &overrides, &mut Terminal::new())?
    };
    for (name, version) in artifacts.versions() {
        say!("{name:24} {version}");
    }
    if args.toolchain {
        for release in fetch_toolchain(&cache)? {
            say!("{:24} {release}", "modules for");
        }
    }
    say!("\nin {}", cache.root().display());
    Ok(ExitCode::SUCCESS)
}

/// `p2plab doctor`: status 2 where something must be mended before a lab can start.
pub(super) fn doctor(overrides: &Overrides) -> Result<ExitCode, CliError> {
    let report = HostReport::gather(&Cache::open()?, overrides)?;
    say!("{report}");
    Ok(if report.missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(2)
    })
}

/// `p2plab clean`.
pub(super) fn clean() -> Result<ExitCode, CliError> {
    let cache = Cache::open()?;
    cache.clean()?;
    say!("removed {}", cache.root().display());
    Ok(ExitCode::SUCCESS)
}
