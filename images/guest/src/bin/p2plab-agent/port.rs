//! Finding the harness's virtio-serial port, and telling when somebody is connected to it.
//!
//! While no host is connected the driver gives end of file to every read and POLLHUP to every poll.
//! Waiting for the host without spinning needs the edge: the driver wakes the port's wait queue when
//! the host's side opens, which an edge-triggered epoll reports once (drivers/char/virtio_console.c,
//! `handle_control_message`, VIRTIO_CONSOLE_PORT_OPEN).

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use p2plab_guest::protocol::PORT_NAME;
use p2plab_guest::server::Server;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use crate::boot::say;

const PORTS: &str = "/sys/class/virtio-ports";
/// After this long without the port, the console says so (and the wait goes on).
const PORT_PATIENCE: Duration = Duration::from_secs(10);
/// Look again at least this often, should an event be lost.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Opens the port and serves it until it breaks (it was unplugged, say).
pub fn serve(server: &Server) -> io::Error {
    match serve_one(server) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn serve_one(server: &Server) -> io::Result<std::convert::Infallible> {
    let port = OpenOptions::new().read(true).write(true).open(find()?)?;
    let connection = Connection::new(&port)?;
    server.set_writer(Box::new(port.try_clone()?));
    say(format_args!("ready"));
    loop {
        connection.wait()?;
        server.serve(&port)?;
    }
}

/// Waits for a port of our name, and for its device file.
fn find() -> io::Result<PathBuf> {
    // Listening begins before looking, so that nothing is missed between.
    let events = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    rustix::net::bind(&events, &netlink::SocketAddrNetlink::new(0, 1))?;
    let begun = Instant::now();
    let mut complained = false;
    loop {
        if let Some(path) = look() {
            return Ok(path);
        }
        if !complained && begun.elapsed() > PORT_PATIENCE {
            complained = true;
            say(format_args!(
                "no virtio-serial port named {PORT_NAME} for {} s; still waiting",
                PORT_PATIENCE.as_secs()
            ));
        }
        let timeout = Timespec::try_from(LOOK_AGAIN).ok();
        let _ = poll(&mut [PollFd::new(&events, PollFlags::IN)], timeout.as_ref());
        let mut event = [0u8; 4096];
        while rustix::net::recv(&events, &mut event, RecvFlags::DONTWAIT).is_ok() {}
    }
}

fn look() -> Option<PathBuf> {
    for entry in std::fs::read_dir(PORTS).ok()?.flatten() {
        let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = PathBuf::from("/dev").join(entry.file_name());
        if name.trim() == PORT_NAME && device.exists() {
            return Some(device);
        }
    }
    None
}

/// Knows whether a host is connected.
struct Connection<'a> {
    port: &'a File,
    edges: rustix::fd::OwnedFd,
}

impl<'a> Connection<'a> {
    fn new(port: &'a File) -> io::Result<Self> {
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edges, port, epoll::EventData::new_u64(0), flags)?;
        Ok(Self { port, edges })
    }

    /// Blocks until a host is connected. Only the absence of POLLHUP tells so: without a host the port
    /// also claims to be readable, for reads do not block then.
    fn wait(&self) -> io::Result<()> {
        loop {
            let mut now = [PollFd::new(self.port, PollFlags::IN)];
            poll(&mut now, Some(&Timespec::default()))?;
            let [state] = &now;
            if !state.revents().contains(PollFlags::HUP) {
                return Ok(());
            }
            // An edge that came before the poll above is still queued; a spurious one only loops.
            let mut events: Vec<epoll::Event> = Vec::with_capacity(1);
            match epoll::wait(
                &self.edges,
                rustix::buffer::spare_capacity(&mut events),
                None,
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
