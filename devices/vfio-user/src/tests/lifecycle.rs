use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vfio_user::Client;

use super::*;
use crate::{ServeError, Server, SocketAddress};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn served() -> (tempfile::TempDir, std::path::PathBuf, Arc<Fake>, Server) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let target = Arc::new(Fake::new());
    let server = Server::bind_target(SocketAddress::Path(path.clone()), target.clone()).unwrap();
    (folder, path, target, server)
}

/// Crate vfio_user's client, which shares no code with our server.
#[test]
fn an_independent_client_is_content() {
    let (_folder, path, target, server) = served();
    let mut client = Client::new(&path).unwrap();
    server.wait_connected(soon()).unwrap();
    assert_eq!(client.region(0).unwrap().size, fake::BAR_SIZE);
    assert_eq!(client.region(7).unwrap().size, 4096);
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(id, [0x34, 0x12, 0x78, 0x56]);
    client.region_write(0, 0x10, &[1, 2, 3, 4]).unwrap();
    client.region_read(0, 0x10, &mut id).unwrap();
    assert_eq!(id, [1, 2, 3, 4]);
    assert_eq!(client.get_irq_info(2).unwrap().count, 8);
    let file = tempfile::tempfile().unwrap();
    client
        .dma_map(0, 0x1000, 0x1000, std::os::fd::AsRawFd::as_raw_fd(&file))
        .unwrap();
    client.dma_unmap(0x1000, 0x1000).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
    server.wait_disconnected(soon()).unwrap();
    assert_eq!(
        target.take_log(),
        [
            "connect",
            "map 0x1000 0x1000 true true true 0x0",
            "unmap 0x1000 0x1000",
            "reset Conventional",
            "disconnect"
        ]
    );
}

#[test]
fn clients_come_and_go() {
    let (_folder, path, target, server) = served();
    for _ in 0..3 {
        let client = Client::new(&path).unwrap();
        assert!(server.connected());
        drop(client);
        server.wait_disconnected(soon()).unwrap();
    }
    assert_eq!(target.take_log().len(), 6);
}

#[test]
fn a_second_client_waits_for_the_first() {
    let (_folder, path, target, server) = served();
    let first = Client::new(&path).unwrap();
    let second = std::thread::spawn(move || Client::new(&path).map(|_| ()));
    assert_eq!(target.take_log(), ["connect"]);
    drop(first);
    second.join().unwrap().unwrap();
    server.stop();
    assert_eq!(target.take_log(), ["disconnect", "connect", "disconnect"]);
}

#[test]
fn stopping_is_prompt_and_leaves_no_file() {
    // Idle.
    let (_folder, path, _target, server) = served();
    assert!(path.exists());
    server.stop();
    assert!(!path.exists());
    // With a client.
    let (_folder, path, target, server) = served();
    let mut client = Client::new(&path).unwrap();
    drop(server);
    assert!(!path.exists());
    assert_eq!(target.take_log(), ["connect", "disconnect"]);
    assert!(client.region_read(7, 0, &mut [0; 4]).is_err());
    // With a connection that never said anything, and one that is not accepted yet.
    let (_folder, path, _target, server) = served();
    let _silent = UnixStream::connect(&path).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    server.stop();
}

#[test]
fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let address = SocketAddress::Path(path.clone());
    let server = Server::bind_target(address.clone(), Arc::new(Fake::new())).unwrap();
    let again = Server::bind_target(address, Arc::new(Fake::new()));
    assert!(matches!(again, Err(ServeError::Bind { .. })));
    Client::new(&path).unwrap();
    drop(server);
}

#[test]
fn abstract_names_are_served() {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("p2plab-vfio-user-test-{}-{number}", std::process::id());
    let address = SocketAddress::Abstract(name.clone());
    let server = Server::bind_target(address.clone(), Arc::new(Fake::new())).unwrap();
    assert_eq!(server.address(), Some(&address));
    let target = SocketAddr::from_abstract_name(&name).unwrap();
    let stream = UnixStream::connect_addr(&target).unwrap();
    std::io::Write::write_all(
        &mut &stream,
        &[1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    )
    .unwrap();
    server.wait_connected(soon()).unwrap();
    drop(stream);
    server.wait_disconnected(soon()).unwrap();
}

#[test]
fn waiting_has_an_end() {
    let (_folder, _path, _target, server) = served();
    let error = server.wait_connected(Instant::now()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "vfio-user server of `fake`: timed out waiting for a client to connect"
    );
}

#[test]
fn an_unlinked_socket_is_reached_through_proc() {
    let server = Server::bind_target(SocketAddress::Unlinked, Arc::new(Fake::new())).unwrap();
    let path = server.path().unwrap().to_owned();
    assert!(path.starts_with("/proc"));
    let client = Client::new(&path).unwrap();
    server.wait_connected(soon()).unwrap();
    drop(client);
    server.wait_disconnected(soon()).unwrap();
    Client::new(&path).unwrap();
    server.stop();
    assert!(Client::new(&path).is_err());
}
