//! The manifest: which packages a lab runs on, in sets that are fetched on their own.

use std::collections::BTreeMap;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{ArtifactError, system_image};

/// `images/manifest.toml`, compiled in.
const TEXT: &str = include_str!("../manifest.toml");

/// The package list of a lab.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Where packages come from.
    pub source: Source,
    /// The sets that every lab needs, by name: `qemu`, `kernel` and `tools`.
    pub sets: BTreeMap<String, PackageSet>,
    /// The sets that some topologies ask for: `system`, and `imagetools` that makes an image of it.
    #[serde(default)]
    pub on_demand: BTreeMap<String, PackageSet>,
    /// What kernel modules are built against.
    pub modules: Option<KernelPackages>,
}

/// The packages of any one kernel that modules are built against.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelPackages {
    /// Its headers. `{release}` and `{version}`, which is the release without the architecture, stand for its own.
    pub headers: Vec<String>,
    /// Its source, an archive in `/usr/src`. `{series}` stands for the first two numbers of its release.
    pub source: String,
    /// What is kept of the archive: paths in the source tree.
    pub members: Vec<String>,
    /// Kernels other than the guest's: package names with one `*`, of which the newest match counts.
    pub older: Vec<String>,
}

/// The set that becomes the guest's system image.
pub(crate) const SYSTEM: &str = "system";
/// The set with mkfs.erofs.
pub(crate) const IMAGE_TOOLS: &str = "imagetools";
/// The set that kernel modules are built with.
pub(crate) const TOOLCHAIN: &str = "toolchain";
/// The set with the headers of the guest's kernel; those of an older one are `headers-SERIES`.
pub(crate) const HEADERS: &str = "headers";
/// The set with sources of the guest's kernel; those of an older one are `source-SERIES`.
pub(crate) const SOURCE: &str = "source";
/// What stands before the release in the name of a package with headers.
const HEADERS_PREFIX: &str = "linux-headers-";

/// Debian suites by name; no hosts.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Suites, each a directory below `dists/` of a mirror.
    pub suites: Vec<String>,
    /// The suite whose versions win.
    pub prefer: String,
    /// Archive components, usually `main`.
    pub components: Vec<String>,
    /// Debian's name of the guest's architecture.
    pub architecture: String,
}

/// Packages that are fetched and unpacked together.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackageSet {
    /// What the lab needs them for.
    pub purpose: String,
    /// Package names; `{release}` stands for the part of `newest` after `prefix`.
    pub packages: Vec<String>,
    /// Whether their dependencies are unpacked too.
    pub dependencies: bool,
    /// A package name with one `*`, of which the newest match decides `{release}`.
    pub newest: Option<String>,
    /// The part of `newest` that is not the release.
    #[serde(default)]
    pub prefix: String,
    /// Lines that the kernel's configuration must contain.
    #[serde(default)]
    pub requires_config: Vec<String>,
}

impl Manifest {
    /// The manifest of this build.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] with line and column if the file in the project is wrong.
    pub fn built_in() -> Result<Self, ArtifactError> {
        Self::parse(TEXT)
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] if it is no TOML, or if a field is missing, unknown or inconsistent.
    pub fn parse(text: &str) -> Result<Self, ArtifactError> {
        let mut manifest: Self =
            toml::from_str(text).map_err(|e| ArtifactError::Manifest(e.to_string()))?;
        manifest.add_older_headers();
        if !manifest.source.suites.contains(&manifest.source.prefer) {
            return Err(ArtifactError::Manifest(format!(
                "source.prefer = {:?} is not one of source.suites",
                manifest.source.prefer
            )));
        }
        for (table, sets) in [("sets", &manifest.sets), ("on_demand", &manifest.on_demand)] {
            for (name, set) in sets {
                set.check()
                    .map_err(|why| ArtifactError::Manifest(format!("{table}.{name}: {why}")))?;
            }
        }
        Ok(manifest)
    }

    /// This manifest with more packages for the system image. Their order does not count.
    #[must_use]
    pub fn with_packages(mut self, packages: &[String]) -> Self {
        if let Some(system) = self.on_demand.get_mut(SYSTEM) {
            system.packages.extend_from_slice(packages);
            system.packages.sort();
            system.packages.dedup();
        }
        self
    }

    /// Makes a set of each pattern of `modules.older`, such as `headers-7.2`.
    fn add_older_headers(&mut self) {
        let Some(modules) = &self.modules else {
            return;
        };
        let requires_config = self
            .sets
            .get("kernel")
            .map(|kernel| &kernel.requires_config);
        for pattern in &modules.older {
            let series = series(pattern.strip_prefix(HEADERS_PREFIX).unwrap_or(pattern));
            let set = PackageSet {
                purpose: format!("headers of kernel {series}, to build modules"),
                packages: modules.headers.clone(),
                dependencies: false,
                newest: Some(pattern.clone()),
                prefix: HEADERS_PREFIX.to_owned(),
                requires_config: requires_config.cloned().unwrap_or_default(),
            };
            self.on_demand.insert(format!("{HEADERS}-{series}"), set);
        }
    }

    /// Names of the sets with headers of kernels other than the guest's.
    pub(crate) fn older_headers(&self) -> Vec<String> {
        let older = format!("{HEADERS}-");
        let names = self
            .on_demand
            .keys()
            .filter(|name| name.starts_with(&older));
        names.cloned().collect()
    }

    /// Adds the set [`HEADERS`] for the guest's kernel of that release, in that version of its packages.
    #[must_use]
    pub(crate) fn with_headers(mut self, release: &str, debian: &str) -> Self {
        if let Some(modules) = &self.modules {
            let names = modules.headers.iter();
            let set = PackageSet {
                purpose: "headers of the guest's kernel, to build modules".to_owned(),
                packages: names
                    .map(|name| format!("{}={debian}", with_release(name, release)))
                    .collect(),
                ..PackageSet::fixed()
            };
            self.on_demand.insert(HEADERS.to_owned(), set);
        }
        self
    }

    /// Adds the set `name` with sources of the kernel of that release, in that version of its packages.
    #[must_use]
    pub(crate) fn with_source(mut self, name: &str, release: &str, debian: &str) -> Self {
        if let Some(modules) = &self.modules {
            let package = modules.source.replace("{series}", &series(release));
            let set = PackageSet {
                purpose: format!(
                    "sources of kernel {}, to build its drivers with patches",
                    series(release)
                ),
                packages: vec![format!("{package}={debian}")],
                ..PackageSet::fixed()
            };
            self.on_demand.insert(name.to_owned(), set);
        }
        self
    }

    /// Of the kernel's source, what is kept.
    pub(crate) fn source_members(&self) -> &[String] {
        let modules = self.modules.as_ref();
        modules
            .map(|modules| modules.members.as_slice())
            .unwrap_or_default()
    }

    /// The set of that name.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] if there is none.
    pub fn set(&self, name: &str) -> Result<&PackageSet, ArtifactError> {
        self.find(name)
            .ok_or_else(|| ArtifactError::Manifest(format!("there is no [sets.{name}]")))
    }

    fn find(&self, name: &str) -> Option<&PackageSet> {
        self.sets.get(name).or_else(|| self.on_demand.get(name))
    }

    /// Name of the set's directory in the cache. It changes with everything that decides what is in it,
    /// so that an older cache is never taken for a newer one.
    #[must_use]
    pub fn directory(&self, name: &str) -> String {
        let mut hash = Sha256::new();
        // The number is the layout of a set's directory: raise it when that changes.
        hash.update(format!("1 {:?} {:?}", self.source, self.find(name)));
        if name == SYSTEM {
            hash.update(system_image::LAYOUT);
        }
        if name.starts_with(SOURCE) {
            hash.update(format!("{:?}", self.source_members()));
        }
        let digest: String = hash
            .finalize()
            .iter()
            .take(6)
            .map(|b| format!("{b:02x}"))
            .collect();
        format!("{name}-{digest}")
    }
}

/// The first two numbers of a release: `7.3` of `7.3.4+deb13-amd64`.
fn series(release: &str) -> String {
    let mut numbers = release.splitn(3, '.');
    let (major, minor) = (numbers.next(), numbers.next());
    format!(
        "{}.{}",
        major.unwrap_or_default(),
        minor.unwrap_or_default()
    )
}

/// A package's name with the release, and the release without its architecture, in their places.
fn with_release(name: &str, release: &str) -> String {
    let version = release
        .rsplit_once('-')
        .map_or(release, |(version, _)| version);
    name.replace("{release}", release)
        .replace("{version}", version)
}

impl PackageSet {
    /// A set to be given packages that need no further ones.
    fn fixed() -> Self {
        Self {
            purpose: String::new(),
            packages: Vec::new(),
            dependencies: false,
            newest: None,
            prefix: String::new(),
            requires_config: Vec::new(),
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.packages.is_empty() {
            return Err("packages is empty".into());
        }
        let uses_release = self.packages.iter().any(|p| p.contains("{release}"));
        match &self.newest {
            None if uses_release => Err("packages use {release}, but there is no `newest`".into()),
            Some(p) if p.matches('*').count() != 1 => {
                Err(format!("newest = {p:?} needs exactly one *"))
            }
            Some(p) if !p.starts_with(&self.prefix) => Err(format!(
                "newest = {p:?} does not start with prefix = {:?}",
                self.prefix
            )),
            _ => Ok(()),
        }
    }

    /// The set's releases among `names`, newest first. Empty if the set has no `newest`.
    #[must_use]
    pub fn releases<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<String> {
        let Some((head, tail)) = self.newest.as_deref().and_then(|p| p.split_once('*')) else {
            return Vec::new();
        };
        let mut found: Vec<(Vec<u64>, String)> = names
            .filter_map(|name| {
                let version = name.strip_prefix(head)?.strip_suffix(tail)?;
                let numbers: Option<Vec<u64>> =
                    version.split('.').map(|n| n.parse().ok()).collect();
                Some((numbers?, name.strip_prefix(&self.prefix)?.to_owned()))
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
            .into_iter()
            .rev()
            .map(|(_, release)| release)
            .collect()
    }

    /// The package names with `release` in its places.
    #[must_use]
    pub fn names(&self, release: &str) -> Vec<String> {
        self.packages
            .iter()
            .map(|p| with_release(p, release))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_manifest_is_sound_and_names_no_host() {
        let manifest = Manifest::built_in().unwrap();
        for set in ["qemu", "kernel", "tools", SYSTEM, IMAGE_TOOLS] {
            assert!(manifest.set(set).is_ok());
        }
        // Sorted, so that a topology that adds nothing has the same image whatever it says.
        assert!(manifest.set(SYSTEM).unwrap().packages.is_sorted());
        assert!(!TEXT.contains("://"));
    }

    #[test]
    fn newest_kernel_is_by_number_and_of_the_plain_flavour() {
        let manifest = Manifest::built_in().unwrap();
        let names = [
            "linux-binary-7.2.9+deb13-amd64",
            "linux-binary-7.2.12+deb13-amd64",
            "linux-binary-7.3.4+deb13-rt-amd64",
            "linux-binary-7.3.5+deb13-cloud-amd64",
            "linux-binary-7.10.1+deb13-amd64",
            "linux-binary-6.12.1+deb13-amd64",
        ];
        let kernel = manifest.set("kernel").unwrap();
        let releases = kernel.releases(names.into_iter());
        assert_eq!(
            releases,
            [
                "7.10.1+deb13-amd64",
                "7.2.12+deb13-amd64",
                "7.2.9+deb13-amd64"
            ]
        );
        assert_eq!(
            kernel.names(&releases[0])[0],
            "linux-binary-7.10.1+deb13-amd64"
        );
    }

    #[test]
    fn modules_are_built_against_the_guest_s_kernel_and_older_ones() {
        let manifest = Manifest::built_in().unwrap();
        let older = manifest.older_headers();
        assert!(!older.is_empty());
        let set = manifest.set(&older[0]).unwrap();
        assert_eq!(set.requires_config, ["CONFIG_PCI_P2PDMA=y"]);
        let names = [
            "linux-headers-7.2.9+deb13-amd64",
            "linux-headers-7.2.12+deb13-amd64",
        ];
        let releases = set.releases(names.into_iter());
        assert_eq!(releases[0], "7.2.12+deb13-amd64");
        assert_eq!(
            set.names(&releases[0])[1..],
            [
                "linux-headers-7.2.12+deb13-common",
                "linux-kbuild-7.2.12+deb13"
            ]
        );

        // Of one kernel, nothing but what belongs to it; and of another, another directory.
        let of = |release| {
            manifest
                .clone()
                .with_headers(release, "7.3.4-1")
                .with_source(SOURCE, release, "7.3.4-1")
        };
        let bound = of("7.3.4+deb13-amd64");
        assert_eq!(
            bound.set(SOURCE).unwrap().packages,
            ["linux-source-7.3=7.3.4-1"]
        );
        assert_eq!(
            bound.set(HEADERS).unwrap().packages[0],
            "linux-headers-7.3.4+deb13-amd64=7.3.4-1"
        );
        assert_ne!(
            bound.directory(HEADERS),
            of("7.3.5+deb13-amd64").directory(HEADERS)
        );
        let mut fewer = bound.clone();
        fewer.modules.as_mut().unwrap().members.pop();
        assert_ne!(bound.directory(SOURCE), fewer.directory(SOURCE));
        assert!(manifest.set(HEADERS).is_err(), "known only with its kernel");
    }

    #[test]
    fn mistakes_in_a_manifest_are_named() {
        let text = |set: &str| {
            format!(
                "[source]\nsuites=['a']\nprefer='a'\ncomponents=['main']\narchitecture='amd64'\n\
                 [sets.x]\npurpose='p'\ndependencies=true\n{set}"
            )
        };
        let why = |set: &str| Manifest::parse(&text(set)).unwrap_err().to_string();
        assert!(why("packages=[]").contains("sets.x: packages is empty"));
        assert!(why("packages=['a-{release}']").contains("there is no `newest`"));
        assert!(why("packages=['a']\nnewest='a-7'").contains("exactly one *"));
        assert!(why("packages=['a']\npakages=[]").contains("pakages"));
        assert!(
            Manifest::parse(&text("packages=['a']").replace("prefer='a'", "prefer='b'"))
                .unwrap_err()
                .to_string()
                .contains("source.prefer")
        );
    }

    #[test]
    fn a_changed_set_gets_a_directory_of_its_own() {
        let old = Manifest::built_in().unwrap();
        let mut new = old.clone();
        new.sets
            .get_mut("tools")
            .unwrap()
            .packages
            .push("strace".into());
        assert_ne!(old.directory("tools"), new.directory("tools"));
        assert_eq!(old.directory("qemu"), new.directory("qemu"));
    }

    #[test]
    fn each_list_of_packages_has_a_system_image_of_its_own() {
        let plain = Manifest::built_in().unwrap();
        let with = |packages: &[&str]| {
            let packages: Vec<String> = packages.iter().map(|&p| p.to_owned()).collect();
            plain.clone().with_packages(&packages)
        };
        let directory = |packages: &[&str]| with(packages).directory(SYSTEM);
        assert_eq!(
            directory(&["strace", "gdb"]),
            directory(&["gdb", "strace", "fio"])
        );
        assert_ne!(directory(&["strace"]), directory(&["gdb"]));
        assert_ne!(directory(&["strace"]), plain.directory(SYSTEM));
        assert_eq!(directory(&["fio"]), plain.directory(SYSTEM));
        let tools = |manifest: &Manifest| manifest.directory("tools");
        assert_eq!(tools(&with(&["strace"])), tools(&plain));
    }
}
