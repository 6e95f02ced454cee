//! File requests, one after the other.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use super::{Shared, load_modules};
use crate::protocol::{Bytes, Entry, EntryKind, ErrorKind, MAX_CHUNK, Reply, Request};

/// Directory entries in one message; a name has at most 255 bytes, so a line stays far below its limit
/// even if each byte needs escaping.
const ENTRIES: usize = 100;

/// A file request and whom to answer.
pub(super) struct Job {
    pub session: u64,
    pub id: u64,
    pub request: Request,
}

/// Does the work and answers.
pub(super) fn work(shared: &Shared, job: Job) {
    let send = |reply| drop(shared.send(job.session, job.id, reply));
    let (what, result) = match job.request {
        Request::Write {
            path,
            offset,
            data,
            create,
        } => {
            let result = write(Path::new(&path), offset, &data.0, create).map(|()| Reply::Done);
            (format!("cannot write {path:?}"), result)
        }
        Request::Read {
            path,
            offset,
            length,
        } => (
            format!("cannot read {path:?}"),
            read(Path::new(&path), offset, length),
        ),
        Request::List { path } => (
            format!("cannot list {path:?}"),
            list(Path::new(&path), send),
        ),
        Request::LoadModules { paths } => (String::new(), Ok(load_modules(paths))),
        _ => (String::new(), Err(io::Error::other("not a file request"))),
    };
    match result {
        Ok(reply) => send(reply),
        Err(error) => {
            let message = format!("{what}: {error}");
            shared.error(job.session, job.id, ErrorKind::System, message);
        }
    }
}

fn write(path: &Path, offset: u64, data: &[u8], create: Option<u32>) -> io::Result<()> {
    let mut options = OpenOptions::new();
    // Without O_NONBLOCK a FIFO would stop the thread until somebody reads it.
    options
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = match create {
        None => options.open(path)?,
        Some(mode) => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            let file = options
                .create(true)
                .truncate(true)
                .mode(mode & 0o7777)
                .open(path)?;
            if file.metadata()?.is_file() && !path.starts_with("/sys") && !path.starts_with("/proc")
            {
                // The mode given to open is subject to umask and ignored for an existing file.
                file.set_permissions(std::fs::Permissions::from_mode(mode & 0o7777))?;
            }
            file
        }
    };
    file.write_all_at(data, offset)
}

fn read(path: &Path, offset: u64, length: u32) -> io::Result<Reply> {
    let wanted = usize::try_from(length)
        .unwrap_or(MAX_CHUNK)
        .clamp(1, MAX_CHUNK);
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let mut data = vec![0; wanted];
    let mut held = 0;
    let mut eof = false;
    // Files of /proc and /sys give less than asked for although more follows.
    while held < wanted && !eof {
        let room = data.get_mut(held..).unwrap_or_default();
        match file.read_at(room, offset.saturating_add(held as u64)) {
            Ok(0) => eof = true,
            Ok(count) => held += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    data.truncate(held);
    Ok(Reply::Data {
        data: Bytes(data),
        eof,
    })
}

fn list(path: &Path, mut send: impl FnMut(Reply)) -> io::Result<Reply> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        // An entry may vanish between being read and being looked at.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if entries.len() == ENTRIES {
            send(Reply::Entries {
                entries: std::mem::take(&mut entries),
                last: false,
            });
        }
        entries.push(Entry {
            name: entry.file_name().to_string_lossy().into_owned(),
            kind: kind(metadata.file_type()),
            size: metadata.len(),
            mode: metadata.permissions().mode() & 0o7777,
        });
    }
    Ok(Reply::Entries {
        entries,
        last: true,
    })
}

fn kind(file_type: FileType) -> EntryKind {
    match file_type {
        t if t.is_file() => EntryKind::File,
        t if t.is_dir() => EntryKind::Directory,
        t if t.is_symlink() => EntryKind::Symlink,
        t if t.is_block_device() => EntryKind::BlockDevice,
        t if t.is_char_device() => EntryKind::CharacterDevice,
        t if t.is_fifo() => EntryKind::Fifo,
        t if t.is_socket() => EntryKind::Socket,
        _ => EntryKind::Other,
    }
}
