//! Where a server listens: a file system path, an abstract socket name, or a socket without a file.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::ServeError;

/// Address of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SocketAddress {
    /// A path in the file system; removed when the server stops.
    Path(PathBuf),
    /// A name in the abstract namespace, without the leading NUL. It vanishes with its process, even by
    /// SIGKILL. It has no permissions, so only peers of our own user are served.
    Abstract(String),
    /// A socket whose file is removed before anyone can see it. Clients reach it at
    /// [`Server::path`](crate::Server::path), a link in `/proc` that vanishes with its process, even by
    /// SIGKILL, and that only our own user may follow. The way to QEMU, which cannot connect to abstract
    /// names.
    Unlinked,
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Path(path) => write!(f, "{}", path.display()),
            SocketAddress::Abstract(name) => write!(f, "@{name}"),
            SocketAddress::Unlinked => write!(f, "(unlinked)"),
        }
    }
}

/// A listening socket that takes its file with it.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: UnixListener,
    own_uid_only: bool,
    file: Option<SocketFile>,
    /// Holds the inode of an unlinked socket, with its path.
    link: Option<(OwnedFd, PathBuf)>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Binds and listens.
    ///
    /// # Errors
    /// [`ServeError::Bind`].
    pub(crate) fn bind(address: &SocketAddress) -> Result<Self, ServeError> {
        let failed = |error| ServeError::Bind {
            address: address.clone(),
            error,
        };
        match address {
            SocketAddress::Path(path) => {
                remove_if_stale(path);
                let socket = UnixListener::bind(path).map_err(failed)?;
                let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
                let file = SocketFile {
                    path: path.clone(),
                    device: metadata.dev(),
                    inode: metadata.ino(),
                };
                Ok(Listener {
                    socket,
                    own_uid_only: false,
                    file: Some(file),
                    link: None,
                })
            }
            SocketAddress::Abstract(name) => {
                let name = SocketAddr::from_abstract_name(name).map_err(failed)?;
                let socket = UnixListener::bind_addr(&name).map_err(failed)?;
                Ok(Listener {
                    socket,
                    own_uid_only: true,
                    file: None,
                    link: None,
                })
            }
            SocketAddress::Unlinked => Self::unlinked().map_err(failed),
        }
    }

    fn unlinked() -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir();
        let path = folder.join(format!("p2plab-vfio-user-{}-{number}", std::process::id()));
        remove_if_stale(&path);
        let socket = UnixListener::bind(&path)?;
        let opened = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        std::fs::remove_file(&path)?;
        let inode = opened?;
        let link = format!("/proc/{}/fd/{}", std::process::id(), inode.as_raw_fd());
        let link = Some((inode, PathBuf::from(link)));
        Ok(Listener {
            socket,
            own_uid_only: true,
            file: None,
            link,
        })
    }

    /// Where a client connects, if that is a path.
    pub(crate) fn path(&self) -> Option<&Path> {
        let file = self.file.as_ref().map(|file| file.path.as_path());
        file.or_else(|| self.link.as_ref().map(|(_, path)| path.as_path()))
    }

    /// The next client; on a socket without permissions, the next of our own user.
    ///
    /// # Errors
    /// The host's, also when the listening socket was shut down.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let stream = match self.socket.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            if !self.own_uid_only {
                return Ok(stream);
            }
            let peer = rustix::net::sockopt::socket_peercred(&stream)?;
            if peer.uid == rustix::process::geteuid() {
                return Ok(stream);
            }
            tracing::warn!(
                uid = peer.uid.as_raw(),
                "refused a vfio-user client of another user"
            );
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        // Another server may have taken the path over in the meantime: remove only what is ours.
        let ours = std::fs::symlink_metadata(&file.path)
            .is_ok_and(|found| found.dev() == file.device && found.ino() == file.inode);
        if ours && let Err(error) = std::fs::remove_file(&file.path) {
            tracing::warn!(path = %file.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Removes a socket on which nobody listens: what a killed process left behind.
fn remove_if_stale(path: &Path) {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return;
    }
    let refused = UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if refused {
        // If it cannot be removed, bind says so.
        let _ = std::fs::remove_file(path);
    }
}
