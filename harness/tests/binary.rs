//! The command line's binary runs.
//!
//! Cargo builds a package's binaries for its integration tests: because of this file, `cargo test` builds the
//! binary that the scenarios in `tests/` run.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// It tells its version, and `list` names the scenario of the README.
#[test]
fn the_binary_tells_what_it_is() {
    let run = |argument| {
        let output = Command::new(env!("CARGO_BIN_EXE_p2plab"))
            .arg(argument)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run("--version").contains(env!("CARGO_PKG_VERSION")));
    assert!(run("list").contains("nvme-cmb-copy"));
}
