//! A driver of the kernel's with patches: its source, copied and changed.

use std::fs;
use std::path::{Path, PathBuf};

use super::BuildError;
use super::make::Place;
use super::sources::{Files, Recipe, is_input, read_below};
use crate::{ArtifactError, child};

/// What a patched driver is made of.
pub(super) struct Patched<'a> {
    pub recipe: &'a Recipe,
    /// Its source, by path below the recipe's directory.
    pub driver: &'a Files,
    pub patches: &'a Files,
    /// The kernel's release, for messages.
    pub release: &'a str,
}

impl Patched<'_> {
    /// The driver's directory with all patches applied, by `patch` where the build runs; `stage` is an empty directory
    /// of ours.
    pub(super) fn files(&self, stage: &Path, place: &Place) -> Result<Files, ArtifactError> {
        for (path, bytes) in self.driver {
            write(&stage.join(&self.recipe.source).join(path), bytes)?;
        }
        for (name, bytes) in self.patches {
            write(&stage.join(name), bytes)?;
            self.apply(name, stage, place)?;
        }
        read_below(stage, &is_input)
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
            failed.push(format!("hunk {number} of {file} (at line {at})"));
        } else if line.starts_with("can't find file to patch") {
            failed.push("a file that it changes is not there".to_owned());
        } else if line.starts_with("Reversed (or previously applied) patch detected") {
            failed.push(format!("{file} has its changes already"));
        }
    }
    failed.dedup();
    (!failed.is_empty()).then(|| format!("{} failed", failed.join(", ")))
}

/// Writes a file, and the directories that lead to it.
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
        let driver = Files::from([("x.c".into(), source.as_bytes().to_vec())]);
        let stage = dir.path().join("stage");
        fs::create_dir(&stage).unwrap();
        let patches = Files::from([("0001-change.patch".into(), patch.as_bytes().to_vec())]);
        let patched = Patched {
            recipe: &recipe(),
            driver: &driver,
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
        for (source, says) in [
            (
                "before\nthree\nelse\n",
                "hunk 1 of drivers/x/x.c (at line 1)",
            ),
            ("before\ntwo\nafter\n", "has its changes already"),
        ] {
            let said = apply(source, PATCH).unwrap_err().to_string();
            assert!(said.contains(says), "{said}");
            assert!(
                said.starts_with("0001-change.patch does not apply to drivers/x of kernel 7.9.0")
            );
            assert!(!said.contains('\n'), "{said}");
        }
        let said = apply("", &PATCH.replace("x.c", "y.c"))
            .unwrap_err()
            .to_string();
        assert!(said.contains("0001-change.patch does not apply"), "{said}");
    }
}
