//! A kernel developer's own kernel; the lab's own, by its files, stands for it.

use std::os::unix::fs::symlink;

use p2plab_images::{Artifacts, Cache, Overrides, Silent, resolve};
use p2plab_tests::HostShare;

use crate::command_line::{run, text, topology};

fn artifacts() -> Artifacts {
    resolve(&Cache::open().unwrap(), &Overrides::default(), &mut Silent).unwrap()
}

/// With its modules, the guest is as complete as with the lab's kernel.
#[test]
fn an_own_kernel_with_its_modules() {
    let _share = HostShare::take();
    let kernel = artifacts().kernel;
    let (image, modules) = (kernel.image, kernel.modules.unwrap().path);
    let output = run(&[
        "boot",
        &topology("one-switch.toml"),
        "--kernel",
        image.to_str().unwrap(),
        "--modules",
        modules.to_str().unwrap(),
        "--exec",
        "uname -r; ls /dev/nvme1n1",
    ]);
    let expected = format!("{}\n/dev/nvme1n1\n", kernel.release);
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    assert!(
        !text(&output.stderr).contains("warning"),
        "{}",
        text(&output.stderr)
    );
}

/// Without them, the guest boots, and a sentence says what is missing and why.
#[test]
fn an_own_kernel_without_modules_is_warned_about() {
    let _share = HostShare::take();
    let kernel = artifacts().kernel;
    let image = kernel.image.to_str().unwrap();
    let one_switch = topology("one-switch.toml");
    let output = run(&["boot", &one_switch, "--kernel", image, "--exec", "uname -r"]);
    assert_eq!(
        text(&output.stdout).trim(),
        kernel.release,
        "{}",
        text(&output.stderr)
    );
    let errors = text(&output.stderr);
    assert!(
        errors.contains("has no nvme driver") && errors.contains("--modules"),
        "{errors}"
    );
}

/// Modules of ours for it are built in its tree, so that tree must be known, and be of that kernel.
#[test]
fn an_own_kernel_s_tree_must_be_known_and_its_own() {
    let kernel = artifacts().kernel;
    let folder = tempfile::tempdir().unwrap();
    let lab = folder.path().join("lab.toml");
    std::fs::write(
        &lab,
        "name = \"own\"\n[guest]\nown_modules = [\"p2pmem\"]\n[[root_port]]\nname = \"rp0\"\n",
    )
    .unwrap();
    // The modules, and the link that `make modules_install` leaves beside them.
    let modules = folder.path().join("modules");
    std::fs::create_dir(&modules).unwrap();
    for entry in std::fs::read_dir(kernel.modules.unwrap().path).unwrap() {
        let entry = entry.unwrap();
        symlink(entry.path(), modules.join(entry.file_name())).unwrap();
    }
    let refusal = || {
        let image = kernel.image.to_str().unwrap();
        let (lab, modules) = (lab.to_str().unwrap(), modules.to_str().unwrap());
        let output = run(&[
            "boot",
            lab,
            "--kernel",
            image,
            "--modules",
            modules,
            "--exec",
            "true",
        ]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        text(&output.stderr)
    };
    let release = &kernel.release;
    let unknown = format!(
        "modules for the kernel {release} need its tree: give --kernel TREE/arch/x86/boot/bzImage, or a --modules folder \
         whose link `build` leads to it"
    );
    let said = refusal();
    assert!(said.contains(&unknown), "{said}");

    let tree = folder.path().join("tree");
    std::fs::create_dir_all(tree.join("include/config")).unwrap();
    for (file, contents) in [
        ("Makefile", ""),
        (".config", "CONFIG_X86_64=y\nCONFIG_PCI_P2PDMA=y\n"),
        ("Module.symvers", ""),
        ("include/config/kernel.release", "7.9.0-rc1+\n"),
    ] {
        std::fs::write(tree.join(file), contents).unwrap();
    }
    symlink(&tree, modules.join("build")).unwrap();
    let other = format!(
        "the headers in {} are of kernel 7.9.0-rc1+, and the modules are to run on {release}: give the headers of \
         {release}, or the kernel 7.9.0-rc1+",
        tree.canonicalize().unwrap().display()
    );
    let said = refusal();
    assert!(said.contains(&other), "{said}");
}
