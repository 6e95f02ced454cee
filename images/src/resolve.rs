//! From what the user asked for to files that a lab can start with.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::cache::Lock;
use crate::fetch::{Resolved, hex, provide, root_of};
use crate::manifest::{IMAGE_TOOLS, SYSTEM};
use crate::{ArtifactError, Cache, Kernel, Manifest, Progress, Qemu, SystemImage};

/// What the user brings instead of what p2plab fetches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// A QEMU system emulator.
    pub qemu: Option<PathBuf>,
    /// A bzImage.
    pub kernel: Option<PathBuf>,
    /// The kernel's modules: a `make modules_install` directory. Only with `kernel`.
    pub modules: Option<PathBuf>,
}

/// All that a lab runs on. While it lives, the cache is not cleaned.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// The emulator.
    pub qemu: Qemu,
    /// The guest's kernel.
    pub kernel: Kernel,
    /// The static busybox.
    pub busybox: PathBuf,
    /// Root of the unpacked programs for the guest.
    pub tools: PathBuf,
    /// The system image, if it was asked for.
    pub system: Option<SystemImage>,
    pub(crate) tools_identity: String,
    versions: BTreeMap<String, String>,
    _lease: Option<Arc<Lock>>,
}

/// Provides everything: from the cache if it is complete, which needs neither network nor apt-get, else by
/// fetching what is missing. What the user brings is checked and its counterpart not fetched.
///
/// # Errors
///
/// Any [`ArtifactError`] but [`ArtifactError::CacheInUse`].
pub fn resolve(
    cache: &Cache,
    overrides: &Overrides,
    progress: &mut dyn Progress,
) -> Result<Artifacts, ArtifactError> {
    resolve_sets(cache, overrides, None, progress)
}

/// As [`resolve`], with the system image: the manifest's packages for it, and `packages` beside them.
///
/// # Errors
///
/// As [`resolve`].
pub fn resolve_with_system(
    cache: &Cache,
    overrides: &Overrides,
    packages: &[String],
    progress: &mut dyn Progress,
) -> Result<Artifacts, ArtifactError> {
    resolve_sets(cache, overrides, Some(packages), progress)
}

fn resolve_sets(
    cache: &Cache,
    overrides: &Overrides,
    system: Option<&[String]>,
    progress: &mut dyn Progress,
) -> Result<Artifacts, ArtifactError> {
    if let (Some(path), None) = (&overrides.modules, &overrides.kernel) {
        return Err(ArtifactError::ModulesWithoutKernel { path: path.clone() });
    }
    // What the user brings is checked first: a mistake in it should not wait for a download.
    let own_qemu = overrides.qemu.as_deref().map(Qemu::own).transpose()?;
    let own_kernel = overrides
        .kernel
        .as_deref()
        .map(|image| Kernel::own(image, overrides.modules.as_deref()))
        .transpose()?;
    let manifest = Manifest::built_in()?.with_packages(system.unwrap_or_default());
    let mut sets = vec!["tools"];
    sets.extend(own_qemu.is_none().then_some("qemu"));
    sets.extend(own_kernel.is_none().then_some("kernel"));
    // The tools have served once the image is there.
    let image = cache.artifact(&manifest.directory(SYSTEM));
    sets.extend((system.is_some() && !image.is_dir()).then_some(IMAGE_TOOLS));
    sets.extend(system.is_some().then_some(SYSTEM));
    let (lease, dirs) = loop {
        let dirs = provide(cache, &manifest, &sets, progress)?;
        let lease = cache.lease()?;
        // Someone may have cleaned between the two.
        if dirs.iter().all(|d| d.is_dir()) {
            break (lease, dirs);
        }
    };
    let mut fetched = BTreeMap::new();
    let system = system
        .is_some()
        .then(|| SystemImage::at(&image))
        .transpose()?;
    for (set, dir) in sets.into_iter().zip(dirs) {
        fetched.insert(set, (root_of(&dir), Resolved::read(&dir)?));
    }
    let mut artifacts = assemble(own_qemu, own_kernel, &fetched, lease)?;
    artifacts.system = system;
    Ok(artifacts)
}

fn assemble(
    own_qemu: Option<Qemu>,
    own_kernel: Option<Kernel>,
    fetched: &BTreeMap<&str, (PathBuf, Resolved)>,
    lease: Option<Lock>,
) -> Result<Artifacts, ArtifactError> {
    let get = |set: &str| {
        fetched.get(set).ok_or_else(|| ArtifactError::CacheDamaged {
            path: PathBuf::from(set),
        })
    };
    let fact = |record: &Resolved, name: &str| record.facts.get(name).cloned().unwrap_or_default();
    let qemu = match own_qemu {
        Some(qemu) => qemu,
        None => {
            let (root, record) = get("qemu")?;
            let mut qemu = Qemu::packaged(root, record.identity())?;
            qemu.version = fact(record, "qemu");
            qemu
        }
    };
    let kernel = match own_kernel {
        Some(kernel) => kernel,
        None => {
            let (root, record) = get("kernel")?;
            Kernel::packaged(root, &fact(record, "kernel"), record.identity())?
        }
    };
    let (tools, record) = get("tools")?;
    let busybox = tools.join("usr/bin/busybox");
    if !busybox.is_file() {
        return Err(ArtifactError::CacheDamaged { path: busybox });
    }
    let mut versions: BTreeMap<String, String> = fetched
        .values()
        .flat_map(|(_, record)| &record.packages)
        .map(|p| (p.name.clone(), p.version.clone()))
        .collect();
    versions.insert("qemu".into(), qemu.version.clone());
    versions.insert("kernel".into(), kernel.release.clone());
    Ok(Artifacts {
        tools_identity: record.identity(),
        tools: tools.clone(),
        qemu,
        kernel,
        busybox,
        system: None,
        versions,
        _lease: lease.map(Arc::new),
    })
}

impl Artifacts {
    /// Versions of all that the lab runs on: `qemu`, `kernel`, and each fetched package by its name.
    #[must_use]
    pub fn versions(&self) -> &BTreeMap<String, String> {
        &self.versions
    }

    /// A hash of QEMU and kernel: what was saved with one identity can be restored with the same.
    #[must_use]
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for part in [&self.qemu.identity, &self.kernel.identity] {
            hash.update(part);
            hash.update([0]);
        }
        hex(&hash.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;

    #[test]
    fn mistakes_in_what_the_user_brings_come_before_any_fetch() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let why = |overrides: Overrides| resolve(&cache, &overrides, &mut Silent).unwrap_err();
        let modules = Some(dir.path().to_owned());
        assert!(matches!(
            why(Overrides {
                modules,
                ..Overrides::default()
            }),
            ArtifactError::ModulesWithoutKernel { .. }
        ));
        let kernel = Some(dir.path().join("bzImage"));
        assert!(matches!(
            why(Overrides {
                kernel,
                ..Overrides::default()
            }),
            ArtifactError::Unreadable { .. }
        ));
        assert!(!cache.root().exists());
    }
}
