//! A copy between two NVMe SSDs, once through host memory and once through the Persistent Memory Region of one of them, or
//! of a third, which our patches to Linux's nvme driver make peer-to-peer memory of.

use p2plab_images::Progress;

use super::copy::{self, CopyJob};
use super::{ScenarioOptions, buffer_memory, nvme_cmb_copy, window};
use crate::lab::LabError;
use crate::report::CopyReport;
use crate::topology::{PmrOptions, Topology};

/// Name on the command line.
pub const NAME: &str = "nvme-pmr-copy";

/// The driver with our patches.
const DRIVER: &str = "nvme";

/// Runs the scenario.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<CopyReport, LabError> {
    let buffer = nvme_cmb_copy::owner(options);
    let job = CopyJob {
        scenario: NAME,
        description: &format!(
            "from ssd0 to ssd1; classic: through host memory; p2p: through the PMR of {buffer}"
        ),
        source: "ssd0",
        destination: "ssd1",
        buffer,
        // NVMe has had the PMR since 1.4, of 2019.
        talk: None,
    };
    copy::run(topology(NAME, options)?, &job, options, progress)
}

/// Two SSDs below one switch, or three; the one whose PMR is the buffer has one that is large enough, and no CMB.
///
/// # Errors
/// Options that no copy can have.
pub fn topology(name: &str, options: &ScenarioOptions) -> Result<Topology, LabError> {
    let memory = buffer_memory(options)?;
    let builder = nvme_cmb_copy::ssds(name, options, |ssd| ssd.pmr(PmrOptions::memory(memory)))?;
    Ok(builder.own_module(DRIVER).window(window(memory)).build()?)
}
