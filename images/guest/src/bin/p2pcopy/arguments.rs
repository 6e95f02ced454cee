//! The command line.

use p2plab_guest::words::{number, positive, size, small};

/// What `--help` prints.
pub const HELP: &str = "\
p2pcopy [OPTIONS] SOURCE DESTINATION
Copies between block devices or files with O_DIRECT and Linux AIO through a chosen buffer.

  --buffer PATH|memory   where the bytes pass: a p2pmem/allocate file, /dev/p2pmemN, or memory (default)
  --buffer-offset SIZE   where in it the chunks begin (default 0): what is not a multiple of a page makes the
                         devices' transfers unaligned
  --chunk SIZE           bytes of one transfer (default 1MiB)
  --count N              chunks to copy; default: all that both sides hold
  --size SIZE            bytes to copy, instead of --count
  --threads N            (default 1)
  --depth N              chunks in flight per thread (default 1)
  --offset SIZE          where to begin on both sides (default 0)
  --source-offset SIZE, --destination-offset SIZE
  --check                write a seeded pattern to the source before, compare the destination after
  --seed N               of the pattern (default: a fresh one, so that old copies do not pass)
  --seeded               with --check and --seed: the source holds the pattern already
  --skip-read            only write, whatever the buffer holds
  --skip-write           only read
  --json                 one JSON object instead of one line

SIZE is a number of bytes, or with KiB, MiB, GiB. Exit status: 1 for I/O or a failed check, 2 for usage.";

const OPTIONS: &[&str] = &[
    "--buffer",
    "--buffer-offset",
    "--chunk",
    "--count",
    "--size",
    "--threads",
    "--depth",
    "--offset",
    "--source-offset",
    "--destination-offset",
    "--check",
    "--seed",
    "--seeded",
    "--skip-read",
    "--skip-write",
    "--json",
    "--help",
];

/// A command line.
#[derive(Debug)]
pub enum Parsed {
    /// `--help`
    Help,
    /// A copy to do.
    Copy(Arguments),
}

/// What to copy and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    pub buffer: Option<String>,
    pub buffer_offset: u64,
    pub chunk: u64,
    pub size: Option<u64>,
    pub threads: usize,
    pub depth: usize,
    pub source_offset: u64,
    pub destination_offset: u64,
    pub check: bool,
    pub seed: Option<u64>,
    pub seeded: bool,
    pub skip_read: bool,
    pub skip_write: bool,
    pub json: bool,
    pub source: String,
    pub destination: String,
}

/// Reads the arguments; the error is a sentence.
pub fn parse(words: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut found = Arguments {
        chunk: 1 << 20,
        threads: 1,
        depth: 1,
        ..Arguments::default()
    };
    let (mut count, mut places) = (None, Vec::new());
    let mut words = words;
    while let Some(word) = words.next() {
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                (name.to_owned(), Some(value.to_owned()))
            }
            _ => (word, None),
        };
        if matches!(
            name.as_str(),
            "--check" | "--seeded" | "--skip-read" | "--skip-write" | "--json"
        ) && inline.is_some()
        {
            return Err(format!("{name} takes no value"));
        }
        let mut value = || {
            inline
                .clone()
                .or_else(|| words.next())
                .ok_or_else(|| format!("{name} needs a value"))
        };
        match name.as_str() {
            "--help" | "-h" => return Ok(Parsed::Help),
            "--buffer" => found.buffer = Some(value()?).filter(|buffer| buffer != "memory"),
            "--buffer-offset" => found.buffer_offset = size(&name, &value()?)?,
            "--chunk" => found.chunk = positive(&name, size(&name, &value()?)?)?,
            "--count" => count = Some(positive(&name, number(&name, &value()?)?)?),
            "--size" => found.size = Some(positive(&name, size(&name, &value()?)?)?),
            "--threads" => found.threads = small(&name, &value()?)?,
            "--depth" => found.depth = small(&name, &value()?)?,
            "--offset" => {
                let offset = size(&name, &value()?)?;
                (found.source_offset, found.destination_offset) = (offset, offset);
            }
            "--source-offset" => found.source_offset = size(&name, &value()?)?,
            "--destination-offset" => found.destination_offset = size(&name, &value()?)?,
            "--seed" => found.seed = Some(number(&name, &value()?)?),
            "--check" => found.check = true,
            "--seeded" => found.seeded = true,
            "--skip-read" => found.skip_read = true,
            "--skip-write" => found.skip_write = true,
            "--json" => found.json = true,
            other if other.starts_with("--") => {
                return Err(format!(
                    "no option {other}; there are {}",
                    OPTIONS.join(", ")
                ));
            }
            _ => places.push(name),
        }
    }
    let [source, destination] = places.as_slice() else {
        let count = places.len();
        return Err(format!(
            "SOURCE and DESTINATION are needed, {count} given; see p2pcopy --help"
        ));
    };
    (found.source, found.destination) = (source.clone(), destination.clone());
    if let Some(count) = count {
        let bytes = found
            .chunk
            .checked_mul(count)
            .ok_or("--count times --chunk is too large")?;
        if found.size.replace(bytes).is_some() {
            return Err("give --count or --size, not both".into());
        }
    }
    consistent(&found)?;
    Ok(Parsed::Copy(found))
}

fn consistent(found: &Arguments) -> Result<(), String> {
    if found.skip_read && found.skip_write {
        return Err("--skip-read with --skip-write leaves nothing to do".into());
    }
    if found.check && (found.skip_read || found.skip_write) {
        return Err("--check needs both reading and writing; leave out the --skip option".into());
    }
    if found.seeded && !(found.check && found.seed.is_some()) {
        return Err("--seeded needs --check, and --seed to know the pattern".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Arguments, String> {
        match parse(line.split_whitespace().map(str::to_owned))? {
            Parsed::Copy(arguments) => Ok(arguments),
            Parsed::Help => panic!("help"),
        }
    }

    #[test]
    fn sizes_and_places() {
        let found =
            parsed("--chunk 128KiB --count=8 --offset 1MiB --source-offset 0 a --json b").unwrap();
        assert_eq!((found.chunk, found.size), (128 << 10, Some(1 << 20)));
        assert_eq!(
            (found.source_offset, found.destination_offset),
            (0, 1 << 20)
        );
        assert!(found.json);
        assert_eq!(
            (found.source.as_str(), found.destination.as_str()),
            ("a", "b")
        );
        assert_eq!(parsed("--buffer memory a b").unwrap().buffer, None);
    }

    #[test]
    fn bad_lines_get_a_sentence() {
        for (line, expected) in [
            ("a", "1 given"),
            ("--chunk 0 a b", "at least 1"),
            ("--chunk 1MB a b", "unit"),
            ("--chunk x a b", "unit"),
            ("--size 99999999999GiB a b", "not a size"),
            ("--count 1 --size 1 a b", "not both"),
            ("--fast a b", "no option --fast"),
            ("a b --depth", "needs a value"),
            ("--depth 1000000 a b", "too large"),
            ("--check --skip-read a b", "--check needs"),
            ("--skip-write --skip-read a b", "nothing to do"),
            ("--seeded a b", "--seeded needs"),
            ("--json=yes a b", "takes no value"),
        ] {
            let why = parsed(line).unwrap_err();
            assert!(why.contains(expected), "{line}: {why}");
        }
    }
}
