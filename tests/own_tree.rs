//! Modules for a kernel tree of a developer's own: `p2plab modules --kdir`, with make and the compiler of the machine.
//!
//! The machine is one as such a tree is built on, with the kernel's compiler and headers installed, in a root of its own:
//! this host may have none of them.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use p2plab_images::{Artifacts, Cache, Overrides, Silent, resolve};
use p2plab_tests::{HostShare, p2plab};

use crate::command_line::{run, text, topology};

/// Makes the machine and runs p2plab on it. Words: unpacked compiler, unpacked headers, guest-kernel/, p2plab, the folder
/// that the machine shares with us, and p2plab's arguments.
const MACHINE: &str = r#"
set -e
tools=$1 headers=$2 sources=$3 p2plab=$4 here=$5
shift 5
new=$here/root
mkdir -p "$new"
mount -t tmpfs -o mode=0755 machine "$new"
mkdir -p "$new/usr/lib" "$new/usr/src" "$new/proc" "$new/dev" "$new/tmp" "$new/guest-kernel" "$new/$here"
# Read-only: the cache is everybody's.
bind() {
    if [ -d "$1" ]; then mkdir -p "$2"; else : > "$2"; fi
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2" 2> /dev/null || :
}
for path in "$tools"/usr/*; do
    case $path in */lib | */src) ;; *) bind "$path" "$new/usr/${path##*/}" ;; esac
done
for path in "$tools"/usr/lib/* "$headers"/usr/lib/*; do bind "$path" "$new/usr/lib/${path##*/}"; done
bind "$headers/usr/src" "$new/usr/src"
for name in bin sbin lib lib64; do ln -s "usr/$name" "$new/$name"; done
bind "$p2plab" "$new/p2plab"
bind "$sources" "$new/guest-kernel"
: > "$new/dev/null"
mount --bind /dev/null "$new/dev/null"
mount --rbind /proc "$new/proc"
mount --bind "$here" "$new/$here"
exec chroot "$new" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/tmp LC_ALL=C P2PLAB_GUEST_KERNEL=/guest-kernel \
    P2PLAB_CACHE="$here/cache" /p2plab modules "$@"
"#;

struct Machine {
    here: tempfile::TempDir,
    artifacts: Artifacts,
}

/// What is unpacked of a set of the manifest, the newest that has `file`.
fn unpacked(set: &str, file: &str) -> PathBuf {
    let folder = Cache::open().unwrap().root().join("artifacts");
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    // NAME-DIGEST; another set's name may begin with the same word.
    let of_set = |name: &str| {
        let digest = name
            .strip_prefix(set)
            .and_then(|rest| rest.strip_prefix('-'));
        digest.is_some_and(|digest| !digest.contains('-'))
    };
    let found = entries
        .filter(|entry| of_set(&entry.file_name().to_string_lossy()))
        .filter(|entry| entry.path().join("root").join(file).exists())
        .max_by_key(|entry| entry.metadata().and_then(|m| m.modified()).unwrap());
    found.unwrap().path().join("root")
}

impl Machine {
    fn new() -> Self {
        // Headers, compiler and the kernel's source are fetched where they are missing.
        for name in ["nvme", "p2pmem"] {
            let output = run(&["modules", name]);
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let artifacts = resolve(&Cache::open().unwrap(), &Overrides::default(), &mut Silent);
        Self {
            here: tempfile::tempdir().unwrap(),
            artifacts: artifacts.unwrap(),
        }
    }

    fn release(&self) -> &str {
        &self.artifacts.kernel.release
    }

    /// The kernel's headers, as their package puts them on a machine.
    fn headers(&self) -> PathBuf {
        let headers = format!("usr/src/linux-headers-{}", self.release());
        Path::new("/").join(headers)
    }

    /// `p2plab modules --kdir TREE NAME` on the machine.
    fn modules(&self, tree: &Path, name: &str) -> Output {
        let headers = self.headers();
        let headers = unpacked(
            "headers",
            headers.strip_prefix("/").unwrap().to_str().unwrap(),
        );
        Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c", MACHINE, "machine"])
            .arg(unpacked("toolchain", "usr/bin/awk"))
            .arg(headers)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel"))
            .args([&p2plab(), self.here.path()])
            .arg("--kdir")
            .args([tree, Path::new(name)])
            .output()
            .unwrap()
    }

    /// The module that a build has said it left.
    fn built(&self, output: &Output, name: &str) -> PathBuf {
        let said = text(&output.stdout);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let mut lines = said.lines();
        assert_eq!(lines.next(), Some(self.release()));
        let mut lines = lines.filter(|line| line.trim_start().starts_with(name));
        let (how, path) = lines.next().unwrap().rsplit_once(": ").unwrap();
        assert!(how.contains("built in"), "{said}");
        PathBuf::from(path)
    }
}

/// The headers of a kernel, by the link in its modules' folder, are a tree to build in: what comes out is for that kernel,
/// and a guest that runs it as its user's own loads it.
#[test]
fn a_module_is_built_in_a_tree_and_loaded() {
    let machine = Machine::new();
    let link = format!("/lib/modules/{}/build", machine.release());
    let output = machine.modules(Path::new(&link), "p2pmem");
    let module = machine.built(&output, "p2pmem");
    let again = machine.modules(Path::new(&link), "p2pmem");
    assert!(text(&again.stdout).contains("p2pmem       unchanged: "));

    let _share = HostShare::take();
    let kernel = &machine.artifacts.kernel;
    let modules = kernel.modules.as_ref().unwrap();
    let output = run(&[
        "boot",
        &topology("one-switch.toml"),
        "--kernel",
        kernel.image.to_str().unwrap(),
        "--modules",
        modules.path.to_str().unwrap(),
        "--put",
        &format!("{}:/root/own.ko", module.display()),
        "--exec",
        "insmod /root/own.ko && cat /sys/class/p2pmem_dev/p2pmem0/size",
    ]);
    assert_eq!(
        text(&output.stdout),
        "67108864\n",
        "{}",
        text(&output.stderr)
    );
}

/// The kernel's own driver, patched, needs a tree that has its source, here as the build directory of `make O=` has it:
/// below the link `source`. Headers alone have none.
#[test]
fn a_patched_driver_needs_a_tree_with_its_source() {
    let machine = Machine::new();
    let output = machine.modules(&machine.headers(), "nvme");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stdout));
    let sentence = format!(
        "the source of kernel {} has no drivers/nvme/host, which nvme is made of: give --kdir a tree with its source",
        machine.release()
    );
    let said = text(&output.stderr);
    assert!(said.contains(&sentence), "{said}");

    let tree = machine.here.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let headers = unpacked(
        "headers",
        &format!("usr/src/linux-headers-{}", machine.release()),
    );
    let headers = headers.join(machine.headers().strip_prefix("/").unwrap());
    for entry in std::fs::read_dir(headers).unwrap().flatten() {
        let name = entry.file_name();
        symlink(machine.headers().join(&name), tree.join(&name)).unwrap();
    }
    let makefile = tree.join("Makefile");
    std::fs::remove_file(&makefile).unwrap();
    let common = machine.release().trim_end_matches("amd64").to_owned() + "common";
    let lines = format!(
        "export KBUILD_OUTPUT = {}\ninclude /usr/src/linux-headers-{common}/Makefile\n",
        tree.display()
    );
    std::fs::write(makefile, lines).unwrap();
    let source = unpacked("source", "drivers/nvme/host/pci.c");
    copy_folder(
        &source.join("drivers/nvme"),
        &tree.join("source/drivers/nvme"),
    );
    // The patches change this header, too.
    let header = "include/linux/nvme.h";
    std::fs::create_dir_all(tree.join("source/include/linux")).unwrap();
    std::fs::copy(source.join(header), tree.join("source").join(header)).unwrap();
    let output = machine.modules(&tree, "nvme");
    let module = std::fs::read(machine.built(&output, "nvme")).unwrap();
    // A parameter that only the patches give it.
    assert!(module.windows(7).any(|word| word == b"use_pmr"));
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
