//! Base images: a guest booted once to a ready agent, with empty slots, saved in the cache.
//!
//! The key of an image is a hash of all that it depends on; what changes makes another image, and nothing is
//! ever invalidated in place. Two processes that want the same missing image build it once: the second waits
//! for the lock that the first one holds.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use p2plab_images::{Accelerator, ArtifactError, touch};
use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};

use super::LabError;
use super::machine::{Begin, Machine, MachinePlan};
use super::phases::Phases;
use crate::agent::Command;
use crate::qemu::snapshot;
use crate::run_directory::{Outcome, RunDirectory};
use crate::shape;
use crate::topology::MIB;
use crate::wait::{self, Deadline};

/// Most images kept for machines that are not this one's; each takes 100 to 200 MB.
const KEPT: usize = 24;
/// An image that was used within this time is not removed.
const STILL_IN_USE: Duration = Duration::from_secs(3600);

/// What an image takes, in MiB, and some more.
const NEEDED_MIB: u64 = 256;

/// The base image for `plan`, booted and saved if the cache has none.
pub(super) fn ensure(
    directory: &Path,
    plan: &MachinePlan,
    artifacts_identity: &str,
    announce: impl FnOnce(),
) -> Result<PathBuf, LabError> {
    let image = directory.join(format!("{}.mapped-ram", key(plan, artifacts_identity)));
    if image.exists() {
        touch(&image);
        return Ok(image);
    }
    let failed = |source| LabError::Directory {
        path: directory.to_owned(),
        source,
    };
    fs::create_dir_all(directory).map_err(failed)?;
    let _lock = lock(&image.with_extension("lock")).map_err(failed)?;
    if image.exists() {
        return Ok(image);
    }
    announce();
    require_space(directory)?;
    build(directory, &image, plan)?;
    prune(directory, &image);
    Ok(image)
}

/// Refuses a file system that an image does not fit into: QEMU would find that out at the end of the boot.
fn require_space(directory: &Path) -> Result<(), LabError> {
    let free = rustix::fs::statvfs(directory)
        .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) / MIB);
    match free {
        Ok(free) if free < NEEDED_MIB => Err(LabError::Artifacts(ArtifactError::NoSpace {
            path: directory.to_owned(),
            needed_mib: NEEDED_MIB,
        })),
        _ => Ok(()),
    }
}

fn build(directory: &Path, image: &Path, plan: &MachinePlan) -> Result<(), LabError> {
    let name = image
        .file_stem()
        .map(|name| name.to_string_lossy().into_owned());
    let mut run = RunDirectory::named(directory, &name.unwrap_or_else(|| "boot".into()))?;
    let logs = run.path().to_owned();
    boot_and_save(image, plan, &run).map_err(|error| error.in_run(&logs))?;
    run.finish(Outcome::Passed);
    Ok(())
}

fn boot_and_save(image: &Path, plan: &MachinePlan, run: &RunDirectory) -> Result<(), LabError> {
    let machine = plan.start(
        &Begin::BootForImage,
        run,
        &mut Phases::begin(Instant::now()),
    )?;
    let boot = machine.ready_after;
    empty_slots(&machine, plan)?;
    snapshot::save(&machine.qemu.qmp, image)?;
    machine.qemu.qmp.quit()?;
    tracing::info!(image = %image.display(), seconds = boot.as_secs_f64(), "saved a base image");
    Ok(())
}

/// Empties every slot: the placeholders have done their work once the firmware has given each slot its windows.
fn empty_slots(machine: &Machine, plan: &MachinePlan) -> Result<(), LabError> {
    let slots = plan.shape.slots();
    let mut events = machine.qemu.qmp.events();
    let numbers: Vec<String> = slots.iter().map(|slot| slot.number.to_string()).collect();
    let line = format!(
        "for slot in {}; do echo 0 > /sys/bus/pci/slots/$slot/power; done; \
         sync; echo 3 > /proc/sys/vm/drop_caches",
        numbers.join(" ")
    );
    let command = Command::shell(line).deadline(wait::BOOT);
    machine
        .agent
        .check(&command)
        .map_err(|error| machine.cause(error.into()))?;
    // QEMU lets go of a device some time after the guest has: only then is its memory gone from the image.
    let deadline = Deadline::new("QEMU to let go of the placeholders", wait::HOTPLUG);
    for slot in &slots {
        events
            .wait("DEVICE_DELETED", &deadline, |_| true)
            .map_err(|e| machine.cause(e.into()))?;
        tracing::debug!(slot = slot.number, "a placeholder has gone");
    }
    // The device has gone and its memory has not: a block of memory that the restored QEMU does not know.
    for slot in &slots {
        let id = serde_json::json!({ "id": shape::placeholder_memory_id(slot) });
        machine.qemu.qmp.execute("object-del", id, &deadline)?;
    }
    Ok(())
}

fn key(plan: &MachinePlan, artifacts_identity: &str) -> String {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update(text.len().to_le_bytes());
        hash.update(text);
    };
    add(artifacts_identity);
    add(&plan.shape.canonical());
    add(&plan.initramfs.to_string_lossy());
    add(&plan.kernel_arguments.join(" "));
    add(super::machine::KERNEL_ARGUMENTS);
    add(super::machine::accelerator());
    if p2plab_images::accelerator() == Accelerator::Kvm {
        // The guest has the host's processor, which a cache that travels does not.
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let tells = |line: &&str| line.starts_with("model name") || line.starts_with("flags");
        cpuinfo.lines().filter(tells).take(2).for_each(&mut add);
    }
    // A user's own kernel keeps its path when it is built anew.
    let system = plan.system.iter();
    if let Some(image) = &plan.system {
        add(&image.to_string_lossy());
        add(super::machine::SYSTEM_ARGUMENT);
    }
    if plan.shape.iommu {
        add(super::machine::IOMMU_ARGUMENT);
    }
    for file in [&plan.kernel, &plan.initramfs].into_iter().chain(system) {
        let metadata = fs::metadata(file).ok();
        add(&format!(
            "{:?}",
            metadata.map(|m| (m.len(), m.mtime(), m.mtime_nsec(), m.ino()))
        ));
    }
    let digest = hash.finalize();
    digest
        .iter()
        .take(12)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn lock(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Removes the images that were used longest ago, but none of the last hour: somebody may be about to load it.
fn prune(directory: &Path, newest: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    let mut images: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "mapped-ram") && path != newest)
        .filter_map(|path| Some((fs::metadata(&path).ok()?.accessed().ok()?, path)))
        .collect();
    images.sort();
    let surplus = images.len().saturating_sub(KEPT);
    let idle = |used: &SystemTime| used.elapsed().is_ok_and(|since| since > STILL_IN_USE);
    let unused = images.into_iter().take(surplus);
    for (_, path) in unused.take_while(|(used, _)| idle(used)) {
        // A QEMU that is loading it has it open and goes on.
        let _ = fs::remove_file(path);
    }
}
