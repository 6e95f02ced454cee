use std::io::Read;
use std::os::fd::AsFd;

use super::raw::*;

#[test]
fn requests_before_version_are_refused() {
    let mut raw = Raw::silent();
    assert_eq!(raw.call(GET_INFO, &words(&[16, 0, 0, 0])), Err(EPROTO));
    assert!(!raw.server.connected());
    raw.call(VERSION, &[0, 0, 0, 0]).unwrap();
    raw.assert_in_step();
}

#[test]
fn bad_version_data_is_refused_and_may_be_repeated() {
    let mut raw = Raw::silent();
    let bad: [&[u8]; 11] = [
        b"",
        b"\0\0",
        b"\0\0\0\0{}",
        b"\0\0\0\0\0",
        b"\0\0\0\0[]\0",
        b"\0\0\0\0{\0",
        b"\0\0\0\0\xff\xff\0",
        b"\0\0\0\0{\"capabilities\":7}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":0}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":-1}}\0",
    ];
    for payload in bad {
        assert_eq!(raw.call(VERSION, payload), Err(EINVAL), "{payload:?}");
    }
    assert_eq!(raw.call(VERSION, &[1, 0, 0, 0]), Err(EPROTONOSUPPORT));
    // A later minor version gets ours; unknown members are nothing to us.
    let reply = raw
        .call(
            VERSION,
            b"\0\0\x09\0{\"x\":1,\"capabilities\":{\"y\":[]}}\0",
        )
        .unwrap();
    assert_eq!(reply[..4], [0, 0, 1, 0]);
    assert_eq!(reply.last(), Some(&0));
    let json: serde_json::Value = serde_json::from_slice(&reply[4..reply.len() - 1]).unwrap();
    assert_eq!(json["capabilities"]["max_msg_fds"], 16);
    assert_eq!(json["capabilities"]["max_data_xfer_size"], 1 << 20);
    assert_eq!(json["capabilities"]["max_dma_maps"], 65535);
    assert_eq!(raw.call(VERSION, &[0, 0, 1, 0]), Err(EINVAL));
    raw.assert_in_step();
}

#[test]
fn unknown_and_unsupported_commands_keep_the_stream_in_step() {
    let mut raw = Raw::new();
    for command in [0, 6, 11, 12, 14, 16, 99, 0xffff] {
        assert_eq!(raw.call(command, &[0xee; 40]), Err(EOPNOTSUPP), "{command}");
    }
    raw.assert_in_step();
}

#[test]
fn every_fixed_size_is_checked() {
    let mut raw = Raw::new();
    let fixed = [
        DMA_MAP,
        DMA_UNMAP,
        GET_INFO,
        GET_REGION_INFO,
        GET_IRQ_INFO,
        REGION_READ,
    ];
    for command in fixed {
        for size in [0, 1, 8, 15, 33, 100] {
            assert_eq!(
                raw.call(command, &vec![0; size]),
                Err(EINVAL),
                "{command}, {size}"
            );
        }
    }
    for command in [SET_IRQS, REGION_WRITE, WRITE_MULTI] {
        assert_eq!(raw.call(command, &[0; 7]), Err(EINVAL), "{command}");
    }
    assert_eq!(raw.call(RESET, &[0]), Err(EINVAL));
    raw.assert_in_step();
    assert_eq!(raw.target.take_log(), [""; 0]);
}

#[test]
fn an_oversized_message_is_skipped() {
    let mut raw = Raw::new();
    let payload = vec![7; 3 << 20];
    // From a thread: nobody says that the server reads on before it answers.
    let bytes = raw.header(REGION_WRITE, 16 + payload.len(), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            raw.send_bytes(&bytes, &[]);
            raw.send_bytes(&payload, &[]);
        });
    });
    assert_eq!(raw.reply(REGION_WRITE), Err(E2BIG));
    raw.assert_in_step();
}

#[test]
fn impossible_sizes_close_the_connection() {
    for size in [0, 15, u32::MAX as usize] {
        let mut raw = Raw::new();
        let bytes = raw.header(GET_INFO, size, 0);
        raw.send_bytes(&bytes, &[]);
        assert_eq!(raw.stream.read(&mut [0; 16]).unwrap(), 0);
        raw.server.stop();
        assert_eq!(raw.target.take_log(), ["disconnect"]);
    }
}

#[test]
fn a_message_in_pieces_is_one_message() {
    let mut raw = Raw::new();
    let mut bytes = raw.header(GET_INFO, 32, 0);
    bytes.extend(words(&[16, 0, 0, 0]));
    for byte in bytes {
        raw.send_bytes(&[byte], &[]);
    }
    assert_eq!(raw.reply(GET_INFO).unwrap(), words(&[16, 3, 9, 5]));
}

#[test]
fn bad_flags_are_refused_and_replies_dropped() {
    let mut raw = Raw::new();
    for flags in [2, 0xf, 0x20, 0x40, 0x8000_0000] {
        raw.send(GET_INFO, &words(&[16, 0, 0, 0]), flags, &[]);
        assert_eq!(raw.reply(GET_INFO), Err(EINVAL), "{flags:#x}");
    }
    raw.send(REGION_READ, &[0; 32], 1, &[]);
    raw.send(REGION_READ, &[0; 0], 0x21, &[]);
    raw.assert_in_step();
}

#[test]
fn no_reply_is_honoured_even_for_errors() {
    let mut raw = Raw::new();
    raw.send(99, &[], NO_REPLY, &[]);
    raw.send(GET_INFO, &words(&[16, 0, 0, 0]), NO_REPLY, &[]);
    raw.send(REGION_WRITE, &[0; 3], NO_REPLY, &[]);
    raw.send(VERSION, &[], NO_REPLY, &[]);
    raw.assert_in_step();
}

#[test]
fn unwanted_descriptors_are_closed_and_refused() {
    let mut raw = Raw::new();
    let (ours, theirs) = std::io::pipe().unwrap();
    for count in [1, 2, 16, 40] {
        let fds = vec![theirs.as_fd(); count];
        assert_eq!(
            raw.call_with(GET_INFO, &words(&[16, 0, 0, 0]), &fds),
            Err(EINVAL)
        );
        assert_eq!(raw.call_with(99, &[], &fds), Err(EINVAL));
        raw.send(REGION_WRITE, &access(0, 0, 0), NO_REPLY | 1, &fds);
    }
    raw.assert_in_step();
    // Every copy of the write end is closed: the read end sees the end.
    drop(theirs);
    let mut ours = ours;
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}

/// Messages that arrive together are told apart, and descriptors go to the message that they came with.
#[test]
fn messages_read_at_once_keep_their_descriptors() {
    let mut raw = Raw::new();
    let (_ours, theirs) = std::io::pipe().unwrap();
    for round in 0..50u8 {
        let mut posted = Vec::new();
        for number in 0..4 {
            posted.extend(raw.header(REGION_WRITE, 16 + 16 + 1, NO_REPLY));
            posted.extend(access(number, 0, 1));
            posted.push(round);
        }
        raw.send_bytes(&posted, &[]);
        let mapping = mixed(32, 3, &[0, 0x1000, 0x1000]);
        raw.send(DMA_MAP, &mapping, 0, &[theirs.as_fd()]);
        raw.reply(DMA_MAP).unwrap();
        let log = raw.target.take_log();
        assert_eq!(log, ["map 0x1000 0x1000 true true true 0x0"]);
        let written = raw.call(REGION_READ, &access(0, 0, 4)).unwrap();
        assert_eq!(written[16..], [round; 4]);
    }
    raw.assert_in_step();
}

/// However many descriptors come with the pieces of one message, few are kept and none stays open.
#[test]
fn descriptors_with_every_piece_are_bounded() {
    let mut raw = Raw::new();
    let (mut ours, theirs) = std::io::pipe().unwrap();
    let mut bytes = raw.header(DMA_MAP, 16 + 32, 0);
    bytes.extend([0; 32]);
    for byte in &bytes {
        raw.send_bytes(&[*byte], &[theirs.as_fd(); 16]);
    }
    assert_eq!(raw.reply(DMA_MAP), Err(EINVAL));
    raw.assert_in_step();
    drop(theirs);
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
}
