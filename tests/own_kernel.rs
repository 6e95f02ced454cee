//! A kernel developer's own kernel; the lab's own, by its files, stands for it.

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
