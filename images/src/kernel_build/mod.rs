//! Kernel modules, built without root: drivers of `guest-kernel/`, and the kernel's own drivers with patches.
//!
//! A [`ModuleBuilder`] is for one kernel. What it built is kept in the cache under a hash of all that it depends on, so
//! that nothing is done where nothing changed; the directory in which a module is compiled is kept, too, so that only
//! what changed is compiled again.
//!
//! | file | knows |
//! |---|---|
//! | `sources` | which modules there are, and what they are made of |
//! | `kernel` | what they are built against: fetched headers, or a tree of the user's own |
//! | `root` | how a build enters toolchain and headers, without root |
//! | `make`, `patch`, `check` | the kernel's build, `patch` and checkpatch.pl, and what they say |
//! | `archive` | the kernel's source as Debian packs it |

mod archive;
mod check;
mod error;
mod kernel;
mod make;
mod patch;
mod root;
mod sources;

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

pub use error::BuildError;
pub use kernel::BuildTarget;
pub(crate) use kernel::headers_dir;
pub use sources::{ModuleSource, module_sources};

use crate::cache::Lock;
use crate::elf::Elf;
use crate::fetch::hex;
use crate::manifest::{SOURCE, TOOLCHAIN};
use crate::{ArtifactError, Cache, Progress};
use kernel::Against;
use make::{Order, Place};
use patch::{Patched, write};
use sources::{Files, Kind};

/// Changes with how modules are built.
const LAYOUT: &str = "modules 1";
/// Stands in a build directory while a build runs there: what a killed one left is not built upon.
const UNFINISHED: &str = "unfinished";

/// Whether the compiler's warnings are errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// `W=1 -Werror`: what our own sources must pass with the compilers of the manifest.
    WarningsAreErrors,
    /// Warnings are passed over, for a user's own kernel and compiler.
    Lenient,
}

/// A module that was built, now or before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltModule {
    /// Its name.
    pub name: String,
    /// The .ko file, without debug information.
    pub path: PathBuf,
    /// The same with debug information, for objdump and faddr2line; as long as it is the newest build.
    pub with_debug: PathBuf,
}

/// Builds modules for one kernel. While it lives, the cache is not cleaned.
#[derive(Debug)]
pub struct ModuleBuilder {
    cache: Cache,
    against: Against,
    strictness: Strictness,
    _lease: Option<Lock>,
}

impl ModuleBuilder {
    /// For that kernel; fetches headers and compiler where they are missing.
    ///
    /// # Errors
    ///
    /// As a fetch; [`BuildError`] for a tree of the user's own that is none, or for packages that are gone.
    pub fn open(
        cache: &Cache,
        target: &BuildTarget,
        progress: &mut dyn Progress,
    ) -> Result<Self, ArtifactError> {
        let against = Against::open(cache, target, progress)?;
        let strictness = match &against.place {
            Place::Packaged(_) => Strictness::WarningsAreErrors,
            Place::Tree(_) => Strictness::Lenient,
        };
        cache.directory("builds")?;
        Ok(Self {
            _lease: cache.lease()?,
            cache: cache.clone(),
            against,
            strictness,
        })
    }

    /// The kernel's release, as `uname -r` prints it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.against.release
    }

    /// Fetches the kernel's source, which is else done when a driver of the kernel's is built.
    ///
    /// # Errors
    ///
    /// As a fetch; [`BuildError::Gone`].
    pub fn fetch_source(&self, progress: &mut dyn Progress) -> Result<(), ArtifactError> {
        self.against.source(&self.cache, progress).map(drop)
    }

    /// Refuses a kernel other than this one's.
    ///
    /// # Errors
    ///
    /// [`BuildError::HeadersMismatch`].
    pub fn require_release(&self, release: &str) -> Result<(), ArtifactError> {
        if release == self.against.release {
            return Ok(());
        }
        Err(BuildError::HeadersMismatch {
            headers: self.headers(),
            found: self.against.release.clone(),
            wanted: release.to_owned(),
        }
        .into())
    }

    /// Where the headers are, for messages.
    fn headers(&self) -> String {
        match &self.against.place {
            Place::Packaged(_) => "the cache".to_owned(),
            Place::Tree(tree) => tree.display().to_string(),
        }
    }

    /// Sets whether warnings are errors. By default they are for packaged kernels, and not for a user's own tree.
    #[must_use]
    pub fn strictness(mut self, strictness: Strictness) -> Self {
        self.strictness = strictness;
        self
    }

    /// The modules of `source` for this kernel, built if that has not been done, and whether it was done now.
    ///
    /// # Errors
    ///
    /// [`BuildError`], the cache's, or a fetch's.
    pub fn build(
        &self,
        source: &ModuleSource,
        progress: &mut dyn Progress,
    ) -> Result<(Vec<BuiltModule>, bool), ArtifactError> {
        let driver = match source.kind {
            Kind::Own => None,
            Kind::Patched(_) => Some(self.against.source(&self.cache, progress)?),
        };
        let name = format!(
            "module-{}-{}",
            source.name,
            self.key(source, driver.as_deref())?
        );
        let mut built = false;
        self.cache
            .ensure(std::slice::from_ref(&name), progress, |_, dir, progress| {
                built = true;
                progress.step(
                    &format!("building {} for {}", source.name, self.release()),
                    None,
                );
                let done = self.compile(source, driver.as_deref(), &dir.join(&name));
                progress.finish();
                done
            })?;
        Ok((self.found(source, &self.cache.artifact(&name))?, built))
    }

    /// checkpatch.pl --strict of this kernel on a driver of ours, or on the patches of one of the kernel's.
    ///
    /// # Errors
    ///
    /// [`BuildError::Check`] with what it says; a fetch's.
    pub fn check(
        &self,
        source: &ModuleSource,
        progress: &mut dyn Progress,
    ) -> Result<(), ArtifactError> {
        let Place::Packaged(tools) = &self.against.place else {
            return Ok(());
        };
        let kernel = self.against.source(&self.cache, progress)?;
        let work = scratch()?;
        let (files, is_source) = match source.kind {
            Kind::Own => (source.files()?, true),
            Kind::Patched(_) => (source.patches()?, false),
        };
        check::check(tools, &kernel, &files, is_source, work.path())
    }

    /// A hash of all that decides what comes out.
    fn key(&self, source: &ModuleSource, driver: Option<&Path>) -> Result<String, ArtifactError> {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update(bytes.len().to_le_bytes());
            hash.update(bytes);
        };
        add(LAYOUT.as_bytes());
        add(self.against.identity.as_bytes());
        add(format!("{:?} {:?}", self.strictness, source.kind).as_bytes());
        let files = match (&source.kind, driver, &self.against.place) {
            (Kind::Own, ..) => source.files()?,
            (Kind::Patched(recipe), Some(driver), Place::Tree(_)) => {
                // The packaged source is known by its package; a user's own changes.
                let mut files = source.patches()?;
                let below = driver.join(&recipe.source);
                let is_source = |name: &str| name.ends_with(".c") || name.ends_with(".h");
                if below.is_dir() {
                    files.extend(sources::read_below(&below, &is_source)?);
                }
                files
            }
            (Kind::Patched(_), ..) => {
                add(driver
                    .map(|path| path.as_os_str().as_encoded_bytes())
                    .unwrap_or_default());
                source.patches()?
            }
        };
        for (path, bytes) in files {
            add(path.as_os_str().as_encoded_bytes());
            add(&bytes);
        }
        Ok(short(&hex(&hash.finalize())))
    }

    /// Where the modules of a source are compiled for this kernel, from one build to the next.
    fn build_directory(&self, source: &ModuleSource) -> Result<PathBuf, ArtifactError> {
        let mut hash = Sha256::new();
        for part in [
            self.against.identity.as_bytes(),
            source.path.as_os_str().as_encoded_bytes(),
            format!("{LAYOUT} {:?}", self.strictness).as_bytes(),
        ] {
            hash.update(part);
            hash.update([0]);
        }
        let name = format!("{}-{}", source.name, short(&hex(&hash.finalize())));
        self.cache.directory(&format!("builds/{name}"))
    }

    /// Compiles, with the cache locked, and leaves the modules in `target`.
    fn compile(
        &self,
        source: &ModuleSource,
        driver: Option<&Path>,
        target: &Path,
    ) -> Result<(), ArtifactError> {
        let (files, directory, modules) = match (&source.kind, driver) {
            (Kind::Patched(recipe), Some(driver)) => {
                let stage = scratch()?;
                let patched = Patched {
                    module: &source.name,
                    recipe,
                    source: driver,
                    patches: &source.patches()?,
                    release: self.release(),
                };
                let files = patched.files(stage.path(), &self.against.place)?;
                (files, recipe.source.as_str(), recipe.modules.as_slice())
            }
            _ => (source.files()?, "", [].as_slice()),
        };
        let directory_of_build = self.build_directory(source)?;
        let work = begin(&directory_of_build, &files)?;
        let order = Order {
            module: &source.name,
            release: self.release(),
            directory,
            modules,
            strictness: self.strictness,
        };
        let made = self.against.place.make(&work, &order);
        // A build that failed by itself has tidied up; one that was killed never comes here.
        finish(&directory_of_build)?;
        made?;
        for path in kernel_objects(&work.join("stripped")) {
            self.require_vermagic(&path)?;
            let name = path.file_name().unwrap_or_default();
            write(&target.join(name), &read(&path)?)?;
        }
        Ok(())
    }

    /// What was compiled must say that it is for this kernel; a tree may have moved on since its modules were prepared.
    fn require_vermagic(&self, module: &Path) -> Result<(), ArtifactError> {
        let bytes = read(module)?;
        let info = Elf::parse(&bytes)
            .and_then(Elf::modinfo)
            .unwrap_or_default();
        let magic = info.iter().find(|(key, _)| *key == "vermagic");
        let release = magic.and_then(|(_, value)| value.split(' ').next());
        let found = release.unwrap_or("of no release");
        if found == self.release() {
            return Ok(());
        }
        let remedy = match &self.against.place {
            Place::Packaged(_) => {
                "run p2plab clean, then p2plab fetch, which fetches the headers anew"
            }
            Place::Tree(_) => {
                "that tree has changed since it was prepared, so run `make modules_prepare` in it, or `make`"
            }
        };
        let name = module.file_stem().unwrap_or_default();
        Err(BuildError::WrongVermagic {
            module: name.to_string_lossy().into_owned(),
            found: found.to_owned(),
            headers: self.headers(),
            release: self.release().to_owned(),
            remedy,
        }
        .into())
    }

    fn found(
        &self,
        source: &ModuleSource,
        artifact: &Path,
    ) -> Result<Vec<BuiltModule>, ArtifactError> {
        let work = self.build_directory(source)?.join("work");
        let compiled = match &source.kind {
            Kind::Own => work,
            Kind::Patched(recipe) => work.join(&recipe.source),
        };
        let modules = kernel_objects(artifact)
            .into_iter()
            .map(|path| BuiltModule {
                name: path
                    .file_stem()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                with_debug: compiled.join(path.file_name().unwrap_or_default()),
                path,
            });
        Ok(modules.collect())
    }
}

/// A directory for what is needed once.
fn scratch() -> Result<tempfile::TempDir, ArtifactError> {
    tempfile::tempdir().map_err(|error| ArtifactError::writing(std::env::temp_dir(), error))
}

/// Brings a build directory up to date: what is equal keeps its time, so that make leaves it alone.
fn begin(directory: &Path, files: &Files) -> Result<PathBuf, ArtifactError> {
    let work = directory.join("work");
    let unfinished = directory.join(UNFINISHED);
    let failed = |error| ArtifactError::writing(directory, error);
    if unfinished.exists() && work.exists() {
        fs::remove_dir_all(&work).map_err(failed)?;
    }
    fs::create_dir_all(&work).map_err(failed)?;
    fs::write(&unfinished, "").map_err(failed)?;
    // A module or source that is gone would be found as if it were still there.
    let is_input = |name: &str| {
        let ends = [".c", ".h", ".S", ".ko"]
            .iter()
            .any(|end| name.ends_with(end));
        ends && !name.ends_with(".mod.c") || matches!(name, "Kbuild" | "Makefile")
    };
    for (path, bytes) in sources::read_below(&work, &is_input)? {
        let is_module = path.extension().is_some_and(|extension| extension == "ko");
        if is_module || files.get(&path) != Some(&bytes) {
            fs::remove_file(work.join(&path)).map_err(failed)?;
        }
    }
    for (path, bytes) in files {
        let path = work.join(path);
        if !path.exists() {
            write(&path, bytes)?;
        }
    }
    Ok(work)
}

fn finish(directory: &Path) -> Result<(), ArtifactError> {
    let path = directory.join(UNFINISHED);
    fs::remove_file(&path).map_err(|error| ArtifactError::writing(path, error))
}

/// The .ko files of a directory, by name.
fn kernel_objects(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut found: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "ko"))
        .collect();
    found.sort();
    found
}

fn read(path: &Path) -> Result<Vec<u8>, ArtifactError> {
    fs::read(path).map_err(|source| ArtifactError::Unreadable {
        what: "module",
        path: path.to_owned(),
        source,
    })
}

fn short(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// Does to a set that was just unpacked what a build needs of it; nothing to sets that are no part of builds.
pub(crate) fn prepare(
    name: &str,
    set: &Path,
    members: &[String],
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    let root = crate::fetch::root_of(set);
    if name == TOOLCHAIN {
        root::finish_toolchain(&root)
    } else if name.starts_with(SOURCE) {
        archive::keep_members(&root, members, progress)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
