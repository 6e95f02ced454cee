//! The medium below the host's page cache, which a power cut leaves.
//!
//! The end of a process loses nothing that it has written to a file: a controller that never called `fdatasync` would
//! pass any number of kills. So this binary brings its own `fdatasync`. Being in the executable it comes before the C
//! library's, the standard library calls it, and the controller's code is the same as everywhere. It carries what has
//! changed in the file over to a second file, the medium: all that a host keeps that loses its power, and nothing else.
//! Counting syncs would say that some happened; the medium says that the right file was synced, after the data was
//! written and before that was acknowledged.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_int;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::NAMESPACES;
use super::pattern::sequence;

/// Media by the paths of their files.
static MEDIA: Mutex<Option<HashMap<PathBuf, Medium>>> = Mutex::new(None);

/// Longer than anybody is in the midst of a block.
const PATIENCE: Duration = Duration::from_secs(2);

struct Medium {
    file: File,
    /// What it has.
    known: Vec<u8>,
    block_size: usize,
    /// Whose blocks these are, if they are any namespace's.
    nsid: Option<u32>,
}

/// The medium of `path`.
pub fn path_of_medium(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap();
    path.parent().unwrap().join("medium").join(name)
}

/// Files that have no medium yet get one, and it has what they have.
pub fn make(folder: &Path) {
    fs::create_dir_all(folder.join("medium")).unwrap();
    for path in files(folder) {
        let place = path_of_medium(&path);
        if !place.exists() {
            fs::copy(&path, &place).unwrap();
        }
    }
}

/// From here on the media of the files in `folder` get what is synced.
pub fn watch(folder: &Path) {
    make(folder);
    let mut media = MEDIA.lock().unwrap();
    for path in files(folder) {
        let place = path_of_medium(&path);
        let ns = NAMESPACES.iter().position(|ns| path.ends_with(ns.name));
        let medium = Medium {
            known: fs::read(&place).unwrap(),
            file: OpenOptions::new().write(true).open(&place).unwrap(),
            block_size: ns.map_or(4096, |ns| 1 << NAMESPACES[ns].shift),
            nsid: ns.map(|ns| ns as u32 + 1),
        };
        media.get_or_insert_default().insert(path, medium);
    }
}

/// The power fails and comes back: the files in `folder` have what their media have.
pub fn cut_power(folder: &Path) {
    for path in files(folder) {
        fs::copy(path_of_medium(&path), &path).unwrap();
    }
}

fn files(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
}

impl Medium {
    fn sync(&mut self, source: &File) {
        let mut now = vec![0; self.known.len()];
        source.read_exact_at(&mut now, 0).unwrap();
        let blocks = now.chunks_exact_mut(self.block_size);
        let known = self.known.chunks_exact_mut(self.block_size);
        for ((place, new), old) in (0..).zip(blocks).zip(known).filter(|((_, a), b)| a != b) {
            let offset = place * self.block_size as u64;
            // Reading gets halves where somebody is writing. The kernel's writeback does not: it locks the page.
            let end = Instant::now() + PATIENCE;
            let torn = |block: &[u8]| {
                self.nsid
                    .is_some_and(|ns| sequence(block, ns, place).is_none())
            };
            while torn(new) && Instant::now() < end {
                std::thread::yield_now();
                source.read_exact_at(new, offset).unwrap();
            }
            self.file.write_all_at(new, offset).unwrap();
            old.copy_from_slice(new);
        }
    }
}

/// In the place of the C library's. Files without a medium need none.
// SAFETY: name and signature are the C library's (unistd.h), and whatever `fd` is, this only asks /proc for it.
#[unsafe(no_mangle)]
extern "C" fn fdatasync(fd: c_int) -> c_int {
    let link = format!("/proc/self/fd/{fd}");
    let Ok(path) = fs::read_link(&link) else {
        return -1;
    };
    let mut media = MEDIA.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(medium) = media.as_mut().and_then(|media| media.get_mut(&path)) {
        medium.sync(&File::open(&link).unwrap());
    }
    0
}
