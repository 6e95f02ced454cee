//! The command line.

use std::time::Duration;

use p2plab_guest::words::{number, positive, size, small};

/// What `--help` prints.
pub const HELP: &str = "\
iobench [OPTIONS] DEVICE
Measures a block device or file with O_DIRECT and Linux AIO.

  --block SIZE         bytes of one transfer (default 4KiB)
  --depth N            transfers in flight (default 1)
  --milliseconds N     how long (default 1000)
  --write              write instead of read: what DEVICE holds is lost
  --sequential         one place after the other; default: random ones
  --seed N             of the random places (default 1)
  --json               one JSON object instead of one line

SIZE is a number of bytes, or with KiB, MiB, GiB. Exit status: 1 for I/O, 2 for usage.";

const OPTIONS: &str =
    "--block, --depth, --milliseconds, --write, --sequential, --seed, --json, --help";

/// A command line.
#[derive(Debug)]
pub enum Parsed {
    /// `--help`
    Help,
    /// Something to measure.
    Measure(Arguments),
}

/// What to measure and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    pub block: usize,
    pub depth: usize,
    pub duration: Duration,
    pub write: bool,
    pub sequential: bool,
    pub seed: u64,
    pub json: bool,
    pub device: String,
}

/// Reads the arguments; the error is a sentence.
pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut found = Arguments {
        block: 4096,
        depth: 1,
        duration: Duration::from_secs(1),
        write: false,
        sequential: false,
        seed: 1,
        json: false,
        device: String::new(),
    };
    let mut devices = Vec::new();
    while let Some(name) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{name} needs a value"));
        match name.as_str() {
            "--help" | "-h" => return Ok(Parsed::Help),
            "--block" => {
                let bytes = positive(&name, size(&name, &value()?)?)?;
                found.block = usize::try_from(bytes).map_err(|_| format!("{name} is too large"))?;
            }
            "--depth" => found.depth = small(&name, &value()?)?,
            "--milliseconds" => {
                found.duration = Duration::from_millis(positive(&name, number(&name, &value()?)?)?);
            }
            "--seed" => found.seed = number(&name, &value()?)?,
            "--write" => found.write = true,
            "--sequential" => found.sequential = true,
            "--json" => found.json = true,
            other if other.starts_with("--") => {
                return Err(format!("no option {other}; there are {OPTIONS}"));
            }
            _ => devices.push(name),
        }
    }
    let [device] = devices.as_slice() else {
        let count = devices.len();
        return Err(format!(
            "one DEVICE is needed, {count} given; see iobench --help"
        ));
    };
    found.device.clone_from(device);
    Ok(Parsed::Measure(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Arguments, String> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Parsed::Measure(arguments) => Ok(arguments),
            Parsed::Help => panic!("help"),
        }
    }

    #[test]
    fn options_are_taken() {
        let found = parsed("--block 128KiB --depth 8 --milliseconds 300 --write /dev/x").unwrap();
        assert_eq!((found.block, found.depth), (128 << 10, 8));
        assert_eq!(found.duration, Duration::from_millis(300));
        assert!(found.write && !found.sequential && found.device == "/dev/x");
    }

    #[test]
    fn bad_lines_get_a_sentence() {
        for (line, expected) in [
            ("", "0 given"),
            ("a b", "2 given"),
            ("--block 0 a", "at least 1"),
            ("--depth", "needs a value"),
            ("--fast a", "no option --fast"),
        ] {
            let why = parsed(line).unwrap_err();
            assert!(why.contains(expected), "{line}: {why}");
        }
    }
}
