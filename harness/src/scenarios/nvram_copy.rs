//! Example 1 of the talk: a copy between two plain NVMe SSDs, once through host memory and once through an NVRAM card
//! below the same switch.

use p2plab_images::Progress;

use super::copy::{self, CopyJob};
use super::{ScenarioOptions, buffer_memory, window};
use crate::lab::LabError;
use crate::report::{CopyReport, Talk};
use crate::topology::{Nvram, Topology};

/// Name on the command line.
pub const NAME: &str = "nvram-copy";

/// The driver that makes the card's memory peer-to-peer memory.
const DRIVER: &str = "p2pmem";

/// Runs the scenario.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<CopyReport, LabError> {
    let job = CopyJob {
        scenario: NAME,
        description: "from ssd0 to ssd1; classic: through host memory; p2p: through the NVRAM card nv0",
        source: "ssd0",
        destination: "ssd1",
        buffer: "nv0",
        talk: Some(Talk::example(600_000_000)),
    };
    copy::run(topology(NAME, options)?, &job, options, progress)
}

/// Two SSDs without a CMB and a card below one switch, and the driver that publishes the card's memory.
///
/// # Errors
/// Options that no copy can have.
pub fn topology(name: &str, options: &ScenarioOptions) -> Result<Topology, LabError> {
    let memory = buffer_memory(options)?;
    let topology = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", copy::ssd("ssd0", options)?)
        .nvme("ssd1", "sw0.1", copy::ssd("ssd1", options)?)
        .nvram("nv0", "sw0.2", Nvram::memory(memory))
        .window(window(memory))
        .own_module(DRIVER)
        .build()?;
    Ok(topology)
}
