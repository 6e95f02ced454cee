//! The kernel's own style check, checkpatch.pl, on a driver of ours or on patches.

use std::path::Path;
use std::process::Stdio;

use super::patch::write;
use super::root::Root;
use super::sources::Files;
use super::{BuildError, make};
use crate::ArtifactError;

/// What checkpatch.pl reads beside the files.
const SCRIPTS: [&str; 3] = ["checkpatch.pl", "const_structs.checkpatch", "spelling.txt"];

/// Checks `files`: patches, or files of C with `is_source`. `work` is an empty directory of ours.
pub(super) fn check(
    tools: &Root,
    source: &Path,
    files: &Files,
    is_source: bool,
    work: &Path,
) -> Result<(), ArtifactError> {
    for script in SCRIPTS {
        let path = source.join("scripts").join(script);
        let bytes = std::fs::read(&path).map_err(|source| ArtifactError::Unreadable {
            what: "the kernel's check",
            path,
            source,
        })?;
        write(&work.join("scripts").join(script), &bytes)?;
    }
    for (name, bytes) in files {
        if is_source && name.extension().is_none_or(|e| e != "c" && e != "h") {
            continue;
        }
        write(&work.join("files").join(name), bytes)?;
        let mut command = [
            "perl",
            "/work/scripts/checkpatch.pl",
            "--no-tree",
            "--strict",
        ]
        .map(str::to_owned)
        .to_vec();
        command.extend(["--no-summary", "--show-types", "--color=never"].map(str::to_owned));
        // A commit that a patch mends is looked for in the kernel's history, which is not here.
        command.extend(["--ignore", "UNKNOWN_COMMIT_ID"].map(str::to_owned));
        command.extend(is_source.then(|| "--file".to_owned()));
        command.push(format!("/work/files/{}", name.display()));
        let out = tools.run(work, &command, Stdio::null())?;
        let said = String::from_utf8_lossy(&out.stdout);
        if out.status.success() {
            continue;
        }
        let mut lines = said.trim().replace("/work/files/", "");
        if lines.is_empty() {
            lines = make::complaint(&out);
        }
        return Err(BuildError::Check {
            file: name.display().to_string(),
            lines,
        }
        .into());
    }
    Ok(())
}
