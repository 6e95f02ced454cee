//! The initramfs archive format: cpio "newc" (Linux, Documentation/driver-api/early-userspace/buffer-format).
//!
//! The same entries give the same bytes: sorted by name, no times, owner root.

use std::collections::BTreeMap;
use std::io::{self, Write};

/// What a name in the archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A directory with these permission bits.
    Directory(u32),
    /// A file with these permission bits and contents.
    File(u32, Vec<u8>),
    /// A symbolic link to that target.
    Symlink(String),
    /// A character device with these permission bits, major and minor number.
    CharDevice(u32, u32, u32),
}

/// An archive in the making.
#[derive(Debug, Clone, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

impl Archive {
    /// An archive without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `name` and the directories above it. A later entry replaces an earlier one of the same name.
    /// Leading slashes are dropped.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the name is empty, has a part `.` or `..`, or has a file above it.
    pub fn add(&mut self, name: &str, entry: Entry) -> io::Result<()> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let name = name.trim_start_matches('/').trim_end_matches('/');
        if name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains('\0') {
            return Err(invalid(format!("{name:?} is no absolute path of a file")));
        }
        for (end, _) in name.match_indices('/') {
            let above = name.get(..end).unwrap_or_default();
            match self.entries.get(above) {
                Some(Entry::Directory(_)) => {}
                Some(_) => return Err(invalid(format!("/{above} is no directory"))),
                None => {
                    self.entries
                        .insert(above.to_owned(), Entry::Directory(0o755));
                }
            }
        }
        self.entries.insert(name.to_owned(), entry);
        Ok(())
    }

    /// The entry of that name, without leading slash.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Writes the archive.
    ///
    /// # Errors
    ///
    /// Those of `out`, and [`io::ErrorKind::InvalidInput`] for a file of 4 GiB or more.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (number, (name, entry)) in (1u32..).zip(&self.entries) {
            let (mode, data, device) = match entry {
                Entry::Directory(bits) => (S_IFDIR | bits, &[][..], (0, 0)),
                Entry::File(bits, data) => (S_IFREG | bits, data.as_slice(), (0, 0)),
                Entry::Symlink(target) => (S_IFLNK | 0o777, target.as_bytes(), (0, 0)),
                Entry::CharDevice(bits, major, minor) => {
                    (S_IFCHR | bits, &[][..], (*major, *minor))
                }
            };
            let links = if matches!(entry, Entry::Directory(_)) {
                2
            } else {
                1
            };
            record(out, name, [number, mode, links, device.0, device.1], data)?;
        }
        record(out, "TRAILER!!!", [0, 0, 1, 0, 0], &[])
    }
}

/// Writes one record; `fields` are inode, mode, links and the device's two numbers.
fn record(out: &mut impl Write, name: &str, fields: [u32; 5], data: &[u8]) -> io::Result<()> {
    let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "larger than 4 GiB");
    let [inode, mode, links, major, minor] = fields;
    let size = u32::try_from(data.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    // In order: magic, inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size,
    // checksum (unused in this format).
    let header = format!(
        "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}\
         {name_size:08x}{:08x}",
        0, 0, 0, 0, 0, 0
    );
    out.write_all(header.as_bytes())?;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, header.len() + name.len() + 1)?;
    out.write_all(data)?;
    pad(out, data.len())
}

/// Header with name, and data, each end on a multiple of four.
fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    let zeros = [0; 3];
    out.write_all(zeros.get(..written.wrapping_neg() & 3).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (name, mode, links, rdev, data) of every record, checking form on the way.
    #[allow(clippy::type_complexity)]
    fn parse(mut bytes: &[u8]) -> Vec<(String, u32, u32, (u32, u32), Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (name_size, size) = (field(11) as usize, field(6) as usize);
            assert_eq!(bytes[110 + name_size - 1], 0);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(
                (field(2), field(3), field(5)),
                (0, 0, 0),
                "uid, gid, mtime of {name}"
            );
            let data = (110 + name_size).next_multiple_of(4);
            let end = data + size.next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), end);
                return found;
            }
            let content = bytes[data..data + size].to_vec();
            found.push((name, field(1), field(4), (field(9), field(10)), content));
            bytes = &bytes[end..];
        }
    }

    fn sample() -> Archive {
        let mut archive = Archive::new();
        archive
            .add("/usr/bin/tool", Entry::File(0o755, b"12345".to_vec()))
            .unwrap();
        archive
            .add("dev/console", Entry::CharDevice(0o600, 5, 1))
            .unwrap();
        archive
            .add("bin", Entry::Symlink("usr/bin".into()))
            .unwrap();
        archive.add("tmp", Entry::Directory(0o1777)).unwrap();
        archive
    }

    #[test]
    fn what_was_added_reads_back_with_parents_first() {
        let mut bytes = Vec::new();
        sample().write(&mut bytes).unwrap();
        let found = parse(&bytes);
        let names: Vec<_> = found.iter().map(|r| r.0.as_str()).collect();
        assert_eq!(
            names,
            [
                "bin",
                "dev",
                "dev/console",
                "tmp",
                "usr",
                "usr/bin",
                "usr/bin/tool"
            ]
        );
        assert_eq!(
            (found[0].1, found[0].4.as_slice()),
            (0o120_777, &b"usr/bin"[..])
        );
        assert_eq!((found[1].1, found[1].2), (0o040_755, 2));
        assert_eq!((found[2].1, found[2].3), (0o020_600, (5, 1)));
        assert_eq!(found[3].1, 0o041_777);
        assert_eq!(
            (found[6].1, found[6].4.as_slice()),
            (0o100_755, &b"12345"[..])
        );
    }

    #[test]
    fn every_padding_reads_back() {
        for length in 0..9 {
            let mut archive = Archive::new();
            let name = "n".repeat(length + 1);
            archive
                .add(&name, Entry::File(0o644, vec![7; length]))
                .unwrap();
            let mut bytes = Vec::new();
            archive.write(&mut bytes).unwrap();
            assert_eq!(bytes.len() % 4, 0);
            assert_eq!(parse(&bytes)[0].4, vec![7; length]);
        }
    }

    #[test]
    fn order_of_adding_does_not_matter() {
        let mut a = Archive::new();
        let mut b = Archive::new();
        let files = [("x/1", b"1"), ("x/2", b"2"), ("y", b"3")];
        files
            .iter()
            .for_each(|(n, d)| a.add(n, Entry::File(0o644, d.to_vec())).unwrap());
        files
            .iter()
            .rev()
            .for_each(|(n, d)| b.add(n, Entry::File(0o644, d.to_vec())).unwrap());
        let (mut left, mut right) = (Vec::new(), Vec::new());
        a.write(&mut left).unwrap();
        b.write(&mut right).unwrap();
        assert_eq!(left, right);
    }

    #[test]
    fn names_that_lead_outside_or_below_a_file_are_refused() {
        let mut archive = sample();
        for bad in [
            "",
            "/",
            "../x",
            "a/../b",
            "a//b",
            "./a",
            "usr/bin/tool/x",
            "bin/x",
            "a\0b",
        ] {
            assert!(
                archive.add(bad, Entry::Symlink("t".into())).is_err(),
                "{bad:?}"
            );
        }
    }
}
