//! What a module is made of, read once: what is hashed is what is compiled, even where someone edits meanwhile.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::kernel::Against;
use super::patch::changed_elsewhere;
use super::sources::{Files, Kind, ModuleSource, is_input, read_below};
use super::{BuildError, make, root};
use crate::fetch::hex;
use crate::{ArtifactError, Cache, Progress};

/// All that is read of a module's source.
#[derive(Debug)]
pub(super) struct Inputs {
    /// A driver of ours, or the patches to one of the kernel's.
    pub files: Files,
    /// The kernel's driver that the patches are for, and what else they change, by path in the kernel's source.
    pub driver: Files,
}

impl Inputs {
    /// Reads `source`, and the kernel's own source where it is wanted, which may be fetched for that.
    pub(super) fn read(
        source: &ModuleSource,
        against: &Against,
        cache: &Cache,
        progress: &mut dyn Progress,
    ) -> Result<Self, ArtifactError> {
        match &source.kind {
            Kind::Own => Ok(Self {
                files: source.files()?,
                driver: Files::new(),
            }),
            Kind::Patched(recipe) => {
                let kernel = against.source(cache, progress)?;
                let directory = kernel.join(&recipe.source);
                if !directory.is_dir() {
                    return Err(BuildError::NoDriver {
                        module: source.name.clone(),
                        source_dir: recipe.source.clone(),
                        release: against.release.clone(),
                    }
                    .into());
                }
                let files = source.patches()?;
                let mut driver = Files::new();
                for (path, bytes) in read_below(&directory, &is_input)? {
                    driver.insert(Path::new(&recipe.source).join(path), bytes);
                }
                for path in changed_elsewhere(&files, recipe) {
                    // A file that is not there is the patch's to make, or patch's to complain of.
                    if let Ok(bytes) = std::fs::read(kernel.join(&path)) {
                        driver.insert(path, bytes);
                    }
                }
                Ok(Self { files, driver })
            }
        }
    }

    /// A hash of them, of how modules are built, and of `more`.
    pub(super) fn digest(&self, more: &[&str]) -> String {
        let mut hash = Sha256::new();
        for text in [make::SCRIPT, root::SCRIPT].iter().chain(more) {
            add(&mut hash, text.as_bytes());
        }
        for files in [&self.files, &self.driver] {
            hash.update(files.len().to_le_bytes());
            for (path, bytes) in files {
                add(&mut hash, path.as_os_str().as_encoded_bytes());
                add(&mut hash, bytes);
            }
        }
        short(&hex(&hash.finalize()))
    }
}

/// A hash of the files below a directory.
pub(super) fn digest_of(directory: &Path) -> Result<String, ArtifactError> {
    let mut hash = Sha256::new();
    for (path, bytes) in read_below(directory, &|_| true)? {
        add(&mut hash, path.as_os_str().as_encoded_bytes());
        add(&mut hash, &bytes);
    }
    Ok(short(&hex(&hash.finalize())))
}

/// A hash of words.
pub(super) fn digest_of_words(words: &[&str]) -> String {
    let mut hash = Sha256::new();
    for word in words {
        add(&mut hash, word.as_bytes());
    }
    short(&hex(&hash.finalize()))
}

/// With its length, so that what follows cannot be taken for a part of it.
fn add(hash: &mut Sha256, bytes: &[u8]) {
    hash.update(bytes.len().to_le_bytes());
    hash.update(bytes);
}

/// As much of a digest as a name needs.
fn short(digest: &str) -> String {
    digest.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_driver_that_the_source_has_not_is_said_so_and_what_was_built_in_it_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        super::super::kernel::tests::tree(dir.path(), "CONFIG_X86_64=y\nCONFIG_PCI_P2PDMA=y\n");
        let against = Against::tree(dir.path()).unwrap();
        let recipe = super::super::sources::Recipe {
            source: "drivers/x".into(),
            modules: vec!["x".into()],
        };
        let source = ModuleSource {
            name: "x".into(),
            path: dir.path().join("patches"),
            kind: Kind::Patched(recipe),
        };
        let cache = Cache::at(dir.path().join("cache"));
        let read = || Inputs::read(&source, &against, &cache, &mut crate::Silent);
        let said = read().unwrap_err().to_string();
        assert!(said.contains("7.9.0-rc1+ has no drivers/x"), "{said}");
        for name in [
            "drivers/x/x.c",
            "drivers/x/Makefile",
            "drivers/x/x.o",
            "patches/1.patch",
        ] {
            super::super::patch::write(&dir.path().join(name), b"").unwrap();
        }
        let driver: Vec<_> = read().unwrap().driver.into_keys().collect();
        assert_eq!(
            driver,
            [Path::new("drivers/x/Makefile"), Path::new("drivers/x/x.c")]
        );
    }

    #[test]
    fn each_file_and_where_it_comes_from_counts() {
        let files = |pairs: &[(&str, &str)]| -> Files {
            let pairs = pairs.iter();
            pairs
                .map(|(name, text)| (PathBuf::from(name), text.as_bytes().to_vec()))
                .collect()
        };
        let digest = |ours: &[(&str, &str)], driver: &[(&str, &str)]| {
            let (files, driver) = (files(ours), files(driver));
            Inputs { files, driver }.digest(&["identity"])
        };
        let digests = [
            digest(&[], &[]),
            digest(&[("a.c", "x")], &[]),
            digest(&[], &[("a.c", "x")]),
            digest(&[("a.c", "y")], &[]),
            digest(&[("b.c", "x")], &[]),
            digest(&[("a.c", ""), ("x", "")], &[]),
        ];
        let distinct: std::collections::BTreeSet<_> = digests.iter().collect();
        assert_eq!(distinct.len(), digests.len());
        assert_eq!(digests[1], digest(&[("a.c", "x")], &[]));
    }
}
