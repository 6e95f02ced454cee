//! The initramfs: the guest's whole userland in one archive, built without root and without host tools.

use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::cpio::{Archive, Entry};
use crate::elf::Elf;
use crate::fetch::{hash_file, hex};
use crate::guest_programs::{AGENT, IOBENCH, P2PCOPY, P2PMEMTEST};
use crate::{ArtifactError, Artifacts, Cache, child};

/// File in the guest that lists the modules to load, one path and its parameters a line, in order.
pub const MODULE_LIST: &str = "/etc/p2plab/modules";

/// Where Debian's packages put libraries, and where the guest's loader looks for them.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// What goes into an initramfs beside the programs that every one has.
#[derive(Debug, Clone, Default)]
pub struct InitramfsSpec {
    /// Modules that the agent loads, by name or by path of a .ko file, with parameters if any
    /// (`nvme use_cmb_sqes=1`); what they need comes along. Unused if the kernel has no modules directory.
    pub modules: Vec<String>,
    /// As `modules`, but left out where the kernel has neither module nor built-in code of that name.
    pub optional_modules: Vec<String>,
    /// More modules that lie ready in the guest, with what they need, and are not loaded at start.
    pub spare_modules: Vec<String>,
    /// Files of the host by their path in the guest. Permissions are kept, and they replace what is there.
    pub files: Vec<(PathBuf, String)>,
}

/// An archive that was not used for so long is removed: whoever changes a program of the guest's makes many.
const KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Builds initramfs archives.
#[derive(Debug)]
pub struct Initramfs;

impl Initramfs {
    /// The path of an archive with the contents of `spec`. It is built at the first call and then found by a
    /// hash of all that goes into it.
    ///
    /// # Errors
    ///
    /// Those of [`ModulesDir::resolve`](crate::ModulesDir::resolve), [`ArtifactError::Initramfs`] for a path that
    /// cannot be in an archive, [`ArtifactError::Unreadable`] for a file that cannot be read.
    pub fn build(
        cache: &Cache,
        artifacts: &Artifacts,
        spec: &InitramfsSpec,
    ) -> Result<PathBuf, ArtifactError> {
        let path = cache
            .directory("initramfs")?
            .join(format!("{}.cpio", key(artifacts, spec)?));
        if path.is_file() {
            crate::touch(&path);
            return Ok(path);
        }
        let archive = assemble(artifacts, spec)?;
        store(&archive, &path)?;
        cache.prune("initramfs", "", KEPT);
        Ok(path)
    }
}

/// Whoever comes second replaces the file by an equal one; nobody sees half of it.
fn store(archive: &Archive, path: &Path) -> Result<(), ArtifactError> {
    let failed = |e| ArtifactError::writing(path, e);
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    archive
        .write(&mut out)
        .and_then(|()| out.flush())
        .map_err(failed)?;
    drop(out);
    file.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// A hash of everything that decides the contents.
fn key(artifacts: &Artifacts, spec: &InitramfsSpec) -> Result<String, ArtifactError> {
    let mut hash = Sha256::new();
    // The number is the layout that `assemble` makes: raise it when that changes.
    hash.update(format!("1 {:?} {:?}\n", spec.modules, spec.spare_modules));
    if !spec.optional_modules.is_empty() {
        hash.update(format!("optional {:?}\n", spec.optional_modules));
    }
    hash.update(&artifacts.kernel.identity);
    hash.update(&artifacts.tools_identity);
    hash.update(Sha256::digest(AGENT));
    hash.update(Sha256::digest(P2PCOPY));
    hash.update(Sha256::digest(IOBENCH));
    hash.update(Sha256::digest(P2PMEMTEST));
    for module in spec.modules.iter().chain(&spec.spare_modules) {
        let file = module.split_ascii_whitespace().next().unwrap_or_default();
        if file.contains('/') {
            hash.update(hash_file(Path::new(file))?);
        }
    }
    let replaced = artifacts.kernel.modules.iter().flat_map(|m| &m.replaced);
    for (name, file) in replaced {
        hash.update(format!("{name} {}\n", hash_file(file)?));
    }
    for (host, guest) in &spec.files {
        hash.update(format!(
            "{guest} {:o} {}\n",
            mode_of(host)?,
            hash_file(host)?
        ));
    }
    Ok(hex(hash.finalize().get(..16).unwrap_or_default()))
}

fn assemble(artifacts: &Artifacts, spec: &InitramfsSpec) -> Result<Archive, ArtifactError> {
    let mut tree = Tree {
        archive: Archive::new(),
    };
    skeleton(&mut tree)?;
    tree.file("/init", 0o755, AGENT.to_vec())?;
    tree.file("/usr/bin/p2pcopy", 0o755, P2PCOPY.to_vec())?;
    tree.file("/usr/bin/iobench", 0o755, IOBENCH.to_vec())?;
    tree.file("/usr/bin/p2pmemtest", 0o755, P2PMEMTEST.to_vec())?;
    busybox(&mut tree, &artifacts.busybox)?;
    for program in ["usr/bin/lspci", "usr/bin/setpci"] {
        tree.program(&artifacts.tools, program)?;
    }
    let names = artifacts.tools.join("usr/share/misc/pci.ids");
    if names.is_file() {
        tree.file("/usr/share/misc/pci.ids", 0o644, read(&names)?)?;
    }
    modules(&mut tree, artifacts, spec)?;
    for (host, guest) in &spec.files {
        tree.file(guest, mode_of(host)?, read(host)?)?;
    }
    Ok(tree.archive)
}

/// Directories, device nodes that exist before devtmpfs is mounted, and the files that programs expect.
fn skeleton(tree: &mut Tree) -> Result<(), ArtifactError> {
    for dir in [
        "usr/bin",
        "usr/lib/modules",
        "usr/lib64",
        "dev",
        "proc",
        "sys",
        "run",
        "mnt",
        "etc",
        "var",
    ] {
        tree.add(dir, Entry::Directory(0o755))?;
    }
    tree.add("tmp", Entry::Directory(0o1777))?;
    tree.add("root", Entry::Directory(0o700))?;
    for (link, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/bin"),
        ("usr/sbin", "bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        tree.add(link, Entry::Symlink(target.into()))?;
    }
    tree.add("dev/console", Entry::CharDevice(0o600, 5, 1))?;
    tree.add("dev/null", Entry::CharDevice(0o666, 1, 3))?;
    for (name, text) in [
        ("etc/passwd", "root::0:0:root:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/hostname", "p2plab\n"),
        ("etc/hosts", "127.0.0.1 localhost p2plab\n"),
        (
            "etc/profile",
            "export PS1='p2plab:\\w# ' PATH=/usr/bin HOME=/root\n",
        ),
    ] {
        tree.file(name, 0o644, text.as_bytes().to_vec())?;
    }
    Ok(())
}

/// busybox and a link for each of its applets, which it lists itself: it is static and runs on the host.
fn busybox(tree: &mut Tree, program: &Path) -> Result<(), ArtifactError> {
    tree.file("/usr/bin/busybox", 0o755, read(program)?)?;
    let out = child::checked(Command::new(program).arg("--list"), "busybox --list")?;
    for applet in String::from_utf8_lossy(&out.stdout).lines() {
        if applet != "busybox" && !applet.is_empty() {
            tree.add(
                &format!("usr/bin/{applet}"),
                Entry::Symlink("busybox".into()),
            )?;
        }
    }
    Ok(())
}

fn modules(
    tree: &mut Tree,
    artifacts: &Artifacts,
    spec: &InitramfsSpec,
) -> Result<(), ArtifactError> {
    let mut list = String::new();
    if let Some(dir) = &artifacts.kernel.modules {
        for module in dir.resolve(&spec.spare_modules)? {
            tree.file(&module.guest_path, 0o644, module.contents)?;
        }
        let mut wanted = spec.modules.clone();
        for module in &spec.optional_modules {
            match dir.resolve(std::slice::from_ref(module)) {
                Ok(_) => wanted.push(module.clone()),
                Err(ArtifactError::ModuleMissing { .. }) => {
                    tracing::info!(module, "left out: the kernel has none");
                }
                Err(error) => return Err(error),
            }
        }
        for module in dir.resolve(&wanted)? {
            list.push_str(format!("{} {}", module.guest_path, module.parameters).trim_end());
            list.push('\n');
            tree.file(&module.guest_path, 0o644, module.contents)?;
        }
    } else if !spec.modules.is_empty() {
        tracing::info!(modules = ?spec.modules, "a kernel without --modules: taken as built in");
    }
    tree.file(MODULE_LIST, 0o644, list.into_bytes())
}

fn read(path: &Path) -> Result<Vec<u8>, ArtifactError> {
    fs::read(path).map_err(|source| ArtifactError::Unreadable {
        what: "the file",
        path: path.to_owned(),
        source,
    })
}

fn mode_of(path: &Path) -> Result<u32, ArtifactError> {
    let meta = fs::metadata(path).map_err(|source| ArtifactError::Unreadable {
        what: "the file",
        path: path.to_owned(),
        source,
    })?;
    Ok(meta.permissions().mode() & 0o7777)
}

/// An archive whose `/bin`, `/sbin`, `/lib` and `/lib64` are links into `/usr`.
struct Tree {
    archive: Archive,
}

impl Tree {
    fn add(&mut self, name: &str, entry: Entry) -> Result<(), ArtifactError> {
        self.archive
            .add(&merged(name), entry)
            .map_err(|e| ArtifactError::Initramfs {
                name: name.to_owned(),
                detail: e.to_string(),
            })
    }

    fn file(&mut self, name: &str, mode: u32, data: Vec<u8>) -> Result<(), ArtifactError> {
        self.add(name, Entry::File(mode, data))
    }

    /// A program from an unpacked root, with its loader and all its libraries.
    fn program(&mut self, root: &Path, name: &str) -> Result<(), ArtifactError> {
        let data = read(&root.join(name))?;
        let mut wanted: Vec<String> = Vec::new();
        if let Some(elf) = Elf::parse(&data) {
            wanted.extend(elf.needed().into_iter().map(str::to_owned));
            if let Some(loader) = elf.interpreter() {
                let path = merged(loader);
                self.file(&path, 0o755, read(&root.join(&path))?)?;
            }
        }
        self.file(name, 0o755, data)?;
        while let Some(library) = wanted.pop() {
            let path = format!("{LIBRARIES}/{library}");
            if self.archive.get(&path).is_some() {
                continue;
            }
            let data = read(&root.join(&path))?;
            if let Some(elf) = Elf::parse(&data) {
                wanted.extend(elf.needed().into_iter().map(str::to_owned));
            }
            self.file(&path, 0o755, data)?;
        }
        Ok(())
    }
}

/// The place of a name in a tree with a merged /usr.
fn merged(name: &str) -> String {
    let name = name.trim_start_matches('/');
    match name.split_once('/') {
        Some(("bin" | "sbin", rest)) => format!("usr/bin/{rest}"),
        Some((top @ ("lib" | "lib64"), rest)) => format!("usr/{top}/{rest}"),
        _ => match name.strip_prefix("usr/sbin/") {
            Some(rest) => format!("usr/bin/{rest}"),
            None => name.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_merged_usr() {
        assert_eq!(merged("/bin/sh"), "usr/bin/sh");
        assert_eq!(merged("/usr/sbin/ip"), "usr/bin/ip");
        assert_eq!(merged("/lib/modules/7.0/a.ko"), "usr/lib/modules/7.0/a.ko");
        assert_eq!(merged("/lib64/ld.so"), "usr/lib64/ld.so");
        assert_eq!(merged("sbin"), "sbin");
        assert_eq!(merged("/etc/passwd"), "etc/passwd");
    }

    #[test]
    fn the_skeleton_has_a_console_before_devtmpfs() {
        let mut tree = Tree {
            archive: Archive::new(),
        };
        skeleton(&mut tree).unwrap();
        assert_eq!(
            tree.archive.get("dev/console"),
            Some(&Entry::CharDevice(0o600, 5, 1))
        );
        tree.file("/sbin/tool", 0o755, vec![]).unwrap();
        assert!(tree.archive.get("usr/bin/tool").is_some());
        assert!(tree.file("/bin/../../x", 0o644, vec![]).is_err());
    }

    #[test]
    fn a_program_of_this_machine_comes_with_its_libraries() {
        // Our own test program and the machine's libraries stand in for an unpacked root.
        let root = tempfile::tempdir().unwrap();
        let libraries = root.path().join(LIBRARIES);
        fs::create_dir_all(&libraries).unwrap();
        fs::create_dir_all(root.path().join("usr/lib64")).unwrap();
        fs::copy(
            std::env::current_exe().unwrap(),
            root.path().join("usr/tool"),
        )
        .unwrap();
        let library = root.path().join("usr/lib64/ld-linux-x86-64.so.2");
        fs::write(library, b"loader").unwrap();
        let tool = read(&root.path().join("usr/tool")).unwrap();
        for name in Elf::parse(&tool).unwrap().needed() {
            fs::write(libraries.join(name), b"library").unwrap();
        }
        let mut tree = Tree {
            archive: Archive::new(),
        };
        tree.program(root.path(), "usr/tool").unwrap();
        assert!(tree.archive.get("usr/lib64/ld-linux-x86-64.so.2").is_some());
        assert!(
            tree.archive
                .get(&format!("{LIBRARIES}/libc.so.6"))
                .is_some()
        );
    }

    #[test]
    fn the_guest_programs_are_static() {
        for program in [AGENT, P2PCOPY] {
            let elf = Elf::parse(program).unwrap();
            assert_eq!((elf.interpreter(), elf.needed()), (None, vec![]));
        }
    }
}
