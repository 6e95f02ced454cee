//! Copying the same bytes in two modes in the same guest, and comparing what it took.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use p2plab_guest::pattern;
use p2plab_images::Progress;
use rustix::fs::FallocateFlags;
use serde::Deserialize;

use super::ScenarioOptions;
use crate::agent::Command;
use crate::lab::{GuestNvme, Lab, LabError};
use crate::report::{CopyReport, MeasuredMode};
use crate::topology::{MIB, Nvme, Topology, sizes};

/// What is copied where.
#[derive(Clone, Copy, Debug)]
pub struct CopyJob<'a> {
    /// Name of the scenario.
    pub scenario: &'a str,
    /// One sentence for the report.
    pub description: &'a str,
    /// Endpoint to read from.
    pub source: &'a str,
    /// Endpoint to write to.
    pub destination: &'a str,
    /// Endpoint whose memory is the buffer in mode `p2p`.
    pub buffer: &'a str,
}

/// What the guest's p2pcopy says of itself.
#[derive(Debug, Deserialize)]
struct CopyResult {
    bytes: u64,
    seconds: f64,
}

/// Seed of the pattern on the source.
const SEED: u64 = 0x7032_706c_6162;
/// Bytes filled or compared at once: fits into a second-level cache.
const BLOCK: u64 = MIB;
/// A copy slower than this has failed.
const SLOWEST: u64 = 4 * MIB;

/// An SSD of the size that the options name: in memory, or in a file of the media folder.
///
/// # Errors
/// A size or chunk that no copy can have.
pub fn ssd(name: &str, options: &ScenarioOptions) -> Result<Nvme, LabError> {
    let (size, chunk) = (options.size, options.chunk);
    let page = 4096;
    if chunk == 0 || !chunk.is_multiple_of(page) {
        return Err(LabError::BadOption(format!(
            "--chunk {} is not a multiple of 4KiB; use for instance 1MiB",
            sizes::format(chunk)
        )));
    }
    if size == 0 || !size.is_multiple_of(chunk) {
        return Err(LabError::BadOption(format!(
            "--size {} is not a multiple of the chunk, {}; use for instance 1GiB",
            sizes::format(size),
            sizes::format(chunk)
        )));
    }
    Ok(match &options.media {
        Some(folder) => Nvme::file(folder.join(format!("{name}.img")), size).create(),
        None => Nvme::memory(size),
    })
}

/// Starts a lab, copies in both modes, compares every byte, and reports.
///
/// # Errors
/// See [`LabError`].
pub fn run(
    topology: Topology,
    job: &CopyJob<'_>,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<CopyReport, LabError> {
    let mut start = Lab::options(topology).cold(options.cold);
    if let Some(directory) = &options.run_directory {
        start = start.run_directory(directory);
    }
    let lab = start.start_with(progress)?;
    let report =
        compare(&lab, job, options, progress).map_err(|error| error.in_run(lab.run_directory()))?;
    lab.finish()?;
    Ok(report)
}

/// Copies in both modes in a running lab.
///
/// # Errors
/// See [`LabError`].
pub fn compare(
    lab: &Lab,
    job: &CopyJob<'_>,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
) -> Result<CopyReport, LabError> {
    let source = medium(lab, job.source)?;
    let destination = medium(lab, job.destination)?;
    fill(source, options.size, progress)?;
    let guest = lab.guest()?;
    let from = guest.nvme(job.source)?;
    let to = guest.nvme(job.destination)?;
    let buffer = guest.nvme(job.buffer)?.p2pmem.ok_or_else(|| {
        LabError::Unexpected(format!(
            "the guest's kernel has registered no peer-to-peer memory of {}; its dmesg in the run directory's \
             console.log says why",
            job.buffer
        ))
    })?;
    let mut modes = Vec::new();
    for (name, buffer) in [("classic", "memory"), ("p2p", buffer.as_str())] {
        clear(destination, options.size)?;
        progress.step(&format!("copying, {name}"), None);
        let before = lab.traffic();
        let result = copy(lab, &from, &to, buffer, options)?;
        let traffic = lab.traffic().since(&before);
        let verified = verify(destination, options.size, progress)?;
        modes.push(MeasuredMode {
            name: name.to_owned(),
            seconds: result.seconds,
            traffic,
            verified,
        });
    }
    progress.finish();
    let mut report = CopyReport::new(job.scenario, options.size, options.chunk, &modes);
    report.description = job.description.to_owned();
    (report.threads, report.depth) = (options.threads, options.depth);
    report.versions = lab.artifacts().versions().clone();
    report
        .versions
        .insert("p2plab".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    Ok(report)
}

fn copy(
    lab: &Lab,
    from: &GuestNvme,
    to: &GuestNvme,
    buffer: &str,
    options: &ScenarioOptions,
) -> Result<CopyResult, LabError> {
    let seconds = 30 + options.size / SLOWEST;
    let command = Command::new("p2pcopy")
        .args(["--json", "--buffer", buffer])
        .args(["--chunk".to_owned(), options.chunk.to_string()])
        .args(["--size".to_owned(), options.size.to_string()])
        .args(["--threads".to_owned(), options.threads.to_string()])
        .args(["--depth".to_owned(), options.depth.to_string()])
        .args([&from.block_device, &to.block_device])
        .deadline(Duration::from_secs(seconds));
    let output = lab.agent()?.check(&command)?.text();
    let result: CopyResult = serde_json::from_str(&output).map_err(|error| {
        LabError::Unexpected(format!("p2pcopy answers `{}`: {error}", output.trim()))
    })?;
    if result.bytes == options.size {
        return Ok(result);
    }
    Err(LabError::Unexpected(format!(
        "p2pcopy copied {} of {} bytes",
        result.bytes, options.size
    )))
}

fn medium<'a>(lab: &'a Lab, name: &str) -> Result<&'a File, LabError> {
    lab.devices()
        .device(name)?
        .nvme()
        .and_then(|controller| controller.namespace_file(1))
        .ok_or_else(|| LabError::Unexpected(format!("{name} has no namespace")))
}

/// Fills the first `size` bytes of `file` with the pattern.
fn fill(file: &File, size: u64, progress: &mut dyn Progress) -> Result<(), LabError> {
    progress.step("filling the source", Some(size));
    let mut block = vec![0; BLOCK as usize];
    let mut offset = 0;
    while offset < size {
        let length = BLOCK.min(size - offset) as usize;
        pattern::fill(SEED, offset, &mut block[..length]);
        file.write_all_at(&block[..length], offset)
            .map_err(medium_error)?;
        offset += length as u64;
        progress.at(offset);
    }
    Ok(())
}

/// Compares every byte of `file` with the pattern; `false` where one differs.
fn verify(file: &File, size: u64, progress: &mut dyn Progress) -> Result<bool, LabError> {
    progress.step("comparing every byte", Some(size));
    let mut block = vec![0; BLOCK as usize];
    let mut offset = 0;
    while offset < size {
        let length = BLOCK.min(size - offset) as usize;
        file.read_exact_at(&mut block[..length], offset)
            .map_err(medium_error)?;
        if let Some(at) = pattern::verify(SEED, offset, &block[..length]) {
            tracing::error!(at, "the copy differs from the source");
            return Ok(false);
        }
        offset += length as u64;
        progress.at(offset);
    }
    Ok(true)
}

/// Makes the destination read as zeros, so that a copy that did not happen cannot pass.
fn clear(file: &File, size: u64) -> Result<(), LabError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, 0, size).map_err(|error| medium_error(error.into()))
}

fn medium_error(source: std::io::Error) -> LabError {
    LabError::Medium(source)
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
