//! Times as people write them: `250us`, `100ms`, `2s`.

use std::time::Duration;

const UNITS: [(&str, u64); 4] = [
    ("ns", 1),
    ("us", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
];

/// Longest time that a text can stand for.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// A text that is no time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a time: write a whole number with ns, us, ms or s, as `100ms`")]
pub struct BadTime(pub String);

/// The time that `text` stands for.
///
/// # Errors
/// [`BadTime`], also for more than [`LONGEST`].
pub fn parse(text: &str) -> Result<Duration, BadTime> {
    let bad = || BadTime(text.chars().take(64).collect());
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit = unit.trim_start();
    let factor = UNITS.iter().find(|(name, _)| *name == unit);
    let nanos = factor.and_then(|(_, factor)| number.checked_mul(*factor));
    let time = nanos.map(Duration::from_nanos);
    time.filter(|time| *time <= LONGEST).ok_or_else(bad)
}

/// The shortest exact text for a time; [`parse`] reads it back.
pub fn format(time: Duration) -> String {
    let nanos = time.as_nanos();
    let exact = |(_, factor): &&(&str, u64)| nanos.is_multiple_of(u128::from(*factor));
    let (name, factor) = UNITS.iter().rev().find(exact).unwrap_or(&UNITS[0]);
    format!("{}{name}", nanos / u128::from(*factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, micros) in [
            ("0s", 0),
            ("250us", 250),
            ("100ms", 100_000),
            ("3600s", 3_600_000_000),
        ] {
            let time = Duration::from_micros(micros);
            assert_eq!((parse(text), format(time)), (Ok(time), text.to_owned()));
        }
        assert_eq!(parse(" 1 s "), Ok(Duration::from_secs(1)));
        for bad in [
            "",
            "1",
            "s",
            "1.5s",
            "1h",
            "-1s",
            "3601s",
            "99999999999999999999s",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
