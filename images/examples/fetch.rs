//! Fetches what a lab runs on, builds an initramfs, and says what came and how long it took.
//!
//! `cargo run -p p2plab-images --example fetch [--system] [MODULE...]`

use std::process::ExitCode;
use std::time::Instant;

use p2plab_images::{
    ArtifactError, Cache, HostReport, Initramfs, InitramfsSpec, Overrides, Terminal, resolve,
    resolve_with_system,
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fetch: {e}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<(), ArtifactError> {
    let start = Instant::now();
    let cache = Cache::open()?;
    let overrides = Overrides::default();
    let mut modules: Vec<String> = std::env::args().skip(1).collect();
    let system = modules.first().is_some_and(|word| word == "--system");
    let artifacts = if system {
        modules.remove(0);
        resolve_with_system(&cache, &overrides, &[], &mut Terminal::new())?
    } else {
        resolve(&cache, &overrides, &mut Terminal::new())?
    };
    println!("resolved in {:?}", start.elapsed());

    if modules.is_empty() {
        modules = ["nvme", "virtio_net", "virtio_blk"]
            .map(str::to_owned)
            .into();
    }
    let start = Instant::now();
    let spec = InitramfsSpec {
        modules,
        ..InitramfsSpec::default()
    };
    let initramfs = Initramfs::build(&cache, &artifacts, &spec)?;
    println!(
        "initramfs in {:?}: {}",
        start.elapsed(),
        initramfs.display()
    );
    println!(
        "QEMU {}: {:?}",
        artifacts.qemu.version, artifacts.qemu.argv_prefix
    );
    println!(
        "kernel {}: {}",
        artifacts.kernel.release,
        artifacts.kernel.image.display()
    );
    if let Some(system) = &artifacts.system {
        println!("system image: {}", system.path.display());
    }
    println!("identity {}", artifacts.identity());
    println!("\n{}", HostReport::gather(&cache, &overrides)?);
    Ok(())
}
