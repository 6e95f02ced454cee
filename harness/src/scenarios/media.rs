//! What lies on the SSDs: the pattern that is copied, and whether it arrived.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use p2plab_guest::pattern;
use p2plab_images::Progress;

use crate::lab::{Lab, LabError};
use crate::topology::MIB;

/// Seed of the pattern on the source.
const SEED: u64 = 0x7032_706c_6162;
/// Bytes filled or compared at once: fits into a second-level cache.
const BLOCK: u64 = MIB;

/// The first namespace of the SSD `name`.
pub(super) fn medium(lab: &Lab, name: &str) -> Result<Arc<File>, LabError> {
    lab.devices()
        .device(name)?
        .nvme()
        .and_then(|controller| controller.namespace_file(1))
        .ok_or_else(|| LabError::Unexpected(format!("{name} has no namespace")))
}

/// Fills the first `size` bytes of `file` with the pattern.
pub(super) fn fill(file: &File, size: u64, progress: &mut dyn Progress) -> Result<(), LabError> {
    progress.step("filling the source", Some(size));
    let mut block = vec![0; BLOCK as usize];
    let mut offset = 0;
    while offset < size {
        let length = BLOCK.min(size - offset) as usize;
        pattern::fill(SEED, offset, &mut block[..length]);
        file.write_all_at(&block[..length], offset)
            .map_err(LabError::medium)?;
        offset += length as u64;
        progress.at(offset);
    }
    Ok(())
}

/// Compares every byte of `file` with the pattern; `false` where one differs.
pub(super) fn verify(
    file: &File,
    size: u64,
    progress: &mut dyn Progress,
) -> Result<bool, LabError> {
    progress.step("comparing every byte", Some(size));
    let mut block = vec![0; BLOCK as usize];
    let mut offset = 0;
    while offset < size {
        let length = BLOCK.min(size - offset) as usize;
        file.read_exact_at(&mut block[..length], offset)
            .map_err(LabError::Medium)?;
        if let Some(at) = pattern::verify(SEED, offset, &block[..length]) {
            tracing::error!(at, "the copy differs from the source");
            return Ok(false);
        }
        offset += length as u64;
        progress.at(offset);
    }
    Ok(true)
}

/// Fills the first `size` bytes with zeros, so that a copy that did not happen cannot pass. They are written and
/// not punched out: otherwise the copy that is measured would pay for the host's allocation of pages.
pub(super) fn clear(file: &File, size: u64) -> Result<(), LabError> {
    let block = vec![0; BLOCK as usize];
    let mut offset = 0;
    while offset < size {
        let length = BLOCK.min(size - offset) as usize;
        file.write_all_at(&block[..length], offset)
            .map_err(LabError::medium)?;
        offset += length as u64;
    }
    Ok(())
}

/// Whether `path` is a folder in which media can be made.
///
/// # Errors
/// One sentence.
pub fn check_media(path: &Path) -> Result<(), LabError> {
    if path.is_dir() {
        return Ok(());
    }
    Err(LabError::BadOption(format!(
        "--media {} is no folder; make it, or leave --media out to keep the SSDs in memory",
        path.display()
    )))
}
