//! Which parts of a namespace's file are allocated: all others are holes and read as zeros.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::namespace::Namespace;

/// The first allocated range that ends behind `offset`, from `offset` at the earliest: where it starts and ends.
/// A file that cannot tell is taken to be allocated.
pub(crate) fn next(ns: &Namespace, offset: u64) -> Option<(u64, u64)> {
    let size = ns.bytes();
    if offset >= size || ns.is_nothing() {
        return None;
    }
    // No data path uses the file's position.
    let start = match seek(&*ns.file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return None,
        Err(_) => return Some((offset, size)),
    };
    let end = seek(&*ns.file, SeekFrom::Hole(start)).unwrap_or(size);
    // Somebody may have punched the range meanwhile.
    (start < size).then(|| (start, end.clamp(start, size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Backing, NamespaceConfig};
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_passed_over() {
        let ns = Namespace::open(1, &NamespaceConfig::memory(1 << 20)).unwrap();
        assert_eq!(next(&ns, 0), None);
        ns.file.write_all_at(&[1], 300 << 10).unwrap();
        let (start, end) = next(&ns, 0).unwrap();
        assert!((1..=300 << 10).contains(&start) && end > 300 << 10);
        assert_eq!(next(&ns, end), None);
        assert_eq!(next(&ns, 1 << 20), None);
    }

    /// `/dev/zero` has neither data nor holes, and says that both are at its start.
    #[test]
    fn nothing_is_a_hole() {
        let mut config = NamespaceConfig::memory(1 << 20);
        config.backing = Backing::Null { size: 1 << 20 };
        let ns = Namespace::open(1, &config).unwrap();
        assert_eq!((next(&ns, 0), next(&ns, 4096)), (None, None));
    }
}
