//! Programs that we start to fetch and unpack: they die with us.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use crate::ArtifactError;

/// Makes the kernel kill the child when the thread that starts it ends, so that a killed p2plab leaves no
/// apt-get behind. Start and await the child on one thread.
pub(crate) fn dies_with_us(command: &mut Command) -> &mut Command {
    let parent = rustix::process::getpid();
    let hook = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died between fork and here; then no signal will ever come.
        if getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(
                rustix::io::Errno::SRCH.raw_os_error(),
            ));
        }
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec; it makes two system calls (prctl, getppid), allocates
    // nothing and takes no lock.
    unsafe { command.pre_exec(hook) }
}

/// Runs to the end with no input and in the C locale, and returns what it wrote.
///
/// # Errors
///
/// [`ArtifactError::ProgramMissing`] if there is no such program, [`ArtifactError::ProgramFailed`] if it could not
/// be started. A failing exit status is no error here.
pub(crate) fn output(command: &mut Command) -> Result<Output, ArtifactError> {
    output_with(command, Stdio::null())
}

/// The same with a standard input.
pub(crate) fn output_with(command: &mut Command, stdin: Stdio) -> Result<Output, ArtifactError> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("LC_ALL", "C");
    dies_with_us(command).output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ArtifactError::ProgramMissing { program },
        _ => ArtifactError::ProgramFailed {
            program,
            detail: e.to_string(),
        },
    })
}

/// Like [`output`], but a failing exit status is an error that says what `doing` was.
pub(crate) fn checked(command: &mut Command, doing: &str) -> Result<Output, ArtifactError> {
    let out = output(command)?;
    if out.status.success() {
        return Ok(out);
    }
    Err(ArtifactError::ProgramFailed {
        program: doing.to_owned(),
        detail: reason(&out),
    })
}

/// The line that says why a program failed: its last error line, else its exit status.
pub(crate) fn reason(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr);
    let lines = || text.lines().map(str::trim).filter(|l| !l.is_empty());
    let line = lines()
        .find(|l| l.starts_with("E: "))
        .or_else(|| lines().next_back());
    line.map_or_else(
        || out.status.to_string(),
        // It becomes part of a sentence of ours.
        |l| {
            let words: Vec<&str> = l
                .trim_start_matches("E: ")
                .split_ascii_whitespace()
                .collect();
            words.join(" ").trim_end_matches('.').to_owned()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Output {
        output(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn the_reason_is_apt_s_error_else_the_last_line_else_the_status() {
        assert_eq!(
            reason(&shell("echo 'E: Failed  to fetch x.' >&2; echo W: y >&2")),
            "Failed to fetch x"
        );
        assert_eq!(
            reason(&shell("echo first >&2; echo last >&2; echo >&2")),
            "last"
        );
        assert!(reason(&shell("exit 3")).contains('3'));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("p2plab-no-such-program")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("p2plab-no-such-program was not found")
        );
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let child = std::thread::spawn(|| {
            dies_with_us(Command::new("sleep").arg("600"))
                .spawn()
                .unwrap()
        });
        let mut child = child.join().unwrap();
        // Ends at once; a child that outlived its thread would hold the test for ten minutes.
        assert!(!child.wait().unwrap().success());
    }
}
