//! apt-get with a private configuration: it resolves, downloads and checks signatures, needs no root and
//! changes nothing on the machine.
//!
//! `-c` adds our file to the machine's configuration instead of replacing it, so that its proxy and
//! credentials keep working. Everything in it that could touch the system (hooks, state, pins) is overridden.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc;
use std::time::Duration;

use crate::manifest::Source;
use crate::mirror::debian_mirrors;
use crate::{ArtifactError, Progress, child};

/// How often a mirror that is in mid-sync is tried.
const ATTEMPTS: usize = 3;

/// One package as apt resolved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deb {
    /// Package name.
    pub package: String,
    /// Full version, with epoch.
    pub version: String,
    /// Name of the downloaded file.
    pub file: String,
    /// Size in bytes.
    pub size: u64,
}

/// An apt of our own in a directory that is thrown away afterwards.
#[derive(Debug)]
pub(crate) struct Apt {
    config: PathBuf,
    archives: PathBuf,
    suites: Vec<String>,
    prefer: String,
    /// Base address of the mirror in use.
    pub mirror: String,
}

impl Apt {
    /// Writes the private configuration below `dir` and fetches the package lists.
    pub fn open(
        dir: &Path,
        source: &Source,
        progress: &mut dyn Progress,
    ) -> Result<Self, ArtifactError> {
        let mirrors = mirrors()?;
        let signed_by = keyring()?;
        let mut last = ArtifactError::NoMirror;
        for mirror in mirrors {
            let apt = Self {
                config: dir.join("apt.conf"),
                archives: dir.join("archives"),
                suites: source.suites.clone(),
                prefer: source.prefer.clone(),
                mirror,
            };
            apt.configure(dir, source, signed_by.as_deref())?;
            progress.step("fetching package lists", None);
            match retrying(&apt.mirror, || apt.update()) {
                Ok(()) => return Ok(apt),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn configure(
        &self,
        dir: &Path,
        source: &Source,
        signed_by: Option<&Path>,
    ) -> Result<(), ArtifactError> {
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(|e| ArtifactError::writing(path, e))
        };
        for name in ["archives/partial", "lists/partial", "none"] {
            let path = dir.join(name);
            fs::create_dir_all(&path).map_err(|e| ArtifactError::writing(path, e))?;
        }
        let signed_by = signed_by
            .map(|k| format!(" [signed-by={}]", k.display()))
            .unwrap_or_default();
        let lines: String = source
            .suites
            .iter()
            .map(|suite| {
                let components = source.components.join(" ");
                format!("deb{signed_by} {} {suite} {components}\n", self.mirror)
            })
            .collect();
        write("sources.list", lines)?;
        write("empty", String::new())?;
        write("apt.conf", config_text(dir, &source.architecture))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config);
        command
    }

    fn update(&self) -> Result<(), ArtifactError> {
        let out = child::output(
            self.command("apt-get")
                .args(["-q", "--error-on=any", "update"]),
        )?;
        let text = String::from_utf8_lossy(&out.stderr);
        // An apt without --error-on reports a failed fetch as a warning and succeeds.
        if out.status.success() && !text.contains("Failed to fetch") {
            return Ok(());
        }
        Err(if mid_sync(&out) {
            ArtifactError::HashMismatch {
                mirror: self.mirror.clone(),
            }
        } else {
            ArtifactError::Update {
                mirror: self.mirror.clone(),
                detail: child::reason(&out),
            }
        })
    }

    /// All package names that start with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>, ArtifactError> {
        let out = child::checked(
            self.command("apt-cache").args(["pkgnames", prefix]),
            "apt-cache pkgnames",
        )?;
        Ok(String::from_utf8_lossy(&out.stdout)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// The packages `names` and, if wanted, all that they need, as apt would install them on an empty system.
    pub fn plan(
        &self,
        set: &str,
        names: &[String],
        dependencies: bool,
    ) -> Result<Vec<Deb>, ArtifactError> {
        let verb = if dependencies { "install" } else { "download" };
        let out = child::output(
            self.command("apt-get")
                .args(["-qq", "-y", "--print-uris", "-t", &self.prefer, verb])
                .args(names),
        )?;
        if !out.status.success() {
            let detail = child::reason(&out);
            return Err(match unknown_package(&detail) {
                Some(package) => ArtifactError::NoSuchPackage {
                    package: package.to_owned(),
                    suites: self.suites.clone(),
                },
                None => ArtifactError::Fetch {
                    set: set.into(),
                    detail,
                },
            });
        }
        let text = String::from_utf8_lossy(&out.stdout);
        Ok(text.lines().filter_map(parse_uri_line).collect())
    }

    /// Downloads exactly these packages and returns the directory that holds them.
    pub fn download(
        &self,
        debs: &[Deb],
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, ArtifactError> {
        let total = debs.iter().fold(0u64, |sum, d| sum.saturating_add(d.size));
        let mut first = true;
        retrying(&self.mirror, || {
            if !std::mem::take(&mut first) {
                self.update()?;
            }
            progress.step("downloading packages", Some(total));
            self.download_once(debs, progress)
        })?;
        Ok(self.archives.clone())
    }

    fn download_once(
        &self,
        debs: &[Deb],
        progress: &mut dyn Progress,
    ) -> Result<(), ArtifactError> {
        let mut command = self.command("apt-get");
        command.args(["-q", "download"]).current_dir(&self.archives);
        command.args(debs.iter().map(|d| format!("{}={}", d.package, d.version)));
        let (sender, receiver) = mpsc::channel();
        let out = std::thread::scope(|scope| {
            // apt-get gives up on a stalled connection by itself (Acquire::http::Timeout), so this ends.
            scope.spawn(move || {
                let _ = sender.send(child::output(&mut command));
            });
            loop {
                match receiver.recv_timeout(Duration::from_millis(200)) {
                    Ok(out) => return out,
                    Err(mpsc::RecvTimeoutError::Timeout) => {
                        progress.at(bytes_below(&self.archives));
                    }
                    Err(mpsc::RecvTimeoutError::Disconnected) => {
                        return Err(ArtifactError::ProgramFailed {
                            program: "apt-get download".into(),
                            detail: "its thread ended early".into(),
                        });
                    }
                }
            }
        })?;
        if out.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&out.stderr);
        Err(if mid_sync(&out) {
            ArtifactError::HashMismatch {
                mirror: self.mirror.clone(),
            }
        } else if text.contains("No space left") {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            ArtifactError::writing(&self.archives, full)
        } else {
            ArtifactError::Fetch {
                set: "listed".into(),
                detail: child::reason(&out),
            }
        })
    }
}

/// Candidates for the mirror: P2PLAB_MIRROR, else what the machine's apt uses.
fn mirrors() -> Result<Vec<String>, ArtifactError> {
    if let Some(mirror) = std::env::var("P2PLAB_MIRROR")
        .ok()
        .filter(|m| !m.trim().is_empty())
    {
        return Ok(vec![mirror.trim().trim_end_matches('/').to_owned()]);
    }
    // Works before a first `apt-get update` and as any user: nothing is fetched.
    let out = child::output(Command::new("apt-get").args(["update", "--print-uris"]))?;
    let found = debian_mirrors(&String::from_utf8_lossy(&out.stdout));
    if found.is_empty() {
        Err(ArtifactError::NoMirror)
    } else {
        Ok(found)
    }
}

/// Debian's archive keys: a keyring file for Signed-By, or `None` where apt itself already trusts them.
pub(crate) fn keyring() -> Result<Option<PathBuf>, ArtifactError> {
    let files = ["debian-archive-keyring.pgp", "debian-archive-keyring.gpg"];
    for file in files {
        let path = Path::new("/usr/share/keyrings").join(file);
        if path.is_file() {
            return Ok(Some(path));
        }
    }
    let trusted = fs::read_dir("/etc/apt/trusted.gpg.d")
        .into_iter()
        .flatten()
        .flatten();
    let has = trusted
        .map(|e| e.file_name())
        .any(|n| n.to_string_lossy().starts_with("debian-archive-"));
    if has {
        Ok(None)
    } else {
        Err(ArtifactError::NoKeyring)
    }
}

fn config_text(dir: &Path, architecture: &str) -> String {
    let dir = dir.display();
    format!(
        r#"#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear APT::Default-Release;
Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/empty";
Dir::State::extended_states "{dir}/extended_states";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "{dir}/none";
Dir::Etc::preferences "{dir}/empty";
Dir::Etc::preferencesparts "{dir}/none";
Dir::Cache "{dir}";
Dir::Cache::archives "{dir}/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"#
    )
}

/// Tries again while the mirror contradicts its own lists.
fn retrying(
    mirror: &str,
    mut attempt: impl FnMut() -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(ArtifactError::HashMismatch { .. }) => {
                tracing::warn!(mirror, "files do not match the signed lists, trying again");
            }
            other => return other,
        }
    }
    attempt()
}

fn mid_sync(out: &Output) -> bool {
    let text = String::from_utf8_lossy(&out.stderr);
    [
        "Hash Sum mismatch",
        "Mirror sync in progress",
        "unexpected size",
    ]
    .iter()
    .any(|sign| text.contains(sign))
}

/// The package that apt-get, in the C locale, says it does not know.
fn unknown_package(reason: &str) -> Option<&str> {
    let rest = reason.strip_prefix("Unable to locate package ")?;
    rest.split_ascii_whitespace().next()
}

/// `'URI' FILE SIZE HASH`, where FILE is PACKAGE_VERSION_ARCHITECTURE.deb with `:` written as `%3a`.
fn parse_uri_line(line: &str) -> Option<Deb> {
    let rest = line.strip_prefix('\'')?.split_once("' ")?.1;
    let mut words = rest.split_ascii_whitespace();
    let file = words.next()?;
    let size = words.next()?.parse().ok()?;
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let package = parts.next()?.to_owned();
    let version = parts.next()?.replace("%3a", ":");
    Some(Deb {
        package,
        version,
        file: file.to_owned(),
        size,
    })
}

fn bytes_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|e| e.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|m| m.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolved_package_is_read_with_its_epoch() {
        let line = "'http://mirror.example.org/debian/pool/main/b/busybox/busybox-static_1.37.0-6%2bb9_amd64.deb' \
                    busybox-static_1%3a1.37.0-6+b9_amd64.deb 955316 SHA256:00ff";
        assert_eq!(
            parse_uri_line(line),
            Some(Deb {
                package: "busybox-static".into(),
                version: "1:1.37.0-6+b9".into(),
                file: "busybox-static_1%3a1.37.0-6+b9_amd64.deb".into(),
                size: 955_316,
            })
        );
        assert_eq!(parse_uri_line("W: something"), None);
        assert_eq!(parse_uri_line("'x' y.deb"), None);
    }

    #[test]
    fn a_package_that_does_not_exist_is_named() {
        let reason = "Unable to locate package strac";
        assert_eq!(unknown_package(reason), Some("strac"));
        assert_eq!(unknown_package("Failed to fetch x"), None);
    }

    #[test]
    fn a_mirror_in_mid_sync_gets_three_attempts_and_other_errors_one() {
        let mut tried = 0;
        let out = retrying("m", || {
            tried += 1;
            Err(ArtifactError::HashMismatch { mirror: "m".into() })
        });
        assert!(matches!(out, Err(ArtifactError::HashMismatch { .. })));
        assert_eq!(tried, 3);
        let mut tried = 0;
        assert!(
            retrying("m", || {
                tried += 1;
                Err(ArtifactError::NoMirror)
            })
            .is_err()
        );
        assert_eq!(tried, 1);
    }

    #[test]
    fn the_configuration_disarms_every_hook_of_the_machine() {
        let text = config_text(Path::new("/somewhere"), "amd64");
        for hook in [
            "APT::Update::Post-Invoke;",
            "DPkg::Post-Invoke;",
            "DPkg::Pre-Install-Pkgs;",
        ] {
            assert!(text.contains(&format!("#clear {hook}")));
        }
    }

    #[test]
    fn no_setting_of_the_machine_switches_signatures_off() {
        let text = config_text(Path::new("/somewhere"), "amd64");
        for setting in [
            "APT::Get::AllowUnauthenticated",
            "Acquire::AllowInsecureRepositories",
            "Acquire::AllowWeakRepositories",
            "Acquire::AllowDowngradeToInsecureRepositories",
        ] {
            assert!(text.contains(&format!("{setting} \"false\";")));
        }
    }
}
