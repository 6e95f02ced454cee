//! `p2plab serve`: switch and endpoints for a QEMU, or another client, that somebody starts by hand.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use p2plab_images::{Cache, Initramfs, InitramfsSpec, Overrides, Silent, resolve};
use p2plab_tests::HostShare;
use rustix::process::{Pid, Signal, kill_process};

use crate::bad_input::install;
use crate::command_line::{await_line, command, text, topology, within};

/// A child that does not outlive its test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server and what it printed at its start.
struct Served {
    process: Guard,
    stdout: BufReader<ChildStdout>,
    sockets: Vec<(String, PathBuf)>,
    qemu: String,
}

fn serve(arguments: &[&str]) -> Served {
    serve_topology("one-switch.toml", arguments)
}

fn serve_topology(name: &str, arguments: &[&str]) -> Served {
    let mut process = command(&["serve", &topology(name)])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map(Guard)
        .unwrap();
    let mut stdout = BufReader::new(process.0.stdout.take().unwrap());
    await_line(process.0.stderr.take().unwrap(), "p2plab: serving");
    // Both parts are there by now; the second ends with the line that is not continued.
    let (mut sockets, mut qemu) = (Vec::new(), String::new());
    for line in stdout.by_ref().lines().map(Result::unwrap) {
        if line.starts_with("qemu-system") || !qemu.is_empty() {
            qemu.push_str(&line);
            qemu.push('\n');
            if !line.ends_with('\\') {
                break;
            }
        } else if let Some((name, path)) = line.split_once(char::is_whitespace)
            && !line.starts_with('#')
        {
            sockets.push((name.to_owned(), path.trim().into()));
        }
    }
    Served {
        process,
        stdout,
        sockets,
        qemu,
    }
}

impl Served {
    /// Ends it as a person does, and returns what it prints then.
    fn end(mut self) -> String {
        kill_process(Pid::from_child(&self.process.0), Signal::INT).unwrap();
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        let status = within("the server's end", || self.process.0.try_wait().unwrap());
        assert_eq!(status.code(), Some(0));
        rest
    }
}

/// Another vfio-user client reads identity and a register; the accesses are in the traffic, as text and as
/// JSON, and the sockets vanish with the server.
#[test]
fn another_client_is_served_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("traffic.json");
    let arguments = [
        "--socket-dir",
        folder.path().to_str().unwrap(),
        "--json",
        json.to_str().unwrap(),
    ];
    let served = serve(&arguments);
    let names: Vec<&str> = served
        .sockets
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["ssd0", "ssd1"]);
    let socket = served.sockets[0].1.clone();
    assert_eq!(socket, folder.path().join("ssd0.sock"));

    let mut client = vfio_user::Client::new(&socket).unwrap();
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(id, [0xe5, 0x1d, 0x00, 0x20]);
    client.region_write(7, 4, &[2, 0]).unwrap();
    // NVMe: VS, version 1.4 or newer.
    client.region_read(0, 8, &mut id).unwrap();
    assert!(u32::from_le_bytes(id) >= 0x0001_0400, "{id:x?}");
    drop(client);

    let traffic = served.end();
    assert!(traffic.contains("# traffic"), "{traffic}");
    let document: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(document["schema_version"], 1);
    let ports = document["ports"].as_array().unwrap();
    let port = |name: &str| ports.iter().find(|port| port["name"] == name).unwrap();
    // Two reads of 4 bytes and a write came down to the SSD, and their completions went up.
    let completions = |name: &str| {
        let tally = &port(name)["egress"]["completion"];
        (tally["tlps"].as_u64(), tally["payload_bytes"].as_u64())
    };
    assert_eq!(completions("ssd0"), (Some(3), Some(8)));
    assert_eq!(completions("ssd1"), (Some(0), Some(0)));
    assert!(!socket.exists());
}

/// An NVRAM card beside the SSDs: registers, and memory that takes what is written.
#[test]
fn a_card_is_served_beside_ssds() {
    let served = serve_topology("nvram.toml", &[]);
    assert!(served.qemu.contains("nv0"), "{}", served.qemu);
    let (_, socket) = served
        .sockets
        .iter()
        .find(|(name, _)| name == "nv0")
        .unwrap();
    let mut client = vfio_user::Client::new(socket).unwrap();
    client.region_write(7, 4, &[2, 0]).unwrap();
    let mut word = [0; 4];
    client.region_read(0, 0, &mut word).unwrap();
    assert_eq!(&word, b"NVRM");
    client.region_write(4, (256 << 20) - 4, b"last").unwrap();
    client.region_read(4, (256 << 20) - 4, &mut word).unwrap();
    assert_eq!(&word, b"last");
    drop(client);
    // The write, and the requests and completions of the reads.
    let traffic = served.end();
    let line = traffic.lines().find(|line| line.starts_with("nv0 "));
    assert!(line.unwrap().contains("endpoint"), "{traffic}");
}

/// The printed command line, pasted into a shell and given something to boot, makes a guest whose kernel
/// binds both SSDs.
#[test]
fn the_printed_command_line_boots_a_guest() {
    let _share = HostShare::take();
    let cache = Cache::open().unwrap();
    let artifacts = resolve(&cache, &Overrides::default(), &mut Silent).unwrap();
    let spec = InitramfsSpec {
        modules: vec!["nvme".into()],
        ..InitramfsSpec::default()
    };
    let initramfs = Initramfs::build(&cache, &artifacts, &spec).unwrap();
    let folder = tempfile::tempdir().unwrap();
    install_qemu(folder.path(), &artifacts.qemu.argv_prefix);

    let served = serve(&[]);
    let line = format!(
        "exec {} -kernel '{}' -initrd '{}' -append 'console=ttyS0 rdinit=/init' -serial stdio",
        served.qemu.trim_end(),
        artifacts.kernel.image.display(),
        initramfs.display()
    );
    let path = format!(
        "{}:{}",
        folder.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut qemu = Command::new("sh")
        .args(["-c", &line])
        .env("PATH", path)
        .envs(artifacts.qemu.env.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map(Guard)
        .unwrap();
    let mut bound = 0;
    let console = BufReader::new(qemu.0.stdout.take().unwrap());
    let mut seen = Vec::new();
    for line in console.split(b'\n').map(Result::unwrap) {
        bound += u32::from(text(&line).contains("default/read/poll queues"));
        seen.extend(line);
        if bound == 2 {
            break;
        }
    }
    assert_eq!(bound, 2, "{}", text(&seen));
    qemu.0.kill().unwrap();
    qemu.0.wait().unwrap();

    let traffic = served.end();
    let ssd = traffic
        .lines()
        .find(|line| line.starts_with("ssd1 "))
        .unwrap();
    assert!(
        !ssd.contains(" 0            0                 0            0 "),
        "{traffic}"
    );
}

/// Makes the lab's QEMU what `qemu-system-x86_64` means for a shell with `folder` in its PATH.
fn install_qemu(folder: &Path, words: &[std::ffi::OsString]) {
    let mut script = "#!/bin/sh\nexec".to_owned();
    for word in words {
        script.push_str(&format!(" '{}'", word.to_str().unwrap()));
    }
    script.push_str(" \"$@\"\n");
    install(&folder.join("qemu-system-x86_64"), &script);
}
