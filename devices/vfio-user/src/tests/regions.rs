use super::raw::*;

fn write(offset: u64, region: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = access(offset, region, data.len() as u32);
    bytes.extend(data);
    bytes
}

#[test]
fn what_is_written_is_read() {
    let mut raw = Raw::new();
    for (region, offset) in [(0, 0x100), (0, 0x3ffc), (7, 0x40), (7, 4092)] {
        let data = [1, 2, 3, 4];
        let reply = raw
            .call(REGION_WRITE, &write(offset, region, &data))
            .unwrap();
        assert_eq!(reply, access(offset, region, 4));
        let reply = raw.call(REGION_READ, &access(offset, region, 4)).unwrap();
        assert_eq!(reply, write(offset, region, &data));
    }
}

#[test]
fn a_posted_write_is_done_before_the_next_read() {
    let mut raw = Raw::new();
    for value in 0..100 {
        raw.send(REGION_WRITE, &write(8, 0, &[value]), NO_REPLY, &[]);
    }
    assert_eq!(
        raw.call(REGION_READ, &access(8, 0, 1)).unwrap(),
        write(8, 0, &[99])
    );
}

/// Initiate Function Level Reset is bit 15 of Device Control, at 0x68 in a function of ours.
#[test]
fn bars_outlive_a_function_level_reset() {
    let mut raw = Raw::new();
    let bars = [7; 24];
    raw.call(REGION_WRITE, &write(0x10, 7, &bars)).unwrap();
    raw.call(REGION_WRITE, &write(0x4, 7, &[6])).unwrap();
    raw.call(REGION_WRITE, &write(0x68, 7, &[0, 0x80])).unwrap();
    let read = raw.call(REGION_READ, &access(0x10, 7, 24)).unwrap();
    assert_eq!(read, write(0x10, 7, &bars));
    let read = raw.call(REGION_READ, &access(0x4, 7, 1)).unwrap();
    assert_eq!(read, write(0x4, 7, &[0]), "all else is reset");
}

#[test]
fn accesses_outside_are_refused() {
    let mut raw = Raw::new();
    for (offset, region, count) in [
        (0x4000, 0, 1),
        (0x3ffd, 0, 4),
        (u64::MAX, 0, 1),
        (u64::MAX - 3, 0, 4),
        (4096, 7, 1),
        (0, 1, 4),
        (0, 6, 4),
        (0, 8, 4),
        (0, 9, 4),
        (0, 9, 0),
        (0, u32::MAX, 4),
    ] {
        let data = vec![0; count as usize];
        assert_eq!(
            raw.call(REGION_READ, &access(offset, region, count)),
            Err(EINVAL)
        );
        assert_eq!(
            raw.call(REGION_WRITE, &write(offset, region, &data)),
            Err(EINVAL)
        );
    }
    raw.assert_in_step();
}

#[test]
fn counts_are_checked() {
    let mut raw = Raw::new();
    assert_eq!(
        raw.call(REGION_READ, &access(0, 0, (1 << 20) + 1)),
        Err(E2BIG)
    );
    assert_eq!(raw.call(REGION_READ, &access(0, 0, u32::MAX)), Err(E2BIG));
    // Data shorter and longer than count.
    let mut payload = write(0, 0, &[9; 8]);
    payload.pop();
    assert_eq!(raw.call(REGION_WRITE, &payload), Err(EINVAL));
    payload.extend([9; 2]);
    assert_eq!(raw.call(REGION_WRITE, &payload), Err(EINVAL));
    assert_eq!(
        raw.call(REGION_READ, &access(0, 0, 8)).unwrap(),
        write(0, 0, &[0; 8])
    );
    // Nothing is something, too.
    assert_eq!(
        raw.call(REGION_READ, &access(0x4000, 0, 0)).unwrap(),
        access(0x4000, 0, 0)
    );
}

#[test]
fn the_clients_transfer_limit_counts() {
    let mut raw = Raw::silent();
    raw.call(
        VERSION,
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":64}}\0",
    )
    .unwrap();
    assert_eq!(raw.call(REGION_READ, &access(0, 0, 65)), Err(E2BIG));
    assert!(raw.call(REGION_READ, &access(0, 0, 64)).is_ok());
}

#[test]
fn several_writes_in_one_message() {
    let mut raw = Raw::new();
    let one = |offset, count, byte| {
        let mut bytes = access(offset, 0, count);
        bytes.extend([byte; 8]);
        bytes
    };
    let mut payload = 3u64.to_le_bytes().to_vec();
    payload.extend(one(0, 8, 1));
    payload.extend(one(0x4000, 8, 2));
    payload.extend(one(4, 2, 3));
    raw.send(WRITE_MULTI, &payload, NO_REPLY, &[]);
    let read = raw.call(REGION_READ, &access(0, 0, 10)).unwrap();
    assert_eq!(read[16..], [1, 1, 1, 1, 3, 3, 1, 1, 0, 0]);
    assert_eq!(raw.call(WRITE_MULTI, &payload), Err(EINVAL));
    payload[0] = 4;
    assert_eq!(raw.call(WRITE_MULTI, &payload), Err(EINVAL));
    payload[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(raw.call(WRITE_MULTI, &payload), Err(EINVAL));
    let mut long = 1u64.to_le_bytes().to_vec();
    long.extend(one(0, 9, 1));
    assert_eq!(raw.call(WRITE_MULTI, &long), Err(E2BIG));
}
