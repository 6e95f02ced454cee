//! QEMU: the fetched one, started through its own loader, or the user's own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{ArtifactError, child};

/// Oldest version that labs were run on; vfio-user-pci came with 10.1.
const OLDEST: (u32, u32) = (11, 1);

/// A QEMU system emulator for x86-64.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// What stands before QEMU's own arguments: the program, or loader, library path, program and data paths.
    pub argv_prefix: Vec<OsString>,
    /// Environment that it needs.
    pub env: Vec<(OsString, OsString)>,
    /// Its version, for example `11.1.3`.
    pub version: String,
    /// The emulator itself, to be named in messages.
    pub program: PathBuf,
    /// Changes with the emulator.
    pub(crate) identity: String,
}

/// What a QEMU says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Probe {
    version: String,
    has_vfio_user: bool,
}

impl Qemu {
    /// The QEMU in an unpacked set. Its version is filled in by the caller.
    pub(crate) fn packaged(root: &Path, identity: String) -> Result<Self, ArtifactError> {
        let must = |path: PathBuf| {
            if path.exists() {
                Ok(path)
            } else {
                Err(ArtifactError::CacheDamaged { path })
            }
        };
        let loader = must(root.join("usr/lib64/ld-linux-x86-64.so.2"))?;
        let libraries = must(root.join("usr/lib/x86_64-linux-gnu"))?;
        let program = must(root.join("usr/bin/qemu-system-x86_64"))?;
        let mut argv_prefix = vec![
            loader.into_os_string(),
            "--library-path".into(),
            libraries.clone().into_os_string(),
            program.clone().into_os_string(),
        ];
        for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            let dir = root.join(data);
            if dir.is_dir() {
                argv_prefix.extend(["-L".into(), dir.into_os_string()]);
            }
        }
        // Without it, QEMU would try the modules of another QEMU that is installed on the host.
        let env = vec![(
            "QEMU_MODULE_DIR".into(),
            libraries.join("qemu").into_os_string(),
        )];
        Ok(Self {
            argv_prefix,
            env,
            version: String::new(),
            program,
            identity,
        })
    }

    /// A QEMU of the user's own, checked for what a lab needs.
    pub(crate) fn own(path: &Path) -> Result<Self, ArtifactError> {
        use std::os::unix::fs::MetadataExt;
        let unreadable = |source| ArtifactError::Unreadable {
            what: "QEMU",
            path: path.to_owned(),
            source,
        };
        let meta = std::fs::metadata(path).map_err(unreadable)?;
        let program = std::path::absolute(path).map_err(unreadable)?;
        let mut qemu = Self {
            argv_prefix: vec![program.clone().into_os_string()],
            env: Vec::new(),
            version: String::new(),
            identity: String::new(),
            program,
        };
        qemu.version = qemu.probe()?.require_fit(path)?;
        // Hashing tens of megabytes at each start costs more than it tells: a rebuilt QEMU has a new time.
        qemu.identity = format!(
            "{}-{}-{}.{}-{}",
            qemu.version,
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ino()
        );
        Ok(qemu)
    }

    /// A command with loader, data paths and environment, to which QEMU's own arguments are added.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut words = self.argv_prefix.iter();
        let mut command = Command::new(words.next().unwrap_or(&OsString::new()));
        command
            .args(words)
            .envs(self.env.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Asks it for version and devices.
    pub(crate) fn probe(&self) -> Result<Probe, ArtifactError> {
        let ask = |arguments: &[&str]| {
            let failed = |detail| ArtifactError::QemuDoesNotStart {
                path: self.program.clone(),
                detail,
            };
            let out = child::output(self.command().args(arguments)).map_err(|error| {
                failed(match error {
                    // The advice that comes with it is for programs that p2plab fetches.
                    ArtifactError::ProgramFailed { detail, .. } => detail,
                    other => other.to_string(),
                })
            })?;
            if !out.status.success() {
                return Err(failed(child::reason(&out)));
            }
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        };
        let text = ask(&["--version"])?;
        let version = parse_version(&text).ok_or_else(|| ArtifactError::QemuDoesNotStart {
            path: self.program.clone(),
            detail: "it does not print a QEMU version".into(),
        })?;
        let devices = ask(&["-machine", "none", "-device", "help"])?;
        Ok(Probe {
            version,
            has_vfio_user: devices.contains("\"vfio-user-pci\""),
        })
    }
}

impl Probe {
    /// The version, if this QEMU can run a lab.
    pub(crate) fn require_fit(self, path: &Path) -> Result<String, ArtifactError> {
        let mut numbers = self.version.split('.').map(|n| n.parse().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if self.has_vfio_user && version >= OLDEST {
            return Ok(self.version);
        }
        Err(ArtifactError::QemuUnfit {
            path: path.to_owned(),
            version: self.version,
            has_vfio_user: self.has_vfio_user,
        })
    }
}

/// `QEMU emulator version 11.1.3 (Debian ...)`.
fn parse_version(text: &str) -> Option<String> {
    let rest = text.split("QEMU emulator version ").nth(1)?;
    let version: String = rest
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    (!version.is_empty()).then_some(version)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn fake(version: &str, devices: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu");
        // Written to the end and renamed by a shell, so that no thread of this process holds it open for
        // writing while it is executed (ETXTBSY).
        let script = format!(
            "#!/bin/sh\ncase $1 in --version) echo 'QEMU emulator version {version} (x)';; \
             *) echo '{devices}';; esac\n"
        );
        let source = dir.path().join("source");
        fs::write(&source, script).unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o755)).unwrap();
        let copied = Command::new("cp")
            .arg("-p")
            .arg(&source)
            .arg(&path)
            .status()
            .unwrap();
        assert!(copied.success());
        (dir, path)
    }

    #[test]
    fn a_fit_qemu_is_taken_and_an_unfit_one_gets_a_sentence() {
        let device = "name \"vfio-user-pci\", bus PCI";
        let (_dir, path) = fake("11.1.0", device);
        assert_eq!(Qemu::own(&path).unwrap().version, "11.1.0");
        let (_dir, path) = fake("10.0.2", "name \"vfio-pci\", bus PCI");
        let error = Qemu::own(&path).unwrap_err().to_string();
        assert!(error.contains("is 10.0.2 and has no vfio-user-pci: give one of 11.1 or newer"));
        let (_dir, path) = fake("11.0.0", "");
        assert!(
            Qemu::own(&path)
                .unwrap_err()
                .to_string()
                .contains("built with vfio-user-pci")
        );
    }

    #[test]
    fn what_is_no_qemu_is_said_so() {
        let error = Qemu::own(Path::new("/bin/false")).unwrap_err();
        assert!(
            matches!(error, ArtifactError::QemuDoesNotStart { .. }),
            "{error}"
        );
        let error = Qemu::own(Path::new("/bin/true")).unwrap_err();
        assert!(
            matches!(error, ArtifactError::QemuDoesNotStart { .. }),
            "{error}"
        );
        let error = Qemu::own(Path::new("/nonexistent/qemu")).unwrap_err();
        assert!(matches!(error, ArtifactError::Unreadable { .. }), "{error}");
    }
}
