//! The interactive shell, driven as a person would.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use p2plab_tests::{HostShare, p2plab};
use rexpect::session::{PtySession, spawn_command};
use rustix::process::{Pid, Signal, kill_process};

use crate::command_line::{command, text, topology};

const PROMPT: &str = "p2plab:/# ";

/// A terminal in which a shell runs p2plab and then says its status and what state the terminal is in.
fn terminal() -> PtySession {
    let line = "\"$P2PLAB\" boot \"$TOPOLOGY\"; echo status=$?; stty -a | tr ';' '\\n'";
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    command
        .env("P2PLAB", p2plab())
        .env("TOPOLOGY", topology("one-switch.toml"));
    spawn_command(command, Some(180_000)).unwrap()
}

fn ends_well(mut terminal: PtySession) {
    terminal.exp_string("status=0").unwrap();
    let settings = terminal.exp_eof().unwrap();
    assert!(
        settings.contains(" icanon") && !settings.contains("-icanon"),
        "{settings}"
    );
}

/// A prompt, commands, and Ctrl-] to leave; the terminal is then as it was.
#[test]
fn a_person_uses_the_shell_and_leaves() {
    let _share = HostShare::take();
    let mut terminal = terminal();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_line("uname -r").unwrap();
    terminal.exp_regex("\n7\\.[0-9.]+").unwrap();
    terminal.send_line("lspci -d 1de5: | wc -l").unwrap();
    terminal.exp_regex("\n2\r").unwrap();
    // Ctrl-C is the guest's.
    terminal
        .send_line("sh -c 'echo be\"\"gun; sleep 600'")
        .unwrap();
    terminal.exp_string("\nbegun").unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string(PROMPT).unwrap();
    terminal.send_control(']').unwrap();
    ends_well(terminal);
}

/// `exit` and `poweroff` end the lab in order, too.
#[test]
fn exit_and_poweroff_end_the_lab() {
    let _share = HostShare::take();
    for last in ["exit", "poweroff"] {
        let mut terminal = terminal();
        terminal.exp_string(PROMPT).unwrap();
        terminal.send_line(last).unwrap();
        ends_well(terminal);
    }
}

/// What a program prints until it ends; one that does not is ended, and the test fails by its status.
fn output_within(child: Child, deadline: Duration) -> Output {
    let pid = Pid::from_child(&child);
    let (ended, end) = channel::<()>();
    let watch = std::thread::spawn(move || {
        if end.recv_timeout(deadline) == Err(RecvTimeoutError::Timeout) {
            // Nobody has waited for it, so the number is still its own.
            kill_process(pid, Signal::TERM).unwrap();
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    watch.join().unwrap();
    output
}

/// A script in a pipe is typed in; the pipe's end ends the shell, and that the lab.
#[test]
fn a_pipe_is_typed_in() {
    let _share = HostShare::take();
    let mut child = command(&["boot", &topology("one-switch.toml")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"echo $((6 * 7))\n")
        .unwrap();
    let output = output_within(child, Duration::from_secs(180));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(
        text(&output.stdout).contains("\n42\r"),
        "{}",
        text(&output.stdout)
    );
}
