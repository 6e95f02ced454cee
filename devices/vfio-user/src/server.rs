//! A [`Server`]: one socket, one function, one thread.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use p2plab_pcie::{Function, Mistakes};
use rustix::io::Errno;

use crate::address::{Listener, SocketAddress};
use crate::posted::Progress;
use crate::session::Session;
use crate::stream::Ended;
use crate::target::Target;

/// Why a server cannot start, or what it waited for did not happen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, too long, or in a folder that does not exist or may not be written.
    #[error(
        "cannot listen on vfio-user socket `{address}`: {error}; choose another address, or end what uses it"
    )]
    Bind {
        /// The address.
        address: SocketAddress,
        /// The host's reason.
        error: io::Error,
    },
    /// The host gave no thread or descriptor.
    #[error("cannot start the vfio-user server of `{function}`: {error}")]
    Start {
        /// Name of the function.
        function: String,
        /// The host's reason.
        error: io::Error,
    },
    /// The deadline passed.
    #[error("vfio-user server of `{function}`: timed out waiting for {what}")]
    TimedOut {
        /// Name of the function.
        function: String,
        /// What was waited for.
        what: &'static str,
    },
}

/// Time between two attempts to accept a client while the host has nothing to accept it with.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Whether an error of accept passes when others give back what they have.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| shortages.contains(&errno))
}

/// What a server's thread shares with its owner.
#[derive(Debug, Default)]
pub(crate) struct Status {
    state: Mutex<State>,
    changed: Condvar,
    /// What clients did wrong, one after the other: each connection is worth as few lines as its messages.
    pub(crate) mistakes: Mistakes,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    connected: bool,
    /// The client's socket, to shut down when stopping.
    stream: Option<UnixStream>,
    release_trigger: Option<File>,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.lock().connected = connected;
        self.changed.notify_all();
    }

    pub(crate) fn set_release_trigger(&self, file: Option<File>) {
        self.lock().release_trigger = file;
    }

    /// Lets a while pass, unless the server is told to stop.
    fn wait_before_retry(&self) {
        let state = self.lock();
        let running = |state: &mut State| !state.stopping;
        drop(
            self.changed
                .wait_timeout_while(state, ACCEPT_RETRY, running),
        );
    }

    /// Makes the client's socket known; `false` if the server is stopping.
    fn begin(&self, stream: &UnixStream) -> io::Result<bool> {
        let mut state = self.lock();
        if !state.stopping {
            state.stream = Some(stream.try_clone()?);
        }
        Ok(!state.stopping)
    }

    fn end(&self) {
        let mut state = self.lock();
        state.stream = None;
        state.release_trigger = None;
        state.connected = false;
        self.changed.notify_all();
    }
}

/// Serves one function to one client at a time. Further clients wait until the present one is gone; it
/// may be a restarted QEMU: the function is reset when its client goes.
#[derive(Debug)]
pub struct Server {
    name: String,
    address: Option<SocketAddress>,
    status: Arc<Status>,
    listener: Option<Arc<Listener>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` and serves `function` to whoever connects. On a path, what a killed process
    /// left there is replaced.
    ///
    /// # Errors
    /// [`ServeError::Bind`], [`ServeError::Start`].
    pub fn bind(address: SocketAddress, function: Arc<Function>) -> Result<Server, ServeError> {
        Self::bind_target(address, function)
    }

    /// Serves `function` to the client at the other end of `stream`, and to no other after it.
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub fn serve_stream(stream: UnixStream, function: Arc<Function>) -> Result<Server, ServeError> {
        Self::serve_stream_target(stream, function)
    }

    pub(crate) fn bind_target(
        address: SocketAddress,
        target: Arc<dyn Target>,
    ) -> Result<Server, ServeError> {
        let listener = Arc::new(Listener::bind(&address)?);
        let accepting = listener.clone();
        let mut server = Self::spawn(target, move |target, status| {
            while !status.lock().stopping {
                match accepting.accept() {
                    Ok(stream) => serve(target, status, &stream),
                    Err(_) if status.lock().stopping => break,
                    Err(error) if is_shortage(&error) => {
                        tracing::error!(function = target.name(), %error, "cannot accept a client");
                        status.wait_before_retry();
                    }
                    Err(error) => {
                        tracing::error!(function = target.name(), %error, "accept failed");
                        break;
                    }
                }
            }
        })?;
        server.listener = Some(listener);
        server.address = Some(address);
        Ok(server)
    }

    pub(crate) fn serve_stream_target(
        stream: UnixStream,
        target: Arc<dyn Target>,
    ) -> Result<Server, ServeError> {
        Self::spawn(target, move |target, status| serve(target, status, &stream))
    }

    fn spawn(
        target: Arc<dyn Target>,
        body: impl FnOnce(&dyn Target, &Status) + Send + 'static,
    ) -> Result<Server, ServeError> {
        let name = target.name().to_owned();
        let status = Arc::new(Status::default());
        let shared = status.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vfio-user {name}"))
            .spawn(move || {
                crate::posted::serving();
                body(&*target, &shared);
            })
            .map_err(|error| ServeError::Start {
                function: name.clone(),
                error,
            })?;
        Ok(Server {
            name,
            address: None,
            status,
            listener: None,
            thread: Some(thread),
        })
    }

    /// Where the server listens; `None` on a socket pair.
    pub fn address(&self) -> Option<&SocketAddress> {
        self.address.as_ref()
    }

    /// The path at which a client, such as QEMU, connects; `None` for an abstract name or a socket pair.
    pub fn path(&self) -> Option<&Path> {
        self.listener.as_deref().and_then(Listener::path)
    }

    /// Whether a client has agreed on a version and is still there.
    pub fn connected(&self) -> bool {
        self.status.lock().connected
    }

    /// Waits until [`connected`](Self::connected).
    ///
    /// # Errors
    /// [`ServeError::TimedOut`].
    pub fn wait_connected(&self, deadline: Instant) -> Result<(), ServeError> {
        self.wait(deadline, "a client to connect", |state| state.connected)
    }

    /// Waits until there is no client, and the function was reset after the last one.
    ///
    /// # Errors
    /// [`ServeError::TimedOut`].
    pub fn wait_disconnected(&self, deadline: Instant) -> Result<(), ServeError> {
        self.wait(deadline, "its client to disconnect", |state| {
            !state.connected
        })
    }

    fn wait(
        &self,
        deadline: Instant,
        what: &'static str,
        done: impl Fn(&State) -> bool,
    ) -> Result<(), ServeError> {
        let mut state = self.status.lock();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ServeError::TimedOut {
                    function: self.name.clone(),
                    what,
                });
            }
            let waited = self.status.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Asks the client to give the device back, by the request interrupt of vfio. QEMU answers as it does
    /// to `device_del`. `false` where the client did not ask to be told.
    pub fn request_release(&self) -> bool {
        let state = self.status.lock();
        if let Some(file) = &state.release_trigger {
            crate::irq::signal(file);
        }
        state.release_trigger.is_some()
    }

    /// Closes the connection and the socket, resets the function, and ends the thread. A QEMU that still
    /// has the device does not survive this: see the crate's documentation for the order that it needs.
    pub fn stop(mut self) {
        self.shut_down();
    }

    /// Stops; `false` if the thread panicked.
    #[cfg(test)]
    pub(crate) fn stop_for_test(mut self) -> bool {
        self.shut_down()
    }

    /// `false` if the thread panicked.
    fn shut_down(&mut self) -> bool {
        {
            let mut state = self.status.lock();
            state.stopping = true;
            self.status.changed.notify_all();
            if let Some(stream) = &state.stream {
                let _ = stream.shutdown(Shutdown::Both);
            }
            if let Some(listener) = &self.listener {
                // Wakes a thread that waits in accept, and fails every later accept.
                let _ = rustix::net::shutdown(&listener.socket, rustix::net::Shutdown::Both);
            }
        }
        let panicked = self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err());
        if panicked {
            tracing::error!(function = self.name, "the vfio-user thread panicked");
        }
        self.listener = None;
        !panicked
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Ends a connection however it ends, also by a panic of the endpoint's.
struct Connection<'a> {
    target: &'a dyn Target,
    status: &'a Status,
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.target.set_posted(None);
        if !std::thread::panicking() && self.status.lock().connected {
            self.target.disconnect();
        }
        self.status.end();
    }
}

fn serve(target: &dyn Target, status: &Status, stream: &UnixStream) {
    match status.begin(stream) {
        Ok(true) => {}
        Ok(false) => return,
        Err(error) => {
            tracing::error!(function = target.name(), %error, "cannot serve a client");
            return;
        }
    }
    let progress = match Progress::new(stream) {
        Ok(progress) => Arc::new(progress),
        Err(error) => {
            tracing::error!(function = target.name(), %error, "cannot serve a client");
            return status.end();
        }
    };
    target.set_posted(Some(progress.clone()));
    let connection = Connection { target, status };
    let ended = Session::run(target, status, stream, progress);
    if status.lock().stopping || matches!(ended, Ended::Closed) {
        tracing::debug!(function = target.name(), "vfio-user client gone");
    } else if status.mistakes.is_worth_a_line() {
        tracing::warn!(function = target.name(), reason = %ended, "vfio-user connection lost");
    }
    // Before the reset, so that a client that left a request behind is not kept waiting for it.
    let _ = stream.shutdown(Shutdown::Both);
    drop(connection);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_passes_and_a_closed_socket_does_not() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(is_shortage(&error(Errno::MFILE)));
        assert!(!is_shortage(&error(Errno::INVAL)));
        let status = Status::default();
        status.lock().stopping = true;
        // One of several: a loaded host delays any of them, but a wait never gets below its time.
        let waited = || {
            let begun = Instant::now();
            status.wait_before_retry();
            begun.elapsed()
        };
        let shortest = std::iter::repeat_with(waited).take(5).min();
        assert!(shortest < Some(ACCEPT_RETRY), "stopping does not wait");
    }
}
