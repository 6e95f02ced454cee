//! The cache: where it is, who may change it, and how something appears in it whole or not at all.
//!
//! ```text
//! CACHE/lock            exclusive while a process fills the cache
//! CACHE/in-use          shared by every process that runs on the cache
//! CACHE/artifacts/      one directory for each unpacked set of packages
//! CACHE/builds/         kernel modules as they are built, kept so that only what changed is compiled again
//! CACHE/initramfs/      archives by hash of their contents
//! CACHE/base-images/    saved guests, by the harness
//! CACHE/runs/           run directories, by the harness
//! CACHE/tmp-*/          being filled; worthless once nobody holds the lock
//! ```

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::{ArtifactError, Progress};

const LOCK: &str = "lock";
const IN_USE: &str = "in-use";
const TEMPORARY: &str = "tmp-";

/// A directory that holds what was fetched and built.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// A held lock; it ends with the value.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// The user's cache: P2PLAB_CACHE, else XDG_CACHE_HOME/p2plab, else ~/.cache/p2plab. Nothing is created.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::NoCacheDirectory`] if none of the three variables is set.
    pub fn open() -> Result<Self, ArtifactError> {
        let var = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let root = var("P2PLAB_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("p2plab")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/p2plab")))
            .ok_or(ArtifactError::NoCacheDirectory)?;
        let root = std::path::absolute(&root).map_err(|e| ArtifactError::CacheNotWritable {
            path: root,
            source: e,
        })?;
        Ok(Self { root })
    }

    /// A cache in that directory.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory of the cache for a purpose of its own: `base-images`, `initramfs` or `runs` (any other
    /// outlives [`clean`](Self::clean)). Created if missing.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::CacheNotWritable`] or [`ArtifactError::NoSpace`].
    pub fn directory(&self, name: &str) -> Result<PathBuf, ArtifactError> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(|e| ArtifactError::writing(&path, e))?;
        Ok(path)
    }

    /// Provides the directories `names` below `artifacts/`: at once if they are there, else by calling
    /// `fill(missing, dir)`, which must create each missing one in `dir`. Concurrent callers, in this or other
    /// processes, wait for the one that fills. What appears under its name is whole.
    pub(crate) fn ensure(
        &self,
        names: &[String],
        progress: &mut dyn Progress,
        fill: impl FnOnce(&[String], &Path, &mut dyn Progress) -> Result<(), ArtifactError>,
    ) -> Result<(), ArtifactError> {
        if self.missing(names).is_empty() {
            return Ok(());
        }
        let _lock = self.lock_to_fill(progress)?;
        let missing = self.missing(names);
        if missing.is_empty() {
            return Ok(());
        }
        let temporary = self.begin_to_fill()?;
        fill(&missing, temporary.path(), progress)?;
        missing
            .iter()
            .try_for_each(|name| self.publish(&temporary, name))
    }

    /// Adds to `artifacts/` a directory whose name is known when it is made: `make(dir)` creates it in `dir` and returns
    /// its name. Returns that, and false where it was there before. One at a time, as [`ensure`](Self::ensure).
    pub(crate) fn add(
        &self,
        progress: &mut dyn Progress,
        make: impl FnOnce(&Path, &mut dyn Progress) -> Result<String, ArtifactError>,
    ) -> Result<(String, bool), ArtifactError> {
        let _lock = self.lock_to_fill(progress)?;
        let temporary = self.begin_to_fill()?;
        let name = make(temporary.path(), progress)?;
        let is_new = !self.artifact(&name).is_dir();
        if is_new {
            self.publish(&temporary, &name)?;
        }
        Ok((name, is_new))
    }

    /// Where artifacts are made, by the holder of the lock.
    fn begin_to_fill(&self) -> Result<TempDir, ArtifactError> {
        self.remove_abandoned();
        self.directory("artifacts")?;
        self.temporary()
    }

    /// Gives what was made its place.
    fn publish(&self, made: &TempDir, name: &str) -> Result<(), ArtifactError> {
        let to = self.artifact(name);
        fs::rename(made.path().join(name), &to).map_err(|e| ArtifactError::writing(to, e))
    }

    /// Removes what is below `below`, has a name that begins with `prefix`, and has not been [touched](touch) for `age`: so long
    /// that nobody is about to use it.
    pub(crate) fn prune(&self, below: &str, prefix: &str, age: Duration) {
        let entries = fs::read_dir(self.root.join(below)).into_iter().flatten();
        for entry in entries.flatten() {
            let touched = entry
                .metadata()
                .and_then(|m| Ok(m.modified()?.max(m.accessed()?)));
            let is_old = touched.is_ok_and(|at| at.elapsed().is_ok_and(|since| since > age));
            if !is_old || !entry.file_name().to_string_lossy().starts_with(prefix) {
                continue;
            }
            let path = entry.path();
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "cannot remove");
            }
        }
    }

    /// Where [`ensure`](Self::ensure) puts the directory `name`.
    pub(crate) fn artifact(&self, name: &str) -> PathBuf {
        self.root.join("artifacts").join(name)
    }

    fn missing(&self, names: &[String]) -> Vec<String> {
        names
            .iter()
            .filter(|n| !self.artifact(n).is_dir())
            .cloned()
            .collect()
    }

    fn temporary(&self) -> Result<TempDir, ArtifactError> {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempdir_in(&self.root)
            .map_err(|e| ArtifactError::writing(&self.root, e))
    }

    /// Removes what a killed filler left. Only for the holder of the lock.
    fn remove_abandoned(&self) {
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove");
            }
        }
    }

    fn lock_to_fill(&self, progress: &mut dyn Progress) -> Result<Lock, ArtifactError> {
        self.directory("")?;
        if let Some(lock) = self.lock(LOCK, FlockOperation::NonBlockingLockExclusive)? {
            return Ok(lock);
        }
        progress.step("waiting for another p2plab that fills the cache", None);
        loop {
            if let Some(lock) = self.lock(LOCK, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Keeps [`clean`](Self::clean) away while the value lives. `None` where the cache is read-only and
    /// hence safe.
    pub(crate) fn lease(&self) -> Result<Option<Lock>, ArtifactError> {
        match self.lock(IN_USE, FlockOperation::LockShared) {
            Err(ArtifactError::CacheNotWritable { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
                ) =>
            {
                Ok(None)
            }
            other => other,
        }
    }

    /// Takes a lock; `None` if someone else has it and the operation does not wait.
    fn lock(&self, name: &str, how: FlockOperation) -> Result<Option<Lock>, ArtifactError> {
        let path = self.root.join(name);
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|e| ArtifactError::writing(&path, e))?;
            match flock(&file, how) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(ArtifactError::writing(&path, e.into())),
            }
            // `clean` may have removed the file while we waited; a lock on a removed file locks nothing.
            let ours = file.metadata().map(|m| (m.dev(), m.ino()));
            let now = fs::metadata(&path).map(|m| (m.dev(), m.ino()));
            if matches!((ours, now), (Ok(a), Ok(b)) if a == b) {
                return Ok(Some(Lock { _file: file }));
            }
        }
    }

    /// Removes the cache with all that is in it. A cache that does not exist is clean.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::CacheInUse`] if another p2plab fills it or runs on it,
    /// [`ArtifactError::CacheNotWritable`] if something cannot be removed.
    pub fn clean(&self) -> Result<(), ArtifactError> {
        if !self.root.exists() {
            return Ok(());
        }
        let in_use = || ArtifactError::CacheInUse {
            path: self.root.clone(),
        };
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        let _filling = self.lock(LOCK, exclusive)?.ok_or_else(in_use)?;
        let _using = self.lock(IN_USE, exclusive)?.ok_or_else(in_use)?;
        let entries =
            fs::read_dir(&self.root).map_err(|e| ArtifactError::writing(&self.root, e))?;
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            // Only what p2plab itself makes: P2PLAB_CACHE may point at a directory with other things.
            let name = name.to_string_lossy();
            if !OURS.contains(&name.as_ref()) && !name.starts_with(TEMPORARY) {
                continue;
            }
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                Ok(())
            };
            removed.map_err(|e| ArtifactError::writing(&path, e))?;
        }
        for name in [IN_USE, LOCK] {
            let path = self.root.join(name);
            fs::remove_file(&path).map_err(|e| ArtifactError::writing(&path, e))?;
        }
        // Stays if the user keeps other files there.
        let _ = fs::remove_dir(&self.root);
        Ok(())
    }
}

/// Directories of the cache, by all crates of the project.
const OURS: [&str; 6] = [
    "artifacts",
    "builds",
    "initramfs",
    "base-images",
    "runs",
    "shares",
];

/// Notes that something in the cache is in use, for who removes what has not been for long. Reading it does not: most file
/// systems note that once a day. Not as a modification: that is what base images know an initramfs by.
pub fn touch(path: &Path) {
    let now = fs::FileTimes::new().set_accessed(SystemTime::now());
    // A cache that cannot be written to is not pruned.
    let _ = File::open(path).and_then(|file| file.set_times(now));
}

/// Removes the cache; see [`Cache::clean`].
///
/// # Errors
///
/// As [`Cache::clean`].
pub fn clean(cache: &Cache) -> Result<(), ArtifactError> {
    cache.clean()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::progress::Silent;

    fn names() -> Vec<String> {
        vec!["one".into(), "two".into()]
    }

    fn fill_all(missing: &[String], dir: &Path) -> Result<(), ArtifactError> {
        for name in missing {
            fs::create_dir(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("file"), name).unwrap();
        }
        Ok(())
    }

    fn temporaries(cache: &Cache) -> usize {
        let entries = fs::read_dir(cache.root()).unwrap().flatten();
        entries
            .filter(|e| e.file_name().to_string_lossy().starts_with(TEMPORARY))
            .count()
    }

    #[test]
    fn a_failed_fill_leaves_nothing_and_the_next_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let failed = cache.ensure(&names(), &mut Silent, |missing, dir, _| {
            fill_all(&missing[..1], dir)?;
            Err(ArtifactError::NoMirror)
        });
        assert!(matches!(failed, Err(ArtifactError::NoMirror)));
        assert!(!cache.artifact("one").exists());
        assert_eq!(temporaries(&cache), 0);
        cache
            .ensure(&names(), &mut Silent, |m, d, _| fill_all(m, d))
            .unwrap();
        assert_eq!(
            fs::read(cache.artifact("two").join("file")).unwrap(),
            b"two"
        );
    }

    #[test]
    fn what_a_killed_filler_left_is_removed_and_never_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        fs::create_dir_all(dir.path().join("tmp-dead/one")).unwrap();
        let mut called = false;
        cache
            .ensure(&names(), &mut Silent, |m, d, _| {
                called = true;
                assert!(!dir.path().join("tmp-dead").exists());
                fill_all(m, d)
            })
            .unwrap();
        assert!(called);
    }

    #[test]
    fn only_what_is_missing_is_filled() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        cache
            .ensure(&names()[..1], &mut Silent, |m, d, _| fill_all(m, d))
            .unwrap();
        cache
            .ensure(&names(), &mut Silent, |m, d, _| {
                assert_eq!(m, ["two".to_owned()]);
                fill_all(m, d)
            })
            .unwrap();
        cache
            .ensure(&names(), &mut Silent, |_, _, _| {
                panic!("nothing is missing")
            })
            .unwrap();
    }

    #[test]
    fn what_has_not_been_used_for_long_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let make = |name: &str| fs::create_dir_all(dir.path().join("builds").join(name)).unwrap();
        for name in ["module-old", "module-used", "other-old"] {
            make(name);
        }
        fs::write(dir.path().join("builds/module-file"), "").unwrap();
        let day = Duration::from_secs(24 * 60 * 60);
        for entry in fs::read_dir(dir.path().join("builds")).unwrap().flatten() {
            let entry = File::open(entry.path()).unwrap();
            let then = SystemTime::now() - 3 * day;
            let times = fs::FileTimes::new().set_accessed(then).set_modified(then);
            entry.set_times(times).unwrap();
        }
        let used = dir.path().join("builds/module-used");
        let modified = || fs::metadata(&used).unwrap().modified().unwrap();
        let before = modified();
        touch(&used);
        assert_eq!(modified(), before);
        cache.prune("builds", "module-", 2 * day);
        let exists = |name: &str| dir.path().join("builds").join(name).exists();
        assert!(!exists("module-old") && !exists("module-file"));
        assert!(exists("module-used") && exists("other-old"));
    }

    #[test]
    fn what_is_named_when_it_is_made_is_added_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let add = || {
            cache.add(&mut Silent, |dir, _| {
                fs::create_dir(dir.join("name")).unwrap();
                Ok("name".to_owned())
            })
        };
        assert_eq!(add().unwrap(), ("name".to_owned(), true));
        assert_eq!(add().unwrap(), ("name".to_owned(), false));
        assert!(cache.artifact("name").is_dir());
        assert_eq!(temporaries(&cache), 0);
    }

    #[test]
    fn of_many_at_once_one_fills_and_all_succeed() {
        let dir = tempfile::tempdir().unwrap();
        let fills = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let cache = Cache::at(dir.path());
                    cache
                        .ensure(&names(), &mut Silent, |m, d, _| {
                            fills.fetch_add(1, Ordering::SeqCst);
                            fill_all(m, d)
                        })
                        .unwrap();
                    assert!(cache.artifact("two").join("file").exists());
                });
            }
        });
        assert_eq!(fills.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_cache_in_use_is_not_cleaned() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        cache.clean().unwrap();
        cache
            .ensure(&names(), &mut Silent, |m, d, _| fill_all(m, d))
            .unwrap();
        let lease = cache.lease().unwrap();
        assert!(matches!(
            cache.clean(),
            Err(ArtifactError::CacheInUse { .. })
        ));
        drop(lease);
        cache.clean().unwrap();
        assert!(!cache.root().exists());
    }

    #[test]
    fn clean_spares_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("photos")).unwrap();
        let cache = Cache::at(dir.path());
        cache
            .ensure(&names(), &mut Silent, |m, d, _| fill_all(m, d))
            .unwrap();
        cache.clean().unwrap();
        assert!(dir.path().join("photos").exists());
        assert!(!cache.artifact("one").exists());
    }
}
