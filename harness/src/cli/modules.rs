//! `p2plab modules`: builds the kernel modules of `guest-kernel/`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use p2plab_images::{BuildTarget, Cache, ModuleBuilder, ModuleSource, Terminal, module_sources};

use super::CliError;

#[derive(Debug, Args)]
pub(super) struct ModulesArgs {
    /// The modules to build [default: all of guest-kernel/]
    name: Vec<String>,
    /// Build for this kernel tree, in which `make` has run, with the compiler of this host, instead of for the guest's
    /// kernel
    #[arg(long, value_name = "DIR")]
    kdir: Option<PathBuf>,
    /// Build for every kernel of the manifest, and have the kernel's checkpatch.pl --strict look at the sources
    #[arg(long, conflicts_with = "kdir")]
    check: bool,
}

/// `p2plab modules`.
pub(super) fn modules(args: &ModulesArgs) -> Result<ExitCode, CliError> {
    let cache = Cache::open()?;
    let sources = if args.name.is_empty() {
        module_sources()?
    } else {
        let names = args.name.iter();
        names
            .map(|name| ModuleSource::find(name))
            .collect::<Result<_, _>>()?
    };
    let mut targets = vec![match &args.kdir {
        Some(tree) => BuildTarget::Tree(tree.clone()),
        None => BuildTarget::Guest,
    }];
    if args.check {
        targets.extend(BuildTarget::older()?);
    }
    for (at, target) in targets.iter().enumerate() {
        let builder = ModuleBuilder::open(&cache, target, &mut Terminal::new())?;
        say!("{}", builder.release());
        for source in &sources {
            build(&builder, source)?;
            // The style is the guest's kernel's; an older kernel has an older opinion.
            if args.check && at == 0 {
                builder.check(source, &mut Terminal::new())?;
                say!("  {:12} passes checkpatch.pl --strict", source.name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn build(builder: &ModuleBuilder, source: &ModuleSource) -> Result<(), CliError> {
    let since = Instant::now();
    let (modules, built) = builder.build(source, &mut Terminal::new())?;
    let how = if built {
        format!("built in {:.1} s", since.elapsed().as_secs_f64())
    } else {
        "unchanged".to_owned()
    };
    for module in modules {
        say!("  {:12} {how}: {}", module.name, module.path.display());
    }
    Ok(())
}

/// Fetches all that modules are built with and against, and returns the kernels' releases.
pub(super) fn fetch_toolchain(cache: &Cache) -> Result<Vec<String>, CliError> {
    let mut targets = vec![BuildTarget::Guest];
    targets.extend(BuildTarget::older()?);
    let mut releases = Vec::new();
    for target in &targets {
        let builder = ModuleBuilder::open(cache, target, &mut Terminal::new())?;
        builder.fetch_source(&mut Terminal::new())?;
        releases.push(builder.release().to_owned());
    }
    Ok(releases)
}
