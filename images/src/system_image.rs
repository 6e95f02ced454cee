//! The system image: Debian's own tools as a read-only root file system, for guests whose topology asks for it.
//!
//! An erofs image without compression: a guest under emulation would pay for each page that it decompresses,
//! while the image itself is read once into the host's page cache, which all labs share. Made without root, and
//! equal for equal packages: files belong to root, all times are zero, and so is the identifier.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fetch::{Resolved, root_of};
use crate::{ArtifactError, Progress, child};

/// Changes with what [`make`] puts into an image beside the packages' files.
pub(crate) const LAYOUT: &str = "system image 1";

/// Name of the image in its set's directory.
const IMAGE: &str = "system.erofs";

/// What no program in a guest needs: documentation, translations, and what serves packages only.
const LEFT_OUT: [&str; 13] = [
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/debconf",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/perl5",
    "usr/share/zoneinfo",
    "usr/share/zsh",
    "var/lib/dpkg",
];

/// Where the agent binds what the guest has.
const MOUNT_POINTS: [&str; 7] = ["dev", "proc", "sys", "run", "tmp", "mnt", "root"];

/// A read-only root file system for guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemImage {
    /// The erofs image.
    pub path: PathBuf,
    /// A hash of the packages in it.
    pub identity: String,
}

impl SystemImage {
    /// The image in the directory of its set.
    pub(crate) fn at(set: &Path) -> Result<Self, ArtifactError> {
        let path = set.join(IMAGE);
        if !path.is_file() {
            return Err(ArtifactError::CacheDamaged { path });
        }
        Ok(Self {
            identity: Resolved::read(set)?.identity(),
            path,
        })
    }
}

/// Makes the image of the files unpacked in `set`, which it replaces, by the mkfs.erofs in `tools`.
pub(crate) fn make(
    tools: &Path,
    set: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    progress.step("making the system image", None);
    let root = root_of(set);
    let failed = |error| ArtifactError::writing(&root, error);
    trim(&root).map_err(failed)?;
    merge_usr(&root).map_err(failed)?;
    furnish(&root).map_err(failed)?;
    let image = set.join(IMAGE);
    mkfs(tools, &root, &image)?;
    fs::remove_dir_all(&root).map_err(failed)?;
    let bytes = fs::metadata(&image).map_err(failed)?.len();
    let mut record = Resolved::read(set)?;
    let size = format!("{} MiB of {} packages", bytes >> 20, record.packages.len());
    record.facts.insert("image".into(), size);
    record.write(set)
}

/// Runs the mkfs.erofs of an unpacked root through that root's own loader, as QEMU is run.
fn mkfs(tools: &Path, root: &Path, image: &Path) -> Result<(), ArtifactError> {
    let mut command = Command::new(tools.join("usr/lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(tools.join("usr/lib/x86_64-linux-gnu"))
        .arg(tools.join("usr/bin/mkfs.erofs"))
        // No extended attributes (those of the cache's files mean nothing in a guest), no messages.
        .args(["--quiet", "--all-root", "-T0", "-x-1"])
        .args(["-U", "00000000-0000-0000-0000-000000000000"])
        .arg(image)
        .arg(root);
    child::checked(&mut command, "mkfs.erofs").map(drop)
}

fn trim(root: &Path) -> io::Result<()> {
    for path in LEFT_OUT {
        match fs::remove_dir_all(root.join(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// One folder for all programs, as in the initramfs: a PATH that the guest has finds those of Debian's
/// `/usr/sbin`, too. The links from the root are base-files'.
fn merge_usr(root: &Path) -> io::Result<()> {
    let (from, to) = (root.join("usr/sbin"), root.join("usr/bin"));
    fs::create_dir_all(&to)?;
    if from.is_dir() && !from.is_symlink() {
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            let target = to.join(entry.file_name());
            // A link from the one folder to the other is not to become a link to itself.
            if target.symlink_metadata().is_ok() {
                fs::remove_file(entry.path())?;
            } else {
                fs::rename(entry.path(), target)?;
            }
        }
        fs::remove_dir(&from)?;
        symlink("bin", &from)?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        let link = root.join(name);
        if link.symlink_metadata().is_err() {
            symlink(format!("usr/{name}"), link)?;
        }
    }
    Ok(())
}

/// What the packages' installation would have made.
fn furnish(root: &Path) -> io::Result<()> {
    for name in MOUNT_POINTS {
        let path = root.join(name);
        fs::create_dir_all(&path)?;
        let mode = if name == "tmp" { 0o1777 } else { 0o755 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    fs::create_dir_all(root.join("etc"))?;
    for (name, text) in [
        ("passwd", "root::0:0:root:/root:/bin/bash\n"),
        ("group", "root:x:0:\n"),
        ("hostname", "p2plab\n"),
        ("hosts", "127.0.0.1 localhost p2plab\n"),
        ("fstab", ""),
    ] {
        fs::write(root.join("etc").join(name), text)?;
    }
    let mounts = root.join("etc/mtab");
    if mounts.symlink_metadata().is_err() {
        symlink("/proc/self/mounts", mounts)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn all_programs_lie_in_one_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        file(root, "usr/sbin/nvme", "nvme");
        file(root, "usr/bin/fio", "fio");
        file(root, "usr/bin/both", "the one in bin");
        symlink("../bin/both", root.join("usr/sbin/both")).unwrap();
        merge_usr(root).unwrap();
        for name in ["nvme", "fio"] {
            for folder in ["bin", "sbin", "usr/bin", "usr/sbin"] {
                let text = fs::read_to_string(root.join(folder).join(name)).unwrap();
                assert_eq!(text, name, "{folder}");
            }
        }
        let both = fs::read_to_string(root.join("bin/both")).unwrap();
        assert_eq!(both, "the one in bin");
        // A second time there is nothing left to do.
        merge_usr(root).unwrap();
    }

    #[test]
    fn what_is_left_out_is_gone_and_what_is_needed_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        file(root, "usr/share/man/man1/fio.1.gz", "");
        file(root, "usr/share/misc/pci.ids", "");
        file(root, "etc/passwd", "of a package");
        trim(root).unwrap();
        furnish(root).unwrap();
        assert!(!root.join("usr/share/man").exists());
        assert!(root.join("usr/share/misc/pci.ids").exists());
        let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap();
        assert!(passwd.starts_with("root::0:0"));
        let mode = fs::metadata(root.join("tmp")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1777);
    }

    #[test]
    fn an_image_that_is_not_there_is_a_damaged_cache() {
        let dir = tempfile::tempdir().unwrap();
        let error = SystemImage::at(dir.path()).unwrap_err();
        assert!(matches!(error, ArtifactError::CacheDamaged { .. }));
    }
}
