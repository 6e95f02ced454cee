//! End-to-end protection information, type 1 with a 16 bit guard (NVM 5.2).

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::spec::command::{
    ApplicationTagCdw15, Command, CopyCdw12, CopyRange, Prinfo, ReadWriteCdw12,
};
use crate::spec::status::Status;

/// The 8 bytes of a block's protection information.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub(crate) struct Tuple {
    guard: U16,
    application: U16,
    reference: U32,
}

pub(crate) const TUPLE: usize = size_of::<Tuple>();
const _: () = assert!(TUPLE == 8);

/// An Application Tag that turns all checks of its block off (NVM 5.2.2.1).
const ESCAPE: u16 = 0xffff;

/// What a command wants of the protection information of its blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Protection {
    info: Prinfo,
    application: u16,
    mask: u16,
    /// Reference tag of the first block; it grows by one from block to block.
    reference: u32,
}

impl Protection {
    /// Of a command that addresses blocks.
    pub(crate) fn of(command: &Command) -> Self {
        let cdw12 = ReadWriteCdw12::from_bits(command.cdw12.get());
        Self::new(cdw12.prinfo(), command)
    }

    /// For the target of Copy.
    pub(crate) fn of_copy(command: &Command) -> Self {
        let cdw12 = CopyCdw12::from_bits(command.cdw12.get());
        Self::new(cdw12.prinfow(), command)
    }

    fn new(prinfo: u8, command: &Command) -> Self {
        let cdw15 = ApplicationTagCdw15::from_bits(command.cdw15.get());
        Self {
            info: Prinfo::from_bits(prinfo),
            application: cdw15.lbat(),
            mask: cdw15.lbatm(),
            reference: command.cdw14.get(),
        }
    }

    /// For a source of Copy.
    pub(crate) fn of_source(command: &Command, range: &CopyRange) -> Self {
        let cdw12 = CopyCdw12::from_bits(command.cdw12.get());
        Self {
            info: Prinfo::from_bits(cdw12.prinfor()),
            application: range.elbat.get(),
            mask: range.elbatm.get(),
            reference: range.eilbrt.get(),
        }
    }

    /// PRACT: the controller inserts the information on writes and strips it on reads.
    pub(crate) fn acts(&self) -> bool {
        self.info.pract()
    }

    /// The same from the `at`th block on.
    pub(crate) fn at_block(&self, at: u64) -> Self {
        // Reference tags wrap around.
        let reference = self.reference.wrapping_add((at & 0xffff_ffff) as u32);
        Self { reference, ..*self }
    }

    /// Whether one of the PRCHK bits is set.
    pub(crate) fn checks(&self) -> bool {
        self.info.guard() || self.info.application() || self.info.reference()
    }

    /// The reference tag of a checked type 1 block is its address (NVM 5.2.2.4).
    pub(crate) fn fits(&self, slba: u64) -> Result<(), Status> {
        if self.info.reference() && u64::from(self.reference) != slba & 0xffff_ffff {
            return Err(Status::INVALID_PROTECTION_INFORMATION);
        }
        Ok(())
    }

    /// Checks the tuples of the blocks in `data`, as far as PRCHK says.
    pub(crate) fn check(&self, data: &[u8], block: usize, tuples: &[u8]) -> Result<(), Status> {
        if !self.checks() {
            return Ok(());
        }
        let mut reference = self.reference;
        for (data, tuple) in data.chunks(block).zip(tuples.chunks_exact(TUPLE)) {
            let tuple = Tuple::read_from_bytes(tuple).map_err(|_| Status::INTERNAL_ERROR)?;
            self.check_block(data, tuple, reference)?;
            reference = reference.wrapping_add(1);
        }
        Ok(())
    }

    fn check_block(&self, data: &[u8], tuple: Tuple, reference: u32) -> Result<(), Status> {
        let application = tuple.application.get();
        if application == ESCAPE {
            return Ok(());
        }
        if self.info.guard() && tuple.guard.get() != guard(data) {
            return Err(Status::GUARD_CHECK_ERROR);
        }
        if self.info.application() && (application ^ self.application) & self.mask != 0 {
            return Err(Status::APPLICATION_TAG_CHECK_ERROR);
        }
        if self.info.reference() && tuple.reference.get() != reference {
            return Err(Status::REFERENCE_TAG_CHECK_ERROR);
        }
        Ok(())
    }

    /// Makes the tuples of the blocks in `data`.
    pub(crate) fn generate(&self, data: &[u8], block: usize, tuples: &mut [u8]) {
        let mut reference = self.reference;
        for (data, slot) in data.chunks(block).zip(tuples.chunks_exact_mut(TUPLE)) {
            let tuple = Tuple {
                guard: guard(data).into(),
                application: self.application.into(),
                reference: reference.into(),
            };
            slot.copy_from_slice(tuple.as_bytes());
            reference = reference.wrapping_add(1);
        }
    }
}

/// T10 DIF's polynomial.
const POLYNOMIAL: u16 = 0x8bb7;

/// Eight bytes at a time ("slicing by 8"): `TABLES[n][b]` is the remainder of byte `b` with `n` bytes behind it.
static TABLES: [[u16; 256]; 8] = tables();

const fn tables() -> [[u16; 256]; 8] {
    let mut tables = [[0u16; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            let carry = remainder & 0x8000 != 0;
            remainder <<= 1;
            if carry {
                remainder ^= POLYNOMIAL;
            }
            bit += 1;
        }
        tables[0][byte] = remainder;
        byte += 1;
    }
    let mut behind = 1;
    while behind < 8 {
        let mut byte = 0;
        while byte < 256 {
            let remainder = tables[behind - 1][byte];
            tables[behind][byte] = (remainder << 8) ^ tables[0][(remainder >> 8) as usize];
            byte += 1;
        }
        behind += 1;
    }
    tables
}

/// The CRC-16/T10-DIF of `data`.
pub(crate) fn guard(data: &[u8]) -> u16 {
    let look = |table: usize, byte: u8| TABLES[table][usize::from(byte)];
    let (words, rest) = data.as_chunks::<8>();
    let mut crc = 0u16;
    for [a, b, c, d, e, f, g, h] in words {
        let [high, low] = crc.to_be_bytes();
        crc = look(7, a ^ high)
            ^ look(6, b ^ low)
            ^ look(5, *c)
            ^ look(4, *d)
            ^ look(3, *e)
            ^ look(2, *f)
            ^ look(1, *g)
            ^ look(0, *h);
    }
    for byte in rest {
        let [high, low] = crc.to_be_bytes();
        crc = u16::from(low) << 8 ^ look(0, byte ^ high);
    }
    crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_guard_is_the_published_crc() {
        // The check value of CRC-16/T10-DIF.
        assert_eq!(guard(b"123456789"), 0xd0db);
        assert_eq!(guard(&[0; 512]), 0);
    }

    proptest! {
        #[test]
        fn the_guard_agrees_with_long_division(data in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut crc = 0u16;
            for byte in &data {
                for bit in (0..8).rev() {
                    let carry = (crc >> 15) ^ u16::from(byte >> bit & 1);
                    crc = (crc << 1) ^ (carry * POLYNOMIAL);
                }
            }
            prop_assert_eq!(guard(&data), crc);
        }
    }

    fn command(prinfo: u32, reference: u32, tag: u32) -> Command {
        Command {
            cdw12: (prinfo << 26).into(),
            cdw14: reference.into(),
            cdw15: tag.into(),
            ..Command::default()
        }
    }

    #[test]
    fn each_check_finds_its_error_and_the_escape_turns_all_off() {
        let data: Vec<u8> = (0..1024u32).map(|i| (i * 7) as u8).collect();
        let made = Protection::of(&command(0b1000, 41, 0x1234));
        let mut tuples = [0; 16];
        made.generate(&data, 512, &mut tuples);
        let check = |prinfo, reference, tag, data: &[u8], tuples: &[u8]| {
            Protection::of(&command(prinfo, reference, tag)).check(data, 512, tuples)
        };
        assert_eq!(check(0b111, 41, 0xffff_1234, &data, &tuples), Ok(()));
        let mut bad = data.clone();
        bad[700] ^= 1;
        let guard_error = Err(Status::GUARD_CHECK_ERROR);
        assert_eq!(check(0b100, 41, 0, &bad, &tuples), guard_error);
        assert_eq!(check(0b011, 41, 0xffff_1234, &bad, &tuples), Ok(()));
        let tag_error = Err(Status::APPLICATION_TAG_CHECK_ERROR);
        assert_eq!(check(0b010, 41, 0xffff_1235, &data, &tuples), tag_error);
        assert_eq!(check(0b010, 41, 0xfff0_1235, &data, &tuples), Ok(()));
        let reference_error = Err(Status::REFERENCE_TAG_CHECK_ERROR);
        assert_eq!(check(0b001, 42, 0, &data, &tuples), reference_error);
        assert_eq!(check(0b111, 42, 0, &bad, &[0xff; 16]), Ok(()));
    }

    #[test]
    fn a_checked_reference_tag_is_the_address() {
        let protection = Protection::of(&command(0b001, 5, 0));
        assert_eq!(protection.fits(0x7_0000_0005), Ok(()));
        assert_eq!(
            protection.fits(6),
            Err(Status::INVALID_PROTECTION_INFORMATION)
        );
        assert_eq!(Protection::of(&command(0b110, 5, 0)).fits(6), Ok(()));
    }
}
