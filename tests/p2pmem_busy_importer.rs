//! A device is unbound while another one still transfers to its memory by a dma-buf: that waits, and nobody else does.

use std::time::Duration;

use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology};
use p2plab_tests::p2pmem::{CMB_BAR, assert_quiet, node, start};

/// For what waits for nothing.
const SOON: Duration = Duration::from_secs(20);

/// The removal of a device's memory waits for the importers of it, as it must; other devices come and go meanwhile, and
/// what they have is given and taken back.
#[test]
fn unbinding_waits_for_transfers_and_holds_up_nobody() {
    let ssd = || Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(64 * MIB).data_only().mapped());
    let topology = Topology::builder("p2pmem-busy-importer")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", ssd())
        .nvme("ssd1", "sw0.1", ssd());
    let name = "p2pmem_unbinding_waits_for_transfers_and_holds_up_nobody";
    let lab = start(name, topology, &["ssd0", "ssd1"]);
    let guest = lab.guest().unwrap();
    let (owner, other) = (
        guest.pci_address("ssd0").unwrap(),
        guest.pci_address("ssd1").unwrap(),
    );
    let memory = node(&guest, "ssd0", CMB_BAR).unwrap();
    let others = node(&guest, "ssd1", CMB_BAR).unwrap();
    let sh = |line: &str| guest.sh_within(line, SOON).unwrap();

    sh(&format!(
        "mkfifo /tmp/transfer && (sleep 600 > /tmp/transfer & echo $! > /tmp/transfer.pid) && \
         (p2pmemtest busy {memory} {other} < /tmp/transfer > /tmp/busy 2>&1 & echo $! > /tmp/busy.pid); \
         until grep -q ready /tmp/busy; do kill -0 $(cat /tmp/busy.pid) && usleep 10000; done"
    ));
    sh(&format!(
        "(sh -c 'echo {owner} > /sys/bus/pci/drivers/nvme/unbind' & echo $! > /tmp/unbind.pid); \
         while [ -e {memory} ]; do usleep 10000; done"
    ));
    for _ in 0..2 {
        sh(&format!(
            "echo {other} > /sys/bus/pci/drivers/nvme/unbind && [ ! -e {others} ] && \
             echo {other} > /sys/bus/pci/drivers/nvme/bind && [ -e {others} ]"
        ));
    }
    sh("kill -0 $(cat /tmp/unbind.pid)"); // still waits

    sh("kill $(cat /tmp/transfer.pid); \
        while kill -0 $(cat /tmp/unbind.pid) 2> /dev/null; do usleep 10000; done");
    sh(&format!(
        "[ ! -e /sys/bus/pci/drivers/nvme/{owner} ] && echo {owner} > /sys/bus/pci/drivers/nvme/bind && \
         p2pmemtest info {memory} | grep 'free {}$' && rmmod p2pmem && rmmod dmabuf_importer",
        64 * MIB
    ));
    // Said every 30 s, which a busy host may take for what is above.
    assert_quiet(&lab, &["which waits for transfers to end before it goes"]);
    lab.finish();
}
