//! Kernel modules: which files are needed for some modules by name, in the order in which they load.
//!
//! Debian's package has no modules.dep (depmod runs when it is installed), so the dependencies are read from
//! the modules themselves, as depmod does.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::elf::Elf;
use crate::{ArtifactError, child, fetch};

/// Larger than any module; a compressed file that claims more is damaged.
const MAX_MODULE_BYTES: u64 = 256 << 20;

/// The modules of one kernel: the directory that is `/lib/modules/RELEASE` on a system that runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModulesDir {
    /// The directory; contains `kernel/`.
    pub path: PathBuf,
    /// The kernel's release, as `uname -r` prints it.
    pub release: String,
    /// Modules that come from elsewhere, by name: others in the place of those in the directory, or further ones. An
    /// initramfs depends on each of them, whether it is in it or not.
    pub replaced: BTreeMap<String, PathBuf>,
}

/// A module ready to go into an initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name with `_` for `-`.
    pub name: String,
    /// Where it belongs in the guest, for example `/lib/modules/RELEASE/kernel/drivers/nvme/host/nvme.ko`.
    pub guest_path: String,
    /// Parameters it is loaded with; empty for none.
    pub parameters: String,
    /// The file, decompressed.
    pub contents: Vec<u8>,
}

impl ModulesDir {
    /// Takes `DIR` or `DIR/lib/modules/RELEASE`, whichever holds the modules of that release.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::NoModules`] if neither does.
    pub fn find(dir: &Path, release: &str) -> Result<Self, ArtifactError> {
        let below = [
            dir.join("lib/modules").join(release),
            dir.join(release),
            dir.to_owned(),
        ];
        let named_otherwise = |path: &Path| {
            // DIR itself may have any name, unless that name is another kernel's release.
            path == dir
                && dir.file_name().is_some_and(|n| n != release)
                && dir.parent().is_some_and(|p| p.ends_with("lib/modules"))
        };
        below
            .into_iter()
            .find(|path| path.join("kernel").is_dir() && !named_otherwise(path))
            .map(|path| Self {
                path,
                release: release.to_owned(),
                replaced: BTreeMap::new(),
            })
            .ok_or_else(|| ArtifactError::NoModules {
                path: dir.to_owned(),
                release: Some(release.to_owned()),
            })
    }

    /// The modules `wanted` and all that they need, each after what it needs. An item is a name, or the
    /// path of a .ko file (contains `/`), and may be followed by parameters: `nvme use_cmb_sqes=1`. What is built
    /// into the kernel is left out.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::ModuleMissing`], [`ArtifactError::BadModule`], [`ArtifactError::Unreadable`].
    pub fn resolve(&self, wanted: &[String]) -> Result<Vec<Module>, ArtifactError> {
        let mut resolver = Resolver {
            dir: self,
            files: self.files(),
            builtin: self.builtin(),
            visited: HashSet::new(),
            found: Vec::new(),
        };
        for item in wanted {
            let (name, parameters) = item.split_once(char::is_whitespace).unwrap_or((item, ""));
            resolver.visit(name, None)?;
            let key = key(name.rsplit('/').next().unwrap_or(name));
            if let Some(module) = resolver.found.iter_mut().find(|m| m.name == key) {
                module.parameters = parameters.trim().to_owned();
            }
        }
        Ok(resolver.found)
    }

    /// Changes when a module is rebuilt, added or removed: hashes names, sizes and times, not contents.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, path) in self.files() {
            let Ok(meta) = fs::metadata(&path) else {
                continue;
            };
            hash.update(format!(
                "{name} {} {}.{}\n",
                meta.len(),
                meta.mtime(),
                meta.mtime_nsec()
            ));
        }
        fetch::hex(&hash.finalize())
    }

    /// Every module file by name. Of equal names that in `updates/` or `extra/` wins, as with depmod.
    fn files(&self) -> BTreeMap<String, PathBuf> {
        let mut files = BTreeMap::new();
        for part in ["kernel", "extra", "updates"] {
            collect(&self.path.join(part), &mut files);
        }
        files.extend(self.replaced.clone());
        files
    }

    /// Whether the directory has a module of that name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.files().contains_key(&key(name))
    }

    /// Whether the kernel has the module of that name built in.
    #[must_use]
    pub fn is_built_in(&self, name: &str) -> bool {
        self.builtin().contains(&key(name))
    }

    fn builtin(&self) -> HashSet<String> {
        let text = fs::read_to_string(self.path.join("modules.builtin")).unwrap_or_default();
        text.lines()
            .map(|l| key(l.rsplit('/').next().unwrap_or(l)))
            .collect()
    }
}

/// The name that the kernel gives the module in a file, or the normal form of a name: `-` is `_`.
fn key(file: &str) -> String {
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn collect(dir: &Path, into: &mut BTreeMap<String, PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() {
            collect(&entry.path(), into);
        } else if name.ends_with(".ko") || name.contains(".ko.") {
            into.insert(key(&name), entry.path());
        }
    }
}

struct Resolver<'a> {
    dir: &'a ModulesDir,
    files: BTreeMap<String, PathBuf>,
    builtin: HashSet<String>,
    visited: HashSet<String>,
    found: Vec<Module>,
}

impl Resolver<'_> {
    /// Depth first. Marking before descending ends a cycle, which the kernel's build refuses anyway; the depth
    /// is that of the module graph, about ten.
    fn visit(&mut self, name: &str, needed_by: Option<&str>) -> Result<(), ArtifactError> {
        let own_file = name.contains('/').then(|| PathBuf::from(name));
        let key = key(name.rsplit('/').next().unwrap_or(name));
        if !self.visited.insert(key.clone()) {
            return Ok(());
        }
        let Some(path) = own_file.or_else(|| self.files.get(&key).cloned()) else {
            if self.builtin.contains(&key) {
                return Ok(());
            }
            return Err(ArtifactError::ModuleMissing {
                module: name.to_owned(),
                needed_by: needed_by.map(str::to_owned),
                release: self.dir.release.clone(),
            });
        };
        let contents = read(&path)?;
        for needed in depends(&contents, &path)? {
            self.visit(&needed, Some(&key))?;
        }
        let below = path
            .strip_prefix(&self.dir.path)
            .ok()
            .map(Path::to_path_buf);
        let below =
            below.unwrap_or_else(|| Path::new("extra").join(path.file_name().unwrap_or_default()));
        let below = below.to_string_lossy();
        let stem = below.split(".ko").next().unwrap_or(&below);
        self.found.push(Module {
            guest_path: format!("/lib/modules/{}/{stem}.ko", self.dir.release),
            name: key,
            parameters: String::new(),
            contents,
        });
        Ok(())
    }
}

/// Modules that a module's `.modinfo` names in `depends=`.
fn depends(contents: &[u8], path: &Path) -> Result<Vec<String>, ArtifactError> {
    let info =
        Elf::parse(contents)
            .and_then(Elf::modinfo)
            .ok_or_else(|| ArtifactError::BadModule {
                path: path.to_owned(),
                detail: "this is no kernel module".into(),
            })?;
    let lists = info
        .into_iter()
        .filter(|(k, _)| *k == "depends")
        .map(|(_, v)| v);
    Ok(lists
        .flat_map(|l| l.split(','))
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect())
}

/// A module file, decompressed.
fn read(path: &Path) -> Result<Vec<u8>, ArtifactError> {
    let unreadable = |source| ArtifactError::Unreadable {
        what: "module",
        path: path.to_owned(),
        source,
    };
    let extension = path
        .extension()
        .map(|e| e.to_string_lossy().into_owned())
        .unwrap_or_default();
    match extension.as_str() {
        "ko" => fs::read(path).map_err(unreadable),
        "xz" => {
            let file = fs::File::open(path).map_err(unreadable)?;
            let mut contents = Vec::new();
            liblzma::read::XzDecoder::new(file)
                .take(MAX_MODULE_BYTES)
                .read_to_end(&mut contents)
                .map_err(|e| damaged(path, e.to_string()))?;
            Ok(contents)
        }
        "gz" => through("gzip", path),
        "zst" => through("zstd", path),
        other => Err(damaged(path, format!("unknown compression .{other}"))),
    }
}

/// Rare formats go through the host's own program.
fn through(program: &str, path: &Path) -> Result<Vec<u8>, ArtifactError> {
    let mut command = Command::new(program);
    let out = child::output(command.args(["-dc", "--"]).arg(path).stdin(Stdio::null()));
    match out {
        Ok(out) if out.status.success() => Ok(out.stdout),
        Ok(out) => Err(damaged(path, child::reason(&out))),
        Err(_) => Err(damaged(
            path,
            format!("unpacking it needs the program {program}, which was not found"),
        )),
    }
}

fn damaged(path: &Path, detail: String) -> ArtifactError {
    ArtifactError::BadModule {
        path: path.to_owned(),
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::module;

    fn tree(modules: &[(&str, &str)]) -> (tempfile::TempDir, ModulesDir) {
        let dir = tempfile::tempdir().unwrap();
        for (file, depends) in modules {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let bytes = module(format!("depends={depends}\0").as_bytes());
            let bytes = if file.ends_with(".xz") {
                let mut packed = Vec::new();
                liblzma::read::XzEncoder::new(&bytes[..], 1)
                    .read_to_end(&mut packed)
                    .unwrap();
                packed
            } else {
                bytes
            };
            fs::write(path, bytes).unwrap();
        }
        fs::write(
            dir.path().join("modules.builtin"),
            "kernel/drivers/virtio/virtio_pci.ko\n",
        )
        .unwrap();
        let modules = ModulesDir::find(dir.path(), "7.0").unwrap();
        (dir, modules)
    }

    fn order(modules: &ModulesDir, wanted: &[&str]) -> Vec<String> {
        let wanted: Vec<String> = wanted.iter().map(|s| (*s).to_owned()).collect();
        modules
            .resolve(&wanted)
            .unwrap()
            .into_iter()
            .map(|m| m.name)
            .collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let (_dir, modules) = tree(&[
            ("kernel/nvme/nvme.ko.xz", "nvme-core"),
            ("kernel/nvme/nvme-core.ko.xz", "nvme_auth,virtio-pci"),
            ("kernel/nvme/nvme-auth.ko", ""),
            ("kernel/nvme/nvmet.ko", "nvme-core"),
        ]);
        assert_eq!(
            order(&modules, &["nvmet", "nvme", "nvme_core", "virtio-pci"]),
            ["nvme_auth", "nvme_core", "nvmet", "nvme"]
        );
        let found = modules.resolve(&["nvme use_cmb_sqes=1".into()]).unwrap();
        let nvme = found.last().unwrap();
        assert_eq!(nvme.guest_path, "/lib/modules/7.0/kernel/nvme/nvme.ko");
        assert_eq!(nvme.parameters, "use_cmb_sqes=1");
        assert!(nvme.contents.starts_with(b"\x7fELF"));
    }

    #[test]
    fn what_was_built_takes_the_place_of_the_directory_s_or_comes_on_top() {
        let (_dir, mut modules) = tree(&[
            ("kernel/nvme/nvme.ko", "old"),
            ("kernel/nvme/nvme-core.ko", ""),
        ]);
        let (built, _) = tree(&[("kernel/nvme.ko", "nvme-core"), ("kernel/p2pmem.ko", "")]);
        assert!(modules.has("nvme-core") && !modules.has("p2pmem"));
        assert!(modules.is_built_in("virtio-pci") && !modules.is_built_in("nvme"));
        for name in ["nvme", "p2pmem"] {
            let file = built.path().join(format!("kernel/{name}.ko"));
            modules.replaced.insert(name.into(), file);
        }
        assert_eq!(
            order(&modules, &["p2pmem", "nvme"]),
            ["p2pmem", "nvme_core", "nvme"]
        );
        let found = modules.resolve(&["p2pmem a=1".into()]).unwrap();
        assert_eq!(found[0].guest_path, "/lib/modules/7.0/extra/p2pmem.ko");
        assert_eq!(found[0].parameters, "a=1");
    }

    #[test]
    fn a_missing_module_is_named_with_the_one_that_needs_it() {
        let (_dir, modules) = tree(&[("kernel/a.ko", "b")]);
        let why = |name: &str| modules.resolve(&[name.to_owned()]).unwrap_err().to_string();
        assert!(why("a").contains("no module b, which a needs"));
        assert!(why("c").contains("no module c:"));
    }

    #[test]
    fn cycles_end_and_damage_is_reported() {
        let (dir, modules) = tree(&[("kernel/a.ko", "b"), ("kernel/b.ko", "a")]);
        assert_eq!(order(&modules, &["a"]), ["b", "a"]);
        fs::write(dir.path().join("kernel/bad.ko"), "text").unwrap();
        fs::write(dir.path().join("kernel/cut.ko.xz"), b"\xfd7zXZ\0").unwrap();
        for name in ["bad", "cut"] {
            let error = modules.resolve(&[name.to_owned()]).unwrap_err();
            assert!(matches!(error, ArtifactError::BadModule { .. }), "{error}");
        }
    }

    #[test]
    fn a_module_of_ones_own_is_taken_by_path() {
        let (_dir, modules) = tree(&[("kernel/nvme-core.ko", "")]);
        let own = tempfile::tempdir().unwrap();
        let path = own.path().join("p2pmem.ko");
        fs::write(&path, module(b"depends=nvme-core\0")).unwrap();
        let found = modules
            .resolve(&[path.to_string_lossy().into_owned()])
            .unwrap();
        assert_eq!(found[1].guest_path, "/lib/modules/7.0/extra/p2pmem.ko");
        assert_eq!(found[0].name, "nvme_core");
    }

    #[test]
    fn the_directory_is_found_from_an_install_root_and_never_of_another_release() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("lib/modules/7.0");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        assert_eq!(ModulesDir::find(dir.path(), "7.0").unwrap().path, modules);
        assert_eq!(ModulesDir::find(&modules, "7.0").unwrap().path, modules);
        assert!(ModulesDir::find(&modules, "7.1").is_err());
        assert!(ModulesDir::find(dir.path(), "7.1").is_err());
    }

    #[test]
    fn rebuilding_a_module_changes_the_fingerprint() {
        let (dir, modules) = tree(&[("kernel/a.ko", "")]);
        let before = modules.fingerprint();
        fs::write(dir.path().join("kernel/a.ko"), module(b"depends=\0new=1\0")).unwrap();
        assert_ne!(before, modules.fingerprint());
    }
}
