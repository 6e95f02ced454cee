//! The guest kernel: ours or the user's own.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::fetch::hash_file;
use crate::{ArtifactError, ModulesDir, kernel_build};

/// A kernel that a guest can boot.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage.
    pub image: PathBuf,
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// Its modules; `None` if the user gave a kernel without any.
    pub modules: Option<ModulesDir>,
    /// Its configuration, if one was found.
    pub config: Option<PathBuf>,
    /// Where modules for it are built, if it is the user's own and that is known: a kernel tree.
    pub build_tree: Option<PathBuf>,
    /// Whether it is the user's own.
    pub is_own: bool,
    /// Changes with the kernel and its modules.
    pub(crate) identity: String,
}

/// `lib/modules/RELEASE` as Debian's packages unpack it.
pub(crate) fn packaged_dir(root: &Path, release: &str) -> PathBuf {
    root.join("usr/lib/modules").join(release)
}

/// The configuration of a kernel, of which a set has the image or the headers.
pub(crate) fn packaged_config(root: &Path, release: &str) -> PathBuf {
    let headers = kernel_build::headers_dir(root, release).join(".config");
    if headers.is_file() {
        return headers;
    }
    packaged_dir(root, release).join("config")
}

impl Kernel {
    /// The kernel in an unpacked set.
    pub(crate) fn packaged(
        root: &Path,
        release: &str,
        identity: String,
    ) -> Result<Self, ArtifactError> {
        let dir = packaged_dir(root, release);
        let image = dir.join("vmlinuz");
        if !image.is_file() {
            return Err(ArtifactError::CacheDamaged { path: image });
        }
        Ok(Self {
            image,
            release: release.to_owned(),
            config: Some(dir.join("config")),
            modules: Some(ModulesDir {
                path: dir,
                release: release.to_owned(),
                replaced: Default::default(),
            }),
            build_tree: None,
            is_own: false,
            identity,
        })
    }

    /// A kernel of the user's own, checked as far as its files tell.
    pub(crate) fn own(image: &Path, modules: Option<&Path>) -> Result<Self, ArtifactError> {
        let release = release_of(image)?;
        let modules = modules
            .map(|dir| ModulesDir::find(dir, &release))
            .transpose()?;
        let config = find_config(image, &release, modules.as_ref());
        if let Some(config) = &config {
            require_p2pdma(image, config)?;
        }
        let fingerprint = modules
            .as_ref()
            .map(ModulesDir::fingerprint)
            .unwrap_or_default();
        let identity = format!("{}-{fingerprint}", hash_file(image)?);
        let image = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
        Ok(Self {
            build_tree: find_build_tree(&image, modules.as_ref()),
            is_own: true,
            image,
            release,
            modules,
            config,
            identity,
        })
    }
}

/// Reads the release from a bzImage (Linux, Documentation/arch/x86/boot.rst: magic at 0x202, offset of
/// the version string less 0x200 at 0x20e).
fn release_of(image: &Path) -> Result<String, ArtifactError> {
    let unreadable = |source| ArtifactError::Unreadable {
        what: "kernel",
        path: image.to_owned(),
        source,
    };
    let mut head = Vec::new();
    fs::File::open(image)
        .and_then(|f| f.take(128 << 10).read_to_end(&mut head))
        .map_err(unreadable)?;
    release_in(&head).ok_or_else(|| ArtifactError::NotABzImage {
        path: image.to_owned(),
    })
}

fn release_in(head: &[u8]) -> Option<String> {
    if head.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset: [u8; 2] = head.get(0x20e..0x210)?.try_into().ok()?;
    let text = head.get(usize::from(u16::from_le_bytes(offset)).checked_add(0x200)?..)?;
    let text = text.split(|&b| b == 0 || b == b' ').next()?;
    let release = std::str::from_utf8(text).ok()?;
    // It becomes part of paths.
    let sane = |c: char| c.is_ascii_alphanumeric() || "._+-~".contains(c);
    (!release.is_empty() && release.len() < 65 && release.chars().all(sane))
        .then(|| release.to_owned())
}

/// The configuration beside the image, in its source tree (arch/x86/boot/bzImage), or with the modules.
fn find_config(image: &Path, release: &str, modules: Option<&ModulesDir>) -> Option<PathBuf> {
    let image = fs::canonicalize(image).ok()?;
    let beside = image.parent()?;
    let mut places = vec![
        beside.join(format!("config-{release}")),
        beside.join("config"),
    ];
    if beside.ends_with("arch/x86/boot") || beside.ends_with("arch/x86_64/boot") {
        places.extend(beside.ancestors().nth(3).map(|tree| tree.join(".config")));
    }
    if let Some(modules) = modules {
        places.extend([
            modules.path.join("config"),
            modules.path.join("build/.config"),
        ]);
    }
    places.into_iter().find(|p| p.is_file())
}

/// The kernel tree that the modules' link `build` leads to, or that the image lies in.
fn find_build_tree(image: &Path, modules: Option<&ModulesDir>) -> Option<PathBuf> {
    let linked = modules.map(|modules| modules.path.join("build"));
    let image = fs::canonicalize(image).ok()?;
    let built = image
        .parent()
        .filter(|beside| beside.ends_with("arch/x86/boot") || beside.ends_with("arch/x86_64/boot"));
    let around = built
        .and_then(|beside| beside.ancestors().nth(3))
        .map(Path::to_path_buf);
    let mut trees = linked.into_iter().chain(around);
    trees.find(|tree| tree.join("Makefile").is_file())
}

pub(crate) fn require_p2pdma(kernel: &Path, config: &Path) -> Result<(), ArtifactError> {
    let text = fs::read_to_string(config).unwrap_or_default();
    // Only a file that is a kernel configuration can say that the option is off.
    let is_config = text.lines().any(|l| l.starts_with("CONFIG_X86"));
    if is_config && !text.lines().any(|l| l == "CONFIG_PCI_P2PDMA=y") {
        return Err(ArtifactError::KernelWithoutP2pdma {
            kernel: kernel.to_owned(),
            config: config.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bz_image(version: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x300 + version.len()].copy_from_slice(version);
        image
    }

    #[test]
    fn the_release_is_the_first_word_of_the_version() {
        let image = bz_image(b"7.3.0-rc2+ (me@host) #4 SMP\0");
        assert_eq!(release_in(&image).as_deref(), Some("7.3.0-rc2+"));
        for length in 0..image.len() {
            let _ = release_in(&image[..length]);
        }
        assert_eq!(release_in(&bz_image(b"../../etc x\0")), None);
        assert_eq!(release_in(b"\x7fELF"), None);
    }

    #[test]
    fn a_tree_s_configuration_is_found_and_decides() {
        let dir = tempfile::tempdir().unwrap();
        let boot = dir.path().join("arch/x86/boot");
        fs::create_dir_all(&boot).unwrap();
        let image = boot.join("bzImage");
        fs::write(&image, bz_image(b"7.4.0 x\0")).unwrap();
        assert_eq!(Kernel::own(&image, None).unwrap().config, None);

        let config = dir.path().join(".config");
        fs::write(&config, "CONFIG_X86_64=y\n# CONFIG_PCI_P2PDMA is not set\n").unwrap();
        let error = Kernel::own(&image, None).unwrap_err();
        assert!(
            matches!(error, ArtifactError::KernelWithoutP2pdma { .. }),
            "{error}"
        );

        fs::write(&config, "CONFIG_X86_64=y\nCONFIG_PCI_P2PDMA=y\n").unwrap();
        let kernel = Kernel::own(&image, None).unwrap();
        assert_eq!(
            (kernel.release.as_str(), kernel.config.is_some()),
            ("7.4.0", true)
        );
    }

    #[test]
    fn what_is_no_kernel_is_said_so() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vmlinux");
        fs::write(&file, b"\x7fELF").unwrap();
        assert!(matches!(
            Kernel::own(&file, None),
            Err(ArtifactError::NotABzImage { .. })
        ));
        let gone = dir.path().join("gone");
        assert!(matches!(
            Kernel::own(&gone, None),
            Err(ArtifactError::Unreadable { .. })
        ));
    }
}
