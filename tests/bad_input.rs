//! Bad input: one sentence that says what is wrong and how to mend it, exit status 2, no backtrace.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::command_line::{command, run, text, topology};

/// The refusal has all these parts.
fn refused(output: &Output, parts: &[&str]) {
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    for part in parts {
        assert!(errors.contains(part), "no {part:?} in: {errors}");
    }
    for noise in ["panicked", "backtrace", "RUST_BACKTRACE", "Error {"] {
        assert!(!errors.contains(noise), "{errors}");
    }
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

/// Boots a topology with these lines in the place of the guest's and the second SSD's.
fn boot(guest: &str, endpoint: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lab.toml");
    let text = format!(
        "name = \"t\"\n[guest]\n{guest}\n[[root_port]]\nname = \"rp0\"\n[[endpoint]]\nname = \"ssd0\"\nport = \
         \"rp0\"\n{endpoint}\n"
    );
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    run(&[&["boot", file, "--exec", "true"], arguments].concat())
}

const SSD: &str = "device = \"nvme\"\nsize = \"16MiB\"";

fn boot_with(arguments: &[&str]) -> Output {
    boot("", SSD, arguments)
}

#[test]
fn mistyped_names_get_the_nearest_valid_ones() {
    refused(
        &run(&["run", "nvme-cbm-copy"]),
        &["`nvme-cbm-copy`", "did you mean `nvme-cmb-copy`?"],
    );
    refused(&run(&["boott"]), &["'boott'", "'boot'"]);
    refused(
        &run(&["run", "nvme-cmb-copy", "--sise", "1GiB"]),
        &["'--sise'", "'--size'"],
    );
    refused(
        &boot("", "device = \"nvm\"\nsize = \"1MiB\"", &[]),
        &["lab.toml:9:10", "`nvm`", "nvme"],
    );
    refused(
        &boot("memroy = \"1GiB\"", SSD, &[]),
        &["lab.toml:3:1", "`memroy`", "`memory`"],
    );
    refused(
        &boot("", "device = \"nvme\"\nsiez = \"1MiB\"", &[]),
        &["lab.toml:10:1", "`siez`", "`size`"],
    );
}

#[test]
fn a_topology_that_cannot_be_read_is_named_with_its_place() {
    refused(
        &run(&["boot", "no/such.toml"]),
        &["no/such.toml", "cannot read the topology"],
    );
    refused(&boot("memory = = 3", SSD, &[]), &["lab.toml:3:10", "TOML"]);
    refused(&run(&["serve", "no/such.toml"]), &["no/such.toml"]);
}

#[test]
fn a_backing_file_must_be_there_and_large_enough() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    let ssd = format!(
        "device = \"nvme\"\nsize = \"16MiB\"\nfile = \"{}\"",
        file.display()
    );
    refused(
        &boot("", &ssd, &[]),
        &[
            "`ssd0`",
            "does not exist",
            "truncate -s 16777216",
            "create = true",
        ],
    );
    std::fs::write(&file, [0; 4096]).unwrap();
    refused(
        &boot("", &ssd, &[]),
        &[
            "`ssd0`",
            "has 4KiB, 16MiB are needed",
            "truncate -s 16777216",
        ],
    );
}

#[test]
fn a_guest_larger_than_the_host_is_refused() {
    refused(
        &boot("memory = \"1TiB\"", SSD, &[]),
        &["of memory", "guest.memory"],
    );
    refused(
        &run(&["run", "nvme-cmb-copy", "--size", "8TiB"]),
        &["of memory", "--size"],
    );
}

#[test]
fn sizes_that_make_no_copy_are_refused() {
    let table: [(&[&str], &str); 6] = [
        (&["--size", "0"], "--size 0"),
        (&["--chunk", "0"], "--chunk 0"),
        (
            &["--size", "1GiB", "--chunk", "3MiB"],
            "not a multiple of the chunk",
        ),
        (
            &["--size", "4MiB", "--chunk", "8MiB"],
            "not a multiple of the chunk",
        ),
        (&["--chunk", "1000"], "not a multiple of 4KiB"),
        (&["--size", "much"], "`much` is not a size"),
    ];
    for (options, part) in table {
        refused(
            &run(&[&["run", "nvme-cmb-copy"], options].concat()),
            &[part],
        );
    }
}

#[test]
fn buffers_that_no_copy_has_are_refused() {
    refused(
        &run(&["run", "nvme-cmb-copy", "--buffer", "fourth"]),
        &["'fourth'", "source, destination, third"],
    );
    refused(
        &run(&["run", "nvram-copy", "--buffer", "third"]),
        &["leave --buffer out"],
    );
    // More than the largest card has.
    refused(
        &run(&["run", "nvram-copy", "--size", "16GiB", "--chunk", "4GiB"]),
        &[
            "chunks of 4GiB for each of 2 thread(s), 4 at a time, are more than the 4GiB of buffers",
            "give a smaller --chunk, --threads or --depth",
        ],
    );
}

#[test]
fn nvram_cards_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("card");
    let card = |more: &str| format!("device = \"nvram\"\nsize = \"64MiB\"\n{more}");
    let on_file = card(&format!("file = \"{}\"", file.display()));
    refused(
        &boot("", &on_file, &[]),
        &["`ssd0`", "does not exist", "truncate -s 67108864"],
    );
    std::fs::write(&file, [0; 4096]).unwrap();
    refused(
        &boot("", &on_file, &[]),
        &["has 4KiB, 64MiB are needed", "truncate -s 67108864"],
    );
    refused(
        &boot("", &card("io_queues = 3"), &[]),
        &[
            "lab.toml:11:1",
            "an nvram endpoint has no field `io_queues`",
        ],
    );
    refused(
        &boot("window = \"32MiB\"", &card(""), &[]),
        &[
            "does not fit into a window of 32MiB",
            "set `window = \"64MiB\"`",
        ],
    );
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let missing = "/nonexistent/report.json";
    refused(
        &run(&["run", "nvme-cmb-copy", "--json", missing]),
        &[missing, "No such file"],
    );
    let one_switch = topology("one-switch.toml");
    refused(
        &run(&["serve", &one_switch, "--json", missing]),
        &[missing, "No such file"],
    );
    refused(
        &run(&["serve", &one_switch, "--socket-dir", "/nonexistent"]),
        &["is no folder", "make it"],
    );
}

#[test]
fn files_to_put_are_checked_before_the_start() {
    refused(&boot_with(&["--put", "file"]), &["HOST:GUEST"]);
    refused(
        &boot_with(&["--put", "/nonexistent:/root/x"]),
        &["/nonexistent cannot be read"],
    );
    refused(
        &boot_with(&["--put", "/etc:/root/x"]),
        &["is no file", "tar"],
    );
    refused(
        &boot_with(&["--put", "/etc/passwd:/root/"]),
        &["is a folder", "/root/test"],
    );
}

/// Makes an executable of `text`. By a process of its own: a child that another thread forks meanwhile would hold a
/// file that we write open, and it could not be executed (ETXTBSY).
pub fn install(path: &Path, text: &str) {
    let mut shell = Command::new("sh")
        .args(["-c", "rm -f \"$0\" && cat > \"$0\" && chmod 755 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    shell
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    assert!(shell.wait().unwrap().success());
}

/// An executable script.
fn script(path: &Path, body: &str) {
    install(path, &format!("#!/bin/sh\n{body}\n"));
}

#[test]
fn a_qemu_that_cannot_run_a_lab_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qemu");
    let qemu = path.to_str().unwrap();
    refused(&boot_with(&["--qemu", qemu]), &[qemu, "does not exist"]);
    std::fs::write(&path, "text").unwrap();
    refused(
        &boot_with(&["--qemu", qemu]),
        &[qemu, "does not start (Permission denied", "leave it out"],
    );
    script(
        &path,
        "case $1 in --version) echo QEMU emulator version 11.0.0;; esac",
    );
    refused(
        &boot_with(&["--qemu", qemu]),
        &[qemu, "has no vfio-user-pci", "11.1 or newer"],
    );
    let doctor = run(&["doctor", "--qemu", qemu]);
    assert_eq!(doctor.status.code(), Some(2));
    assert!(
        text(&doctor.stdout).contains("has no vfio-user-pci"),
        "{}",
        text(&doctor.stdout)
    );
}

/// A file with the header of a bzImage (Documentation/arch/x86/boot.rst) of release 7.9.0.
fn fake_kernel(folder: &Path) -> PathBuf {
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x300..0x306].copy_from_slice(b"7.9.0 ");
    let path = folder.join("bzImage");
    std::fs::write(&path, image).unwrap();
    path
}

#[test]
fn a_kernel_that_cannot_run_a_lab_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = fake_kernel(folder.path());
    let kernel = kernel.to_str().unwrap();
    let config = folder.path().join("config");
    std::fs::write(&config, "CONFIG_X86_64=y\n# CONFIG_PCI_P2PDMA is not set\n").unwrap();
    refused(
        &boot_with(&["--kernel", kernel]),
        &[kernel, "has no P2PDMA", "CONFIG_PCI_P2PDMA=y"],
    );
    let passwd = "/etc/passwd";
    refused(
        &boot_with(&["--kernel", passwd]),
        &[passwd, "not a bootable x86 kernel", "bzImage"],
    );
    std::fs::write(&config, "").unwrap();
    refused(
        &boot_with(&[
            "--kernel",
            kernel,
            "--modules",
            folder.path().to_str().unwrap(),
        ]),
        &["holds no kernel modules", "modules_install"],
    );
    refused(
        &boot_with(&["--modules", "/tmp"]),
        &["`modules` needs `kernel`"],
    );
}

fn fetch_with(cache: &Path, path: &str) -> Output {
    command(&["fetch"])
        .env("P2PLAB_CACHE", cache)
        .env("PATH", path)
        .env("P2PLAB_MIRROR", "http://127.0.0.1:1/debian")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn an_empty_cache_needs_apt_get_and_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let empty = folder.path().to_str().unwrap();
    refused(
        &fetch_with(&cache, empty),
        &["apt-get was not found", "P2PLAB_CACHE"],
    );
    let doctor = command(&["doctor"])
        .env("P2PLAB_CACHE", &cache)
        .env("PATH", empty)
        .output()
        .unwrap();
    assert_eq!(doctor.status.code(), Some(2));
    assert!(text(&doctor.stdout).contains("apt-get was not found"));
    let path = std::env::var("PATH").unwrap();
    refused(
        &fetch_with(&cache, &path),
        &["http://127.0.0.1:1/debian", "network", "P2PLAB_MIRROR"],
    );
    // Nothing half-done stays behind.
    let left = std::fs::read_dir(&cache).unwrap().flatten();
    assert!(
        left.into_iter()
            .all(|e| !e.file_name().to_string_lossy().starts_with("tmp-"))
    );
}

/// A disk of one megabyte, in a name space of its own where such a thing needs no root.
#[test]
fn a_full_disk_is_said_so() {
    let folder = tempfile::tempdir().unwrap();
    let line =
        "mount -t tmpfs -o size=1m none \"$P2PLAB_CACHE\" || exit 77; exec \"$P2PLAB\" fetch";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", line])
        .env("P2PLAB", p2plab_tests::p2plab())
        .env("P2PLAB_CACHE", folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.code() == Some(77) || text(&output.stderr).contains("unshare:") {
        eprintln!("not tested: this host allows no user name spaces");
        return;
    }
    refused(&output, &["no space for", "free about", "P2PLAB_CACHE"]);
}
