//! A driver of the kernel's with patches: its source, copied and changed.

use std::fs;
use std::path::{Path, PathBuf};

use super::BuildError;
use super::make::Place;
use super::sources::{Files, Recipe, read_below};
use crate::{ArtifactError, child};

/// What a patched driver is made of.
pub(super) struct Patched<'a> {
    /// Name of the module, for messages.
    pub module: &'a str,
    pub recipe: &'a Recipe,
    /// The kernel's source, or the part of it that the cache keeps.
    pub source: &'a Path,
    pub patches: &'a Files,
    /// The kernel's release, for messages.
    pub release: &'a str,
}

impl Patched<'_> {
    /// The driver's directory with all patches applied, by `patch` where the build runs; `stage` is an empty directory
    /// of ours.
    pub(super) fn files(&self, stage: &Path, place: &Place) -> Result<Files, ArtifactError> {
        let from = self.source.join(&self.recipe.source);
        if !from.is_dir() {
            return Err(BuildError::NoDriver {
                module: self.module.to_owned(),
                source_dir: self.recipe.source.clone(),
                release: self.release.to_owned(),
            }
            .into());
        }
        // A user's tree holds what it was built to, too.
        let is_source = |name: &str| {
            let ends = [".c", ".h", ".S"].iter().any(|end| name.ends_with(end));
            (ends && !name.ends_with(".mod.c")) || matches!(name, "Makefile" | "Kbuild")
        };
        for (path, bytes) in read_below(&from, &is_source)? {
            write(&stage.join(&self.recipe.source).join(path), &bytes)?;
        }
        for (name, bytes) in self.patches {
            write(&stage.join(name), bytes)?;
            self.apply(name, stage, place)?;
        }
        read_below(stage, &is_source)
    }

    fn apply(&self, name: &Path, stage: &Path, place: &Place) -> Result<(), ArtifactError> {
        let work = place.work(stage);
        let mut command = [
            "patch",
            "-p1",
            "--forward",
            "--batch",
            "--no-backup-if-mismatch",
        ]
        .map(str::to_owned)
        .to_vec();
        for (option, path) in [("-d", work.clone()), ("-i", work.join(name))] {
            command.extend([option.to_owned(), path.display().to_string()]);
        }
        let out = place
            .run(stage, &command)
            .map_err(|error| match (error, place) {
                (ArtifactError::ProgramMissing { program }, Place::Tree(tree)) => {
                    let tree = tree.clone();
                    BuildError::ProgramMissing { program, tree }.into()
                }
                (error, _) => error,
            })?;
        if out.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&out.stdout);
        Err(BuildError::Patch {
            patch: name.display().to_string(),
            source_dir: self.recipe.source.clone(),
            release: self.release.to_owned(),
            what: failed_hunks(&said).unwrap_or_else(|| child::reason(&out)),
        }
        .into())
    }
}

/// Of what `patch` wrote, which hunks of which files it could not place.
fn failed_hunks(said: &str) -> Option<String> {
    let mut file = "";
    let mut failed: Vec<String> = Vec::new();
    for line in said.lines() {
        if let Some(name) = line.strip_prefix("patching file ") {
            file = name;
        } else if let Some(hunk) = line.strip_prefix("Hunk #").filter(|l| l.contains("FAILED")) {
            let number = hunk.split(' ').next().unwrap_or_default();
            let at = hunk
                .rsplit(' ')
                .next()
                .unwrap_or_default()
                .trim_end_matches('.');
            failed.push(format!("hunk {number} of {file} fails (at line {at})"));
        } else if line.starts_with("can't find file to patch") {
            failed.push("a file that it changes is not there".to_owned());
        } else if line.starts_with("Reversed (or previously applied) patch detected") {
            failed.push(format!("{file} has its changes already"));
        }
    }
    failed.dedup();
    (!failed.is_empty()).then(|| failed.join(", "))
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), ArtifactError> {
    let parent = path.parent().map(PathBuf::from).unwrap_or_default();
    fs::create_dir_all(&parent)
        .and_then(|()| fs::write(path, bytes))
        .map_err(|error| ArtifactError::writing(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            source: "drivers/x".into(),
            modules: vec!["x".into()],
        }
    }

    fn apply(source: &str, patch: &str) -> Result<Files, ArtifactError> {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("tree/drivers/x/x.c"), source.as_bytes()).unwrap();
        write(&dir.path().join("tree/drivers/x/x.o"), b"built").unwrap();
        let stage = dir.path().join("stage");
        fs::create_dir(&stage).unwrap();
        let patches = Files::from([("0001-change.patch".into(), patch.as_bytes().to_vec())]);
        let patched = Patched {
            module: "x",
            recipe: &recipe(),
            source: &dir.path().join("tree"),
            patches: &patches,
            release: "7.9.0",
        };
        // The host's patch, as for a user's own tree.
        patched.files(&stage, &Place::Tree(dir.path().join("tree")))
    }

    const PATCH: &str = "x: say two\n\n--- a/drivers/x/x.c\n+++ b/drivers/x/x.c\n@@ -1,3 +1,3 @@\n before\n-one\n+two\n after\n";

    #[test]
    fn a_patch_changes_a_copy_of_the_source() {
        let files = apply("before\none\nafter\n", PATCH).unwrap();
        let names: Vec<_> = files.keys().collect();
        assert_eq!(names, [Path::new("drivers/x/x.c")]);
        assert_eq!(files[Path::new("drivers/x/x.c")], b"before\ntwo\nafter\n");
    }

    #[test]
    fn a_patch_that_does_not_apply_names_hunk_file_and_kernel() {
        let another = PATCH.replace("x.c", "y.c");
        for (source, patch, what) in [
            (
                "before\nthree\nelse\n",
                PATCH,
                "hunk 1 of drivers/x/x.c fails (at line 1)",
            ),
            (
                "before\ntwo\nafter\n",
                PATCH,
                "drivers/x/x.c has its changes already",
            ),
            ("", &another, "a file that it changes is not there"),
        ] {
            let said = apply(source, patch).unwrap_err().to_string();
            assert_eq!(
                said,
                format!(
                    "0001-change.patch does not apply to drivers/x of kernel 7.9.0: {what}; that source has changed since \
                     the patch was made, so renew the patch, or build for a kernel that it was made for"
                )
            );
        }
    }

    #[test]
    fn a_driver_that_the_source_has_not_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let patched = Patched {
            module: "x",
            recipe: &recipe(),
            source: dir.path(),
            patches: &Files::new(),
            release: "7.9.0",
        };
        let error = patched
            .files(dir.path(), &Place::Tree(dir.path().into()))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the source of kernel 7.9.0 has no drivers/x, which x is made of: give --kdir a tree with its source, or, for \
             a fetched kernel, list it under `members` in images/manifest.toml"
        );
    }
}
