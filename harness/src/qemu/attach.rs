//! The console joined to a person's terminal, for the interactive shell.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendFlags, send};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::console::{Console, Shared};
use crate::wait::{self, lock};

/// Ctrl-], telnet's and virsh's key.
const LEAVE: u8 = 0x1d;
/// Ctrl-A, QEMU's own: Ctrl-A x leaves, Ctrl-A Ctrl-A types one Ctrl-A.
const PREFIX: u8 = 0x01;
/// Ctrl-D, a terminal's end of input.
const END_OF_TRANSMISSION: u8 = 0x04;
/// Ctrl-U, which empties the line: on one that has something Ctrl-D is no end.
const KILL_LINE: u8 = 0x15;

/// While there is input, only what happens wakes the relay.
const IDLE: Duration = Duration::from_secs(3600);
/// After the input's end, how long the guest may be silent before it is told of the end again.
const END_AGAIN: Duration = Duration::from_secs(1);

/// Why the relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The person pressed Ctrl-] or Ctrl-A x.
    ByKey,
    /// The guest's side of the console has ended: QEMU is gone.
    ConsoleClosed,
    /// [`Detach::detach`] was called: the shell has ended, a deadline has passed.
    Detached,
    /// SIGHUP, SIGINT or SIGTERM arrived. The terminal is restored; the caller should end.
    BySignal,
    /// The terminal itself has gone away.
    TerminalGone,
}

/// Ends the relay from another thread.
#[derive(Debug)]
pub struct Detach(UnixStream);

impl Detach {
    /// Ends it, after the text that has arrived so far has been shown.
    pub fn detach(&self) {
        let _ = send(&self.0, b"d", SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// A relay between the console and a terminal that is ready to run.
#[derive(Debug)]
pub struct Attachment {
    console: Console,
    woken: UnixStream,
    detached: UnixStream,
    since: u64,
}

impl Console {
    /// Prepares to relay the console from `since` on (0: all that is kept; [`Console::mark`]: what follows).
    pub fn attach(&self, since: u64) -> io::Result<(Attachment, Detach)> {
        let (woken, wake) = UnixStream::pair()?;
        let (detached, detach) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        let mut state = lock(&self.shared.state);
        state.attached = Some(wake);
        // For what is there already.
        state.wake_attached();
        drop(state);
        Ok((
            Attachment {
                console: self.clone(),
                woken,
                detached,
                since,
            },
            Detach(detach),
        ))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        lock(&self.console.shared.state).attached = None;
    }
}

/// Raw mode, undone when dropped.
struct Raw {
    terminal: File,
    before: Termios,
}

impl Raw {
    /// `None` if `input` is no terminal.
    fn enter(input: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        if !isatty(input) {
            return Ok(None);
        }
        let before = tcgetattr(input)?;
        let mut raw = before.clone();
        raw.make_raw();
        let terminal = File::from(input.try_clone_to_owned()?);
        // Drain, not flush: what a person or a script has typed ahead belongs to the guest.
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

impl Attachment {
    /// Relays until something ends it. `input` may be a terminal (then in raw mode, with leave keys)
    /// or anything else, such as a pipe, whose end becomes a Ctrl-D in the guest.
    ///
    /// No deadline: it is a person who waits.
    pub fn run(mut self, input: impl AsFd, output: impl AsFd) -> io::Result<Left> {
        let input = input.as_fd();
        let signals = Signals::watch()?;
        let raw = Raw::enter(input)?;
        let mut reader = File::from(input.try_clone_to_owned()?);
        let mut output = File::from(output.as_fd().try_clone_to_owned()?);
        let mut keys = Keys {
            leave_keys: raw.is_some(),
            prefixed: false,
        };
        let mut typed: Vec<u8> = Vec::new();
        let mut input_open = true;
        loop {
            let ready = self.poll(&signals, input, input_open, &typed)?;
            if ready.nothing && typed.is_empty() {
                // A shell that just ran a command may have lost the character as it took its terminal back, or taken it for
                // another one.
                typed.extend([KILL_LINE, END_OF_TRANSMISSION]);
            }
            if ready.console
                && let Some(left) = self.show(&mut output)?
            {
                return Ok(left);
            }
            if ready.signal {
                return Ok(Left::BySignal);
            }
            if ready.detach {
                self.show(&mut output)?;
                return Ok(Left::Detached);
            }
            if ready.input {
                let mut buffer = [0; 1024];
                match reader.read(&mut buffer) {
                    // A terminal whose other side is gone reads as EIO.
                    Ok(0) | Err(_) if raw.is_some() => return Ok(Left::TerminalGone),
                    Ok(0) | Err(_) => {
                        typed.push(END_OF_TRANSMISSION);
                        input_open = false;
                    }
                    Ok(length) => {
                        let bytes = buffer.get(..length).unwrap_or_default();
                        if keys.take(bytes, &mut typed) {
                            return Ok(Left::ByKey);
                        }
                    }
                }
            }
            type_into(&self.console.shared, &mut typed);
        }
    }

    fn poll(
        &self,
        signals: &Signals,
        input: BorrowedFd<'_>,
        input_open: bool,
        typed: &[u8],
    ) -> io::Result<Ready> {
        let stream = &self.console.shared.stream;
        let mut fds = vec![
            PollFd::new(&self.woken, PollFlags::IN),
            PollFd::new(&signals.arrived, PollFlags::IN),
            PollFd::new(&self.detached, PollFlags::IN),
        ];
        // While the guest has not taken what was typed, no more is read: the terminal holds it back.
        if !typed.is_empty() {
            fds.push(PollFd::new(stream, PollFlags::OUT));
        } else if input_open {
            fds.push(PollFd::from_borrowed_fd(input, PollFlags::IN));
        }
        let patience = if input_open { IDLE } else { END_AGAIN };
        wait::poll_for(&mut fds, patience)?;
        let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            nothing: !input_open && fds.iter().all(|fd| fd.revents().is_empty()),
            console: is_ready(0),
            signal: is_ready(1),
            detach: is_ready(2),
            input: typed.is_empty() && is_ready(3),
        })
    }

    /// Shows what has arrived since the last time.
    fn show(&mut self, output: &mut File) -> io::Result<Option<Left>> {
        let mut drain = [0; 256];
        // Before the text is fetched, so that text that comes meanwhile wakes again.
        while matches!(self.woken.read(&mut drain), Ok(length) if length > 0) {}
        let (text, lost, closed) = {
            let state = lock(&self.console.shared.state);
            let (text, lost) = state.text_since(self.since);
            let text = text.to_vec();
            self.since = state.end();
            (text, lost, state.closed)
        };
        let write = |output: &mut File| {
            if lost > 0 {
                write!(
                    output,
                    "\r\n[{lost} bytes not shown; they are in console.log]\r\n"
                )?;
            }
            output.write_all(&text)?;
            output.flush()
        };
        match write(output) {
            Ok(()) => Ok(closed.then_some(Left::ConsoleClosed)),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Some(Left::TerminalGone)),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Ok(Some(Left::TerminalGone))
            }
            Err(error) => Err(error),
        }
    }
}

struct Ready {
    /// The input has ended, and the guest was silent.
    nothing: bool,
    console: bool,
    signal: bool,
    detach: bool,
    input: bool,
}

fn type_into(shared: &Shared, typed: &mut Vec<u8>) {
    if typed.is_empty() {
        return;
    }
    match send(
        &shared.stream,
        typed,
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    ) {
        Ok(sent) => drop(typed.drain(..sent.min(typed.len()))),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
        // The console has ended; its reader will say so.
        Err(_) => typed.clear(),
    }
}

struct Keys {
    leave_keys: bool,
    prefixed: bool,
}

impl Keys {
    /// Appends to `typed` what the guest shall get; true when the person wants to leave.
    fn take(&mut self, bytes: &[u8], typed: &mut Vec<u8>) -> bool {
        if !self.leave_keys {
            typed.extend_from_slice(bytes);
            return false;
        }
        for &byte in bytes {
            match (std::mem::take(&mut self.prefixed), byte) {
                (_, LEAVE) | (true, b'x' | b'X') => return true,
                (true, PREFIX) => typed.push(PREFIX),
                (true, other) => typed.extend([PREFIX, other]),
                (false, PREFIX) => self.prefixed = true,
                (false, other) => typed.push(other),
            }
        }
        false
    }
}

/// The signals that would otherwise end us with the terminal still raw.
struct Signals {
    arrived: UnixStream,
    registered: Vec<signal_hook::SigId>,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        let (arrived, arrive) = UnixStream::pair()?;
        let mut signals = Self {
            arrived,
            registered: Vec::new(),
        };
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            let id = signal_hook::low_level::pipe::register(signal, arrive.try_clone()?)?;
            signals.registered.push(id);
        }
        Ok(signals)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::fault::Faults;
    use crate::wait::Deadline;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;
    use std::time::Duration;

    fn console() -> (Console, UnixStream, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let log = folder.path().join("console.log");
        (
            Console::start(ours, &log, Faults::new()).unwrap(),
            theirs,
            folder,
        )
    }

    #[test]
    fn leave_keys_and_the_prefix() {
        let table: [(&[u8], &[u8], bool); 6] = [
            (b"ls\r", b"ls\r", false),
            (b"a\x1db", b"a", true),
            (b"\x01x", b"", true),
            (b"\x01\x01x", b"\x01x", false),
            (b"\x01b", b"\x01b", false),
            (b"\x03", b"\x03", false),
        ];
        for (pressed, expected, leaves) in table {
            let mut keys = Keys {
                leave_keys: true,
                prefixed: false,
            };
            let mut typed = Vec::new();
            let mut left = false;
            for byte in pressed {
                left = left || keys.take(&[*byte], &mut typed);
            }
            assert_eq!((typed.as_slice(), left), (expected, leaves), "{pressed:?}");
        }
    }

    #[test]
    fn a_pipe_is_relayed_and_its_end_is_ctrl_d() {
        let (console, mut guest, _folder) = console();
        guest.write_all(b"prompt# ").unwrap();
        console
            .wait_for("# ", &Deadline::new("prompt", Duration::from_secs(20)))
            .unwrap();
        let (input, mut typist) = UnixStream::pair().unwrap();
        let (mut screen, output) = UnixStream::pair().unwrap();
        let (attachment, _detach) = console.attach(0).unwrap();
        let relay = std::thread::spawn(move || attachment.run(input, output));
        typist.write_all(b"exit\x1d\n").unwrap();
        drop(typist);
        let mut typed = [0; 7];
        guest.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"exit\x1d\n\x04", "no leave keys in a pipe");
        // A shell that took it for another character has that on its line.
        let mut again = [0; 2];
        guest.read_exact(&mut again).unwrap();
        assert_eq!(&again, b"\x15\x04");
        guest.write_all(b"bye").unwrap();
        drop(guest);
        assert_eq!(relay.join().unwrap().unwrap(), Left::ConsoleClosed);
        let mut shown = String::new();
        screen.read_to_string(&mut shown).unwrap();
        assert_eq!(shown, "prompt# bye");
    }

    #[test]
    fn a_terminal_is_raw_while_attached_and_as_before_afterwards() {
        let (console, mut guest, _folder) = console();
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let terminal = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let modes = |file: &File| tcgetattr(file).unwrap().local_modes;
        let before = modes(&terminal);
        assert!(before.contains(LocalModes::ICANON));
        let (attachment, _detach) = console.attach(0).unwrap();
        let (input, output) = (terminal.try_clone().unwrap(), terminal.try_clone().unwrap());
        let relay = std::thread::spawn(move || attachment.run(input, output));
        let mut person = File::from(person);
        guest.write_all(b"# ").unwrap();
        let mut shown = [0; 2];
        // The relay shows text only once the terminal is raw.
        person.read_exact(&mut shown).unwrap();
        assert!(!modes(&terminal).contains(LocalModes::ICANON));
        person.write_all(b"\x03").unwrap();
        let mut typed = [0; 1];
        guest.read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"\x03", "Ctrl-C goes to the guest");
        person.write_all(b"\x1d").unwrap();
        assert_eq!(relay.join().unwrap().unwrap(), Left::ByKey);
        assert_eq!(modes(&terminal), before);
    }

    #[test]
    fn another_thread_can_end_it() {
        let (console, _guest, _folder) = console();
        let (input, _typist) = UnixStream::pair().unwrap();
        let (_screen, output) = UnixStream::pair().unwrap();
        let (attachment, detach) = console.attach(0).unwrap();
        detach.detach();
        assert_eq!(attachment.run(input, output).unwrap(), Left::Detached);
    }
}
