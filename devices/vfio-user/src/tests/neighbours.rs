//! Clients that misbehave hurt nobody but themselves.

use std::os::fd::AsFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::SendFlags;

use super::raw::*;

/// Longest wait for what must happen.
const SOON: Duration = Duration::from_secs(10);

/// Stops on a thread of its own, so that a stop that hangs fails the test.
fn stops(raw: Raw) -> bool {
    let (done, is_done) = channel();
    let Raw { server, stream, .. } = raw;
    std::thread::spawn(move || {
        let _ = done.send(server.stop_for_test());
    });
    let stopped = is_done.recv_timeout(SOON);
    drop(stream);
    stopped.expect("the server to stop while its client is still there")
}

/// The server sits in a send that nobody takes; stopping gets it out.
#[test]
fn a_client_that_reads_no_replies_does_not_keep_the_server_from_stopping() {
    let mut raw = Raw::new();
    let request = {
        let mut bytes = raw.header(REGION_READ, 32, 0);
        bytes.extend(access(0, 0, 0x4000));
        bytes
    };
    let writable = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    // Until both directions are full: the server takes no more requests, as it cannot get rid of a reply.
    let full = loop {
        let mut fds = [PollFd::new(&raw.stream, PollFlags::OUT)];
        if poll(&mut fds, Some(&writable)).unwrap() == 0 {
            break true;
        }
        match rustix::net::send(&raw.stream, &request, SendFlags::DONTWAIT) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(_) => break false,
        }
    };
    assert!(full);
    assert!(stops(raw));
}

#[test]
fn a_client_that_stops_inside_a_message_does_not_keep_the_server_from_stopping() {
    for length in [1, 15, 16, 20] {
        let mut raw = Raw::new();
        let mut bytes = raw.header(REGION_READ, 32, 0);
        bytes.extend([0; 16]);
        raw.send_bytes(&bytes[..length], &[]);
        assert!(stops(raw), "{length}");
    }
}

/// Descriptors that come with refused messages, or too many with one, are closed.
#[test]
fn refused_descriptors_are_closed() {
    let mut raw = Raw::new();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let fds = vec![writer.as_fd(); 16];
    for (command, count) in [(GET_INFO, 1), (DMA_MAP, 2), (SET_IRQS, 3), (99, 16)] {
        let payload = words(&[16, 0, 0, 0]);
        assert!(raw.call_with(command, &payload, &fds[..count]).is_err());
    }
    let many = vec![writer.as_fd(); 40];
    assert!(
        raw.call_with(GET_INFO, &words(&[16, 0, 0, 0]), &many)
            .is_err()
    );
    raw.assert_in_step();
    drop((fds, many));
    drop(writer);
    // The end of the pipe comes once nobody has the other end open.
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        let _ = done.send(std::io::Read::read(&mut reader, &mut [0]).unwrap());
    });
    assert_eq!(is_done.recv_timeout(SOON), Ok(0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Whatever one client sends, the device next to it goes on: each byte that was written is read back.
    #[test]
    fn garbage_on_one_connection_leaves_the_next_one_alone(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..12)
    ) {
        let bad = Raw::new();
        let mut good = Raw::new();
        for (number, piece) in pieces.iter().enumerate() {
            let _ = rustix::net::send(
                &bad.stream,
                piece,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            let at = 8 * number as u64;
            let mut write = access(at, 0, 4);
            write.extend((number as u32).to_le_bytes());
            prop_assert!(good.call(REGION_WRITE, &write).is_ok());
            let read = good.call(REGION_READ, &access(at, 0, 4)).unwrap();
            prop_assert_eq!(&read[16..], (number as u32).to_le_bytes());
        }
        good.assert_in_step();
        prop_assert!(stops(bad));
        prop_assert!(stops(good));
    }
}
