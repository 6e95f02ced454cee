//! What a module is built against: fetched headers, or a kernel tree of the user's own.

use std::fs;
use std::path::{Path, PathBuf};

use super::BuildError;
use super::make::Place;
use super::root::Root;
use crate::fetch::{Resolved, provide, root_of};
use crate::kernel::require_p2pdma;
use crate::manifest::{HEADERS, SOURCE, TOOLCHAIN};
use crate::{ArtifactError, Cache, Kernel, Manifest, Progress};

/// The kernel that modules are built for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildTarget {
    /// The guest's kernel that p2plab fetches.
    Guest,
    /// One of the manifest's older kernels, by its set: see [`older`](Self::older).
    Older(String),
    /// A built kernel tree of the user's own.
    Tree(PathBuf),
}

impl BuildTarget {
    /// The manifest's kernels that are built against, and not run.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`].
    pub fn older() -> Result<Vec<Self>, ArtifactError> {
        let sets = Manifest::built_in()?.older_headers();
        Ok(sets.into_iter().map(Self::Older).collect())
    }

    /// What modules for `kernel` are built against.
    ///
    /// # Errors
    ///
    /// [`BuildError::NoTree`] for a kernel of the user's own whose tree is not known.
    pub fn of(kernel: &Kernel) -> Result<Self, ArtifactError> {
        match &kernel.build_tree {
            Some(tree) => Ok(Self::Tree(tree.clone())),
            None if kernel.is_own => Err(BuildError::NoTree {
                release: kernel.release.clone(),
            }
            .into()),
            None => Ok(Self::Guest),
        }
    }
}

/// Headers or a tree, ready to build against.
#[derive(Debug, Clone)]
pub(super) struct Against {
    pub release: String,
    pub place: Place,
    /// Changes with all that a module depends on but its source; of a tree of the user's own, which says nothing of what
    /// has changed, its path.
    pub identity: String,
    source: Source,
}

/// Where the kernel's own drivers are.
#[derive(Debug, Clone)]
enum Source {
    /// A set of the manifest, fetched when it is first needed: its name, and the packages' version.
    Set {
        name: String,
        debian: String,
    },
    Tree(PathBuf),
}

impl Against {
    pub(super) fn open(
        cache: &Cache,
        target: &BuildTarget,
        progress: &mut dyn Progress,
    ) -> Result<Self, ArtifactError> {
        match target {
            BuildTarget::Guest => Self::guest(cache, progress),
            BuildTarget::Older(set) => {
                let manifest = Manifest::built_in()?;
                let dirs = provide(cache, &manifest, &[TOOLCHAIN, set], progress)?;
                let [tools, headers] = each(dirs)?;
                let name = set.replacen(HEADERS, SOURCE, 1);
                Self::packaged(&tools, &headers, name, None)
            }
            BuildTarget::Tree(tree) => Self::tree(tree),
        }
    }

    fn guest(cache: &Cache, progress: &mut dyn Progress) -> Result<Self, ArtifactError> {
        let manifest = Manifest::built_in()?;
        let [kernel] = each(provide(cache, &manifest, &["kernel"], progress)?)?;
        let (release, debian) = versions(&Resolved::read(&kernel)?, &kernel)?;
        let manifest = manifest.with_headers(&release, &debian);
        let dirs = provide(cache, &manifest, &[TOOLCHAIN, HEADERS], progress)
            .map_err(|error| gone(error, &release))?;
        let [tools, headers] = each(dirs)?;
        let name = SOURCE.to_owned();
        Self::packaged(&tools, &headers, name, Some((release, debian)))
    }

    fn packaged(
        tools: &Path,
        headers: &Path,
        source: String,
        versions_of_kernel: Option<(String, String)>,
    ) -> Result<Self, ArtifactError> {
        let record = Resolved::read(headers)?;
        let (release, debian) = match versions_of_kernel {
            Some(versions) => versions,
            None => versions(&record, headers)?,
        };
        let root = Root {
            toolchain: root_of(tools),
            headers: Some(root_of(headers)),
        };
        let directory = headers_dir(&root_of(headers), &release);
        if !directory.join("Makefile").is_file() {
            return Err(ArtifactError::CacheDamaged { path: directory });
        }
        Ok(Self {
            identity: format!("{}{}", record.identity(), Resolved::read(tools)?.identity()),
            place: Place::Packaged(root),
            source: Source::Set {
                name: source,
                debian,
            },
            release,
        })
    }

    pub(super) fn tree(tree: &Path) -> Result<Self, ArtifactError> {
        let lacks = |missing| BuildError::NotATree {
            tree: tree.to_owned(),
            missing,
        };
        let tree = fs::canonicalize(tree).map_err(|_| lacks("Makefile"))?;
        const RELEASE: &str = "include/config/kernel.release";
        const CONFIG: &str = ".config";
        const SYMBOLS: &str = "Module.symvers";
        for needed in ["Makefile", CONFIG, RELEASE, SYMBOLS] {
            if !tree.join(needed).is_file() {
                return Err(lacks(needed).into());
            }
        }
        require_p2pdma(&tree, &tree.join(CONFIG))?;
        let release = fs::read_to_string(tree.join(RELEASE)).map_err(|_| lacks(RELEASE))?;
        // With O=, sources are elsewhere.
        let linked = tree.join("source");
        let source = if linked.is_dir() {
            linked
        } else {
            tree.clone()
        };
        Ok(Self {
            release: release.trim().to_owned(),
            // Its make finds out what has changed in it.
            identity: tree.display().to_string(),
            place: Place::Tree(tree),
            source: Source::Tree(source),
        })
    }

    /// The kernel's source, or the part of it that is kept.
    pub(super) fn source(
        &self,
        cache: &Cache,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, ArtifactError> {
        let (name, debian) = match &self.source {
            Source::Tree(tree) => return Ok(tree.clone()),
            Source::Set { name, debian } => (name, debian),
        };
        let manifest = Manifest::built_in()?.with_source(name, &self.release, debian);
        let dirs = provide(cache, &manifest, &[name], progress)
            .map_err(|error| gone(error, &self.release))?;
        let [set] = each(dirs)?;
        Ok(root_of(&set))
    }
}

/// Where Debian's packages have a kernel's headers.
pub(crate) fn headers_dir(root: &Path, release: &str) -> PathBuf {
    root.join("usr/src")
        .join(format!("linux-headers-{release}"))
}

/// Release of a kernel, and version of its packages.
fn versions(record: &Resolved, set: &Path) -> Result<(String, String), ArtifactError> {
    let damaged = || ArtifactError::CacheDamaged {
        path: set.to_owned(),
    };
    let release = record.facts.get("kernel").cloned().ok_or_else(damaged)?;
    let is_kernel = |name: &str| name.starts_with("linux-") && name.ends_with(&release);
    let mut packages = record
        .packages
        .iter()
        .filter(|package| is_kernel(&package.name));
    let debian = packages.next().ok_or_else(damaged)?.version.clone();
    Ok((release, debian))
}

/// Packages that belong to a kernel in the cache leave the suites when a newer kernel arrives.
fn gone(error: ArtifactError, release: &str) -> ArtifactError {
    let (package, detail) = match error {
        ArtifactError::NoSuchPackage { package, suites } => {
            (package, format!("it is not in {}", suites.join(" or ")))
        }
        // `Version '7.3.4-1' for 'linux-source-7.3' was not found`
        ArtifactError::Fetch { detail, .. } if detail.ends_with("was not found") => {
            let package = detail.split('\'').nth(3).unwrap_or("package");
            (package.to_owned(), detail)
        }
        other => return other,
    };
    BuildError::Gone {
        package,
        release: release.to_owned(),
        detail,
    }
    .into()
}

/// As many directories as sets were asked for.
fn each<const N: usize>(dirs: Vec<PathBuf>) -> Result<[PathBuf; N], ArtifactError> {
    dirs.try_into().map_err(|_| ArtifactError::CacheDamaged {
        path: PathBuf::from("artifacts"),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A tree as far as it is looked at.
    pub(in super::super) fn tree(dir: &Path, config: &str) {
        for (name, text) in [
            ("Makefile", ""),
            (".config", config),
            ("Module.symvers", ""),
            ("include/config/kernel.release", "7.9.0-rc1+\n"),
        ] {
            super::super::patch::write(&dir.join(name), text.as_bytes()).unwrap();
        }
    }

    #[test]
    fn a_user_s_tree_must_be_built_and_have_p2pdma() {
        let dir = tempfile::tempdir().unwrap();
        let why = || Against::tree(dir.path()).unwrap_err().to_string();
        assert!(why().contains("it has no Makefile"), "{}", why());
        tree(
            dir.path(),
            "CONFIG_X86_64=y\n# CONFIG_PCI_P2PDMA is not set\n",
        );
        let tree_path = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(
            why(),
            format!(
                "the kernel {0} has no P2PDMA ({0}/.config says so): build it with CONFIG_PCI_P2PDMA=y (needs \
                 CONFIG_ZONE_DEVICE)",
                tree_path.display()
            )
        );
        fs::remove_file(dir.path().join("include/config/kernel.release")).unwrap();
        assert_eq!(
            why(),
            format!(
                "{} is no kernel tree that modules can be built in: it has no include/config/kernel.release; give one in \
                 which `make` has run, or the folder /lib/modules/RELEASE/build",
                dir.path().display()
            )
        );

        tree(dir.path(), "CONFIG_X86_64=y\nCONFIG_PCI_P2PDMA=y\n");
        let first = Against::tree(dir.path()).unwrap();
        assert_eq!(first.release, "7.9.0-rc1+");
    }

    #[test]
    fn packages_that_have_left_the_suites_say_what_to_do() {
        let fetch = ArtifactError::Fetch {
            set: "source".into(),
            detail: "Version '7.3.4-1' for 'linux-source-7.3' was not found".into(),
        };
        let said = gone(fetch, "7.3.4+deb13-amd64").to_string();
        assert!(said.contains("no linux-source-7.3 any more"), "{said}");
        assert!(said.contains("p2plab clean"), "{said}");
        let missing = ArtifactError::NoSuchPackage {
            package: "linux-headers-7.3.4+deb13-amd64".into(),
            suites: vec!["trixie".into()],
        };
        assert!(matches!(
            gone(missing, "7.3.4+deb13-amd64"),
            ArtifactError::Build(BuildError::Gone { .. })
        ));
        let other = gone(ArtifactError::NoMirror, "x");
        assert!(matches!(other, ArtifactError::NoMirror));
    }

    #[test]
    fn the_kernel_of_a_set_is_known_with_its_packages_version() {
        let package = |name: &str, version: &str| crate::ResolvedPackage {
            name: name.into(),
            version: version.into(),
            sha256: String::new(),
        };
        let record = Resolved {
            schema: 1,
            set: "kernel".into(),
            mirror: String::new(),
            suites: Vec::new(),
            packages: vec![
                package("libelf1t64", "0.1"),
                package("linux-binary-7.3.4+deb13-amd64", "7.3.4-1~bpo13+1"),
            ],
            facts: [("kernel".to_owned(), "7.3.4+deb13-amd64".to_owned())].into(),
        };
        let found = versions(&record, Path::new("x")).unwrap();
        assert_eq!(found.1, "7.3.4-1~bpo13+1");
    }
}
