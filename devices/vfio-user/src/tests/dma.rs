use std::fs::File;
use std::os::fd::AsFd;

use super::raw::*;

fn map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    mixed(32, flags, &[offset, address, size])
}

#[test]
fn map_with_and_without_descriptor() {
    let mut raw = Raw::new();
    let file = File::open("/dev/null").unwrap();
    let reply = raw.call_with(DMA_MAP, &map(3, 0x1000, 0x10_0000, 0x2000), &[file.as_fd()]);
    assert_eq!(reply, Ok(vec![]));
    assert_eq!(
        raw.call(DMA_MAP, &map(1, 0, 0xf000_0000, 0x4000)),
        Ok(vec![])
    );
    assert_eq!(
        raw.target.take_log(),
        [
            "map 0x100000 0x2000 true true true 0x1000",
            "map 0xf0000000 0x4000 true false false 0x0"
        ]
    );
}

#[test]
fn bad_maps_are_refused() {
    let mut raw = Raw::new();
    let file = File::open("/dev/null").unwrap();
    let two = [file.as_fd(), file.as_fd()];
    assert_eq!(
        raw.call_with(DMA_MAP, &map(3, 0, 0x1000, 0x1000), &two),
        Err(EINVAL)
    );
    assert_eq!(raw.call(DMA_MAP, &map(4, 0, 0x1000, 0x1000)), Err(EINVAL));
    assert_eq!(raw.call(DMA_MAP, &map(3, 0, 0x1000, 0)), Err(EINVAL));
    assert_eq!(raw.call(DMA_MAP, &map(3, 0, u64::MAX, 2)), Err(EINVAL));
    // Parts of pages.
    assert_eq!(raw.call(DMA_MAP, &map(3, 0, 0x1000, 0x800)), Err(EINVAL));
    assert_eq!(raw.call(DMA_MAP, &map(3, 0, 0x1800, 0x1000)), Err(EINVAL));
    let part = mixed(24, 0, &[0x1000, 0x800]);
    assert_eq!(raw.call(DMA_UNMAP, &part), Err(EINVAL));
    assert_eq!(
        raw.call(DMA_MAP, &mixed(31, 3, &[0, 0x1000, 0x1000])),
        Err(EINVAL)
    );
    raw.assert_in_step();
    assert_eq!(raw.target.take_log(), [""; 0]);
}

#[test]
fn unmap_one_and_all() {
    let mut raw = Raw::new();
    let one = mixed(24, 0, &[0x10_0000, 0x2000]);
    assert_eq!(raw.call(DMA_UNMAP, &one), Ok(one.clone()));
    let all = mixed(24, 2, &[0, 0]);
    assert_eq!(raw.call(DMA_UNMAP, &all), Ok(all.clone()));
    assert_eq!(
        raw.target.take_log(),
        ["unmap 0x100000 0x2000", "unmap all"]
    );
    for bad in [
        mixed(24, 1, &[0x1000, 0x1000]),
        mixed(24, 2, &[0, 0x1000]),
        mixed(24, 4, &[0, 0]),
        mixed(23, 0, &[0, 0x1000]),
    ] {
        assert_eq!(raw.call(DMA_UNMAP, &bad), Err(EINVAL));
    }
    // Nothing was there, and nothing is.
    let nothing = mixed(24, 0, &[0xdead_0000, 0x1000]);
    assert_eq!(raw.call(DMA_UNMAP, &nothing), Ok(nothing.clone()));
    assert_eq!(raw.target.take_log(), [""; 0]);
}
