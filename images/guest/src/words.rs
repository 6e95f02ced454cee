//! Values of options, as the guest's programs take them. `name` is the option; every error is a sentence.

/// Most transfers in flight, all threads together: the kernel's default limit (fs.aio-max-nr).
const MAX_IN_FLIGHT: u64 = 65_536;

/// A whole number.
pub fn number(name: &str, text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("{name} {text:?} is not a whole number"))
}

/// `value`, unless it is 0.
pub fn positive(name: &str, value: u64) -> Result<u64, String> {
    if value == 0 {
        Err(format!("{name} must be at least 1"))
    } else {
        Ok(value)
    }
}

/// A number of transfers in flight or threads: at least 1.
pub fn small(name: &str, text: &str) -> Result<usize, String> {
    let value = positive(name, number(name, text)?)?;
    match usize::try_from(value) {
        Ok(small) if value <= MAX_IN_FLIGHT => Ok(small),
        _ => Err(format!(
            "{name} {value} is too large, the most is {MAX_IN_FLIGHT}"
        )),
    }
}

/// A number of bytes with an optional binary suffix.
pub fn size(name: &str, text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => {
            return Err(format!(
                "{name} {text:?}: the unit is none of B, KiB, MiB, GiB, TiB"
            ));
        }
    };
    let wrong = || format!("{name} {text:?} is not a size such as 4096, 128KiB or 1GiB");
    digits
        .parse::<u64>()
        .map_err(|_| wrong())?
        .checked_mul(1 << shift)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("128KiB", 128 << 10),
            ("2m", 2 << 20),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(size("--block", text), Ok(bytes));
        }
        for text in ["", "KiB", "1MB", "-1", "99999999999GiB"] {
            assert!(size("--block", text).is_err(), "{text}");
        }
        assert!(small("--depth", "0").is_err() && small("--depth", "65537").is_err());
    }
}
