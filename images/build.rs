//! Builds the guest's programs, static and optimised, with a cargo of its own, so that they can be embedded.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The guest runs x86-64 whatever the host is.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROGRAMS: [&str; 4] = ["p2plab-agent", "p2pcopy", "iobench", "p2pmemtest"];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for input in [
        "build.rs",
        "guest/src",
        "guest/Cargo.toml",
        "../Cargo.toml",
        "../Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", here.join(input).display());
    }
    // A target directory of its own: the outer cargo holds the lock of the usual one.
    let target = out.join("guest");
    build(&here, &target);
    for name in PROGRAMS {
        let program = target.join(TARGET).join("release").join(name);
        assert!(program.is_file(), "crate p2plab-guest built no {name}");
        let variable = name.replace('-', "_").to_uppercase();
        println!("cargo:rustc-env={variable}={}", program.display());
    }
}

fn build(here: &Path, target: &Path) {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The outer cargo's settings (flags, wrappers such as clippy's, profile) are not for the guest; where
    // crates come from and the job server are.
    const KEPT: [&str; 5] = [
        "CARGO_HOME",
        "CARGO_MAKEFLAGS",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTRIES_",
    ];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let cargo_s = text.starts_with("CARGO") && !KEPT.iter().any(|k| text.starts_with(k));
        let rustc_s = text.starts_with("RUSTC") || text.starts_with("RUSTDOC");
        if cargo_s || rustc_s || text == "RUSTFLAGS" {
            cargo.env_remove(&name);
        }
    }
    cargo
        .current_dir(here.join(".."))
        .args([
            "build",
            "--release",
            "--locked",
            "--quiet",
            "--package",
            "p2plab-guest",
            "--bins",
        ])
        .args(["--target", TARGET, "--target-dir"])
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        // Small programs: what counts is how soon they are built and how small the initramfs stays.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "2")
        .env("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_OPT_LEVEL", "0");
    // The outer build has fetched all that the lock file names for these programs: no network is needed.
    if !env::var("CARGO_NET_OFFLINE").is_ok_and(|v| v == "false") {
        cargo.arg("--offline");
    }
    let status = cargo.status().expect("cargo starts");
    assert!(
        status.success(),
        "the guest's programs do not build (see above)"
    );
}
