//! What this host has, what a lab would use of it, and what is missing.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::keyring;
use crate::fetch::{NEEDED_MIB, Resolved};
use crate::{ArtifactError, Cache, Kernel, Manifest, Overrides, Qemu, manifest};

/// Memory that a guest of ordinary size and its QEMU want, in MiB.
const WANTED_MEMORY_MIB: u64 = 2048;

/// How QEMU executes the guest's CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization.
    Kvm,
    /// Emulation, with the reason why not KVM.
    Tcg(String),
}

/// The accelerator to use here. /dev/kvm alone proves nothing: it can exist and create machines in which a
/// stock kernel does not boot, where the CPU has neither vmx nor svm.
#[must_use]
pub fn accelerator() -> Accelerator {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualization(&cpuinfo) {
        return Accelerator::Tcg("the CPU shows neither vmx nor svm".into());
    }
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Accelerator::Kvm,
        Err(e) => Accelerator::Tcg(format!("/dev/kvm does not open: {e}")),
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|l| l.starts_with("flags"));
    flags
        .flat_map(str::split_ascii_whitespace)
        .any(|f| f == "vmx" || f == "svm")
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm => f.write_str("KVM"),
            Self::Tcg(why) => write!(f, "TCG, emulation ({why})"),
        }
    }
}

/// The answers of `p2plab doctor`; [`Display`](fmt::Display) prints them.
#[derive(Debug, Clone)]
pub struct HostReport {
    /// How guests would run.
    pub accelerator: Accelerator,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory of the host, in MiB.
    pub memory_mib: u64,
    /// Memory that is available now, in MiB.
    pub available_mib: u64,
    /// Directory of the cache.
    pub cache: PathBuf,
    /// Free space where the cache is or would be, in MiB.
    pub free_mib: u64,
    /// Each set that every lab needs: its name, its purpose, and what is in the cache (`None`: nothing yet).
    pub sets: Vec<(String, String, Option<String>)>,
    /// The sets that only some topologies ask for, likewise.
    pub on_demand: Vec<(String, String, Option<String>)>,
    /// apt-get's path, if it is there.
    pub apt_get: Option<PathBuf>,
    /// dpkg-deb's path, if it is there.
    pub dpkg_deb: Option<PathBuf>,
    /// Where Debian's archive keys are, or `None`.
    pub keyring: Option<String>,
    /// What would be used, a line each.
    pub used: Vec<String>,
    /// What is missing, a sentence each with its remedy. Empty: a lab can start.
    pub missing: Vec<String>,
}

impl HostReport {
    /// Looks at the host. Fetches and changes nothing; a QEMU or kernel of the user's own is checked.
    ///
    /// # Errors
    ///
    /// [`ArtifactError::Manifest`] only; all else is part of the report.
    pub fn gather(cache: &Cache, overrides: &Overrides) -> Result<Self, ArtifactError> {
        let manifest = Manifest::built_in()?;
        let keys = keyring();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let mut report = Self {
            accelerator: accelerator(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: meminfo_mib(&meminfo, "MemTotal:"),
            available_mib: meminfo_mib(&meminfo, "MemAvailable:"),
            cache: cache.root().to_owned(),
            free_mib: free_mib(cache.root()),
            sets: Vec::new(),
            on_demand: Vec::new(),
            apt_get: find_program("apt-get"),
            dpkg_deb: find_program("dpkg-deb"),
            keyring: keys.as_ref().ok().map(|k| match k {
                Some(path) => path.display().to_string(),
                None => "trusted by apt".into(),
            }),
            used: Vec::new(),
            missing: Vec::new(),
        };
        for (sets, list) in [
            (&manifest.sets, &mut report.sets),
            (&manifest.on_demand, &mut report.on_demand),
        ] {
            for (name, set) in sets {
                let found = Resolved::read(&cache.artifact(&manifest.directory(name))).ok();
                let found = found.map(|record| summary(&record, &set.packages));
                list.push((name.clone(), set.purpose.clone(), found));
            }
        }
        report.decide(overrides);
        if let (Err(e), true) = (keys, report.must_fetch(overrides)) {
            report.missing.push(e.to_string());
        }
        Ok(report)
    }

    /// Whether something would have to be fetched.
    #[must_use]
    pub fn must_fetch(&self, overrides: &Overrides) -> bool {
        self.sets.iter().any(|(name, _, found)| {
            found.is_none()
                && !(name == "qemu" && overrides.qemu.is_some())
                && !(name == "kernel" && overrides.kernel.is_some())
        })
    }

    fn decide(&mut self, overrides: &Overrides) {
        self.used.push(format!("accelerator: {}", self.accelerator));
        let qemu = overrides
            .qemu
            .as_deref()
            .map(|path| Qemu::own(path).map(|q| format!("{} at {}", q.version, path.display())));
        let kernel = overrides.kernel.as_deref().map(|path| {
            Kernel::own(path, overrides.modules.as_deref())
                .map(|k| format!("{} at {}", k.release, path.display()))
        });
        for (name, own) in [("qemu", qemu), ("kernel", kernel), ("tools", None)] {
            let fetched = self
                .sets
                .iter()
                .find(|(n, ..)| n == name)
                .and_then(|s| s.2.clone());
            match own {
                Some(Ok(what)) => self.used.push(format!("{name}: {what} (yours)")),
                Some(Err(e)) => self.missing.push(e.to_string()),
                None => self.used.push(match fetched {
                    Some(what) => format!("{name}: {what} (cache)"),
                    None => {
                        format!("{name}: will be fetched at the first start, or by p2plab fetch")
                    }
                }),
            }
        }
        if self.must_fetch(overrides) {
            for (program, found) in [("apt-get", &self.apt_get), ("dpkg-deb", &self.dpkg_deb)] {
                if found.is_none() {
                    let program = program.to_owned();
                    self.missing
                        .push(ArtifactError::ProgramMissing { program }.to_string());
                }
            }
            if self.free_mib < NEEDED_MIB {
                let path = self.cache.clone();
                self.missing.push(
                    ArtifactError::NoSpace {
                        path,
                        needed_mib: NEEDED_MIB,
                    }
                    .to_string(),
                );
            }
        }
        if self.available_mib < WANTED_MEMORY_MIB {
            self.missing.push(format!(
                "only {} MiB of memory are available: a guest of ordinary size wants {WANTED_MEMORY_MIB} MiB; end \
                 other programs, or give the guest less in its topology",
                self.available_mib
            ));
        }
    }
}

/// What was found out about a set, else the versions of the packages that the manifest names.
fn summary(record: &Resolved, named: &[String]) -> String {
    let facts = ["qemu", "kernel", "image", "compiler"];
    let fact = facts.iter().find_map(|name| record.facts.get(*name));
    fact.cloned().unwrap_or_else(|| {
        let wanted = record.packages.iter().filter(|p| named.contains(&p.name));
        wanted
            .map(|p| format!("{} {}", p.name, p.version))
            .collect::<Vec<_>>()
            .join(", ")
    })
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = |path: &Option<PathBuf>| {
            path.as_ref()
                .map_or("not found".to_owned(), |p| p.display().to_string())
        };
        writeln!(f, "This host")?;
        writeln!(f, "  CPUs        {}", self.cpus)?;
        writeln!(
            f,
            "  memory      {} MiB, {} MiB available",
            self.memory_mib, self.available_mib
        )?;
        writeln!(f, "  apt-get     {}", found(&self.apt_get))?;
        writeln!(f, "  dpkg-deb    {}", found(&self.dpkg_deb))?;
        writeln!(
            f,
            "  Debian keys {}",
            self.keyring.as_deref().unwrap_or("not found")
        )?;
        writeln!(f, "Cache")?;
        writeln!(f, "  {} ({} MiB free)", self.cache.display(), self.free_mib)?;
        for (name, purpose, what) in &self.sets {
            let what = what.as_deref().unwrap_or("not fetched yet");
            writeln!(f, "  {name:<11} {what} - {purpose}")?;
        }
        for (name, purpose, what) in &self.on_demand {
            let option = match name.as_str() {
                manifest::SYSTEM | manifest::IMAGE_TOOLS => "--system",
                _ => "--toolchain",
            };
            let none = format!("fetched when it is asked for, or by p2plab fetch {option}");
            let what = what.as_deref().unwrap_or(&none);
            writeln!(f, "  {name:<11} {what} - {purpose}")?;
        }
        writeln!(f, "Will be used")?;
        for line in &self.used {
            writeln!(f, "  {line}")?;
        }
        if self.missing.is_empty() {
            return writeln!(f, "Nothing is missing.");
        }
        writeln!(f, "Missing")?;
        for line in &self.missing {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

fn meminfo_mib(meminfo: &str, field: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(field));
    let kib = line
        .and_then(|l| l.split_ascii_whitespace().next())
        .and_then(|n| n.parse().ok());
    kib.unwrap_or(0u64) >> 10
}

/// Free space at the nearest directory above that exists.
fn free_mib(path: &Path) -> u64 {
    let existing = path
        .ancestors()
        .find(|p| p.is_dir())
        .unwrap_or(Path::new("/"));
    rustix::fs::statvfs(existing).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize) >> 20)
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_flag_of_its_own_means_virtualization() {
        assert!(has_virtualization("flags\t\t: fpu svm npt\n"));
        assert!(has_virtualization("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualization(
            "flags\t\t: fpu\nvmx flags\t: vnmi\nmodel name: svm vmx\n"
        ));
    }

    #[test]
    fn an_empty_cache_is_no_fault_and_a_bad_qemu_is() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        let overrides = Overrides::default();
        let report = HostReport::gather(&cache, &overrides).unwrap();
        assert!(report.must_fetch(&overrides));
        assert!(
            report
                .to_string()
                .contains("qemu: will be fetched at the first start")
        );
        assert!(report.to_string().contains("p2plab fetch --system"));
        assert!(!cache.root().exists());

        let overrides = Overrides {
            qemu: Some("/nonexistent".into()),
            ..overrides
        };
        let report = HostReport::gather(&cache, &overrides).unwrap();
        assert!(report.missing.iter().any(|m| m.contains("/nonexistent")));
    }

    #[test]
    fn memory_is_read_in_mib() {
        assert_eq!(
            meminfo_mib("MemTotal:       2097152 kB\n", "MemTotal:"),
            2048
        );
        assert_eq!(meminfo_mib("", "MemTotal:"), 0);
    }
}
