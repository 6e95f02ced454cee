//! Kernel modules that p2plab builds: what `p2plab modules` says, and how they get into a guest.

use std::path::Path;

use p2plab::topology::{MIB, Nvme, Topology};
use p2plab_images::{
    ArtifactError, BuildError, BuildTarget, Cache, ModuleBuilder, ModuleSource, Silent,
    module_sources,
};
use p2plab_tests::{HostShare, TestLab};

use crate::command_line::{run, text};

const GOOD: &str = "// SPDX-License-Identifier: GPL-2.0
#include <linux/module.h>

static int answer;
module_param(answer, int, 0444);

MODULE_DESCRIPTION(\"Answers\");
MODULE_LICENSE(\"GPL\");
";

fn write(folder: &Path, name: &str, text: &str) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(name), text).unwrap();
}

fn tiny(folder: &Path, text: &str) -> ModuleSource {
    write(folder, "Kbuild", "obj-m := tiny.o\n");
    write(folder, "tiny.c", text);
    ModuleSource::own(folder)
}

fn every_kernel() -> Vec<ModuleBuilder> {
    let mut targets = vec![BuildTarget::Guest];
    targets.extend(BuildTarget::older().unwrap());
    let cache = Cache::open().unwrap();
    let open = |target: &BuildTarget| ModuleBuilder::open(&cache, target, &mut Silent).unwrap();
    targets.iter().map(open).collect()
}

/// All of guest-kernel/ compiles for each kernel of the manifest without a warning, and passes the kernel's own check.
#[test]
fn our_modules_are_clean_for_every_kernel() {
    let kernels = every_kernel();
    assert!(kernels.len() >= 2, "the guest's, and an older one");
    for source in module_sources().unwrap() {
        for kernel in &kernels {
            kernel.build(&source, &mut Silent).unwrap();
        }
        kernels[0].check(&source, &mut Silent).unwrap();
    }
}

/// Against fetched headers: a change is compiled, no change is nothing, and mistakes are told in the compiler's words.
#[test]
fn a_driver_of_ours_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = &every_kernel()[0];
    let build = |text: &str| kernel.build(&tiny(folder.path(), text), &mut Silent);
    // A comment of its own, so that no earlier run has built it.
    let unique = format!("{GOOD}/* {} */\n", folder.path().display());
    let (modules, built) = build(&unique).unwrap();
    assert!(built && modules[0].name == "tiny" && modules[0].path.is_file());
    assert!(!build(&unique).unwrap().1);

    let warned = build(&GOOD.replace("static int answer", "static int unused;\nstatic int answer"));
    let said = warned.unwrap_err().to_string();
    assert!(
        said.contains("tiny.c:4") && said.contains("unused"),
        "{said}"
    );
    let unstyled = tiny(folder.path(), &GOOD.replace("int answer", "int  answer=0"));
    let said = kernel
        .check(&unstyled, &mut Silent)
        .unwrap_err()
        .to_string();
    assert!(
        said.starts_with("the kernel's checkpatch.pl --strict refuses tiny.c"),
        "{said}"
    );
    assert!(said.contains("INITIALISED_STATIC"), "{said}");
    kernel
        .check(&tiny(folder.path(), GOOD), &mut Silent)
        .unwrap();
    assert!(matches!(
        kernel.require_release("6.1.0"),
        Err(ArtifactError::Build(BuildError::HeadersMismatch { .. }))
    ));
}

/// Whatever a build does, it changes nothing of the headers, which all builds share.
#[test]
fn a_build_cannot_write_to_the_headers() {
    let folder = tempfile::tempdir().unwrap();
    let source = tiny(folder.path(), GOOD);
    let kbuild = "obj-m := tiny.o\nifneq ($(shell touch $(objtree)/Module.symvers 2> /dev/null || echo refused),refused)\n\
                  $(error the headers can be written)\nendif\n";
    write(folder.path(), "Kbuild", kbuild);
    every_kernel()[0].build(&source, &mut Silent).unwrap();
}

/// The kernel's own driver with a patch that does not fit its source: which hunk, and of which kernel.
#[test]
fn a_patch_that_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let patches = folder.path().join("patches/nvme");
    write(
        &patches,
        "build.toml",
        "source = \"drivers/nvme/host\"\nmodules = [\"nvme\"]\n",
    );
    let patch = "--- a/drivers/nvme/host/pci.c\n+++ b/drivers/nvme/host/pci.c\n@@ -1,2 +1,2 @@\n no such line\n-nor this\n+one\n";
    write(&patches, "0001-no.patch", patch);
    let output = std::process::Command::new(p2plab_tests::p2plab())
        .args(["modules", "nvme"])
        .env("P2PLAB_GUEST_KERNEL", folder.path())
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let release = every_kernel()[0].release().to_owned();
    let sentence = format!(
        "0001-no.patch does not apply to drivers/nvme/host of kernel {release}: hunk 1 of drivers/nvme/host/pci.c fails (at \
         line 1); that source has changed since the patch was made, so renew the patch, or build for a kernel that it was \
         made for"
    );
    assert!(said.contains(&sentence), "{said}");
}

/// A host that gives its users no namespaces: what is refused, why, and both ways out.
#[test]
fn a_host_that_allows_no_namespaces_is_told_how() {
    let folder = tempfile::tempdir().unwrap();
    // Of its own, so that no earlier run has built it.
    let unique = format!("{GOOD}/* {} */\n", folder.path().display());
    tiny(&folder.path().join("tiny"), &unique);
    // What is forbidden in there is allowed out here.
    let forbidden = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" modules tiny";
    let output = std::process::Command::new("unshare")
        .args(["--map-root-user", "sh", "-c", forbidden])
        .arg(p2plab_tests::p2plab())
        .env("P2PLAB_GUEST_KERNEL", folder.path())
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let parts = [
        "p2plab: this host does not let its users enter a root of their own, in which modules are built (unshare: unshare \
         failed: ",
        "): allow user namespaces (sysctl user.max_user_namespaces=10000, ",
        "), or build for a kernel tree of yours with --kdir DIR, which needs none\n",
    ];
    for part in parts {
        assert!(said.contains(part), "no {part:?} in: {said}");
    }
}

/// Mistakes of a person at the command line.
#[test]
fn the_command_says_what_is_wrong() {
    for (arguments, says) in [
        (vec!["modules", "nvmf"], "there is no module `nvmf`"),
        (
            vec!["modules", "--kdir", "/nonexistent", "nvme"],
            "no kernel tree",
        ),
        (
            vec!["modules", "--kdir", "/tmp", "--check"],
            "cannot be used with",
        ),
    ] {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(
            text(&output.stderr).contains(says),
            "{}",
            text(&output.stderr)
        );
    }
}

/// A driver that the kernel has none of is put into the running guest, which is restored as any other.
#[test]
fn a_driver_of_ours_is_loaded() {
    let _share = HostShare::take();
    let folder = tempfile::tempdir().unwrap();
    tiny(&folder.path().join("tiny"), GOOD);
    let topology = "name = \"tiny\"\n[guest]\nown_modules = [\"tiny answer=42\"]\n[[root_port]]\nname = \"rp0\"\n";
    write(folder.path(), "tiny.toml", topology);
    let output = std::process::Command::new(p2plab_tests::p2plab())
        .arg("boot")
        .arg(folder.path().join("tiny.toml"))
        .args(["--exec", "cat /sys/module/tiny/parameters/answer"])
        .env("P2PLAB_GUEST_KERNEL", folder.path())
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "42\n", "{}", text(&output.stderr));
}

/// A module of the topology is in the guest before its endpoints, with its parameters, after a reboot, too; the
/// kernel's own is not loaded where ours takes its place.
#[test]
fn modules_of_the_topology_are_in_the_guest() {
    let topology = Topology::builder("modules")
        .root_port("rp0")
        .nvme("ssd0", "rp0", Nvme::memory(64 * MIB))
        .own_module("nvme use_pmr=0 use_cmb_sqes=0")
        .build()
        .unwrap();
    let lab = TestLab::start("modules_of_the_topology_are_in_the_guest", topology);
    let guest = lab.guest().unwrap();
    let look = "cat /sys/module/nvme/parameters/use_pmr /sys/module/nvme/parameters/use_cmb_sqes";
    assert_eq!(guest.sh(look).unwrap(), "N\nN\n");
    guest.nvme("ssd0").unwrap();
    lab.reboot().unwrap();
    assert_eq!(guest.sh(look).unwrap(), "N\nN\n");
    lab.finish();
}

/// The header for user space, as a program includes it that is compiled with all warnings, and the layout that it has had
/// from the beginning.
#[test]
fn user_space_compiles_with_the_header() {
    let sizes = [
        ("info", 48),
        ("alloc", 24),
        ("address", 8),
        ("distance", 24),
        ("export", 24),
    ]
    .map(|(name, size)| {
        format!("_Static_assert(sizeof(struct p2pmem_{name}) == {size}, \"{name}\");\n")
    })
    .concat();
    let ioctls = [
        ("INFO", 0x8030_f400_u32),
        ("FREE", 0x4008_f402),
        ("EXPORT", 0xc018_f404),
    ]
    .map(|(name, number)| {
        format!("_Static_assert(P2PMEM_IOC_{name} == {number:#x}u, \"{name}\");\n")
    })
    .concat();
    let program =
        format!("#include <linux/p2pmem.h>\n{sizes}{ioctls}int main(void) {{ return 0; }}\n");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("program.c");
    std::fs::write(&file, program).unwrap();
    let include = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../guest-kernel/p2pmem/include/uapi");
    for standard in ["c11", "gnu17"] {
        let output = std::process::Command::new("gcc")
            .args(["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
            .arg(format!("-std={standard}"))
            .arg("-I")
            .arg(&include)
            .arg(&file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
