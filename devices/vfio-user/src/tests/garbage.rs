use std::os::fd::AsFd;

use proptest::prelude::*;

use super::raw::*;

fn command() -> impl Strategy<Value = u16> {
    prop_oneof![4 => 0u16..17, 1 => any::<u16>()]
}

/// Payloads whose words are small often enough to get past the first checks.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![3 => 0u32..40, 1 => any::<u32>()];
    let words = prop::collection::vec(word, 0..12).prop_map(|list| words(&list));
    prop_oneof![2 => words, 1 => prop::collection::vec(any::<u8>(), 0..300)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    /// Well-framed nonsense is refused or done, and never puts the stream out of step.
    #[test]
    fn well_framed_garbage_keeps_in_step(
        messages in prop::collection::vec((command(), payload(), 0usize..3), 1..20)
    ) {
        let mut raw = Raw::new();
        let (_, fd) = std::io::pipe().unwrap();
        for (command, payload, fds) in messages {
            let _ = raw.call_with(command, &payload, &vec![fd.as_fd(); fds]);
        }
        raw.assert_in_step();
        prop_assert!(raw.server.stop_for_test());
    }

    /// Any bytes at all: the server ends the connection or waits for more, and never panics.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let raw = Raw::new();
        // The server may close before it has read all.
        let _ = rustix::net::send(&raw.stream, &bytes, rustix::net::SendFlags::NOSIGNAL);
        drop(raw.stream);
        prop_assert!(raw.server.stop_for_test());
    }
}
