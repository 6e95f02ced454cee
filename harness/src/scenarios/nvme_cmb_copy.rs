//! Example 2 of the talk: a copy between two NVMe SSDs, once through host memory and once through the
//! Controller Memory Buffer of the source.

use p2plab_images::Progress;

use super::ScenarioOptions;
use super::copy::{self, CopyJob};
use crate::lab::LabError;
use crate::report::CopyReport;
use crate::topology::{MIB, Topology};

/// Name on the command line.
pub const NAME: &str = "nvme-cmb-copy";

/// Smallest CMB: the buffer of a copy with few small chunks fits, and Linux takes it.
const SMALLEST_CMB: u64 = 64 * MIB;

/// Runs the scenario.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<CopyReport, LabError> {
    let job = CopyJob {
        scenario: NAME,
        description: "from ssd0 to ssd1; classic: through host memory; p2p: through the CMB of ssd0",
        source: "ssd0",
        destination: "ssd1",
        buffer: "ssd0",
    };
    copy::run(topology(NAME, options)?, &job, options, progress)
}

/// Two SSDs below one switch, the first with a CMB that is large enough.
pub(super) fn topology(name: &str, options: &ScenarioOptions) -> Result<Topology, LabError> {
    let buffer = options
        .chunk
        .saturating_mul(u64::from(options.threads))
        .saturating_mul(u64::from(options.depth));
    // Linux takes a part of the CMB for queues if asked to, and allocates from a pool: twice is ample.
    let cmb = buffer
        .checked_mul(2)
        .and_then(u64::checked_next_power_of_two)
        .unwrap_or(u64::MAX)
        .max(SMALLEST_CMB);
    let topology = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", copy::ssd("ssd0", options)?.cmb(cmb))
        .nvme("ssd1", "sw0.1", copy::ssd("ssd1", options)?)
        .build()?;
    Ok(topology)
}
