//! What a lab leaves behind: its run directory, and nothing else.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use p2plab_tests::{HostShare, TestLab, p2plab, two_ssds};
use rustix::process::{Pid, Signal, kill_process};

use crate::patience::until;

/// Files of a run that booted and ended, markers aside.
const FILES: [&str; 7] = [
    "agent.jsonl",
    "cmdline.txt",
    "console.log",
    "counters.json",
    "device.log",
    "qemu.log",
    "topology.toml",
];

/// SIGKILL.
#[test]
fn a_killed_lab_leaves_nothing_behind() {
    leaves_nothing(Signal::KILL);
}

/// Ctrl-C.
#[test]
fn an_interrupted_lab_leaves_nothing_behind() {
    leaves_nothing(Signal::INT);
}

/// SIGTERM.
#[test]
fn a_terminated_lab_leaves_nothing_behind() {
    leaves_nothing(Signal::TERM);
}

/// Ends a command line that has a guest running by `signal`.
fn leaves_nothing(signal: Signal) {
    let _share = HostShare::take();
    let place = tempfile::tempdir().unwrap();
    let mut topology = two_ssds("ended").to_toml();
    topology.push('\n');
    fs::write(place.path().join("topology.toml"), topology).unwrap();
    let temporary = place.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let mut lab = Command::new(p2plab())
        .args(["boot", "topology.toml", "--exec", "echo running; sleep 600"])
        .current_dir(place.path())
        .env("TMPDIR", &temporary)
        .env("XDG_RUNTIME_DIR", &temporary)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    // Ends with the lab, should it fail: that closes the pipe.
    BufReader::new(lab.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "running\n");
    let family = descendants(lab.id());
    assert!(
        family.iter().any(|pid| is_qemu(*pid)),
        "no QEMU among {family:?}"
    );
    // The endpoints' sockets are the lab's own process's.
    let sockets = sockets_of(&[&[lab.id()], &family[..]].concat());
    kill_process(Pid::from_child(&lab), signal).unwrap();
    until("the command line to end", || {
        lab.try_wait().unwrap().is_some()
    });
    until("its children to end", || {
        family.iter().all(|pid| !is_alive(*pid))
    });
    assert_eq!(names(&temporary), [""; 0], "temporary files");
    assert_eq!(names(place.path()), ["tmp", "topology.toml"]);
    for socket in sockets {
        assert!(!Path::new(&socket).exists(), "socket {socket}");
    }
}

/// Not a test of its own: the process that the next test watches panic.
#[test]
#[ignore = "run by a_panicking_test_leaves_nothing_behind in a process of its own"]
fn helper_that_panics_with_a_lab() {
    let Some(folder) = std::env::var_os("P2PLAB_TEST_FOLDER") else {
        return;
    };
    let lab = TestLab::start("helper_that_panics_with_a_lab", two_ssds("panics"));
    let report = format!(
        "{}\n{}",
        lab.qemu().unwrap().child.pid(),
        lab.run_directory().display()
    );
    fs::write(Path::new(&folder).join("report"), report).unwrap();
    panic!("as tests do");
}

/// A test that fails while it owns a lab leaves no QEMU, says where the logs are, and marks them as failed.
#[test]
fn a_panicking_test_leaves_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let temporary = place.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let helper = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "cleanup::helper_that_panics_with_a_lab",
        ])
        .arg("--nocapture")
        .env("P2PLAB_TEST_FOLDER", place.path())
        .env("TMPDIR", &temporary)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (status, said) = wait_with_stderr(helper);
    assert_eq!(status, Some(101), "{said}");
    let report = fs::read_to_string(place.path().join("report")).unwrap();
    let (pid, run) = report.split_once('\n').unwrap();
    assert!(!is_alive(pid.parse().unwrap()), "QEMU {pid}");
    assert_eq!(names(&temporary), [""; 0], "temporary files");
    assert!(
        said.contains(&format!("the run's logs are in {run}")),
        "{said}"
    );
    assert_eq!(markers(Path::new(run)), ["failed"]);
    assert_run_files(Path::new(run));
}

/// The run directory of a lab that ended well has all its files, the endpoints' story among them, and the
/// marker says so.
#[test]
fn a_passed_run_is_on_record() {
    let lab = TestLab::start("a_passed_run_is_on_record", two_ssds("record"));
    let run = lab.run_directory().to_owned();
    assert_eq!(markers(&run), ["started"]);
    lab.guest().unwrap().nvme("ssd0").unwrap();
    lab.finish();
    assert_eq!(markers(&run), ["passed"]);
    assert_run_files(&run);
    let read = |name| fs::read_to_string(run.join(name)).unwrap();
    let command = read("cmdline.txt");
    for part in [
        "# The same lab again: p2plab boot topology.toml",
        ".mapped-ram",
        "vfio-user-pci",
        "qemu-system-x86_64",
    ] {
        assert!(command.contains(part), "no {part} in {command}");
    }
    assert!(
        read("console.log").contains("nvme nvme0"),
        "the guest found the SSD"
    );
    assert!(read("agent.jsonl").contains("\"hello\"") || read("agent.jsonl").contains("Hello"));
    let devices = read("device.log");
    assert!(
        devices.contains("LAB   ssd0 is served for sw0.0"),
        "{devices}"
    );
    assert!(devices.contains("p2plab_nvme"), "{devices}");
    let counters: serde_json::Value = serde_json::from_str(&read("counters.json")).unwrap();
    assert!(counters["traffic"]["ports"].is_array() && counters["devices"]["ssd1"].is_object());
}

/// A lab whose guest does not come up says where its logs are, and they say what the guest said.
#[test]
fn a_failed_start_names_its_logs() {
    let _share = HostShare::take();
    let folder = p2plab_tests::run_directory("a_failed_start_names_its_logs");
    let topology = p2plab::topology::Topology::builder("no-init")
        .root_port("rp0")
        .kernel_argument("rdinit=/nothing")
        .kernel_argument("init=/nothing")
        .build();
    let options = p2plab::lab::Lab::options(topology.unwrap()).cold(true);
    let error = options
        .run_directory(&folder)
        .start()
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("kernel panic in the guest"), "{error}");
    let place = format!("The logs are in {}", folder.display());
    assert!(error.ends_with(&place), "{error}");
    assert_eq!(markers(&folder), ["failed"]);
    let console = fs::read_to_string(folder.join("console.log")).unwrap();
    assert!(console.contains("Kernel panic - not syncing"));
}

fn assert_run_files(run: &Path) {
    for file in FILES {
        assert!(
            run.join(file).is_file(),
            "{file} is missing in {}",
            run.display()
        );
    }
}

fn markers(run: &Path) -> Vec<String> {
    let mut names = names(run);
    names.retain(|name| ["started", "passed", "failed"].contains(&name.as_str()));
    names
}

/// Sorted names of what is in `folder`.
fn names(folder: &Path) -> Vec<String> {
    let name =
        |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(name).collect();
    names.sort();
    names
}

fn wait_with_stderr(mut child: Child) -> (Option<i32>, String) {
    let mut said = String::new();
    // To its end: the child's, and that of all who inherited the pipe.
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    let status = child.wait().unwrap();
    (status.code(), said)
}

/// State and parent of process `pid`, from /proc/PID/stat (proc(5)): `PID (NAME) STATE PARENT ...`.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// A zombie is dead: nothing of it is left but its status, and a container's init may never ask for that.
fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| !['Z', 'X'].contains(&state))
}

fn is_qemu(pid: u32) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains("qemu-system")
}

/// Children of `pid`, theirs, and so on.
fn descendants(pid: u32) -> Vec<u32> {
    let numbers = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let all: Vec<(u32, u32)> = numbers
        .filter_map(|pid| Some((pid, stat(pid)?.1)))
        .collect();
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        let children = all.iter().filter(|(_, above)| *above == parent);
        family.extend(children.map(|(pid, _)| *pid));
        next += 1;
    }
    family.split_off(1)
}

/// Paths of the sockets in the file system that processes `pids` hold: from /proc/net/unix, by inode.
fn sockets_of(pids: &[u32]) -> Vec<String> {
    let mut inodes = Vec::new();
    for pid in pids {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        inodes.extend(targets.map(|path: PathBuf| path.to_string_lossy().into_owned()));
    }
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let path = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (inode, path) = (words.get(6)?, words.get(7)?);
        let ours = inodes.contains(&format!("socket:[{inode}]")) && path.starts_with('/');
        ours.then(|| (*path).to_owned())
    };
    table.lines().filter_map(path).collect()
}
