//! The device of /dev/p2pmemN goes away at the worst moments: nothing of it is used afterwards, nothing is lost, and
//! the modules unload in any order.

use std::time::Duration;

use p2plab::lab::Guest;
use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Topology, TopologyBuilder};
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{LOAD_IMPORTER, LOAD_P2PMEM, complaints, node, start};

/// The BAR of the SSDs' CMB.
const CMB_BAR: u8 = 4;
/// Rounds of the stress test, where the variable does not say another number.
const ROUNDS: u64 = 20;
/// See [`ROUNDS`].
const VARIABLE: &str = "P2PLAB_P2PMEM_ROUNDS";
/// Until a device of the guest is back.
const BACK: Duration = Duration::from_secs(60);

/// Memory of the first SSD, used by the second.
struct Use<'a> {
    guest: Guest<'a>,
    /// PCI address of the SSD with the CMB.
    owner: String,
    /// PCI address of the other one, and its disk.
    peer: String,
    disk: String,
    /// The device.
    memory: String,
}

impl<'a> Use<'a> {
    fn of(lab: &'a TestLab) -> Self {
        let guest = lab.guest().unwrap();
        let peer = guest.nvme("ssd1").unwrap();
        Self {
            owner: guest.pci_address("ssd0").unwrap(),
            memory: node(&guest, "ssd0", CMB_BAR).unwrap(),
            peer: peer.address,
            disk: peer.block_device,
            guest,
        }
    }

    /// Runs a line of shell with `OWNER`, `PEER`, `DISK` and `MEMORY` in it, which must succeed.
    fn sh(&self, line: &str) -> String {
        self.guest.sh_within(&self.line(line), BACK).unwrap()
    }

    fn line(&self, line: &str) -> String {
        line.replace("OWNER", &self.owner)
            .replace("PEER", &self.peer)
            .replace("DISK", &self.disk)
            .replace("MEMORY", &self.memory)
    }

    /// Holds memory in all ways at once, a dma-buf that the peer has mapped among them.
    fn hold(&self) {
        self.sh(
            "p2pmemtest hold MEMORY DISK PEER > /tmp/held 2>&1 & echo $! > /tmp/pid; \
                 until grep -q ready /tmp/held; do kill -0 $(cat /tmp/pid) && usleep 10000; done",
        );
    }

    /// Waits for what held memory, which must have found all as it should be.
    fn released(&self) {
        self.sh("while kill -0 $(cat /tmp/pid) 2> /dev/null; do usleep 10000; done");
        let text = self.sh("cat /tmp/held");
        assert!(text.contains("5 passed, 0 failed"), "{text}");
    }

    /// Waits until the memory is there, all of it free, and a copy passes through it.
    fn back(&self) {
        self.guest
            .wait_until(
                "the memory to be back",
                &format!("[ -e {} ]", self.memory),
                BACK,
            )
            .unwrap();
        self.guest.nvme("ssd0").unwrap();
        let info = self.sh("p2pmemtest info MEMORY");
        assert!(info.contains(&format!("free {}\n", 64 * MIB)), "{info}");
        self.sh("p2pcopy --check --size 4MiB --buffer MEMORY DISK DISK --destination-offset 8MiB");
    }

    fn gone(&self) {
        self.sh("[ ! -e MEMORY ] && ! ls /dev/p2pmem[0-9]*");
    }
}

/// The first SSD's CMB is mapped for the CPU, so that stray accesses would go unnoticed by the model, not the kernel.
fn topology(intx: bool) -> TopologyBuilder {
    let cmb = CmbOptions::new(64 * MIB).data_only().mapped();
    let ssd0 = Nvme::memory(GIB / 4).cmb_with(cmb);
    Topology::builder("p2pmem-removal")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", if intx { ssd0.intx() } else { ssd0 })
        .nvme("ssd1", "sw0.1", Nvme::memory(GIB / 4))
}

fn lab(name: &str) -> TestLab {
    start(name, topology(false), &["ssd0", "ssd1"])
}

/// The kernel has not complained but about our modules, which are not its own.
fn assert_quiet(guest: &Guest<'_>) {
    let loading = ["loading out-of-tree module", "module verification failed"];
    assert_eq!(complaints(guest, &loading).unwrap(), Vec::<String>::new());
}

/// The driver is unbound, then the PCI device removed, while memory is mapped, touched and not, exported and imported:
/// SIGBUS, EFAULT, ENODEV, a revoked import; and afterwards all of the memory is there again.
#[test]
fn unbound_and_removed_while_in_use() {
    let lab = lab("p2pmem_unbound_and_removed_while_in_use");
    let user = Use::of(&lab);
    for (away, again) in [
        (
            "echo OWNER > /sys/bus/pci/drivers/nvme/unbind",
            "echo OWNER > /sys/bus/pci/drivers/nvme/bind",
        ),
        (
            "echo 1 > /sys/bus/pci/devices/OWNER/remove",
            "echo 1 > /sys/bus/pci/rescan",
        ),
    ] {
        user.back();
        user.hold();
        user.sh(away);
        user.gone();
        user.released();
        user.sh(again);
        user.back();
    }
    assert_quiet(&user.guest);
    user.sh("rmmod p2pmem && rmmod dmabuf_importer");
    assert_quiet(&user.guest);
    lab.finish();
}

/// A copy through the memory is under way when its device goes: it ends with an error, soon, and the disk that it was
/// between works on.
#[test]
fn removed_under_a_copy() {
    let lab = lab("p2pmem_removed_under_a_copy");
    let user = Use::of(&lab);
    for away in [
        "echo OWNER > /sys/bus/pci/drivers/nvme/unbind",
        "echo 1 > /sys/bus/pci/devices/OWNER/remove",
    ] {
        user.back();
        user.sh(
            "(while p2pcopy --size 64MiB --chunk 256KiB --depth 4 --threads 2 --buffer MEMORY DISK DISK \
             --destination-offset 128MiB; do :; done) > /tmp/copy 2>&1 & echo $! > /tmp/pid; \
             until grep -q copied /tmp/copy; do usleep 10000; done",
        );
        user.sh(away);
        user.sh("while kill -0 $(cat /tmp/pid) 2> /dev/null; do usleep 10000; done");
        let said = user.sh("tail -n 1 /tmp/copy");
        let possible = [
            "Bad address",
            "No such device",
            "No such file",
            "Input/output error",
        ];
        assert!(possible.iter().any(|why| said.contains(why)), "{said}");
        user.sh("p2pcopy --check --size 4MiB DISK DISK --destination-offset 8MiB");
        user.sh("echo OWNER > /sys/bus/pci/drivers/nvme/bind || echo 1 > /sys/bus/pci/rescan");
        user.back();
    }
    assert_quiet(&user.guest);
    lab.finish();
}

/// The lab takes the SSD out of its slot under a guest that holds its memory.
#[test]
fn unplugged_while_in_use() {
    let name = "p2pmem_unplugged_while_in_use";
    let mut lab = start(name, topology(true), &["ssd0", "ssd1"]);
    let user = Use::of(&lab);
    user.hold();
    user.sh(
        "(while p2pcopy --size 64MiB --chunk 256KiB --depth 4 --buffer MEMORY DISK DISK \
         --destination-offset 128MiB; do :; done) > /tmp/copy 2>&1 &",
    );
    let released = user
        .line("while kill -0 $(cat /tmp/pid) 2> /dev/null; do usleep 10000; done; cat /tmp/held");
    lab.detach("ssd0").unwrap();
    let guest = lab.guest().unwrap();
    let text = guest.sh(&released).unwrap();
    assert!(text.contains("5 passed, 0 failed"), "{text}");
    guest
        .sh("! ls /dev/p2pmem[0-9]* && rmmod p2pmem && rmmod dmabuf_importer")
        .unwrap();
    assert_quiet(&guest);
    lab.finish();
}

/// The modules unload in every order, and not while somebody holds memory; who comes later finds who is there.
#[test]
fn modules_unload_in_every_order() {
    let lab = lab("p2pmem_modules_unload_in_every_order");
    let user = Use::of(&lab);
    // Held: the driver stays, the device may go, and the driver stays until its last user has gone.
    user.hold();
    user.sh("! rmmod p2pmem");
    user.sh("echo OWNER > /sys/bus/pci/drivers/nvme/unbind");
    user.released();
    user.sh("rmmod p2pmem; echo OWNER > /sys/bus/pci/drivers/nvme/bind");
    user.gone();
    user.sh(LOAD_P2PMEM);
    user.back();
    // p2pmem first, and again; then the provider's driver first.
    user.sh(&format!(
        "rmmod p2pmem; rmmod dmabuf_importer; {LOAD_P2PMEM}; {LOAD_IMPORTER}"
    ));
    user.back();
    user.sh("echo OWNER > /sys/bus/pci/drivers/nvme/unbind");
    user.gone();
    user.sh(&format!("rmmod p2pmem; {LOAD_P2PMEM}"));
    user.gone();
    user.sh("echo OWNER > /sys/bus/pci/drivers/nvme/bind");
    user.back();
    // The whole driver of the provider goes.
    user.sh("rmmod nvme");
    user.gone();
    user.sh("rmmod p2pmem");
    assert_quiet(&user.guest);
    lab.finish();
}

/// Memory comes, is mapped, copied through, held in all ways and taken away, again and again, by unbinding and by
/// removal in turn. ci/p2pmem-stress.sh does the same at length.
#[test]
fn comes_and_goes_under_load() {
    let rounds = std::env::var(VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok());
    let rounds: u64 = rounds.unwrap_or(ROUNDS);
    let lab = lab("p2pmem_comes_and_goes_under_load");
    let user = Use::of(&lab);
    for round in 0..rounds {
        user.back();
        user.hold();
        user.sh(
            "p2pcopy --size 100MiB --chunk 256KiB --depth 4 --buffer MEMORY DISK DISK \
             --destination-offset 128MiB > /tmp/copy 2>&1 &",
        );
        let (away, again) = if round % 2 == 0 {
            (
                "echo 1 > /sys/bus/pci/devices/OWNER/remove",
                "echo 1 > /sys/bus/pci/rescan",
            )
        } else {
            (
                "echo OWNER > /sys/bus/pci/drivers/nvme/unbind",
                "echo OWNER > /sys/bus/pci/drivers/nvme/bind",
            )
        };
        // Each round at another moment of the copy, over 100 ms.
        user.sh(&format!(
            "usleep {}; {away}",
            round.wrapping_mul(7919) % 100_000
        ));
        user.released();
        user.sh("while pidof p2pcopy; do usleep 10000; done; :");
        user.sh(again);
    }
    user.back();
    assert_quiet(&user.guest);
    user.sh("rmmod p2pmem && rmmod dmabuf_importer");
    lab.finish();
    println!("{rounds} rounds");
}
