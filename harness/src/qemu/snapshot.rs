//! Base images: saving a booted guest to a file and starting from it.
//!
//! Measured with QEMU 11.1.3, TCG, 512 MiB, page cache warm: saving 0.6 to 1.4 s; the file is sparse, 105 MiB
//! allocated of 518 (what the guest has touched); loading 0.07 s, from exec to `cont` 0.11 s. Any number of QEMUs may
//! load one file at once: they read it into memory of their own and never write it.
//!
//! What the two sides must agree on: the same arguments less the placeholders. `-kernel` and `-initrd` are
//! not needed to restore (memory comes from the file), but a guest that reboots afterwards needs them.
//! The chardevs' descriptors are new ones; an agent port that was open in the guest stays open.
//!
//! Time: the guest's monotonic clock and its TSC go on from the moment of saving, so no timer fires in a
//! burst and no hung-task alarm is raised. Its wall clock also goes on from there, hours or days late: the
//! lab must set it after the restore.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::qmp::{Events, Qmp, QmpError};
use crate::wait::{self, Deadline};

/// `mapped-ram` gives every page a fixed place in the file, which makes it sparse and fast to read;
/// `events` announces the end, so that nobody polls.
const CAPABILITIES: [&str; 2] = ["events", "mapped-ram"];

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
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
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
