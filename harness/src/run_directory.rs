//! A folder for each run of a lab, in which a killed run explains itself.
//!
//! | file            | content                                                        |
//! |-----------------|----------------------------------------------------------------|
//! | `cmdline.txt`   | the QEMU command line, quoted for a shell                      |
//! | `topology.toml` | what was built                                                 |
//! | `qemu.log`      | QEMU's stdout and stderr                                       |
//! | `console.log`   | the guest's serial console, from the first byte                |
//! | `agent.jsonl`   | what was said to the guest agent and what it answered          |
//! | `device.log`    | the device models' log                                         |
//! | `counters.json` | the traffic                                                    |
//!
//! and exactly one of the markers `started`, `passed`, `failed`. A marker still called `started` whose lock
//! nobody holds belongs to a run that was killed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

/// Dated runs kept; older ones are removed when a new one starts.
const RUNS_KEPT: usize = 20;
const MARKERS: [&str; 3] = ["started", "passed", "failed"];

/// A run's folder could not be made or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}; is the file system full or read-only?", path.display())]
pub struct RunDirectoryError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// Not so.
    Failed,
}

/// The folder of one run. Dropping it without an outcome says that the run failed.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    /// Locked while the run lives: the kernel lets go of the lock however we end.
    marker: File,
    finished: bool,
}

impl RunDirectory {
    /// `base/name`, emptied of an earlier run's files; for tests, whose runs have names.
    ///
    /// If another run is alive under that name, this one gets `name-PID-NUMBER`.
    pub fn named(base: &Path, name: &str) -> Result<Self, RunDirectoryError> {
        // Two labs of one test, or the same test in two processes, run side by side.
        let others = (1_u32..).map(|n| format!("{name}-{}-{n}", std::process::id()));
        let names = std::iter::once(name.to_owned()).chain(others);
        let mut paths = names.map(|name| base.join(name));
        let path = paths
            .find(|path| !is_alive(path))
            .unwrap_or_else(|| base.join(name));
        for marker in MARKERS.iter().chain(&FILES) {
            remove(&path.join(marker))?;
        }
        Self::start(path)
    }

    /// `base/TIME-PID`, the time in UTC; for the command line. Keeps the last 20 runs that have ended.
    pub fn dated(base: &Path) -> Result<Self, RunDirectoryError> {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let directory =
            Self::start(base.join(format!("{}-{}", stamp(since.as_secs()), std::process::id())))?;
        prune(base, &directory.path);
        Ok(directory)
    }

    fn start(path: PathBuf) -> Result<Self, RunDirectoryError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| RunDirectoryError {
                action,
                path,
                source,
            }
        };
        fs::create_dir_all(&path).map_err(failed("create the run's folder", &path))?;
        let name = path.join("started");
        let mut marker = File::create(&name).map_err(failed("write", &name))?;
        // Another process that prunes probes the lock for a moment. The wait cannot be long: the folder is ours.
        flock(&marker, FlockOperation::LockExclusive)
            .map_err(|error| failed("lock", &name)(error.into()))?;
        writeln!(marker, "pid {}", std::process::id()).map_err(failed("write", &name))?;
        Ok(Self {
            path,
            marker,
            finished: false,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's stdout and stderr.
    pub fn qemu_log(&self) -> PathBuf {
        self.path.join("qemu.log")
    }

    /// The guest's console.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// The conversation with the guest agent.
    pub fn agent_log(&self) -> PathBuf {
        self.path.join("agent.jsonl")
    }

    /// The device models' log.
    pub fn device_log(&self) -> PathBuf {
        self.path.join("device.log")
    }

    /// Writes the command line so that a shell takes it (descriptors of `fd=` arguments excepted).
    /// `notes` precede it as comments.
    pub fn write_command_line(
        &self,
        argv: &[OsString],
        notes: &[String],
    ) -> Result<(), RunDirectoryError> {
        let mut text = Vec::new();
        for line in notes.iter().flat_map(|note| note.lines()) {
            text.extend_from_slice(format!("# {line}\n").as_bytes());
        }
        for (index, word) in argv.iter().enumerate() {
            // One option a line: people read and compare these.
            if index > 0 {
                let option = word.as_bytes().starts_with(b"-");
                text.extend_from_slice(if option { b" \\\n  " } else { b" " });
            }
            text.extend_from_slice(quote(word).as_bytes());
        }
        text.push(b'\n');
        self.write("cmdline.txt", &text)
    }

    /// Writes the topology as TOML.
    pub fn write_topology(&self, toml: &str) -> Result<(), RunDirectoryError> {
        self.write("topology.toml", toml.as_bytes())
    }

    /// Writes the traffic as JSON.
    pub fn write_counters(&self, json: &str) -> Result<(), RunDirectoryError> {
        self.write("counters.json", json.as_bytes())
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<(), RunDirectoryError> {
        let path = self.path.join(name);
        fs::write(&path, content).map_err(|source| RunDirectoryError {
            action: "write",
            path,
            source,
        })
    }

    /// Records how the run ended; the first outcome stands.
    pub fn finish(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let marker = if outcome == Outcome::Passed {
            "passed"
        } else {
            "failed"
        };
        if let Err(error) = fs::rename(self.path.join("started"), self.path.join(marker)) {
            tracing::error!("cannot mark {} as {marker}: {error}", self.path.display());
        }
        if outcome == Outcome::Failed {
            eprintln!("p2plab: the run's logs are in {}", self.path.display());
        }
        let _ = flock(&self.marker, FlockOperation::Unlock);
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        self.finish(Outcome::Failed);
    }
}

const FILES: [&str; 7] = [
    "cmdline.txt",
    "topology.toml",
    "qemu.log",
    "console.log",
    "agent.jsonl",
    "device.log",
    "counters.json",
];

fn remove(path: &Path) -> Result<(), RunDirectoryError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            let path = path.to_owned();
            Err(RunDirectoryError {
                action: "remove an earlier run's file",
                path,
                source,
            })
        }
        _ => Ok(()),
    }
}

/// Whether a process still holds the marker's lock.
fn is_alive(directory: &Path) -> bool {
    let Ok(marker) = File::open(directory.join("started")) else {
        return false;
    };
    flock(&marker, FlockOperation::NonBlockingLockShared).is_err()
}

/// Removes the oldest ended runs. Only folders that have the form of a dated run's name and hold a marker
/// are touched: the base may be a folder that somebody else also uses.
fn prune(base: &Path, ours: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    let mut runs: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(is_dated) && path != ours)
        .filter(|path| MARKERS.iter().any(|marker| path.join(marker).is_file()))
        .filter(|path| !is_alive(path))
        .collect();
    runs.sort_unstable();
    let surplus = (runs.len() + 1).saturating_sub(RUNS_KEPT);
    for run in runs.iter().take(surplus) {
        // Another process may be pruning the same.
        if let Err(error) = fs::remove_dir_all(run) {
            tracing::debug!("cannot remove the old run {}: {error}", run.display());
        }
    }
}

fn is_dated(name: &OsStr) -> bool {
    let parts: Vec<&[u8]> = name.as_bytes().split(|byte| *byte == b'-').collect();
    let digits = |part: &&[u8]| !part.is_empty() && part.iter().all(u8::is_ascii_digit);
    matches!(parts[..], [date, time, _] if date.len() == 8 && time.len() == 6)
        && parts.iter().all(digits)
}

/// `YYYYMMDD-HHMMSS` in UTC, which sorts by time.
///
/// The date is by H. Hinnant's "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
fn stamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest % 3600 / 60, rest % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// Quotes a word for a POSIX shell, unless it needs none.
fn quote(word: &OsStr) -> OsString {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_=+,./:@%".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return word.to_owned();
    }
    let mut quoted = vec![b'\''];
    for &byte in bytes {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            other => quoted.push(other),
        }
    }
    quoted.push(b'\'');
    OsString::from_vec(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers(path: &Path) -> Vec<&'static str> {
        MARKERS
            .into_iter()
            .filter(|marker| path.join(marker).exists())
            .collect()
    }

    #[test]
    fn there_is_exactly_one_marker_at_any_time() {
        let base = tempfile::tempdir().unwrap();
        for (outcome, marker) in [(Outcome::Passed, "passed"), (Outcome::Failed, "failed")] {
            let mut run = RunDirectory::named(base.path(), "test").unwrap();
            let path = run.path().to_owned();
            assert_eq!(markers(&path), ["started"]);
            run.finish(outcome);
            run.finish(Outcome::Passed);
            assert_eq!(markers(&path), [marker]);
        }
        let path = RunDirectory::named(base.path(), "test")
            .unwrap()
            .path()
            .to_owned();
        assert_eq!(markers(&path), ["failed"], "dropped without an outcome");
    }

    #[test]
    fn a_living_run_keeps_its_folder_and_a_dead_ones_files_go() {
        let base = tempfile::tempdir().unwrap();
        let first = RunDirectory::named(base.path(), "test").unwrap();
        let second = RunDirectory::named(base.path(), "test").unwrap();
        let third = RunDirectory::named(base.path(), "test").unwrap();
        assert_ne!(first.path(), second.path());
        assert_ne!(third.path(), second.path());
        first.write_counters("{}").unwrap();
        drop(first);
        let third = RunDirectory::named(base.path(), "test").unwrap();
        assert_eq!(third.path(), base.path().join("test"));
        assert!(!third.path().join("counters.json").exists());
    }

    #[test]
    fn only_the_last_runs_are_kept_and_nothing_else_is_touched() {
        let base = tempfile::tempdir().unwrap();
        for minute in 0..30 {
            let old = base.path().join(format!("20200101-00{minute:02}00-7"));
            fs::create_dir(&old).unwrap();
            fs::write(old.join("passed"), "").unwrap();
        }
        for other in ["20200101-000000-x", "notes"] {
            fs::create_dir(base.path().join(other)).unwrap();
        }
        let no_marker = base.path().join("20190101-000000-7");
        fs::create_dir(&no_marker).unwrap();
        let run = RunDirectory::dated(base.path()).unwrap();
        let count = fs::read_dir(base.path()).unwrap().count();
        assert_eq!(count, RUNS_KEPT + 3);
        assert!(run.path().exists() && no_marker.exists());
        assert!(!base.path().join("20200101-000000-7").exists());
        assert!(base.path().join("20200101-002900-7").exists());
    }

    #[test]
    fn the_command_line_survives_a_shell() {
        let base = tempfile::tempdir().unwrap();
        let run = RunDirectory::named(base.path(), "quoting").unwrap();
        let argv = [
            "printf", "%s|", "-append", "a b", "it's", "", "$HOME", "x;y",
        ]
        .map(OsString::from);
        run.write_command_line(&argv, &[]).unwrap();
        let output = std::process::Command::new("sh")
            .arg(run.path().join("cmdline.txt"))
            .output();
        let printed = String::from_utf8(output.unwrap().stdout).unwrap();
        assert_eq!(printed, "-append|a b|it's||$HOME|x;y|");
    }

    #[test]
    fn stamps_are_civil_dates() {
        assert_eq!(stamp(0), "19700101-000000");
        assert_eq!(stamp(951_782_399), "20000228-235959");
        assert_eq!(stamp(951_782_400), "20000229-000000");
        assert_eq!(stamp(1_795_385_575), "20261122-221255");
        assert!(is_dated(OsStr::new("20261122-221255-42")));
        assert!(!is_dated(OsStr::new("2026-11-22")));
    }
}
