//! Example 2 of the talk: a copy between two NVMe SSDs, once through host memory and once through the
//! Controller Memory Buffer of one of them, or of a third.

use p2plab_images::Progress;

use super::copy::{self, CopyJob};
use super::{BufferOwner, ScenarioOptions, buffer_memory, window};
use crate::lab::LabError;
use crate::report::{CopyReport, Talk};
use crate::topology::{MIB, Nvme, Topology, TopologyBuilder};

/// Name on the command line.
pub const NAME: &str = "nvme-cmb-copy";

/// Blocks of an SSD that is there for its memory.
const BYSTANDER: u64 = 64 * MIB;

/// Runs the scenario.
///
/// # Errors
/// See [`LabError`].
pub fn run(options: &ScenarioOptions, progress: &mut dyn Progress) -> Result<CopyReport, LabError> {
    let buffer = owner(options);
    let job = CopyJob {
        scenario: NAME,
        description: &format!(
            "from ssd0 to ssd1; classic: through host memory; p2p: through the CMB of {buffer}"
        ),
        source: "ssd0",
        destination: "ssd1",
        buffer,
        talk: Some(Talk::example(1_600_000_000)),
    };
    copy::run(topology(NAME, options)?, &job, options, progress)
}

/// Two SSDs below one switch, or three; the one whose CMB is the buffer has one that is large enough.
///
/// # Errors
/// Options that no copy can have.
pub fn topology(name: &str, options: &ScenarioOptions) -> Result<Topology, LabError> {
    let memory = buffer_memory(options)?;
    let builder = ssds(name, options, |ssd| ssd.cmb(memory))?;
    Ok(builder.window(window(memory)).build()?)
}

/// Whose memory the options choose.
pub(super) fn owner(options: &ScenarioOptions) -> &'static str {
    match options.buffer {
        BufferOwner::Source => "ssd0",
        BufferOwner::Destination => "ssd1",
        BufferOwner::Third => "ssd2",
    }
}

/// Two SSDs below one switch, or three, of which `with_memory` makes the one whose memory is the buffer.
pub(super) fn ssds(
    name: &str,
    options: &ScenarioOptions,
    with_memory: impl Fn(Nvme) -> Nvme,
) -> Result<TopologyBuilder, LabError> {
    let ssd = |name, ssd: Nvme| {
        if name == owner(options) {
            with_memory(ssd)
        } else {
            ssd
        }
    };
    let mut builder = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4);
    for (name, port) in [("ssd0", "sw0.0"), ("ssd1", "sw0.1")] {
        builder = builder.nvme(name, port, ssd(name, copy::ssd(name, options)?));
    }
    if options.buffer == BufferOwner::Third {
        builder = builder.nvme("ssd2", "sw0.2", ssd("ssd2", Nvme::memory(BYSTANDER)));
    }
    Ok(builder)
}
