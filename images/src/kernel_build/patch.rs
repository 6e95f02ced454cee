//! A driver of the kernel's with patches: its source, copied and changed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::BuildError;
use super::make::Place;
use super::sources::{Files, Recipe, is_input, read_below};
use crate::{ArtifactError, child};

/// What a patched driver is made of.
pub(super) struct Patched<'a> {
    pub recipe: &'a Recipe,
    /// Its source, and what else of the kernel the patches change, by path in the kernel's source.
    pub driver: &'a Files,
    pub patches: &'a Files,
    /// The kernel's release, for messages.
    pub release: &'a str,
}

impl Patched<'_> {
    /// The driver's directory with all patches applied, by `patch` where the build runs, and the headers that they change;
    /// `stage` is an empty directory of ours.
    pub(super) fn files(&self, stage: &Path, place: &Place) -> Result<Files, ArtifactError> {
        for (path, bytes) in self.driver {
            write(&stage.join(path), bytes)?;
        }
        for (name, bytes) in self.patches {
            let patch = with_known_documentation(bytes, self.driver);
            write(&stage.join(name), &patch)?;
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

/// The files outside of the driver's directory that the patches change: the kernel's headers, and its documentation.
pub(super) fn changed_elsewhere(patches: &Files, recipe: &Recipe) -> BTreeSet<PathBuf> {
    let texts = patches.values().map(|bytes| String::from_utf8_lossy(bytes));
    let changed = texts.flat_map(|text| {
        let lines = text.lines();
        let paths = lines.filter_map(|line| line.strip_prefix("+++ b/").map(PathBuf::from));
        paths.collect::<Vec<_>>()
    });
    changed
        .filter(|path| {
            path.components()
                .all(|part| matches!(part, Component::Normal(_)))
        })
        .filter(|path| !path.starts_with(&recipe.source))
        .collect()
}

/// The patch without its changes to documentation that the source does not have: an older kernel may have it elsewhere, a
/// user's tree none, and no build needs it.
fn with_known_documentation(patch: &[u8], source: &Files) -> Vec<u8> {
    let mut kept = Vec::with_capacity(patch.len());
    let mut keeps = true;
    for line in patch.split_inclusive(|byte| *byte == b'\n') {
        if let Some(names) = line.strip_prefix(b"diff --git a/") {
            let names = String::from_utf8_lossy(names);
            let name = names.split(' ').next().unwrap_or_default();
            keeps = !name.starts_with("Documentation/") || source.contains_key(Path::new(name));
        }
        if keeps {
            kept.extend_from_slice(line);
        }
    }
    kept
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
        let driver = Files::from([("drivers/x/x.c".into(), source.as_bytes().to_vec())]);
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
    fn a_patch_changes_headers_and_documentation_too() {
        let names = ["drivers/x/x.c", "include/linux/x.h", "Documentation/x"];
        let driver: Files = names
            .map(|name| (PathBuf::from(name), b"before\none\nafter\n".to_vec()))
            .into();
        let patch: String = names
            .map(|name| PATCH.replace("drivers/x/x.c", name))
            .concat();
        let patches = Files::from([("0001-change.patch".into(), patch.into_bytes())]);
        let elsewhere: Vec<_> = changed_elsewhere(&patches, &recipe()).into_iter().collect();
        assert_eq!(
            elsewhere,
            [Path::new("Documentation/x"), Path::new("include/linux/x.h")]
        );
        let dir = tempfile::tempdir().unwrap();
        let patched = Patched {
            recipe: &recipe(),
            driver: &driver,
            patches: &patches,
            release: "7.9.0",
        };
        let files = patched
            .files(dir.path(), &Place::Tree(dir.path().into()))
            .unwrap();
        let built: Vec<_> = files.keys().collect();
        assert_eq!(
            built,
            [Path::new("drivers/x/x.c"), Path::new("include/linux/x.h")]
        );
        assert_eq!(
            files[Path::new("include/linux/x.h")],
            b"before\ntwo\nafter\n"
        );

        let git = format!("diff --git a/Documentation/x b/Documentation/x\n{PATCH}");
        let is_kept =
            |source: &Files| with_known_documentation(git.as_bytes(), source) == git.as_bytes();
        assert!(is_kept(&driver) && !is_kept(&Files::new()));
        let outside = PATCH.replace("b/drivers", "b/../drivers");
        let patches = Files::from([("1.patch".into(), outside.into_bytes())]);
        assert!(changed_elsewhere(&patches, &recipe()).is_empty());
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
}
