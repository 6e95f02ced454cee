//! Base images: saving a booted guest to a file and starting from it.
//!
//! Measured with QEMU 11.1.3, TCG, 512 MiB, page cache warm: saving 1.4 to 1.6 s; the file is sparse, 105
//! MiB allocated of 518 (what the guest has touched); loading 0.07 s, from exec to `cont` 0.11 s on an idle
//! machine and 0.3 to 0.5 s while two compilers run. Multifd, direct-io, and x-ignore-shared on a copy of a
//! memory file were not faster. Any number of QEMUs may load one file at once: they read it into memory of
//! their own and never write it.
//!
//! What the two sides must agree on: the same arguments less the placeholders. `-kernel` and `-initrd` are
//! not needed to restore (memory comes from the file), but a guest that reboots afterwards needs them.
//! The chardevs' descriptors are new ones; an agent port that was open in the guest stays open.
//!
//! Time (TCG; not measured under KVM): the guest's monotonic clock and its TSC go on from the moment of
//! saving, so no timer fires in a burst and no hung-task alarm is raised. Its wall clock also goes on from
//! there, hours or days late: the lab must set it after the restore (the guest's RTC shows the host's time).

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde_json::{Value, json};

use super::qmp::{Events, Qmp, QmpError};
use crate::wait::{self, Deadline};

/// `mapped-ram` gives every page a fixed place in the file, which makes it sparse and fast to read;
/// `events` announces the end, so that nobody polls.
const CAPABILITIES: [&str; 2] = ["events", "mapped-ram"];

/// The end of an unfinished image's name, which is `IMAGE.PID-NUMBER.partial`.
const PARTIAL: &str = ".partial";

/// Why a base image could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// QEMU did not do it.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The host did not.
    #[error("cannot write base image {}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// JSON has no way to say it.
    #[error("the base image's path {} is not UTF-8; choose another cache folder", .0.display())]
    Path(PathBuf),
}

/// Stops the guest and writes it to `path`; the file appears there whole or not at all.
///
/// The guest stays stopped: [`Qmp::cont`] lets it go on, [`Qmp::quit`] ends it.
pub fn save(qmp: &Qmp, path: &Path) -> Result<(), SnapshotError> {
    let deadline = Deadline::new("the base image to be written", wait::SNAPSHOT_SAVE);
    // Same folder, so that the rename is atomic; own name, so that two savers do not meet.
    static SAVES: AtomicU64 = AtomicU64::new(0);
    sweep(path);
    let number = SAVES.fetch_add(1, Ordering::Relaxed);
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}-{number}{PARTIAL}", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = write(qmp, &partial, &deadline).and_then(|()| {
        let settled = File::open(&partial).and_then(|file| file.sync_all());
        settled
            .and_then(|()| fs::rename(&partial, path))
            .map_err(|source| SnapshotError::Io {
                path: path.into(),
                source,
            })
    });
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

/// Removes what savers of the same image left behind when they were killed.
fn sweep(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return;
    };
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let file = entry.file_name();
        let rest = file.as_bytes().strip_prefix(name.as_bytes());
        let saver = rest.and_then(|rest| {
            let rest = str::from_utf8(rest).ok()?;
            let (pid, _) = rest
                .strip_prefix('.')?
                .strip_suffix(PARTIAL)?
                .split_once('-')?;
            Pid::from_raw(pid.parse().ok()?)
        });
        // Only "no such process" means that it is gone; "not permitted" is somebody else's process.
        if saver.is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn write(qmp: &Qmp, path: &Path, deadline: &Deadline) -> Result<(), SnapshotError> {
    let channels = file_channel(path)?;
    qmp.stop()?;
    qmp.set_migration_capabilities(&CAPABILITIES)?;
    let events = qmp.events();
    qmp.execute("migrate", json!({ "channels": channels }), deadline)?;
    Ok(finish(qmp, events, "saving the guest", deadline)?)
}

/// Loads `path` into a QEMU that was started with `-incoming defer`. The guest is left stopped.
pub fn load(qmp: &Qmp, path: &Path) -> Result<(), SnapshotError> {
    let deadline = Deadline::new("the base image to be loaded", wait::SNAPSHOT_RESTORE);
    let channels = file_channel(path)?;
    qmp.set_migration_capabilities(&CAPABILITIES)?;
    let events = qmp.events();
    // Without exit-on-error=false QEMU exits on a bad image, and its reason is only in its log.
    let arguments = json!({ "channels": channels, "exit-on-error": false });
    qmp.execute("migrate-incoming", arguments, &deadline)?;
    Ok(finish(qmp, events, "restoring the guest", &deadline)?)
}

/// A channel rather than a URI: a URI gives a comma in the path a meaning.
fn file_channel(path: &Path) -> Result<Value, SnapshotError> {
    let name = path
        .to_str()
        .ok_or_else(|| SnapshotError::Path(path.into()))?;
    let file = json!({ "transport": "file", "filename": name, "offset": 0 });
    Ok(json!([{ "channel-type": "main", "addr": file }]))
}

fn finish(qmp: &Qmp, mut events: Events, what: &str, deadline: &Deadline) -> Result<(), QmpError> {
    let ends = |data: &Value| {
        ["completed", "failed", "cancelled"]
            .iter()
            .any(|s| data["status"] == *s)
    };
    let end = events.wait("MIGRATION", deadline, ends)?;
    if end.data["status"] == "completed" {
        return Ok(());
    }
    let answer = qmp.execute("query-migrate", Value::Null, deadline)?;
    let reason = answer["error-desc"]
        .as_str()
        .unwrap_or("QEMU gives no reason; see qemu.log");
    Err(QmpError::Failed {
        what: what.to_owned(),
        reason: reason.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_savers_files_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("base.img");
        let mut dead = std::process::Command::new("/bin/true").spawn().unwrap();
        dead.wait().unwrap();
        let name = |rest: &str| folder.path().join(format!("base.img{rest}"));
        let swept = name(&format!(".{}-0.partial", dead.id()));
        let kept = [
            "",
            ".x-0.partial",
            &format!(".{}-0.partial", std::process::id()),
            "2.1-0.partial",
        ]
        .map(name);
        for file in kept.iter().chain([&swept]) {
            fs::write(file, "").unwrap();
        }
        sweep(&image);
        assert!(!swept.exists());
        assert!(kept.iter().all(|file| file.exists()));
    }

    #[test]
    fn a_comma_in_the_path_is_part_of_the_path() {
        let channels = file_channel(Path::new("/cache/a,offset=7")).unwrap();
        assert_eq!(channels[0]["addr"]["filename"], "/cache/a,offset=7");
    }
}
