use super::raw::*;

#[test]
fn device_info() {
    let mut raw = Raw::new();
    raw.assert_in_step();
    assert_eq!(raw.call(GET_INFO, &words(&[15, 0, 0, 0])), Err(EINVAL));
}

#[test]
fn region_info_of_every_index() {
    let mut raw = Raw::new();
    for index in (0..9).filter(|index| *index != 2) {
        let reply = raw
            .call(GET_REGION_INFO, &words(&[32, 0, index, 0, 0, 0, 0, 0]))
            .unwrap();
        let (flags, size) = match index {
            0 => (3, 0x4000),
            7 => (3, 4096),
            _ => (0, 0),
        };
        assert_eq!(reply, words(&[32, flags, index, 0, size, 0, 0, 0]));
    }
    for index in [9, 100, u32::MAX] {
        let request = words(&[32, 0, index, 0, 0, 0, 0, 0]);
        assert_eq!(raw.call(GET_REGION_INFO, &request), Err(EINVAL));
    }
    assert_eq!(
        raw.call(GET_REGION_INFO, &words(&[31, 0, 0, 0, 0, 0, 0, 0])),
        Err(EINVAL)
    );
    raw.assert_in_step();
}

/// A client that leaves no room for a mapped region's capability learns how much it needs. The reply has the
/// capability's offset already: QEMU refuses one without, and crashes over it on a hot-add.
#[test]
fn region_info_without_room_for_its_capability() {
    let mut raw = Raw::new();
    let request = words(&[32, 0, 2, 0, 0, 0, 0, 0]);
    let reply = raw.call(GET_REGION_INFO, &request).unwrap();
    assert_eq!(reply, words(&[64, 0xf, 2, 32, 4096, 0, 0, 0]));
    raw.assert_in_step();
}

#[test]
fn irq_info_of_every_index() {
    let mut raw = Raw::new();
    let expected = [(7, 1), (1, 0), (1, 8), (1, 1), (1, 1)];
    for (index, (flags, count)) in (0..).zip(expected) {
        let reply = raw.call(GET_IRQ_INFO, &words(&[16, 0, index, 0])).unwrap();
        assert_eq!(reply, words(&[16, flags, index, count]));
    }
    for index in [5, u32::MAX] {
        assert_eq!(
            raw.call(GET_IRQ_INFO, &words(&[16, 0, index, 0])),
            Err(EINVAL)
        );
    }
    assert_eq!(raw.call(GET_IRQ_INFO, &words(&[8, 0, 0, 0])), Err(EINVAL));
}

#[test]
fn reset() {
    let mut raw = Raw::new();
    assert_eq!(raw.call(RESET, &[]), Ok(vec![]));
    assert_eq!(raw.target.take_log(), ["reset Conventional"]);
}
