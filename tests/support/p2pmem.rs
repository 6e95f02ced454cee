//! Guests with the p2pmem driver.

use p2plab::lab::{Guest, LabError};
use p2plab::topology::TopologyBuilder;

use crate::TestLab;

/// Loads the driver, in the guest.
pub const LOAD_P2PMEM: &str = "insmod /lib/modules/$(uname -r)/extra/p2pmem.ko";
/// Loads the importer of dma-bufs.
pub const LOAD_IMPORTER: &str = "insmod /lib/modules/$(uname -r)/extra/dmabuf_importer.ko";

/// Starts the lab of `topology` with the driver and the importer of dma-bufs in the guest, waits until its SSDs `ssds`
/// are bound, and empties the kernel's log.
///
/// # Panics
/// Where anything of it fails.
pub fn start(name: &str, topology: TopologyBuilder, ssds: &[&str]) -> TestLab {
    let topology = topology.own_module("p2pmem").own_module("dmabuf_importer");
    let topology = topology.build().unwrap_or_else(|error| panic!("{error}"));
    let lab = TestLab::start(name, topology);
    let ready = || -> Result<(), LabError> {
        let guest = lab.guest()?;
        for ssd in ssds {
            guest.nvme(ssd)?;
        }
        // What came with the start is none of what `complaints` looks for.
        guest.sh("dmesg -c > /tmp/boot.log").map(drop)
    };
    if let Err(error) = ready() {
        panic!("{error}");
    }
    lab
}

/// The node of the memory in `bar` of endpoint `name`, by its address.
///
/// # Errors
/// The agent's.
pub fn node(guest: &Guest<'_>, name: &str, bar: u8) -> Result<String, LabError> {
    let address = guest.pci_address(name)?;
    Ok(format!("/dev/p2pmem/by-address/{address}-bar{bar}"))
}

/// What the kernel has logged since [`start`] that is a warning or worse, without lines that have one of `expected` in
/// them.
///
/// # Errors
/// The agent's.
pub fn complaints(guest: &Guest<'_>, expected: &[&str]) -> Result<Vec<String>, LabError> {
    let log = guest.sh("dmesg -r")?;
    // `<N>` before the time: facility and level; 4 is a warning.
    let level = |line: &str| {
        let (number, _) = line.strip_prefix('<')?.split_once('>')?;
        Some(number.parse::<u32>().ok()? & 7)
    };
    let lines = log
        .lines()
        .filter(|line| level(line).is_some_and(|level| level <= 4))
        .filter(|line| !expected.iter().any(|word| line.contains(word)));
    Ok(lines.map(str::to_owned).collect())
}
