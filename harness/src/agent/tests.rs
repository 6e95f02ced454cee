//! The client against the agent's own request loop, over a socket pair instead of a guest.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use p2plab_guest::children::{Children, Reaping};
use p2plab_guest::protocol::ErrorKind;
use p2plab_guest::server::Server;

use super::*;

/// Generous: the tests share two cores with builds.
const SOON: Duration = Duration::from_secs(20);

fn server() -> (Arc<Server>, Receiver<Power>) {
    let (ended, powers) = channel();
    let ended = Mutex::new(ended);
    let children = Children::new(Reaping::Own).unwrap();
    let shutdown = Box::new(move |power| ended.lock().unwrap().send(power).unwrap());
    let failed = vec![ModuleFailure {
        path: "/lib/x.ko".into(),
        error: "no".into(),
    }];
    (
        Arc::new(Server::new(children, failed, shutdown).unwrap()),
        powers,
    )
}

fn connect(server: &Arc<Server>) -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    let server = Arc::clone(server);
    std::thread::spawn(move || {
        server.set_writer(Box::new(guest.try_clone().unwrap()));
        let _ = server.serve(guest);
    });
    host
}

fn client() -> AgentClient {
    let (server, _) = server();
    let client = AgentClient::new(connect(&server)).unwrap();
    client.hello(SOON).unwrap();
    client
}

#[test]
fn hello_and_ping_tell_the_state() {
    let client = client();
    let status = client.ping(SOON).unwrap();
    assert!(!status.boot_id.is_empty() && status.uptime_ms > 0);
    assert_eq!(status.failed_modules.len(), 1);
}

#[test]
fn output_streams_are_apart_and_the_status_is_told() {
    let client = client();
    let output = client
        .run(
            &Command::shell("echo out $A; pwd; echo err >&2; exit 3")
                .env("A", "b")
                .current_dir("/tmp"),
        )
        .unwrap();
    assert_eq!(output.text(), "out b\n/tmp\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.status, Exit::Status(3));
    assert!(client.run(&Command::new("true")).unwrap().status.success());
    let failed = client
        .check(&Command::shell("echo why >&2; false"))
        .unwrap_err()
        .to_string();
    assert!(failed.contains("exit status 1: why"), "{failed}");
    let killed = client.run(&Command::shell("kill -9 $$")).unwrap();
    assert_eq!(killed.status, Exit::Signal(9));
}

#[test]
fn input_reaches_the_command_and_ends() {
    let client = client();
    let input = vec![b'x'; 30_000];
    assert_eq!(
        client
            .run(&Command::new("cat").stdin(input.clone()))
            .unwrap()
            .stdout,
        input
    );
    // The command that closes its input early is no failure.
    assert!(
        client
            .run(&Command::new("true").stdin(input))
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn a_missing_program_is_an_error_of_the_guest() {
    let error = client().run(&Command::new("/no/such/program")).unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Guest {
                kind: ErrorKind::System,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("/no/such/program"), "{error}");
}

#[test]
fn the_deadline_kills_the_whole_group() {
    let client = client();
    let begun = Instant::now();
    let mut pids = String::new();
    let command =
        Command::shell("sleep 1000 & echo $!; sleep 1000").deadline(Duration::from_millis(300));
    let exit = client
        .run_streaming(&command, |_, bytes| {
            pids.push_str(&String::from_utf8_lossy(bytes))
        })
        .unwrap();
    assert_eq!(exit, Exit::Deadline);
    assert!(begun.elapsed() < SOON);
    let stat = format!("/proc/{}/stat", pids.trim());
    let until = Instant::now() + SOON;
    // Killed, it is gone or a zombie of whoever adopts orphans here.
    while std::fs::read_to_string(&stat).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(
            Instant::now() < until,
            "the background process {pids} survived the deadline"
        );
        std::thread::yield_now();
    }
    let error = client.run(&command).unwrap_err();
    assert!(matches!(error, AgentError::Deadline { .. }), "{error}");
}

#[test]
fn a_process_left_behind_does_not_hold_the_end_back() {
    let client = client();
    let begun = Instant::now();
    let output = client.run(&Command::shell("yes & echo $! >&2")).unwrap();
    assert_eq!(output.status, Exit::Status(0));
    assert!(begun.elapsed() < SOON);
    let _ = client.run(&Command::shell(format!("kill {}", output.error_text())));
}

#[test]
fn kill_reaches_a_running_command_and_ping_is_answered_meanwhile() {
    let client = client();
    let running = client.start(&Command::new("sleep").arg("1000")).unwrap();
    assert_eq!(client.ping(SOON).unwrap().running, 1);
    running.kill(15).unwrap();
    assert_eq!(running.wait(|_, _| ()).unwrap(), Exit::Signal(15));
    let error = running.kill(15).unwrap_err();
    assert!(
        matches!(
            error,
            AgentError::Guest {
                kind: ErrorKind::NotFound,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn commands_run_side_by_side() {
    let client = client();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let client = &client;
            scope.spawn(move || {
                let output = client
                    .run(&Command::shell(format!("seq {number} 2000")))
                    .unwrap();
                let lines = output.text().lines().count();
                assert_eq!(lines, 2001 - number);
            });
        }
    });
}

#[test]
fn a_flood_is_whole_and_bounded() {
    let client = client();
    let mut total = 0u64;
    let command = Command::shell("head -c 20000000 /dev/zero");
    client
        .run_streaming(&command, |_, bytes| total += bytes.len() as u64)
        .unwrap();
    assert_eq!(total, 20_000_000);
    let error = client
        .run(&Command::new("yes").output_limit(100_000))
        .unwrap_err();
    assert!(matches!(error, AgentError::TooMuchOutput { .. }), "{error}");
    assert!(client.ping(SOON).is_ok());
}

#[test]
fn files_go_there_and_back() {
    let client = client();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sub/file").display().to_string();
    for size in [0usize, 1, 32 * 1024, 32 * 1024 + 1, 700_001] {
        let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        client.put(&bytes, &path, 0o751, SOON).unwrap();
        assert_eq!(client.get(&path, usize::MAX, SOON).unwrap(), bytes);
    }
    assert_eq!(client.get(&path, 10, SOON).unwrap().len(), 10);
    let entries = client
        .list(&format!("{}/sub", directory.path().display()), SOON)
        .unwrap();
    let [entry] = entries.as_slice() else {
        panic!("{entries:?}")
    };
    assert_eq!((entry.name.as_str(), entry.kind), ("file", EntryKind::File));
    assert_eq!((entry.size, entry.mode), (700_001, 0o751));
    let copy = directory.path().join("copy").display().to_string();
    client
        .put_file(std::path::Path::new(&path), &copy, 0o600, SOON)
        .unwrap();
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&path).unwrap());
    assert!(client.get("/no/such/file", 1, SOON).is_err());
    assert!(client.get("/proc/self/stat", 4096, SOON).unwrap().len() > 10);
}

#[test]
fn a_large_directory_comes_in_parts() {
    let client = client();
    let directory = tempfile::tempdir().unwrap();
    for number in 0..350 {
        std::fs::write(directory.path().join(format!("{number:03}")), "").unwrap();
    }
    let entries = client
        .list(&directory.path().display().to_string(), SOON)
        .unwrap();
    assert_eq!(entries.len(), 350);
    assert_eq!(entries[349].name, "349");
}

#[test]
fn bad_lines_get_an_error_and_the_agent_lives() {
    let (server, _) = server();
    let mut stream = connect(&server);
    let mut replies = BufReader::new(stream.try_clone().unwrap()).lines();
    let long = vec![b'a'; 300 * 1024];
    for (line, expected) in [
        (&b"garbage"[..], "not a request"),
        (&b"{\"id\":5,\"request\":\"fly\"}"[..], "\"id\":5"),
        (&b"\xff\xfe\x00"[..], "not a request"),
        (&long[..], "longer than"),
        (&b"{\"id\":0,\"request\":\"ping\"}"[..], "reserved"),
        (&b"{\"id\":6,\"request\":\"ping\"}"[..], "pong"),
    ] {
        stream.write_all(line).unwrap();
        stream.write_all(b"\n").unwrap();
        let reply = replies.next().unwrap().unwrap();
        assert!(reply.contains(expected), "{reply}");
    }
}

#[test]
fn another_host_begins_anew() {
    let (server, _) = server();
    let first = AgentClient::new(connect(&server)).unwrap();
    first.hello(SOON).unwrap();
    let flood = first.start(&Command::new("yes")).unwrap();
    drop(flood);
    drop(first);
    let second = AgentClient::new(connect(&server)).unwrap();
    let status = second.hello(SOON).unwrap().status;
    assert_eq!(status.running, 0, "the first host's command was killed");
    assert_eq!(
        second.run(&Command::new("echo").arg("hi")).unwrap().text(),
        "hi\n"
    );
}

#[test]
fn hello_on_the_same_stream_drops_what_was_under_way() {
    let client = client();
    let flood = client.start(&Command::new("yes")).unwrap();
    client.hello(SOON).unwrap();
    assert_eq!(
        client.run(&Command::new("echo").arg("hi")).unwrap().text(),
        "hi\n"
    );
    let error = flood.wait(|_, _| ()).unwrap_err();
    assert!(matches!(error, AgentError::Lost { .. }), "{error}");
}

#[test]
fn stale_bytes_are_ignored_until_the_matching_hello() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let client = AgentClient::new(host).unwrap();
    let agent = std::thread::spawn(move || {
        guest
            .write_all(b"lf of a line\"}\n{\"id\":1,\"reply\":\"done\"}\n")
            .unwrap();
        let mut lines = BufReader::new(guest.try_clone().unwrap()).lines();
        let mut hello = lines.next().unwrap().unwrap();
        if hello.is_empty() {
            hello = lines.next().unwrap().unwrap();
        }
        let hello: serde_json::Value = serde_json::from_str(&hello).unwrap();
        let reply = |nonce: &str| {
            let status = serde_json::json!({"version": "1", "boot_id": nonce, "kernel": "k",
                "uptime_ms": 1, "running": 0});
            serde_json::json!({"id": hello["id"], "reply": {"hello": {"nonce": nonce,
                "protocol": 1, "status": status}}})
        };
        let nonce = hello["request"]["hello"]["nonce"].as_str().unwrap();
        writeln!(
            guest,
            "{}\n{}",
            reply("of another conversation"),
            reply(nonce)
        )
        .unwrap();
        nonce.to_owned()
    });
    let hello = client.hello(SOON).unwrap();
    assert_eq!(hello.status.boot_id, agent.join().unwrap());
}

#[test]
fn failing_ends_every_wait_at_once_with_the_reason() {
    let client = client();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.run(&Command::new("sleep").arg("1000")));
        while client.ping(SOON).unwrap().running == 0 {}
        client.fail("kernel panic on the console");
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the guest agent is lost: kernel panic on the console"
        );
    });
    let error = client.ping(SOON).unwrap_err();
    assert!(error.to_string().contains("kernel panic"), "{error}");
    client.hello(SOON).unwrap();
    assert_eq!(client.ping(SOON).unwrap().running, 0);
}

#[test]
fn a_guest_lost_before_the_conversation_is_not_waited_for() {
    let client = client();
    client.fail("kernel panic on the console");
    let begun = Instant::now();
    let lost = || Some("kernel panic on the console".into());
    let error = client.hello_unless(SOON, lost).unwrap_err();
    assert!(matches!(error, AgentError::Lost { .. }), "{error}");
    assert!(begun.elapsed() < SOON);
}

#[test]
fn a_closed_port_and_a_silent_agent_are_told_apart() {
    let (host, guest) = UnixStream::pair().unwrap();
    let client = AgentClient::new(host).unwrap();
    let error = client.ping(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, AgentError::Deadline { .. }), "{error}");
    drop(guest);
    let error = client.hello(SOON).unwrap_err();
    assert!(matches!(error, AgentError::Lost { .. }), "{error}");
}

#[test]
fn shutdown_is_acknowledged_and_then_done() {
    let (server, powers) = server();
    let client = AgentClient::new(connect(&server)).unwrap();
    client.hello(SOON).unwrap();
    client.shutdown(Power::Reboot, SOON).unwrap();
    assert_eq!(powers.recv_timeout(SOON).unwrap(), Power::Reboot);
}

#[test]
fn traffic_is_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("agent.jsonl");
    let (server, _) = server();
    let client = AgentClient::with_log(connect(&server), &log, || None).unwrap();
    client.hello(SOON).unwrap();
    client.ping(SOON).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(
        lines.iter().any(|line| line["to"]["request"] == "ping"),
        "{text}"
    );
    assert!(
        lines
            .iter()
            .any(|line| line["from"]["reply"]["pong"].is_object()),
        "{text}"
    );
}
