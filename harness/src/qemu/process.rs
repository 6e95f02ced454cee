//! A child process that dies with us, whose end everybody can wait for.
//!
//! The kernel sends a parent-death signal when the *thread* that forked the child ends, not the process
//! (prctl(2), PR_SET_PDEATHSIG). A test harness runs every test in a thread of its own, so children are
//! forked by one thread that lives as long as the process does: the spawner below. It ends with the
//! process, however that ends, SIGKILL included.
//!
//! QEMU is started through its own loader (`ld.so --library-path ... qemu-system-x86_64`): the loader maps
//! the program into itself without another exec, so the signal, the pid and the descriptors stay as set here.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::die_with_us;
use crate::wait::{self, Deadline, DeadlineExceeded, lock};

/// How many lines of a log an error message carries.
pub const TAIL_LINES: usize = 30;
/// How much of a log's end is read to find them.
const TAIL_BYTES: u64 = 16 << 10;

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The argument vector has no first element.
    #[error("cannot start {name}: there is no program to start")]
    Empty {
        /// What was to be started.
        name: String,
    },
    /// The log cannot be written.
    #[error("cannot write {name}'s log {}: {source}; is the folder there, and has it space?", path.display())]
    Log {
        /// What was to be started.
        name: String,
        /// The log.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host did not start it.
    #[error("cannot start {name} ({}): {source}", program.display())]
    Spawn {
        /// What was to be started.
        name: String,
        /// The program.
        program: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// Why there is no exit status.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// It is still running.
    #[error(transparent)]
    Deadline(#[from] DeadlineExceeded),
    /// The host would not say.
    #[error("cannot learn how a child ended: {0}")]
    Io(#[from] io::Error),
}

/// A child to be started.
#[derive(Debug)]
pub struct Spawn {
    /// What it is, for error messages: "QEMU".
    pub name: String,
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// Descriptors that it inherits under their present numbers; everything else is close-on-exec.
    pub inherit: Vec<OwnedFd>,
    /// Where its stdout and stderr go, appended. Its stdin is /dev/null.
    pub log: PathBuf,
}

impl Spawn {
    /// Starts it. Our copies of the inherited descriptors are closed when this returns.
    pub fn start(self) -> Result<Child, SpawnError> {
        let Self {
            name,
            argv,
            inherit,
            log,
        } = self;
        let mut words = argv.into_iter();
        let Some(program) = words.next() else {
            return Err(SpawnError::Empty { name });
        };
        let open = File::options().create(true).append(true).open(&log);
        let logs = open.and_then(|file| Ok((file.try_clone()?, file)));
        let (out, err) = match logs {
            Ok(files) => files,
            Err(source) => {
                return Err(SpawnError::Log {
                    name,
                    path: log,
                    source,
                });
            }
        };
        let mut command = Command::new(&program);
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        die_with_us::prepare(&mut command, &inherit);
        match spawn_on_spawner(command) {
            Ok((process, pidfd)) => {
                let pid = process.id();
                Ok(Child {
                    name,
                    pid,
                    pidfd,
                    process: Mutex::new(process),
                    log,
                })
            }
            Err(source) => Err(SpawnError::Spawn {
                name,
                program: program.into(),
                source,
            }),
        }
    }
}

/// A running or ended child. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: u32,
    pidfd: OwnedFd,
    process: Mutex<std::process::Child>,
    log: PathBuf,
}

impl Child {
    /// Its process id. After it has ended the number may belong to somebody else.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Becomes readable when the child has ended; for a poll of one's own.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for its end; any number of threads may.
    pub fn wait(&self, deadline: &Deadline) -> Result<ExitStatus, WaitError> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            let left = deadline.check()?;
            wait::poll_for(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], left)?;
        }
    }

    /// Waits for its end without a deadline: for a thread whose only job this is.
    pub(super) fn wait_forever(&self) -> Result<ExitStatus, WaitError> {
        loop {
            match self.wait(&Deadline::new("a child's end", Duration::from_secs(3600))) {
                Err(WaitError::Deadline(_)) => {}
                other => return other,
            }
        }
    }

    /// Its exit status if it has ended.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        lock(&self.process).try_wait()
    }

    /// Kills it (SIGKILL), and only it; nothing happens if it has ended.
    ///
    /// By pidfd: a pid could by now be somebody else's, a pidfd cannot.
    pub fn kill(&self) {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, "cannot kill {}: {error}", self.name),
        }
    }

    /// The last lines of its log, as far as the log can be read.
    pub fn log_tail(&self, lines: usize) -> Vec<String> {
        tail(&self.log, lines).unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        let deadline = Deadline::new(format!("{}'s end after SIGKILL", self.name), wait::KILL);
        if let Err(error) = self.wait(&deadline) {
            tracing::error!(pid = self.pid, "{error}");
        }
    }
}

fn tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all
        .iter()
        .skip(all.len().saturating_sub(lines))
        .map(|line| (*line).to_owned())
        .collect())
}

type Spawned = io::Result<(std::process::Child, OwnedFd)>;
type Job = (Command, Sender<Spawned>);

/// Runs the fork on the thread that lives as long as the process.
fn spawn_on_spawner(command: Command) -> Spawned {
    static SPAWNER: OnceLock<io::Result<Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        // The static keeps a sender for ever, so this thread ends only with the process.
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (command, answer) in jobs {
                    let _ = answer.send(spawn_here(command));
                }
            })?;
        Ok(sender)
    });
    let gone = || io::Error::other("the thread that starts children is gone");
    let sender = spawner
        .as_ref()
        .map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
    let (answer, result) = channel();
    sender.send((command, answer)).map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

fn spawn_here(mut command: Command) -> Spawned {
    let mut child = command.spawn()?;
    // Not yet reaped, so the pid is still the child's.
    match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::sync::Arc;

    fn sh(script: &str, inherit: Vec<OwnedFd>, folder: &Path) -> Child {
        let argv = ["/bin/sh", "-c", script].map(OsString::from).into();
        let log = folder.join("log");
        Spawn {
            name: "sh".into(),
            argv,
            inherit,
            log,
        }
        .start()
        .unwrap()
    }

    fn soon() -> Deadline {
        Deadline::new("the child's end", Duration::from_secs(20))
    }

    #[test]
    fn status_and_log_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let child = sh("echo one; echo two >&2; exit 7", vec![], folder.path());
        assert_eq!(child.wait(&soon()).unwrap().code(), Some(7));
        assert_eq!(child.wait(&soon()).unwrap().code(), Some(7), "asked twice");
        assert_eq!(child.log_tail(1), ["two"]);
        assert_eq!(child.log_tail(9), ["one", "two"]);
    }

    #[test]
    fn many_wait_for_one_child_and_a_kill_wakes_them() {
        let folder = tempfile::tempdir().unwrap();
        let child = Arc::new(sh("read x; sleep 1000", vec![], folder.path()));
        let late = Deadline::new("an end that does not come", Duration::from_millis(20));
        // stdin is /dev/null, so read returns at once and the sleep keeps the child alive.
        assert!(matches!(child.wait(&late), Err(WaitError::Deadline(_))));
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let child = Arc::clone(&child);
                std::thread::spawn(move || child.wait(&soon()).unwrap())
            })
            .collect();
        child.kill();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().signal(), Some(9));
        }
        child.kill();
    }

    #[test]
    fn it_inherits_what_it_is_given_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (private, _private) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let number = theirs.as_raw_fd();
        let script = format!(
            "[ -e /proc/self/fd/{} ] && exit 1; [ -e /proc/self/fd/{number} ] || exit 2",
            private.as_raw_fd()
        );
        let child = sh(&script, vec![theirs.into()], folder.path());
        assert_eq!(child.wait(&soon()).unwrap().code(), Some(0));
        // Our copy of its end was closed, so with the child's end the pair is over.
        assert_eq!((&ours).read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn it_has_a_process_group_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let child = sh("sleep 1000", vec![], folder.path());
        let pid = Pid::from_raw(i32::try_from(child.pid()).unwrap());
        assert_eq!(rustix::process::getpgid(pid).ok(), pid);
    }

    #[test]
    fn what_cannot_start_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let spawn = |program: &str, log: PathBuf| {
            let argv = vec![program.into()];
            Spawn {
                name: "QEMU".into(),
                argv,
                inherit: vec![],
                log,
            }
            .start()
            .unwrap_err()
        };
        let error = spawn("/no/such/program", folder.path().join("log"));
        assert!(
            error
                .to_string()
                .starts_with("cannot start QEMU (/no/such/program): No such")
        );
        let error = spawn("/bin/true", folder.path().join("no/log"));
        assert!(matches!(error, SpawnError::Log { .. }), "{error}");
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let child = std::thread::spawn(move || sh("sleep 1000", vec![], &path))
            .join()
            .unwrap();
        let moment = Deadline::new("a death that must not come", Duration::from_millis(200));
        assert!(matches!(child.wait(&moment), Err(WaitError::Deadline(_))));
    }

    /// Not a test of its own: the process that the next test kills.
    #[test]
    #[ignore = "run by children_die_with_us in a process of its own"]
    fn helper_that_starts_a_child_and_waits_to_be_killed() {
        let Some(folder) = std::env::var_os("P2PLAB_TEST_FOLDER") else {
            return;
        };
        let child = sh("sleep 1000", vec![], Path::new(&folder));
        let pid = Path::new(&folder).join("pid");
        let partial = pid.with_extension("partial");
        File::create(&partial)
            .unwrap()
            .write_all(child.pid().to_string().as_bytes())
            .unwrap();
        std::fs::rename(partial, pid).unwrap();
        let _ = child.wait(&soon());
    }

    #[test]
    fn children_die_with_us() {
        let folder = tempfile::tempdir().unwrap();
        let module = module_path!().split_once("::").unwrap().1;
        let name = format!("{module}::helper_that_starts_a_child_and_waits_to_be_killed");
        let mut us = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &name])
            .env("P2PLAB_TEST_FOLDER", folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = soon();
        let pid = loop {
            if let Ok(pid) = std::fs::read_to_string(folder.path().join("pid")) {
                break pid;
            }
            deadline.check().unwrap();
            std::thread::yield_now();
        };
        let grandchild = Pid::from_raw(pid.parse().unwrap()).unwrap();
        let pidfd = pidfd_open(grandchild, PidfdFlags::empty()).unwrap();
        us.kill().unwrap();
        us.wait().unwrap();
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let ended = wait::poll_for(&mut fds, Duration::from_secs(20)).unwrap();
        assert_eq!(ended, 1, "the child of a killed process goes on running");
    }
}
