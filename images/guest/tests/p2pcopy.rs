//! p2pcopy on ordinary files of the build directory, whose file system mostly has O_DIRECT.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output};

use p2plab_guest::pattern;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("p2pcopy-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn p2pcopy(options: &str, places: [&str; 2]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_p2pcopy"))
        .args(options.split_whitespace())
        .args(places)
        .output()
        .unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn copies_every_byte_with_threads_and_depth() {
    let folder = Folder::new("copy");
    // The last chunk is shorter than the others.
    let mut bytes = vec![0; (1 << 20) + 512];
    pattern::fill(3, 0, &mut bytes);
    let (from, to) = (folder.file("from", &bytes), folder.path("to"));
    let output = p2pcopy("--chunk 64KiB --threads 3 --depth 4 --json", [&from, &to]);
    let report = json(&output);
    assert_eq!(report["bytes"], bytes.len());
    assert_eq!(report["verified"], serde_json::Value::Null);
    assert!(report["bytes_per_second"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read(&to).unwrap() == bytes);
}

#[test]
fn a_file_can_be_the_buffer_as_p2pmem_is() {
    let folder = Folder::new("buffer");
    let buffer = folder.file("buffer", &vec![0; 64 << 10]);
    let (from, to) = (folder.file("from", &vec![1; 1 << 20]), folder.path("to"));
    let options = format!("--buffer {buffer} --chunk 16KiB --depth 4 --check --json");
    let report = json(&p2pcopy(&options, [&from, &to]));
    assert_eq!(
        (&report["verified"], &report["buffer"]),
        (&true.into(), &buffer.into())
    );
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
}

#[test]
fn offsets_place_the_copy_and_check_seeds_only_its_range() {
    let folder = Folder::new("offsets");
    let (from, to) = (
        folder.file("from", &vec![1; 1 << 20]),
        folder.file("to", &vec![2; 1 << 20]),
    );
    let options = "--source-offset 128KiB --destination-offset 512KiB --size 192KiB --chunk 64KiB \
                   --check --seed 8 --json";
    assert_eq!(json(&p2pcopy(options, [&from, &to]))["verified"], true);
    let (from, to) = (std::fs::read(from).unwrap(), std::fs::read(to).unwrap());
    let part = 128 << 10..320 << 10;
    assert_eq!(pattern::verify(8, 128 << 10, &from[part.clone()]), None);
    assert!(
        from[..part.start]
            .iter()
            .chain(&from[part.end..])
            .all(|byte| *byte == 1)
    );
    assert!(to[512 << 10..704 << 10] == from[part]);
    assert!(
        to[..512 << 10]
            .iter()
            .chain(&to[704 << 10..])
            .all(|byte| *byte == 2)
    );
}

#[test]
fn a_difference_is_found_with_its_place() {
    let folder = Folder::new("differs");
    let mut bytes = vec![0; 1 << 20];
    pattern::fill(4, 0, &mut bytes);
    bytes[700_001] ^= 1;
    let (from, to) = (folder.file("from", &bytes), folder.path("to"));
    let output = p2pcopy("--check --seeded --seed 4 --json", [&from, &to]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["verified"], &report["mismatch"]),
        (&false.into(), &700_001.into())
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("700001"));
}

#[test]
fn skipping_leaves_the_other_side_alone() {
    let folder = Folder::new("skip");
    let (from, to) = (
        folder.file("from", &vec![1; 1 << 20]),
        folder.file("to", &vec![2; 1 << 20]),
    );
    json(&p2pcopy("--skip-write --json", [&from, &to]));
    assert!(std::fs::read(&to).unwrap().iter().all(|byte| *byte == 2));
    json(&p2pcopy("--skip-read --json --count 1", [&from, &to]));
    assert!(std::fs::read(&to).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn failures_say_what_and_where() {
    let folder = Folder::new("fail");
    let (from, to) = (folder.file("from", &vec![1; 1 << 20]), folder.path("to"));
    let missing = folder.path("missing");
    for (options, places, code, words) in [
        (
            "",
            [missing.as_str(), to.as_str()],
            1,
            "missing: No such file",
        ),
        ("--chunk 1000", [&from, &to], 2, "logical block size of 512"),
        ("--size 1GiB", [&from, &to], 2, "only 1048576 are there"),
        ("--offset 1MiB", [&from, &to], 2, "none at offset 1048576"),
        (
            "--buffer /no/p2pmem/allocate",
            [&from, &to],
            1,
            "has no p2pmem",
        ),
        ("--buffer", [&from, &to], 2, "SOURCE and DESTINATION"),
    ] {
        let output = p2pcopy(options, places);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{options}: {said}");
        assert!(said.contains(words), "{options}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}
