//! Kernel modules, built without root: drivers of `guest-kernel/`, and the kernel's own drivers with patches.
//!
//! A [`ModuleBuilder`] is for one kernel. What it built is kept in the cache under a hash of all that it depends on, so
//! that nothing is done where nothing changed; the directory in which a module is compiled is kept, too, so that only
//! what changed is compiled again. In a tree of the user's own, only its own make knows what has changed (a header, the
//! environment): there it is always asked, and what came out is kept under a hash of itself.
//!
//! | file | knows |
//! |---|---|
//! | `sources` | which modules there are, and what they are made of |
//! | `inputs` | what is read of them, and its hash |
//! | `kernel` | what they are built against: fetched headers, or a tree of the user's own |
//! | `root` | how a build enters toolchain and headers, without root |
//! | `work` | the directory in which a module is compiled |
//! | `make`, `patch`, `check` | the kernel's build, `patch` and checkpatch.pl, and what they say |
//! | `archive` | the kernel's source as Debian packs it |

mod archive;
mod check;
mod error;
mod inputs;
mod kernel;
mod make;
mod patch;
mod root;
mod sources;
mod work;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::BuildError;
pub use kernel::BuildTarget;
pub(crate) use kernel::headers_dir;
pub use sources::{ModuleSource, module_sources};

use crate::cache::Lock;
use crate::elf::Elf;
use crate::manifest::{SOURCE, TOOLCHAIN};
use crate::{ArtifactError, Cache, Progress};
use inputs::Inputs;
use kernel::Against;
use make::{Order, Place};
use patch::Patched;
use sources::Kind;
use work::Work;

/// Changes with how modules are built.
const LAYOUT: &str = "modules 2";
/// Directory of the cache below which modules are compiled.
const BUILDS: &str = "builds";
/// What was built and not used for so long is removed.
const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Directory of an artifact with the modules that have debug information.
const DEBUG: &str = "debug";

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
    /// The same with debug information, for objdump and faddr2line.
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
        // First: what is fetched must not be cleaned away before it is used.
        cache.directory(BUILDS)?;
        let lease = cache.lease()?;
        let against = Against::open(cache, target, progress)?;
        let strictness = match &against.place {
            Place::Packaged(_) => Strictness::WarningsAreErrors,
            Place::Tree(_) => Strictness::Lenient,
        };
        Ok(Self {
            _lease: lease,
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
        let inputs = Inputs::read(source, &self.against, &self.cache, progress)?;
        let (name, built) = match &self.against.place {
            Place::Packaged(_) => self.build_if_new(source, &inputs, progress)?,
            Place::Tree(_) => self.build_by_make(source, &inputs, progress)?,
        };
        Ok((self.found(&self.cache.artifact(&name))?, built))
    }

    /// Against headers that do not change: nothing is done where the artifact is there. Its name, and whether it is new.
    fn build_if_new(
        &self,
        source: &ModuleSource,
        inputs: &Inputs,
        progress: &mut dyn Progress,
    ) -> Result<(String, bool), ArtifactError> {
        let how = format!("{LAYOUT} {:?} {:?}", self.strictness, source.kind);
        let digest = inputs.digest(&[&how, &self.against.identity]);
        let name = format!("module-{}-{digest}", source.name);
        let mut built = false;
        self.cache
            .ensure(std::slice::from_ref(&name), progress, |_, dir, progress| {
                built = true;
                self.compile(source, inputs, &dir.join(&name), progress)
            })?;
        Ok((name, built))
    }

    /// In a tree of the user's own: make decides, and the artifact is named by what comes out.
    fn build_by_make(
        &self,
        source: &ModuleSource,
        inputs: &Inputs,
        progress: &mut dyn Progress,
    ) -> Result<(String, bool), ArtifactError> {
        self.cache.add(progress, |dir, progress| {
            let made = dir.join("made");
            self.compile(source, inputs, &made, progress)?;
            let name = format!("module-{}-{}", source.name, inputs::digest_of(&made)?);
            let to = dir.join(&name);
            fs::rename(&made, &to).map_err(|error| ArtifactError::writing(to, error))?;
            Ok(name)
        })
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
        let builds = self.cache.directory(BUILDS)?;
        // Pruned with the builds, if we are killed.
        let work =
            tempfile::tempdir_in(&builds).map_err(|error| ArtifactError::writing(builds, error))?;
        let (files, is_source) = match source.kind {
            Kind::Own => (source.files()?, true),
            Kind::Patched(_) => (source.patches()?, false),
        };
        check::check(tools, &kernel, &files, is_source, work.path())
    }

    /// Where the modules of a source are compiled for this kernel, from one build to the next.
    fn build_directory(&self, source: &ModuleSource) -> PathBuf {
        let path = source.path.display().to_string();
        let how = format!("{LAYOUT} {:?}", self.strictness);
        let place = inputs::digest_of_words(&[&self.against.identity, &path, &how]);
        let name = format!("{}-{place}", source.name);
        self.cache.root().join(BUILDS).join(name)
    }

    /// Compiles, with the cache locked, and leaves the modules in `target`, which is in a directory for this alone.
    fn compile(
        &self,
        source: &ModuleSource,
        inputs: &Inputs,
        target: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(), ArtifactError> {
        self.cache.prune("artifacts", "module-", KEPT);
        self.cache.prune(BUILDS, "", KEPT);
        let work = Work::open(&self.build_directory(source), progress)?;
        let what = format!("building {} for {}", source.name, self.release());
        progress.step(&what, None);
        let done = self.compile_in(&work, source, inputs, target);
        progress.finish();
        done
    }

    fn compile_in(
        &self,
        work: &Work,
        source: &ModuleSource,
        inputs: &Inputs,
        target: &Path,
    ) -> Result<(), ArtifactError> {
        let (directory, modules) = match &source.kind {
            Kind::Own => {
                work.begin(&inputs.files)?;
                ("", [].as_slice())
            }
            Kind::Patched(recipe) => {
                let patched = Patched {
                    recipe,
                    driver: &inputs.driver,
                    patches: &inputs.files,
                    release: self.release(),
                };
                let stage = target.with_file_name("stage");
                work.begin(&patched.files(&stage, &self.against.place)?)?;
                (recipe.source.as_str(), recipe.modules.as_slice())
            }
        };
        let order = Order {
            module: &source.name,
            release: self.release(),
            directory,
            modules,
            strictness: self.strictness,
            stdin: work.stdin()?,
        };
        let made = self.against.place.make(&work.path(), order);
        // What a build leaves that failed by itself can be built upon.
        if !matches!(
            made,
            Err(ArtifactError::Build(BuildError::Interrupted { .. }))
        ) {
            work.finish()?;
        }
        made?;
        let compiled = work.path().join(directory);
        for path in kernel_objects(&work.path().join("stripped")) {
            self.require_vermagic(&source.name, &path)?;
            let name = path.file_name().unwrap_or_default();
            keep(&path, &target.join(name))?;
            keep(&compiled.join(name), &target.join(DEBUG).join(name))?;
        }
        if !target.is_dir() {
            let module = source.name.clone();
            return Err(BuildError::NoModule { module }.into());
        }
        Ok(())
    }

    /// What was compiled must say that it is for this kernel; a tree may have moved on since its modules were prepared.
    fn require_vermagic(&self, module: &str, path: &Path) -> Result<(), ArtifactError> {
        let bytes = read(path)?;
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
            Place::Tree(_) => "that tree has changed since it was prepared, so run `make` in it",
        };
        Err(BuildError::WrongVermagic {
            module: module.to_owned(),
            found: found.to_owned(),
            headers: self.headers(),
            release: self.release().to_owned(),
            remedy,
        }
        .into())
    }

    fn found(&self, artifact: &Path) -> Result<Vec<BuiltModule>, ArtifactError> {
        crate::touch(artifact);
        let modules = kernel_objects(artifact).into_iter().map(|path| {
            let file = path.file_name().unwrap_or_default();
            let name = path.file_stem().unwrap_or_default();
            BuiltModule {
                name: name.to_string_lossy().into_owned(),
                with_debug: artifact.join(DEBUG).join(file),
                path,
            }
        });
        let modules: Vec<BuiltModule> = modules.collect();
        if modules.is_empty() {
            let path = artifact.to_owned();
            return Err(ArtifactError::CacheDamaged { path });
        }
        Ok(modules)
    }
}

/// Copies a module to where it is kept, and on the disk: a name that is there after a crash of the host has what belongs
/// to it.
fn keep(from: &Path, to: &Path) -> Result<(), ArtifactError> {
    let bytes = read(from)?;
    let parent = to.parent().unwrap_or(to);
    let written = fs::create_dir_all(parent).and_then(|()| {
        let mut file = File::create(to)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        File::open(parent)?.sync_all()
    });
    written.map_err(|error| ArtifactError::writing(to, error))
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
