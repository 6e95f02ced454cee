//! A device's register file: the table of what it decodes, and how accesses of a host meet it.
//!
//! The table says where registers are and who may write them; what they hold and what a write does is the device's.
//! A guest reads any bytes that it likes, and gets zeros where there is no register. It writes aligned 4 or 8 bytes,
//! and what has another shape is the device's to ignore.

/// How a host may use a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Writes change nothing.
    ReadOnly,
    /// Writes reach the device.
    ReadWrite,
}

/// A register of 4 or 8 bytes. `N` is what the device calls it.
#[derive(Clone, Copy, Debug)]
pub struct Register<N> {
    /// Its name.
    pub name: N,
    /// Where it starts in its BAR.
    pub offset: u64,
    /// Bytes: 4 or 8.
    pub width: u64,
    /// Who may write it.
    pub access: Use,
}

/// One line of a table.
pub const fn register<N>(name: N, offset: u64, width: u64, access: Use) -> Register<N> {
    Register {
        name,
        offset,
        width,
        access,
    }
}

/// Fills `data` with the bytes at `at`, whatever its length and alignment.
pub fn read<N: Copy>(table: &[Register<N>], at: u64, data: &mut [u8], value_of: impl Fn(N) -> u64) {
    data.fill(0);
    let end = at.saturating_add(data.len() as u64);
    for register in table {
        if register.offset >= end || register.offset.saturating_add(register.width) <= at {
            continue;
        }
        let value = value_of(register.name).to_le_bytes();
        for (byte, position) in value
            .iter()
            .zip(register.offset..)
            .take(register.width as usize)
        {
            let index = position.checked_sub(at);
            let slot = index.and_then(|index| data.get_mut(usize::try_from(index).ok()?));
            if let Some(slot) = slot {
                *slot = *byte;
            }
        }
    }
}

/// A write of a shape that registers take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    at: u64,
    value: u64,
    width: u64,
}

impl Write {
    /// `data` at `at`, where it is aligned to 4 bytes and has 4 or 8.
    pub fn parse(at: u64, data: &[u8]) -> Option<Self> {
        let (value, width) = match (data, at % 4) {
            (&[a, b, c, d], 0) => (u64::from(u32::from_le_bytes([a, b, c, d])), 4),
            (&[a, b, c, d, e, f, g, h], 0) => (u64::from_le_bytes([a, b, c, d, e, f, g, h]), 8),
            _ => return None,
        };
        Some(Self { at, value, width })
    }

    /// What of it meets `register`, if the host may write that, and the mask of those bits.
    pub fn part<N>(&self, register: &Register<N>) -> Option<(u64, u64)> {
        let ones = |width| if width == 8 { u64::MAX } else { 0xffff_ffff };
        let (mask, whole) = (ones(self.width), ones(register.width));
        if register.access == Use::ReadOnly {
            return None;
        }
        match self.at.checked_sub(register.offset) {
            Some(shift) => (shift < register.width).then(|| {
                (
                    (self.value << (8 * shift)) & whole,
                    (mask << (8 * shift)) & whole,
                )
            }),
            None => {
                let shift = register.offset - self.at;
                (shift < self.width).then(|| {
                    (
                        (self.value >> (8 * shift)) & whole,
                        (mask >> (8 * shift)) & whole,
                    )
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TABLE: &[Register<u8>] = &[
        register(0, 0, 4, Use::ReadOnly),
        register(1, 4, 4, Use::ReadWrite),
        register(2, 8, 8, Use::ReadWrite),
        register(3, 20, 4, Use::ReadWrite),
    ];

    fn value(name: u8) -> u64 {
        0x1122_3344_5566_7788 ^ u64::from(name)
    }

    /// The table's bytes, laid out one by one.
    fn image() -> [u8; 32] {
        let mut image = [0; 32];
        for register in TABLE {
            let (at, width) = (register.offset as usize, register.width as usize);
            image[at..at + width].copy_from_slice(&value(register.name).to_le_bytes()[..width]);
        }
        image
    }

    #[test]
    fn writes_reach_what_they_cover() {
        let parts = |at, data: &[u8]| -> Vec<(u8, u64, u64)> {
            let write = Write::parse(at, data).unwrap();
            let parts = TABLE.iter().filter_map(|r| Some((r.name, write.part(r)?)));
            parts
                .map(|(name, (value, mask))| (name, value, mask))
                .collect()
        };
        let eight = 0x0102_0304_0506_0708u64.to_le_bytes();
        assert_eq!(parts(0, &eight), [(1, 0x0102_0304, 0xffff_ffff)]);
        assert_eq!(
            parts(4, &eight),
            [(1, 0x0506_0708, 0xffff_ffff), (2, 0x0102_0304, 0xffff_ffff)]
        );
        assert_eq!(parts(8, &eight), [(2, 0x0102_0304_0506_0708, u64::MAX)]);
        assert_eq!(
            parts(12, &eight[..4]),
            [(2, 0x0506_0708 << 32, 0xffff_ffff << 32)]
        );
        assert_eq!(parts(24, &eight), []);
        for (at, length) in [(1, 4), (2, 8), (0, 1), (0, 2), (0, 0), (4, 16)] {
            assert_eq!(Write::parse(at, &vec![0; length]), None);
        }
    }

    proptest! {
        #[test]
        fn reads_are_the_bytes_that_are_there(at in 0u64..40, length in 0usize..40) {
            let mut data = vec![0xff; length];
            read(TABLE, at, &mut data, value);
            let image = image();
            let expected: Vec<u8> = (at as usize..at as usize + length)
                .map(|i| image.get(i).copied().unwrap_or(0))
                .collect();
            prop_assert_eq!(data, expected);
        }

        #[test]
        fn no_access_is_too_strange(at: u64, data: Vec<u8>) {
            let mut bytes = data.clone();
            read(TABLE, at, &mut bytes, value);
            if let Some(write) = Write::parse(at, &data) {
                for register in TABLE {
                    let _ = write.part(register);
                }
            }
        }
    }
}
