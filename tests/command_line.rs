//! The command line as its users drive it: statuses, streams, signals, and what it leaves behind.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use p2plab_tests::{HostShare, p2plab};
use rustix::process::{Pid, Signal, kill_process};

/// A command line that is about to start.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(p2plab());
    command.args(arguments);
    command
}

/// Runs it to its end.
pub fn run(arguments: &[&str]) -> Output {
    command(arguments).stdin(Stdio::null()).output().unwrap()
}

/// One of the example topologies.
pub fn topology(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../harness/topologies");
    folder.join(name).to_str().unwrap().to_owned()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The command's streams stay apart, its status becomes ours, and the SSDs are there when it begins.
#[test]
fn exec_passes_streams_and_status_on() {
    let _share = HostShare::take();
    let line = "echo out; echo err >&2; ls /dev/nvme0n1 /dev/nvme1n1; exit 7";
    let output = run(&["boot", &topology("one-switch.toml"), "--exec", line]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "out\n/dev/nvme0n1\n/dev/nvme1n1\n");
    let errors = text(&output.stderr);
    assert!(errors.lines().any(|line| line == "err"), "{errors}");
    // No terminal, no bars: whatever else is there is a plain line of ours.
    let plain = |line: &str| line == "err" || line.starts_with("p2plab: ");
    assert!(
        errors.lines().all(plain) && !errors.contains('\x1b'),
        "{errors}"
    );
}

/// A command ended by a signal gives 128 and its number; one that powers the guest off is no failure.
#[test]
fn exec_tells_of_signals_and_of_power_off() {
    let _share = HostShare::take();
    let one_switch = topology("one-switch.toml");
    let output = run(&["boot", &one_switch, "--exec", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    let output = run(&["boot", &one_switch, "--exec", "poweroff"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

/// Files arrive whole, with their permissions, wherever they are to be.
#[test]
fn files_are_put_with_their_permissions() {
    let _share = HostShare::take();
    let folder = tempfile::tempdir().unwrap();
    let mut puts = Vec::new();
    for (name, mode, guest) in [
        ("run", 0o755, "/usr/bin/mine"),
        ("a:b", 0o640, "/root/data"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\necho {name}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        puts.extend(["--put".to_owned(), format!("{}:{guest}", path.display())]);
    }
    let one_switch = topology("one-switch.toml");
    let mut arguments = vec!["boot", &one_switch];
    arguments.extend(puts.iter().map(String::as_str));
    arguments.extend([
        "--exec",
        "mine; stat -c %a /usr/bin/mine /root/data; tail -1 /root/data",
    ]);
    let output = run(&arguments);
    assert_eq!(
        text(&output.stdout),
        "run\n755\n640\necho a:b\n",
        "{}",
        text(&output.stderr)
    );
}

/// Ctrl-C and SIGTERM end a lab at once, at any stage, and leave no process and no socket.
#[test]
fn signals_end_a_lab_and_leave_nothing() {
    let _share = HostShare::take();
    let one_switch = topology("one-switch.toml");
    let stages = [
        (
            Signal::INT,
            130,
            ["--exec", "echo ready; sleep 600"],
            "ready",
        ),
        (
            Signal::TERM,
            143,
            ["--exec", "echo ready; sleep 600"],
            "ready",
        ),
        (
            Signal::TERM,
            143,
            ["--cold", "--exec=true"],
            "p2plab: booting",
        ),
    ];
    for (signal, status, options, stage) in stages {
        let mut arguments = vec!["boot", &one_switch];
        arguments.extend(options);
        let mut child = command(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        if stage == "ready" {
            await_line(child.stdout.take().unwrap(), stage);
        } else {
            await_line(child.stderr.take().unwrap(), stage);
        }
        // A child of the cold boot comes a moment after the line that announces it.
        let guests = within("QEMU", || {
            Some(children(&child)).filter(|all| !all.is_empty())
        });
        kill_process(Pid::from_child(&child), signal).unwrap();
        let code = within("its end", || child.try_wait().unwrap());
        assert_eq!(code.code(), Some(status), "{arguments:?}");
        for guest in guests {
            within("QEMU's end", || (!guest.exists()).then_some(()));
        }
    }
}

/// Every command has help, and a version is given.
#[test]
fn help_and_version() {
    let version = run(&["--version"]);
    assert!(text(&version.stdout).starts_with("p2plab 0."));
    let help = text(&run(&["--help"]).stdout);
    for name in ["run", "list", "boot", "serve", "fetch", "doctor", "clean"] {
        assert!(help.contains(&format!("\n  {name} ")), "{help}");
        let output = run(&[name, "--help"]);
        assert!(
            output.status.success() && output.stdout.len() > 60,
            "{name}"
        );
    }
    let list = text(&run(&["list"]).stdout);
    for name in ["nvram-copy ", "nvme-cmb-copy ", "nvme-pmr-copy "] {
        assert!(list.lines().any(|line| line.starts_with(name)), "{list}");
    }
}

/// A filled cache needs neither network nor apt-get; the doctor and fetch say what is in it.
#[test]
fn a_filled_cache_needs_no_network() {
    let offline = |arguments: &[&str]| {
        let nowhere = "http://127.0.0.1:1/debian";
        let mut command = command(arguments);
        command
            .env("PATH", "/nonexistent")
            .env("P2PLAB_MIRROR", nowhere);
        command.stdin(Stdio::null()).output().unwrap()
    };
    // Whoever comes first fills the cache.
    assert!(run(&["fetch"]).status.success());
    for (name, wanted) in [("fetch", "qemu "), ("doctor", "Nothing is missing.")] {
        let output = offline(&[name]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(
            text(&output.stdout).contains(wanted),
            "{}",
            text(&output.stdout)
        );
    }
}

/// A cache that a running p2plab uses is not pulled from under it.
#[test]
fn clean_refuses_a_cache_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    std::fs::create_dir_all(cache.join("artifacts/x")).unwrap();
    let user = std::fs::File::create(cache.join("in-use")).unwrap();
    rustix::fs::flock(&user, rustix::fs::FlockOperation::LockShared).unwrap();
    let clean = || {
        command(&["clean"])
            .env("P2PLAB_CACHE", &cache)
            .output()
            .unwrap()
    };
    let output = clean();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("is in use by another p2plab"));
    assert!(cache.join("artifacts/x").exists());
    drop(user);
    assert_eq!(clean().status.code(), Some(0));
    assert!(!cache.exists());
}

/// Waits for a line that begins so; what follows is read and thrown away, so that nobody blocks.
pub fn await_line(stream: impl std::io::Read + Send + 'static, start: &str) -> String {
    let mut lines = BufReader::new(stream).lines();
    let found = lines
        .by_ref()
        .map_while(Result::ok)
        .find(|line| line.starts_with(start));
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
    found.unwrap_or_else(|| panic!("no line begins with {start:?}"))
}

/// Looks until there is something, for at most a minute.
pub fn within<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited for {what}, in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The folders in /proc of its children.
fn children(process: &Child) -> Vec<PathBuf> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.id()))
        .into_iter()
        .flatten();
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            let pids = list.split_whitespace();
            pids.map(|pid| Path::new("/proc").join(pid))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// A cache on a full disk is found out before the guest boots, not when its image does not fit.
#[test]
fn a_base_image_needs_space() {
    let images = p2plab_images::Cache::open()
        .unwrap()
        .directory("base-images")
        .unwrap();
    let line = "mount -t tmpfs -o size=1m none \"$IMAGES\" || exit 77; exec \"$P2PLAB\" boot \"$TOPOLOGY\" --exec true";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", line])
        .env("P2PLAB", p2plab())
        .env("IMAGES", images)
        .env("TOPOLOGY", topology("one-switch.toml"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.code() == Some(77) || text(&output.stderr).contains("unshare:") {
        eprintln!("not tested: this host allows no user name spaces");
        return;
    }
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(
        errors.contains("no space for") && errors.contains("free about"),
        "{errors}"
    );
}
