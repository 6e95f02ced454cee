//! Splits a byte stream into lines of bounded length.

/// A line that was longer than the splitter's limit; its bytes are dropped up to the next newline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong {
    /// The limit in bytes.
    pub limit: usize,
}

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "a line was longer than {} bytes and was dropped",
            self.limit
        )
    }
}

impl std::error::Error for TooLong {}

/// Collects bytes until a newline; holds at most `limit` of them.
#[derive(Debug)]
pub struct LineSplitter {
    limit: usize,
    held: Vec<u8>,
    dropping: bool,
}

impl LineSplitter {
    /// A splitter for lines of at most `limit` bytes, the newline not counted.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            held: Vec::new(),
            dropping: false,
        }
    }

    /// Takes `bytes` and calls `line` for each line that they complete, without its newline. Empty
    /// lines are passed over: they are what a peer sends to end a line of unknown state.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(Result<&[u8], TooLong>)) {
        while !bytes.is_empty() {
            let end = bytes.iter().position(|b| *b == b'\n');
            let (part, rest) = match end {
                Some(at) => (&bytes[..at], &bytes[at + 1..]),
                None => (bytes, &bytes[..0]),
            };
            if !self.dropping {
                if part.len() > self.limit - self.held.len() {
                    self.dropping = true;
                    self.held = Vec::new();
                } else {
                    self.held.extend_from_slice(part);
                }
            }
            if end.is_some() {
                if self.dropping {
                    line(Err(TooLong { limit: self.limit }));
                } else if !self.held.is_empty() {
                    line(Ok(&self.held));
                }
                self.held.clear();
                self.dropping = false;
            }
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(limit: usize, pieces: &[&[u8]]) -> Vec<Result<Vec<u8>, TooLong>> {
        let mut splitter = LineSplitter::new(limit);
        let mut lines = Vec::new();
        for piece in pieces {
            splitter.feed(piece, |line| lines.push(line.map(<[u8]>::to_vec)));
        }
        lines
    }

    #[test]
    fn joins_pieces_and_skips_empty_lines() {
        let lines = split(8, &[b"ab", b"c\n\n", b"d\ne"]);
        assert_eq!(lines, [Ok(b"abc".to_vec()), Ok(b"d".to_vec())]);
    }

    #[test]
    fn a_long_line_is_one_error_and_the_next_line_is_whole() {
        let lines = split(4, &[b"abcd\n", b"abc", b"de", b"fghi\nok\n"]);
        let long = Err(TooLong { limit: 4 });
        assert_eq!(lines, [Ok(b"abcd".to_vec()), long, Ok(b"ok".to_vec())]);
    }

    proptest! {
        #[test]
        fn cutting_the_stream_elsewhere_changes_nothing(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            cut in 0usize..200,
        ) {
            let cut = cut.min(bytes.len());
            prop_assert_eq!(split(10, &[&bytes]), split(10, &[&bytes[..cut], &bytes[cut..]]));
        }
    }
}
