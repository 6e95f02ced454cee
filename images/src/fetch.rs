//! Fills the cache: resolve, download, unpack, look at what came, and write down what it was.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::apt::{Apt, Deb};
use crate::cache::Cache;
use crate::manifest::{IMAGE_TOOLS, Manifest, PackageSet, SYSTEM, TOOLCHAIN};
use crate::{ArtifactError, Progress, child, kernel, kernel_build, qemu, system_image};

/// MiB that a fetch of everything needs at its peak: packages, lists and what is unpacked.
pub(crate) const NEEDED_MIB: u64 = 900;

/// Name of the record in a set's directory.
const RECORD: &str = "resolved.json";

/// What a set of the manifest resolved to, kept beside its files so that a run can say and repeat it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// Version of this record's layout.
    pub schema: u32,
    /// Name of the set.
    pub set: String,
    /// Base address of the mirror that served it.
    pub mirror: String,
    /// Suites it was resolved from.
    pub suites: Vec<String>,
    /// Every package, sorted by name.
    pub packages: Vec<ResolvedPackage>,
    /// What was found out about the files: `qemu` (version), `kernel` (release), `image` (its size) or `compiler`.
    pub facts: BTreeMap<String, String>,
}

/// One package of a [`Resolved`] set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedPackage {
    /// Package name.
    pub name: String,
    /// Full version, with epoch.
    pub version: String,
    /// SHA-256 of the .deb, in hexadecimal.
    pub sha256: String,
}

impl Resolved {
    /// Reads the record of an unpacked set.
    pub(crate) fn read(set: &Path) -> Result<Self, ArtifactError> {
        let path = set.join(RECORD);
        let text =
            fs::read(&path).map_err(|_| ArtifactError::CacheDamaged { path: path.clone() })?;
        serde_json::from_slice(&text).map_err(|_| ArtifactError::CacheDamaged { path })
    }

    pub(crate) fn write(&self, set: &Path) -> Result<(), ArtifactError> {
        let path = set.join(RECORD);
        let failed = |e| ArtifactError::writing(&path, e);
        let text = serde_json::to_vec_pretty(self).map_err(|e| failed(e.into()))?;
        fs::write(&path, text).map_err(failed)
    }

    /// A hash of every package in it: equal exactly if the files are.
    #[must_use]
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for package in &self.packages {
            hash.update(&package.sha256);
        }
        hex(&hash.finalize())
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Directory of the set's unpacked files; the system image's set has the image instead.
pub(crate) fn root_of(set: &Path) -> PathBuf {
    set.join("root")
}

/// Provides the sets of the manifest in the cache and returns their directories in the same order.
pub(crate) fn provide(
    cache: &Cache,
    manifest: &Manifest,
    sets: &[&str],
    progress: &mut dyn Progress,
) -> Result<Vec<PathBuf>, ArtifactError> {
    let names: Vec<String> = sets.iter().map(|s| manifest.directory(s)).collect();
    cache.ensure(&names, progress, |missing, dir, progress| {
        require_space(cache.root())?;
        let wanted: Vec<&str> = sets
            .iter()
            .copied()
            .filter(|s| missing.contains(&manifest.directory(s)))
            .collect();
        let done = fetch(manifest, &wanted, dir, progress).and_then(|()| {
            for name in &wanted {
                let set = dir.join(manifest.directory(name));
                kernel_build::prepare(name, &set, manifest.source_members(), progress)?;
            }
            if !wanted.contains(&SYSTEM) {
                return Ok(());
            }
            // Fetched just now, or there before.
            let tools = manifest.directory(IMAGE_TOOLS);
            let fetched = dir.join(&tools);
            let tools = if fetched.is_dir() {
                fetched
            } else {
                cache.artifact(&tools)
            };
            let system = dir.join(manifest.directory(SYSTEM));
            system_image::make(&root_of(&tools), &system, progress)
        });
        let done = done.and_then(|()| settle(dir));
        progress.finish();
        done
    })?;
    Ok(names.iter().map(|n| cache.artifact(n)).collect())
}

/// Writes all files to the disk: a name that is there after a crash of the host has what belongs to it.
fn settle(dir: &Path) -> Result<(), ArtifactError> {
    let synced = std::fs::File::open(dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
    synced.map_err(|error| ArtifactError::writing(dir, error))
}

fn require_space(path: &Path) -> Result<(), ArtifactError> {
    let free =
        rustix::fs::statvfs(path).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize));
    if free >> 20 < NEEDED_MIB {
        return Err(ArtifactError::NoSpace {
            path: path.to_owned(),
            needed_mib: NEEDED_MIB,
        });
    }
    Ok(())
}

/// A set on its way into the cache.
struct Job<'a> {
    name: &'a str,
    set: &'a PackageSet,
    release: Option<String>,
    debs: Vec<Deb>,
}

fn fetch(
    manifest: &Manifest,
    sets: &[&str],
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    let apt_dir = dir.join("apt");
    fs::create_dir(&apt_dir).map_err(|e| ArtifactError::writing(&apt_dir, e))?;
    let apt = Apt::open(&apt_dir, &manifest.source, progress)?;
    progress.step("resolving packages", None);
    let mut jobs = Vec::new();
    let mut releases = BTreeMap::new();
    for &name in sets {
        let set = manifest.set(name)?;
        let candidates = candidates(&apt, set)?;
        jobs.push(plan(&apt, name, set, candidates.first().cloned())?);
        releases.insert(name, candidates);
    }
    let mut debs: Vec<Deb> = jobs.iter().flat_map(|j| j.debs.clone()).collect();
    debs.sort_by(|a, b| a.file.cmp(&b.file));
    debs.dedup();
    let archives = apt.download(&debs, progress)?;
    unpack(&jobs, manifest, &archives, dir, progress)?;
    for mut job in jobs {
        let older = releases.remove(job.name).unwrap_or_default();
        let target = dir.join(manifest.directory(job.name));
        let mut older = older.into_iter().skip(1);
        // The newest kernel nearly always fits; only if it does not, an older one is fetched.
        let facts = loop {
            match inspect(&job, &target)? {
                Some(facts) => break facts,
                None => {
                    let release = older.next().ok_or_else(|| no_kernel(job.set))?;
                    job = plan(&apt, job.name, job.set, Some(release))?;
                    let archives = apt.download(&job.debs, progress)?;
                    fs::remove_dir_all(&target).map_err(|e| ArtifactError::writing(&target, e))?;
                    unpack(
                        std::slice::from_ref(&job),
                        manifest,
                        &archives,
                        dir,
                        progress,
                    )?;
                }
            }
        };
        record(&job, manifest, &apt.mirror, &archives, facts)?.write(&target)?;
    }
    // The packages have served; the rest of the private apt goes with the temporary directory.
    fs::remove_dir_all(&apt_dir).map_err(|e| ArtifactError::writing(&apt_dir, e))
}

fn no_kernel(set: &PackageSet) -> ArtifactError {
    ArtifactError::NoKernel {
        pattern: set.newest.clone().unwrap_or_default(),
        config: set.requires_config.join(" "),
    }
}

/// Releases of a set, newest first; none for a set without `newest`.
fn candidates(apt: &Apt, set: &PackageSet) -> Result<Vec<String>, ArtifactError> {
    let Some(pattern) = &set.newest else {
        return Ok(Vec::new());
    };
    let prefix = pattern.split('*').next().unwrap_or_default();
    let found = set.releases(apt.names(prefix)?.iter().map(String::as_str));
    if found.is_empty() {
        Err(no_kernel(set))
    } else {
        Ok(found)
    }
}

fn plan<'a>(
    apt: &Apt,
    name: &'a str,
    set: &'a PackageSet,
    release: Option<String>,
) -> Result<Job<'a>, ArtifactError> {
    let names = set.names(release.as_deref().unwrap_or_default());
    let debs = apt.plan(name, &names, set.dependencies)?;
    Ok(Job {
        name,
        set,
        release,
        debs,
    })
}

/// Unpacks each job's packages into its directory, two at a time, the largest first.
fn unpack(
    jobs: &[Job<'_>],
    manifest: &Manifest,
    archives: &Path,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    let mut work: Vec<(&Deb, PathBuf)> = Vec::new();
    for job in jobs {
        let root = root_of(&dir.join(manifest.directory(job.name)));
        fs::create_dir_all(&root).map_err(|e| ArtifactError::writing(&root, e))?;
        work.extend(job.debs.iter().map(|d| (d, root.clone())));
    }
    work.sort_by_key(|(deb, _)| std::cmp::Reverse(deb.size));
    progress.step(
        "unpacking",
        Some(work.iter().fold(0, |sum, (d, _)| sum + d.size)),
    );
    let queue = std::sync::Mutex::new(work.into_iter());
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (queue, sender) = (&queue, sender.clone());
            scope.spawn(move || {
                loop {
                    let Some((deb, root)) = queue.lock().ok().and_then(|mut q| q.next()) else {
                        return;
                    };
                    let done = unpack_one(&archives.join(&deb.file), &root).map(|()| deb.size);
                    if sender.send(done).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut total = 0;
        for done in receiver {
            total += done?;
            progress.at(total);
        }
        Ok(())
    })
}

fn unpack_one(deb: &Path, root: &Path) -> Result<(), ArtifactError> {
    let mut command = Command::new("dpkg-deb");
    command.arg("-x").arg(deb).arg(root);
    let out = child::output(&mut command)?;
    if out.status.success() {
        return Ok(());
    }
    if String::from_utf8_lossy(&out.stderr).contains("No space left") {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        return Err(ArtifactError::writing(root, full));
    }
    Err(ArtifactError::ProgramFailed {
        program: format!(
            "dpkg-deb -x {}",
            deb.file_name().unwrap_or_default().to_string_lossy()
        ),
        detail: child::reason(&out),
    })
}

/// Looks at an unpacked set. `None` if it does not meet the manifest's demands.
fn inspect(
    job: &Job<'_>,
    target: &Path,
) -> Result<Option<BTreeMap<String, String>>, ArtifactError> {
    let root = root_of(target);
    drop_privilege_bits(&root);
    let mut facts = BTreeMap::new();
    if let Some(release) = &job.release {
        let config = kernel::packaged_config(&root, release);
        let text = fs::read_to_string(&config)
            .map_err(|_| ArtifactError::CacheDamaged { path: config })?;
        if !job
            .set
            .requires_config
            .iter()
            .all(|want| text.lines().any(|l| l == want))
        {
            return Ok(None);
        }
        facts.insert("kernel".into(), release.clone());
    }
    if job.name == TOOLCHAIN
        && let Some(gcc) = job
            .debs
            .iter()
            .find(|deb| deb.package.starts_with("gcc-") && job.set.packages.contains(&deb.package))
    {
        let compiler = format!("{} {}", gcc.package, gcc.version);
        facts.insert("compiler".into(), compiler);
    }
    if job.name == "qemu" {
        let qemu = qemu::Qemu::packaged(&root, String::new())?;
        facts.insert("qemu".into(), qemu.probe()?.require_fit(&qemu.program)?);
    }
    Ok(Some(facts))
}

/// Some dependencies (passwd) bring set-user-ID programs, which have no place in a cache.
fn drop_privilege_bits(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = fs::symlink_metadata(entry.path()) else {
            continue;
        };
        if meta.is_dir() {
            drop_privilege_bits(&entry.path());
        } else if meta.is_file() && meta.permissions().mode() & 0o6000 != 0 {
            let mode = meta.permissions().mode() & 0o1777;
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(mode));
        }
    }
}

fn record(
    job: &Job<'_>,
    manifest: &Manifest,
    mirror: &str,
    archives: &Path,
    facts: BTreeMap<String, String>,
) -> Result<Resolved, ArtifactError> {
    let mut packages = Vec::new();
    for deb in &job.debs {
        packages.push(ResolvedPackage {
            name: deb.package.clone(),
            version: deb.version.clone(),
            sha256: hash_file(&archives.join(&deb.file))?,
        });
    }
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Resolved {
        schema: 1,
        set: job.name.to_owned(),
        mirror: mirror.to_owned(),
        suites: manifest.source.suites.clone(),
        packages,
        facts,
    })
}

/// SHA-256 of a file, in hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String, ArtifactError> {
    let failed = |source| ArtifactError::Unreadable {
        what: "the file",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(failed)?;
        match buffer.get(..n) {
            Some(bytes) if n > 0 => hash.update(bytes),
            _ => return Ok(hex(&hash.finalize())),
        }
    }
}
