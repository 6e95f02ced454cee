//! The device of /dev/p2pmemN goes away at the worst moments: nothing of it is used afterwards, nothing is lost, and
//! the modules unload in any order. Removal by surprise: p2pmem_surprise.rs.

use p2plab::topology::{CmbOptions, GIB, MIB, Nvme, Nvram, Topology, TopologyBuilder};
use p2plab_tests::TestLab;
use p2plab_tests::p2pmem::{
    AWAY, CMB_BAR, LOAD_IMPORTER, LOAD_P2PMEM, Memory, NVRAM_BAR, assert_quiet, start, user,
};

/// Bytes of the memory.
const SIZE: u64 = 64 * MIB;

/// The first SSD's CMB is mapped for the CPU, so that stray accesses would go unnoticed by the model, not the kernel.
fn with_cmb(intx: bool) -> TopologyBuilder {
    let ssd0 = Nvme::memory(GIB / 4).cmb_with(CmbOptions::new(SIZE).data_only().mapped());
    Topology::builder("p2pmem-removal")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvme("ssd0", "sw0.0", if intx { ssd0.intx() } else { ssd0 })
        .nvme("ssd1", "sw0.1", user())
}

fn with_card() -> TopologyBuilder {
    Topology::builder("p2pmem-removal-card")
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .nvram("nv0", "sw0.0", Nvram::memory(SIZE).mapped())
        .nvme("ssd1", "sw0.1", user())
}

/// A lab with the CMB as the only peer memory.
fn cmb(name: &str) -> (TestLab, Memory) {
    let lab = start(name, with_cmb(false), &["ssd0", "ssd1"]);
    let memory = Memory::of(&lab, "ssd0", CMB_BAR, SIZE);
    (lab, memory)
}

/// A lab with an NVRAM card, whose driver is p2pmem itself, as the only peer memory.
fn card(name: &str) -> (TestLab, Memory) {
    let lab = start(name, with_card(), &["ssd1"]);
    let memory = Memory::of(&lab, "nv0", NVRAM_BAR, SIZE);
    (lab, memory)
}

/// The driver is unbound, then the PCI device removed, while memory is mapped, touched and not, exported and imported:
/// SIGBUS, EFAULT, ENODEV, a revoked import; and afterwards all of the memory is there again.
#[test]
fn unbound_and_removed_while_in_use() {
    in_use(cmb("p2pmem_unbound_and_removed_while_in_use"));
}

/// The same where the driver that is unbound is p2pmem.
#[test]
fn a_card_is_unbound_and_removed_while_in_use() {
    in_use(card("p2pmem_a_card_is_unbound_and_removed_while_in_use"));
}

fn in_use((lab, memory): (TestLab, Memory)) {
    for (away, again) in AWAY {
        memory.back(&lab);
        memory.hold(&lab);
        memory.sh(&lab, away);
        memory.gone(&lab);
        memory.released(&lab);
        memory.sh(&lab, again);
        memory.back(&lab);
    }
    memory.sh(&lab, "rmmod p2pmem && rmmod dmabuf_importer");
    assert_quiet(&lab, &[]);
    lab.finish();
}

/// A copy through the memory is under way when its device goes: it ends with an error, soon, and the disk that it was
/// between works on.
#[test]
fn removed_under_a_copy() {
    let (lab, memory) = cmb("p2pmem_removed_under_a_copy");
    for (away, again) in AWAY {
        memory.back(&lab);
        let before = memory.copy(&lab);
        memory.sh(&lab, away);
        memory.copy_failed(&lab, &before);
        memory.sh(&lab, again);
        memory.back(&lab);
    }
    assert_quiet(&lab, &[]);
    lab.finish();
}

/// The slot's button is pressed under a guest that holds and copies through the memory of an SSD.
#[test]
fn unplugged_while_in_use() {
    let name = "p2pmem_unplugged_while_in_use";
    let lab = start(name, with_cmb(true), &["ssd0", "ssd1"]);
    let memory = Memory::of(&lab, "ssd0", CMB_BAR, SIZE);
    unplugged((lab, memory));
}

/// The same with an NVRAM card, whose driver is p2pmem.
#[test]
fn a_card_is_unplugged_while_in_use() {
    unplugged(card("p2pmem_a_card_is_unplugged_while_in_use"));
}

fn unplugged((mut lab, memory): (TestLab, Memory)) {
    memory.back(&lab);
    memory.hold(&lab);
    let before = memory.copy(&lab);
    lab.detach(&memory.name).unwrap();
    memory.released(&lab);
    memory.copy_failed(&lab, &before);
    memory.gone(&lab);
    lab.attach(&memory.name).unwrap();
    memory.back(&lab);
    memory.sh(&lab, "rmmod p2pmem && rmmod dmabuf_importer");
    assert_quiet(&lab, &[]);
    lab.finish();
}

/// The modules unload in every order, and not while somebody holds memory; who comes later finds who is there.
#[test]
fn modules_unload_in_every_order() {
    let (lab, memory) = cmb("p2pmem_modules_unload_in_every_order");
    let sh = |line: &str| drop(memory.sh(&lab, line));
    // Held: the driver stays, the device may go, and the driver stays until its last user has gone.
    memory.hold(&lab);
    sh("! rmmod p2pmem");
    sh("echo OWNER > DRIVER/unbind");
    memory.released(&lab);
    sh("rmmod p2pmem; echo OWNER > DRIVER/bind");
    memory.gone(&lab);
    sh(LOAD_P2PMEM);
    memory.back(&lab);
    // A dma-buf keeps the driver as a file does, when there is no file any more.
    sh(
        "(sleep 600 | p2pmemtest keep MEMORY > /tmp/kept & echo $! > /tmp/pid); \
         until grep -q ready /tmp/kept; do kill -0 $(cat /tmp/pid) && usleep 10000; done; ! rmmod p2pmem",
    );
    sh(&format!(
        "kill $(cat /tmp/pid); until rmmod p2pmem; do usleep 10000; done; {LOAD_P2PMEM}"
    ));
    memory.back(&lab);
    // p2pmem first, and again; then the provider's driver first.
    sh(&format!(
        "rmmod p2pmem; rmmod dmabuf_importer; {LOAD_P2PMEM}; {LOAD_IMPORTER}"
    ));
    memory.back(&lab);
    sh("echo OWNER > DRIVER/unbind");
    memory.gone(&lab);
    sh(&format!("rmmod p2pmem; {LOAD_P2PMEM}"));
    memory.gone(&lab);
    sh("echo OWNER > DRIVER/bind");
    memory.back(&lab);
    // The whole driver of the provider goes.
    sh("rmmod nvme");
    memory.gone(&lab);
    sh("rmmod p2pmem");
    assert_quiet(&lab, &[]);
    lab.finish();
}

/// The module is also the driver of an NVRAM card, but nothing that holds the module: who has the node open does, and a
/// node that is not open keeps nobody.
#[test]
fn the_module_stays_while_a_cards_memory_is_open() {
    let (lab, memory) = card("p2pmem_the_module_stays_while_open");
    memory.back(&lab);
    let refused = memory.sh(
        &lab,
        "exec 3<> MEMORY; rmmod p2pmem 2>&1; [ -e MEMORY ] && grep p2pmem /proc/modules",
    );
    assert!(
        refused.contains("Resource temporarily unavailable"),
        "{refused}"
    );
    memory.back(&lab);
    // Open while its device is unbound: held all the same.
    let refused = memory.sh(
        &lab,
        "exec 3<> MEMORY; echo OWNER > DRIVER/unbind; rmmod p2pmem 2>&1; echo OWNER > DRIVER/bind",
    );
    assert!(
        refused.contains("Resource temporarily unavailable"),
        "{refused}"
    );
    memory.back(&lab);
    memory.sh(
        &lab,
        "rmmod p2pmem && [ ! -e MEMORY ] && ! grep p2pmem /proc/modules",
    );
    memory.sh(&lab, LOAD_P2PMEM);
    memory.back(&lab);
    assert_quiet(&lab, &[]);
    lab.finish();
}

/// The module goes while its providers are looked for, again and again.
#[test]
fn the_module_goes_during_a_rescan() {
    let (lab, memory) = card("p2pmem_the_module_goes_during_a_rescan");
    memory.sh(
        &lab,
        "(until [ -e /tmp/stop ]; do echo 1 > /sys/class/p2pmem_dev/rescan && echo 1 >> /tmp/scans; done) 2> /dev/null & \
         echo $! > /tmp/scanner",
    );
    for _ in 0..10 {
        memory.sh(
            &lab,
            &format!(
                // The first line may be of a scan that ended before.
                "rm -f /tmp/scans; until [ $(cat /tmp/scans 2> /dev/null | wc -l) -ge 2 ]; do :; done; \
                 rmmod p2pmem && [ ! -e MEMORY ] && {LOAD_P2PMEM}"
            ),
        );
        memory.back(&lab);
    }
    memory.sh(
        &lab,
        "touch /tmp/stop; while kill -0 $(cat /tmp/scanner) 2> /dev/null; do usleep 10000; done",
    );
    memory.back(&lab);
    memory.sh(&lab, "rmmod p2pmem && rmmod dmabuf_importer");
    assert_quiet(&lab, &[]);
    lab.finish();
}
