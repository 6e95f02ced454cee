//! The modules of `guest-kernel/`: which there are, and what each is made of.
//!
//! ```text
//! guest-kernel/NAME/            a driver of ours; its Kbuild says what is built
//! guest-kernel/patches/NAME/    NNNN-*.patch, and build.toml, which says what they apply to and what is built
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::BuildError;
use crate::ArtifactError;

/// Names the folder, where p2plab does not run from its checkout.
const VARIABLE: &str = "P2PLAB_GUEST_KERNEL";
/// The folder in the checkout that this program was built from.
const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-kernel");
/// What the patches of a folder are applied to.
const RECIPE: &str = "build.toml";

/// Files by their path in the directory that is built.
pub(super) type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A folder of `guest-kernel/` of which modules are built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSource {
    /// Name of the folder, and of the module that matters.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A driver of ours.
    Own,
    /// A driver of the kernel's, with patches.
    Patched(Recipe),
}

/// A folder's `build.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recipe {
    /// Directory in the kernel's source, such as `drivers/nvme/host`.
    pub source: String,
    /// The modules of that directory that are built.
    pub modules: Vec<String>,
}

/// All of them, by name.
///
/// # Errors
///
/// [`BuildError::NoSources`] if the folder is not there, [`BuildError::BadRecipe`].
pub fn module_sources() -> Result<Vec<ModuleSource>, ArtifactError> {
    below(&folder())
}

fn folder() -> PathBuf {
    let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
    variable.map_or_else(|| PathBuf::from(CHECKOUT), PathBuf::from)
}

/// Those of the folder `path`.
pub(super) fn below(path: &Path) -> Result<Vec<ModuleSource>, ArtifactError> {
    let path = fs::canonicalize(path).map_err(|_| BuildError::NoSources { path: path.into() })?;
    let mut found = Vec::new();
    for folder in folders(&path) {
        if folder.join("Kbuild").is_file() {
            found.push(source(folder, Kind::Own));
        }
    }
    for folder in folders(&path.join("patches")) {
        let recipe = folder.join(RECIPE);
        if recipe.is_file() {
            let kind = Kind::Patched(read_recipe(&recipe)?);
            found.push(source(folder, kind));
        }
    }
    if found.is_empty() {
        return Err(BuildError::NoSources { path }.into());
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

impl ModuleSource {
    /// The one of that name.
    ///
    /// # Errors
    ///
    /// [`BuildError::NoSuchModule`], and as [`module_sources`].
    pub fn find(name: &str) -> Result<Self, ArtifactError> {
        let path = folder();
        let all = below(&path)?;
        let path = fs::canonicalize(&path).unwrap_or(path);
        let names = all.iter().map(|source| source.name.clone()).collect();
        let found = all.into_iter().find(|source| source.name == name);
        found.ok_or_else(|| {
            let name = name.to_owned();
            BuildError::NoSuchModule { name, path, names }.into()
        })
    }

    /// A driver of ours in any folder with a Kbuild.
    #[must_use]
    pub fn own(folder: &Path) -> Self {
        source(folder.to_owned(), Kind::Own)
    }

    /// What is to be compiled, of a driver of ours. Its documentation is not, nor is what a build in place left.
    pub(super) fn files(&self) -> Result<Files, ArtifactError> {
        read_below(&self.path, &is_input)
    }

    /// Its patches, in order.
    pub(super) fn patches(&self) -> Result<Files, ArtifactError> {
        read_below(&self.path, &|name| name.ends_with(".patch"))
    }
}

/// Whether a build reads it, and not just leaves it there.
pub(super) fn is_input(name: &str) -> bool {
    let is_source = [".c", ".h", ".S"].iter().any(|end| name.ends_with(end));
    matches!(name, "Kbuild" | "Makefile") || is_source && !name.ends_with(".mod.c")
}

fn source(path: PathBuf, kind: Kind) -> ModuleSource {
    let name = path.file_name().unwrap_or_default();
    ModuleSource {
        name: name.to_string_lossy().into_owned(),
        path,
        kind,
    }
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.is_dir()).collect()
}

fn read_recipe(path: &Path) -> Result<Recipe, ArtifactError> {
    let bad = |detail| BuildError::BadRecipe {
        path: path.to_owned(),
        detail,
    };
    let text = fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    let recipe: Recipe = toml::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let is_plain = |path: &str| {
        let path = Path::new(path);
        let mut parts = path.components();
        parts.all(|part| matches!(part, std::path::Component::Normal(_)))
    };
    if !is_plain(&recipe.source) || recipe.source.is_empty() {
        let source = &recipe.source;
        return Err(bad(format!(
            "source = {source:?} is no directory in a kernel's source"
        ))
        .into());
    }
    if recipe.modules.is_empty() || !recipe.modules.iter().all(|name| is_plain(name)) {
        return Err(bad("`modules` needs names of modules, such as [\"nvme\"]".into()).into());
    }
    Ok(recipe)
}

/// All wanted files below a directory, by their path in it.
pub(super) fn read_below(
    directory: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Files, ArtifactError> {
    let mut files = Files::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        let failed = |source| ArtifactError::Unreadable {
            what: "module sources",
            path: next.clone(),
            source,
        };
        for entry in fs::read_dir(&next).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() && !path.is_symlink() {
                todo.push(path);
            } else if wanted(&name) {
                let bytes = fs::read(&path).map_err(failed)?;
                let below = path.strip_prefix(directory).unwrap_or(&path);
                files.insert(below.to_owned(), bytes);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn folders_with_a_kbuild_or_a_recipe_are_modules() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "README.md", "");
        write(dir.path(), "p2pmem/Kbuild", "obj-m := p2pmem.o\n");
        write(dir.path(), "p2pmem/core/main.c", "");
        write(dir.path(), "p2pmem/main.o", "");
        write(dir.path(), "p2pmem/p2pmem.mod.c", "");
        write(dir.path(), "p2pmem/README.md", "");
        write(dir.path(), "notes/x", "");
        let recipe = "source = \"drivers/nvme/host\"\nmodules = [\"nvme\"]\n";
        write(dir.path(), "patches/nvme/build.toml", recipe);
        write(dir.path(), "patches/nvme/0002-b.patch", "");
        write(dir.path(), "patches/nvme/0001-a.patch", "");
        let found = below(dir.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|source| source.name.as_str()).collect();
        assert_eq!(names, ["nvme", "p2pmem"]);
        let files: Vec<_> = found[1].files().unwrap().into_keys().collect();
        assert_eq!(files, [Path::new("Kbuild"), Path::new("core/main.c")]);
        let patches: Vec<_> = found[0].patches().unwrap().into_keys().collect();
        assert_eq!(
            patches,
            [Path::new("0001-a.patch"), Path::new("0002-b.patch")]
        );
    }

    #[test]
    fn a_folder_without_modules_and_a_bad_recipe_are_refused_in_one_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let why = || below(dir.path()).unwrap_err().to_string();
        assert!(why().contains("set P2PLAB_GUEST_KERNEL"));
        for (text, says) in [
            ("modules = [\"x\"]", "missing field `source`"),
            (
                "source = \"../x\"\nmodules = [\"x\"]",
                "no directory in a kernel's source",
            ),
            ("source = \"x\"\nmodules = []", "needs names of modules"),
            (
                "source = \"x\"\nmodules = [\"a/../b\"]",
                "needs names of modules",
            ),
        ] {
            write(dir.path(), "patches/x/build.toml", text);
            assert!(why().contains(says), "{}", why());
        }
        let gone = dir.path().join("gone");
        assert!(
            below(&gone)
                .unwrap_err()
                .to_string()
                .contains("no module sources in")
        );
    }

    #[test]
    fn a_module_that_is_not_there_is_answered_with_those_that_are() {
        let said = ModuleSource::find("p2pmen").unwrap_err().to_string();
        assert!(
            said.contains("there is no module `p2pmen`") && said.contains("nvme"),
            "{said}"
        );
    }
}
