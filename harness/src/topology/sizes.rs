//! Sizes as people write them: `4096`, `64KiB`, `512MiB`, `1GiB`.

/// 2^10 bytes.
pub const KIB: u64 = 1 << 10;
/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;
/// 2^30 bytes.
pub const GIB: u64 = 1 << 30;

const UNITS: [(&str, u64); 5] = [
    ("B", 1),
    ("KiB", KIB),
    ("MiB", MIB),
    ("GiB", GIB),
    ("TiB", 1 << 40),
];

/// A text that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a size: write bytes as `4096`, or a whole number with KiB, MiB, GiB or TiB, as `64MiB`"
)]
pub struct BadSize(pub String);

/// Bytes that `text` stands for. A unit may follow the number, with or without a space, in any case;
/// `K`, `M`, `G` and `T` mean the binary units too.
///
/// # Errors
/// [`BadSize`], also where the bytes do not fit into 64 bits.
pub fn parse(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.chars().take(64).collect());
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit = unit.trim_start();
    let factor = UNITS
        .iter()
        .find(|(name, _)| {
            unit.eq_ignore_ascii_case(name)
                || (name.len() == 3 && unit.eq_ignore_ascii_case(name.get(..1).unwrap_or(name)))
        })
        .map(|(_, factor)| *factor)
        .or(unit.is_empty().then_some(1));
    factor
        .and_then(|factor| number.checked_mul(factor))
        .ok_or_else(bad)
}

/// The shortest exact text for `bytes`: `64MiB`, or `4097` where no unit divides it. [`parse`] reads it
/// back to the same number.
pub fn format(bytes: u64) -> String {
    UNITS
        .iter()
        .rev()
        .find(|(_, factor)| *factor > 1 && bytes >= *factor && bytes.is_multiple_of(*factor))
        .map_or_else(
            || bytes.to_string(),
            |(name, factor)| format!("{}{name}", bytes / factor),
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("4096", 4096),
            ("0", 0),
            (" 64MiB ", 64 * MIB),
            ("1 gib", GIB),
            ("2G", 2 * GIB),
            ("7k", 7 * KIB),
            ("3B", 3),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_size() {
        for text in [
            "",
            "MiB",
            "-1",
            "1.5GiB",
            "1MB",
            "1 Mi B",
            "99999999TiB",
            "0x10",
            "１MiB",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn format_is_read_back(bytes: u64, shift in 0u32..63) {
            let bytes = (bytes >> shift) << (shift / 2);
            prop_assert_eq!(parse(&format(bytes)), Ok(bytes));
        }

        #[test]
        fn parse_never_panics(text in ".*") {
            let _ = parse(&text);
        }
    }
}
