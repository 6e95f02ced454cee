//! The directory in which a module is compiled, kept so that only what changed is compiled again.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::fs::{FlockOperation, flock};

use super::patch::write;
use super::sources::{self, Files};
use crate::{ArtifactError, Progress};

/// Stands in the directory while a build runs there: what a killed one left is not built upon.
const UNFINISHED: &str = "unfinished";
/// Locked by who builds there.
const LOCK: &str = "lock";

/// A build directory that nobody else builds in.
#[derive(Debug)]
pub(super) struct Work {
    directory: PathBuf,
    lock: File,
}

impl Work {
    /// Waits for a build that goes on in `directory` though the p2plab that started it was killed.
    pub(super) fn open(
        directory: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Self, ArtifactError> {
        let failed = |error| ArtifactError::writing(directory, error);
        fs::create_dir_all(directory).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(directory.join(LOCK))
            .map_err(failed)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress.step("waiting for a build whose p2plab was killed", None);
            while let Err(error) = flock(&lock, FlockOperation::LockExclusive) {
                if error != rustix::io::Errno::INTR {
                    return Err(failed(error.into()));
                }
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            lock,
        })
    }

    /// Where files are, and what is built of them.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join("work")
    }

    /// A standard input for the build, which has nothing in it and holds the lock: it lasts as long as the build's
    /// processes do, even if they outlive us.
    pub(super) fn stdin(&self) -> Result<Stdio, ArtifactError> {
        let file = self.lock.try_clone();
        file.map(Stdio::from)
            .map_err(|error| ArtifactError::writing(&self.directory, error))
    }

    /// Brings the directory up to date: what is equal keeps its time, so that make leaves it alone.
    pub(super) fn begin(&self, files: &Files) -> Result<(), ArtifactError> {
        let work = self.path();
        let unfinished = self.directory.join(UNFINISHED);
        let failed = |error| ArtifactError::writing(&self.directory, error);
        if unfinished.exists() && work.exists() {
            fs::remove_dir_all(&work).map_err(failed)?;
        }
        fs::create_dir_all(&work).map_err(failed)?;
        fs::write(&unfinished, "").map_err(failed)?;
        // A module or source that is gone would be found as if it were still there.
        let is_stale = |name: &str| name.ends_with(".ko") || sources::is_input(name);
        for (path, bytes) in sources::read_below(&work, &is_stale)? {
            let now = files.get(&path);
            if now == Some(&bytes) {
                continue;
            }
            fs::remove_file(work.join(&path)).map_err(failed)?;
            if now.is_none() {
                remove_object(&work.join(&path)).map_err(failed)?;
            }
        }
        for (path, bytes) in files {
            let path = work.join(path);
            if !path.exists() {
                write(&path, bytes)?;
            }
        }
        Ok(())
    }

    /// What is there now can be built upon.
    pub(super) fn finish(&self) -> Result<(), ArtifactError> {
        let path = self.directory.join(UNFINISHED);
        fs::remove_file(&path).map_err(|error| ArtifactError::writing(path, error))
    }
}

/// Removes what was compiled of a source: make would link an object whose source is gone.
fn remove_object(source: &Path) -> std::io::Result<()> {
    let object = source.with_extension("o");
    let name = object.file_name().unwrap_or_default().to_string_lossy();
    for path in [
        object.with_file_name(format!(".{name}.cmd")),
        object.clone(),
    ] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Silent;

    fn files(pairs: &[(&str, &str)]) -> Files {
        let pairs = pairs.iter();
        pairs
            .map(|(name, text)| (PathBuf::from(name), text.as_bytes().to_vec()))
            .collect()
    }

    #[test]
    fn equal_files_keep_their_times_and_vanished_ones_vanish_with_their_objects() {
        let dir = tempfile::tempdir().unwrap();
        let work = Work::open(dir.path(), &mut Silent).unwrap();
        work.begin(&files(&[("a.c", "a"), ("b.c", "b"), ("d/h.c", "h")]))
            .unwrap();
        work.finish().unwrap();
        let path = |name: &str| work.path().join(name);
        let time = |name: &str| fs::metadata(path(name)).unwrap().modified().unwrap();
        let (a, b) = (time("a.c"), time("b.c"));
        for made in ["x.mod.c", "a.o", "d/h.o", "d/.h.o.cmd"] {
            write(&path(made), b"made").unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
        work.begin(&files(&[("a.c", "a"), ("b.c", "other")]))
            .unwrap();
        assert_eq!(time("a.c"), a);
        assert_ne!(time("b.c"), b);
        for gone in ["d/h.c", "d/h.o", "d/.h.o.cmd"] {
            assert!(!path(gone).exists(), "{gone}");
        }
        assert!(path("x.mod.c").exists() && path("a.o").exists());
    }

    #[test]
    fn who_outlives_us_keeps_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let work = Work::open(dir.path(), &mut Silent).unwrap();
        let mut command = std::process::Command::new("sleep");
        let mut orphan =
            crate::child::dies_with_us(command.arg("600").stdin(work.stdin().unwrap()))
                .spawn()
                .unwrap();
        drop((work, command));
        let lock = File::open(dir.path().join(LOCK)).unwrap();
        let now = FlockOperation::NonBlockingLockExclusive;
        assert!(flock(&lock, now).is_err());
        orphan.kill().unwrap();
        orphan.wait().unwrap();
        Work::open(dir.path(), &mut Silent).unwrap();
    }
}
