//! Copying the same bytes in two modes in the same guest, and comparing what it took.

use std::collections::BTreeMap;
use std::time::Duration;

use p2plab_images::Progress;
use p2plab_pcie::Traffic;
use serde::Deserialize;

use super::ScenarioOptions;
use super::media::{clear, fill, medium, verify};
use crate::agent::Command;
use crate::lab::{GuestNvme, Lab, LabError};
use crate::report::{CopyReport, MeasuredMode, Talk};
use crate::topology::{MIB, Nvme, Topology, sizes};
use crate::wait;

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
    /// What the talk measured, where this is an example of it.
    pub talk: Option<Talk>,
}

/// What the guest's p2pcopy says of itself.
#[derive(Debug, Deserialize)]
struct CopyResult {
    bytes: u64,
    seconds: f64,
}

/// A copy slower than this has failed.
const SLOWEST: u64 = 4 * MIB;

/// Time without a change after which counters are taken to stand still.
const STILL: Duration = Duration::from_millis(50);
/// How often that is looked for.
const SETTLE_LOOKS: usize = 20;

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
    in_lab(topology, options, progress, |lab, options, progress| {
        compare(lab, job, options, progress)
    })
}

/// Starts a lab as the options say, does `work` in it, and ends it in order. An error of `work` comes with the
/// place of the run's logs.
pub(super) fn in_lab<T>(
    mut topology: Topology,
    options: &ScenarioOptions,
    progress: &mut dyn Progress,
    work: impl FnOnce(&Lab, &ScenarioOptions, &mut dyn Progress) -> Result<T, LabError>,
) -> Result<T, LabError> {
    options.own.apply(&mut topology);
    let mut start = Lab::options(topology).cold(options.cold);
    if let Some(directory) = &options.run_directory {
        start = start.run_directory(directory);
    }
    let lab = start.start_with(progress)?;
    let done = work(&lab, options, progress).map_err(|error| error.in_run(lab.run_directory()))?;
    lab.finish()?;
    Ok(done)
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
    fill(&source, options.size, progress)?;
    let guest = lab.guest()?;
    let from = guest.nvme(job.source)?;
    let to = guest.nvme(job.destination)?;
    let peer_memory = &peer_memory(lab, job.buffer)?;
    prefer_sgls(lab)?;
    await_scans(lab, &[&from, &to])?;
    let mut modes = Vec::new();
    for (name, buffer) in [("classic", "memory"), ("p2p", peer_memory)] {
        clear(&destination, options.size)?;
        progress.step(&format!("copying, {name}"), None);
        let before = settled(lab);
        let seconds = GuestCopy::new(&from, &to, buffer, options).run(lab)?;
        let traffic = settled(lab).since(&before);
        let verified = verify(&destination, options.size, progress)?;
        modes.push(MeasuredMode {
            name: name.to_owned(),
            seconds,
            traffic,
            verified,
        });
    }
    progress.finish();
    let mut report = CopyReport::new(job.scenario, options.size, options.chunk, &modes);
    report.description = job.description.to_owned();
    (report.threads, report.depth) = (options.threads, options.depth);
    report.talk = job.talk;
    report.versions = versions(lab);
    Ok(report)
}

/// Lets the guest's nvme driver describe data by SGLs wherever the average segment is a page.
///
/// Its default is 32 KiB, and it counts segments before it merges neighbours: those of a mapped CMB are pages, so a
/// buffer that is one run of addresses would still get a list of 8 bytes for each page, and the lists would be most
/// of what crosses the upstream port. A kernel without the parameter is left as it is.
pub(super) fn prefer_sgls(lab: &Lab) -> Result<(), LabError> {
    let set = "p=/sys/module/nvme/parameters/sgl_threshold; [ ! -e $p ] || echo 4096 > $p";
    lab.agent()?.check(&Command::new("sh").args(["-c", set]))?;
    Ok(())
}

/// Opens the disks: that waits for the end of their partition scans, whose reads would be counted.
fn await_scans(lab: &Lab, disks: &[&GuestNvme]) -> Result<(), LabError> {
    for disk in disks {
        let open = format!(": < {}", disk.block_device);
        lab.agent()?
            .check(&Command::new("sh").args(["-c", &open]))?;
    }
    Ok(())
}

/// What was counted, once it stands still: counting follows the bytes, and what the guest has seen may be counted a moment
/// later. A guest that never rests is not waited for.
fn settled(lab: &Lab) -> Traffic {
    let mut counted = lab.traffic();
    for _ in 0..SETTLE_LOOKS {
        std::thread::sleep(STILL);
        let now = lab.traffic();
        if now == counted {
            break;
        }
        counted = now;
    }
    counted
}

/// One run of the guest's p2pcopy.
#[derive(Clone, Copy, Debug)]
pub(super) struct GuestCopy<'a> {
    pub from: &'a GuestNvme,
    pub to: &'a GuestNvme,
    /// `memory`, or a file whose mapping is the buffer.
    pub buffer: &'a str,
    pub size: u64,
    pub chunk: u64,
    pub threads: u32,
    pub depth: u32,
}

impl<'a> GuestCopy<'a> {
    /// What the options say, from `from` to `to` through `buffer`.
    pub(super) fn new(
        from: &'a GuestNvme,
        to: &'a GuestNvme,
        buffer: &'a str,
        options: &ScenarioOptions,
    ) -> Self {
        Self {
            from,
            to,
            buffer,
            size: options.size,
            chunk: options.chunk,
            threads: options.threads,
            depth: options.depth,
        }
    }

    /// Copies, and returns the seconds that it took, as the guest's clock has it.
    pub(super) fn run(&self, lab: &Lab) -> Result<f64, LabError> {
        let command = Command::new("p2pcopy")
            .args(["--json", "--buffer", self.buffer])
            .args(["--chunk".to_owned(), self.chunk.to_string()])
            .args(["--size".to_owned(), self.size.to_string()])
            .args(["--threads".to_owned(), self.threads.to_string()])
            .args(["--depth".to_owned(), self.depth.to_string()])
            .args([&self.from.block_device, &self.to.block_device])
            .deadline(Duration::from_secs(30 + self.size / SLOWEST));
        let output = lab.agent()?.check(&command)?.text();
        let result: CopyResult = serde_json::from_str(&output).map_err(|error| {
            LabError::Unexpected(format!("p2pcopy answers `{}`: {error}", output.trim()))
        })?;
        if result.bytes == self.size {
            return Ok(result.seconds);
        }
        Err(LabError::Unexpected(format!(
            "p2pcopy copied {} of {} bytes",
            result.bytes, self.size
        )))
    }
}

/// The file whose mapping is peer-to-peer memory of the endpoint `name`, an SSD or an NVRAM card.
fn peer_memory(lab: &Lab, name: &str) -> Result<String, LabError> {
    let guest = lab.guest()?;
    if lab.devices().device(name)?.nvram().is_none() {
        return p2pmem(lab, &guest.nvme(name)?, name).map(str::to_owned);
    }
    let file = format!("{}/p2pmem/allocate", guest.nvram(name)?.folder);
    let what = format!("the p2pmem driver to publish the memory of {name}");
    guest.wait_until(&what, &format!("[ -e {file} ]"), wait::HOTPLUG)?;
    Ok(file)
}

/// The file whose mapping is peer-to-peer memory of the SSD `name`.
pub(super) fn p2pmem<'a>(lab: &Lab, nvme: &'a GuestNvme, name: &str) -> Result<&'a str, LabError> {
    if let Some(p2pmem) = &nvme.p2pmem {
        return Ok(p2pmem);
    }
    // A user's own kernel whose configuration lies nowhere near it could not be refused before it ran.
    let symbols = lab.guest()?.try_sh("cat /proc/kallsyms")?.text();
    if symbols.contains(" _text\n") && !symbols.contains(" pci_p2pdma_add_resource\n") {
        let release = &lab.artifacts().kernel.release;
        return Err(LabError::BadOption(format!(
            "the guest's kernel {release} has no P2PDMA: build it with CONFIG_PCI_P2PDMA=y (needs CONFIG_ZONE_DEVICE)"
        )));
    }
    Err(LabError::Unexpected(format!(
        "the guest's kernel has registered no peer-to-peer memory of {name}; its dmesg in the run directory's \
         console.log says why"
    )))
}

/// What a report says it ran on.
pub(super) fn versions(lab: &Lab) -> BTreeMap<String, String> {
    let mut versions = lab.artifacts().versions().clone();
    versions.insert("p2plab".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    versions
}
