//! The kernel's source as Debian packs it: one large archive, of which a few directories are kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::child::dies_with_us;
use crate::{ArtifactError, Progress};

/// Replaces what the package unpacked to `root` by `members` of the archive in it.
pub(super) fn keep_members(
    root: &Path,
    members: &[String],
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    let archive = find(&root.join("usr/src"))?;
    let total = fs::metadata(&archive).map(|meta| meta.len()).ok();
    progress.step("unpacking the kernel's source", total);
    extract(&archive, root, members, progress)?;
    for member in members {
        let path = root.join(member);
        if !path.exists() {
            return Err(ArtifactError::Manifest(format!(
                "modules.members: the kernel's source has no {member}"
            )));
        }
    }
    let packaged = root.join("usr");
    fs::remove_dir_all(&packaged).map_err(|error| ArtifactError::writing(&packaged, error))
}

fn find(directory: &Path) -> Result<PathBuf, ArtifactError> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths
        .find(|path| path.to_string_lossy().ends_with(".tar.xz"))
        .ok_or_else(|| ArtifactError::CacheDamaged {
            path: directory.join("linux-source-*.tar.xz"),
        })
}

/// Decompresses here, since xz need not be installed, and lets tar, which dpkg needs, too, pick what is wanted.
fn extract(
    archive: &Path,
    root: &Path,
    members: &[String],
    progress: &mut dyn Progress,
) -> Result<(), ArtifactError> {
    let name = archive.file_name().unwrap_or_default().to_string_lossy();
    let top = name.trim_end_matches(".tar.xz");
    let failed = |detail: String| ArtifactError::ProgramFailed {
        program: format!("unpacking {name}"),
        detail,
    };
    let file = fs::File::open(archive).map_err(|error| failed(error.to_string()))?;
    let mut tar = Command::new("tar");
    tar.args(["-x", "--no-same-owner", "--strip-components=1", "-C"])
        .arg(root)
        .args(members.iter().map(|member| format!("{top}/{member}")))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut tar = dies_with_us(&mut tar)
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ArtifactError::ProgramMissing {
                program: "tar".into(),
            },
            _ => failed(error.to_string()),
        })?;
    let copied = match tar.stdin.take() {
        Some(mut into) => {
            let read = Counted {
                file,
                read: 0,
                progress,
            };
            io::copy(&mut liblzma::read::XzDecoder::new(read), &mut into).map(drop)
        }
        None => Ok(()),
    };
    let status = tar.wait().map_err(|error| failed(error.to_string()))?;
    copied.map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("tar ended with {status}")));
    }
    Ok(())
}

/// Tells the progress what was read.
struct Counted<'a> {
    file: fs::File,
    read: u64,
    progress: &'a mut dyn Progress,
}

impl io::Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read += bytes as u64;
        self.progress.at(self.read);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::Silent;
    use crate::kernel_build::patch::write;

    #[test]
    fn members_of_the_archive_are_kept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("linux-source-7.9");
        write(&source.join("drivers/x/x.c"), b"x").unwrap();
        write(&source.join("drivers/y/y.c"), b"y").unwrap();
        let tar = Command::new("tar")
            .args(["-c", "-C"])
            .arg(dir.path())
            .arg("linux-source-7.9")
            .output()
            .unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/src")).unwrap();
        let file = fs::File::create(root.join("usr/src/linux-source-7.9.tar.xz")).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(file, 1);
        xz.write_all(&tar.stdout).unwrap();
        xz.finish().unwrap();

        let wrong = keep_members(&root, &["drivers/z".into()], &mut Silent).unwrap_err();
        assert!(wrong.to_string().contains("tar ended"), "{wrong}");
        keep_members(&root, &["drivers/x".into()], &mut Silent).unwrap();
        assert_eq!(fs::read(root.join("drivers/x/x.c")).unwrap(), b"x");
        assert!(!root.join("drivers/y").exists() && !root.join("usr").exists());
    }
}
