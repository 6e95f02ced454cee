//! The README's example of a scenario. A test holds the two against each other.

// README: begin
use p2plab::lab::Lab;
use p2plab::topology::{GIB, MIB, Nvme, Topology};
use p2plab_pcie::TlpKind;

/// Data that one SSD reads into its neighbour's CMB never reaches the upstream port.
#[test]
fn peer_to_peer_stays_below_the_switch() -> Result<(), Box<dyn std::error::Error>> {
    let topology = Topology::builder("example")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", Nvme::memory(GIB).cmb(64 * MIB))
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB))
        .build()?;
    let lab = Lab::options(topology).start()?;
    let guest = lab.guest()?;
    let (ssd0, ssd1) = (guest.nvme("ssd0")?, guest.nvme("ssd1")?);
    let cmb = ssd0.p2pmem.ok_or("the kernel has not registered the CMB")?;

    let before = lab.traffic();
    guest.sh(&format!(
        "p2pcopy --size 64MiB --buffer {cmb} {} {}",
        ssd1.block_device, ssd0.block_device
    ))?;
    let traffic = lab.traffic().since(&before);

    // ssd1 wrote what it read into ssd0's CMB; ssd0 took it from there without leaving the device.
    let writes = traffic.between("ssd1", "ssd0", TlpKind::MWr);
    assert_eq!(writes.payload_bytes, 64 * MIB);
    assert!(traffic.upstream_payload_bytes() < MIB, "{traffic}");
    lab.finish()?; // powers off, checks the counters' laws, marks the run as passed
    Ok(())
}
// README: end

/// The README shows this file's example, word for word.
#[test]
fn the_readme_shows_this_example() {
    let source = include_str!("example.rs");
    let example = source
        .split("// README: begin\n")
        .nth(1)
        .and_then(|rest| rest.split("// README: end").next())
        .unwrap();
    assert!(include_str!("../README.md").contains(example.trim()));
}
