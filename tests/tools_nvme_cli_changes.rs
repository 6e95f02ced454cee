//! nvme-cli changes an SSD: blocks in other ways than write, its format, its namespaces, its firmware, its state.

use p2plab::topology::{MIB, Nvme};
use p2plab::wait;
use p2plab_tests::TestLab;
use p2plab_tests::tools::{Tools, number, with_tools};

use crate::patience::until;

/// One SSD in memory.
fn one_ssd(name: &str) -> TestLab {
    TestLab::start(name, with_tools("changes", [Nvme::memory(128 * MIB)]))
}

/// Writes random bytes over `blocks` blocks of 512 bytes from `lba` on, and returns them.
fn write_random(tools: &Tools<'_>, lba: u64, blocks: u64) -> Vec<u8> {
    let (bytes, count) = (blocks * 512, blocks - 1);
    let data = tools.bytes(&format!(
        "head -c {bytes} /dev/urandom > /tmp/data && cat /tmp/data"
    ));
    tools.run(&format!(
        "nvme write DISK -s {lba} -c {count} -z {bytes} -d /tmp/data"
    ));
    data
}

/// A log page of the controller, as its bytes.
fn log_page(tools: &Tools<'_>, id: u8, bytes: usize) -> Vec<u8> {
    let line = format!("nvme get-log CTRL --log-id={id} --log-len={bytes} --raw-binary");
    let page = tools.bytes(&line);
    assert_eq!(page.len(), bytes, "log page {id:#x}");
    page
}

/// Compare (NVM 1.0, section 3.2.1) finds equal what is, and says Compare Failure where it is not.
#[test]
fn compare_tells_equal_from_different() {
    let lab = one_ssd("compare_tells_equal_from_different");
    let tools = Tools::new(&lab, "ssd0");
    write_random(&tools, 8, 32);
    let compare = "nvme compare DISK -s 8 -c 31 -z 16384 -d /tmp/data";
    tools.run(compare);
    tools.run("head -c 512 /dev/urandom > /tmp/other");
    tools.run("nvme write DISK -s 39 -c 0 -z 512 -d /tmp/other");
    let why = tools.refused(compare);
    assert!(why.contains("Compare Failure"), "{why}");
    tools.run("nvme compare DISK -s 8 -c 30 -z 15872 -d /tmp/data");
    lab.finish();
}

/// Copy (section 3.2.2) gathers two ranges behind each other.
#[test]
fn copy_gathers_ranges() {
    let lab = one_ssd("copy_gathers_ranges");
    let tools = Tools::new(&lab, "ssd0");
    let first = write_random(&tools, 8, 8);
    let second = write_random(&tools, 100, 16);
    tools.run("nvme copy DISK --sdlba=5000 --slbs=100,8 --blocks=15,7");
    assert!(tools.read(5000, 16, 8192) == second);
    assert!(tools.read(5016, 8, 4096) == first);
    assert!(tools.read(8, 8, 4096) == first);
    lab.finish();
}

/// Verify (section 3.2.6) is content with blocks that can be read, finds the one that cannot, and refuses those that
/// are not there.
#[test]
fn verify_reads_without_data() {
    let lab = one_ssd("verify_reads_without_data");
    let tools = Tools::new(&lab, "ssd0");
    write_random(&tools, 8, 32);
    tools.run("nvme verify DISK -s 8 -c 31");
    tools.run("nvme write-uncor DISK -s 39 -c 0");
    let why = tools.refused("nvme verify DISK -s 8 -c 31");
    assert!(why.contains("Unrecovered Read Error"), "{why}");
    tools.run("nvme verify DISK -s 8 -c 30");
    let end = 128 * MIB / 512;
    let why = tools.refused(&format!("nvme verify DISK -s {} -c 1", end - 1));
    assert!(why.contains("LBA Out of Range"), "{why}");
    lab.finish();
}

/// Blocks marked by Write Uncorrectable (section 3.2.7) cannot be read until they are written again.
#[test]
fn uncorrectable_blocks_cannot_be_read() {
    let lab = one_ssd("uncorrectable_blocks_cannot_be_read");
    let tools = Tools::new(&lab, "ssd0");
    let data = write_random(&tools, 0, 32);
    tools.run("nvme write-uncor DISK -s 8 -c 7");
    for lba in [8, 15] {
        let why = tools.refused(&format!("nvme read DISK -s {lba} -c 0 -z 512"));
        assert!(why.contains("Unrecovered Read Error"), "{why}");
    }
    assert!(tools.read(0, 8, 4096) == data[..4096]);
    assert!(tools.read(16, 16, 8192) == data[8192..]);
    let data = write_random(&tools, 8, 8);
    assert!(tools.read(8, 8, 4096) == data);
    lab.finish();
}

/// Format NVM (Base 2.0, section 5.14) changes the size of blocks, and the old data is gone.
#[test]
fn format_changes_the_size_of_blocks() {
    let lab = one_ssd("format_changes_the_size_of_blocks");
    let tools = Tools::new(&lab, "ssd0");
    write_random(&tools, 0, 64);
    for (shift, bytes) in [(12, 4096), (9, 512)] {
        let index = lba_format(&tools, shift);
        tools.run(&format!("nvme format DISK --lbaf={index} --ses=1 --force"));
        let ns = tools.json("nvme id-ns DISK -o json");
        assert_eq!(number(&ns["flbas"]) & 0xf, index);
        assert_eq!(number(&ns["nsze"]) * bytes, 128 * MIB);
        let disk = tools.nvme.block_device.trim_start_matches("/dev/");
        let size = format!("cat /sys/block/{disk}/queue/logical_block_size");
        assert_eq!(tools.guest.sh(&size).unwrap().trim(), bytes.to_string());
        let read = tools.read(0, 32768 / bytes, 32768);
        assert!(read.iter().all(|byte| *byte == 0), "erased to zeros");
        tools.run("dd if=/dev/urandom of=DISK oflag=direct bs=32k count=1");
    }
    lab.finish();
}

/// Index of the format with blocks of `1 << shift` bytes and without metadata.
fn lba_format(tools: &Tools<'_>, shift: u64) -> u64 {
    let ns = tools.json("nvme id-ns DISK -o json");
    let formats = ns["lbafs"].as_array().unwrap().iter();
    let fits = |f: &serde_json::Value| number(&f["ds"]) == shift && number(&f["ms"]) == 0;
    (0..).zip(formats).find(|(_, f)| fits(f)).unwrap().0
}

/// Namespace Management and Attachment (sections 5.23 and 5.22): the one namespace goes, and with what was not
/// allocated there is room for two, which do not touch each other's data; one of them goes again.
#[test]
fn namespaces_come_and_go() {
    let ssd = Nvme::memory(128 * MIB).unallocated(128 * MIB);
    let lab = TestLab::start("namespaces_come_and_go", with_tools("changes", [ssd]));
    let tools = Tools::new(&lab, "ssd0");
    let format = lba_format(&tools, 9);
    let id = tools.json("nvme id-ctrl CTRL -o json");
    let (controller, total) = (number(&id["cntlid"]), number(&id["tnvmcap"]));
    assert_eq!((total, number(&id["unvmcap"])), (256 * MIB, 128 * MIB));
    let listed = || {
        let list = tools.json("nvme list-ns CTRL -o json");
        let ids = list["nsid_list"].as_array().unwrap().iter();
        ids.map(|entry| number(&entry["nsid"])).collect::<Vec<_>>()
    };
    tools.run(&format!("nvme detach-ns CTRL -n 1 -c {controller}"));
    tools.run("nvme delete-ns CTRL -n 1");
    let free = tools.json("nvme id-ctrl CTRL -o json");
    assert_eq!(number(&free["unvmcap"]), total, "all capacity is free");
    let blocks = total / 2 / 512;
    let create = format!("nvme create-ns CTRL -s {blocks} -c {blocks} -f {format}");
    let created = [1, 2].map(|_| {
        let said = tools.run(&create);
        let nsid = said.trim().rsplit("nsid:").next().unwrap();
        let nsid = number(&nsid.trim().into());
        tools.run(&format!("nvme attach-ns CTRL -n {nsid} -c {controller}"));
        nsid
    });
    let why = tools.refused(&create);
    assert!(why.contains("Insufficient Capacity"), "{why}");
    assert_eq!(listed(), created);
    tools.run("nvme ns-rescan CTRL");
    let [first, second] = created.map(|nsid| block_device(&tools, nsid));
    for disk in [&first, &second] {
        let write = format!(
            "head -c 1M /dev/urandom > /tmp{disk} && dd if=/tmp{disk} of={disk} bs=1M oflag=direct"
        );
        tools.run(&format!("mkdir -p /tmp/dev && {write}"));
    }
    let same = |disk: &str| format!("dd if={disk} bs=1M count=1 iflag=direct | cmp - /tmp{disk}");
    tools.run(&format!("{} && {}", same(&first), same(&second)));
    let [kept, gone] = created;
    tools.run(&format!(
        "nvme detach-ns CTRL -n {gone} -c {controller} && nvme delete-ns CTRL -n {gone}"
    ));
    assert_eq!(listed(), [kept]);
    tools.run(&same(&first));
    lab.finish();
}

/// Waits for the block device of namespace `nsid`.
fn block_device(tools: &Tools<'_>, nsid: u64) -> String {
    let folder = format!("/sys/class/nvme/{}", tools.nvme.controller);
    let look =
        format!("for d in {folder}/nvme*n*; do [ \"$(cat $d/nsid)\" = {nsid} ] && echo $d; done");
    let what = format!("namespace {nsid}");
    let found = format!("[ -n \"$({look})\" ]");
    tools
        .guest
        .wait_until(&what, &found, wait::HOTPLUG)
        .unwrap();
    let path = tools.guest.try_sh(&look).unwrap().text();
    let name = path.trim().rsplit('/').next().unwrap();
    let node = format!("/dev/{name}");
    let is_there = format!("[ -b {node} ]");
    tools
        .guest
        .wait_until(&node, &is_there, wait::HOTPLUG)
        .unwrap();
    node
}

/// Firmware Image Download and Commit (sections 5.13 and 5.12): an image goes into a slot, and a reset makes it the
/// active one.
#[test]
fn firmware_is_activated_by_a_reset() {
    let lab = one_ssd("firmware_is_activated_by_a_reset");
    let tools = Tools::new(&lab, "ssd0");
    let id = tools.json("nvme id-ctrl CTRL -o json");
    let slots = number(&id["frmw"]) >> 1 & 7;
    assert!(slots >= 2, "{slots} firmware slots");
    let active = || log_page(&tools, 3, 512)[0] & 7;
    assert_eq!(active(), 1);
    // 64 KiB that begin as the controller wants it: revision 2.0.
    let head = r"p2plabFW2.0     \0\0\001\0\0\0\0\0";
    tools.run(&format!(
        "{{ printf '{head}'; head -c 65512 /dev/urandom; }} > /tmp/image"
    ));
    tools.run("nvme fw-download CTRL --fw=/tmp/image --xfer=4096");
    // Action 1: replaces the image in the slot, which the next reset activates.
    tools.run("nvme fw-commit CTRL --slot=2 --action=1");
    assert_eq!(active(), 1, "not before the reset");
    let id = tools.json("nvme id-ctrl CTRL -o json");
    assert_eq!(id["fr"].as_str().unwrap().trim_end(), "1.0");
    tools.run("nvme reset CTRL");
    assert_eq!(active(), 2);
    let shown = tools.json("nvme fw-log CTRL -o json");
    let shown = &shown[&*tools.nvme.controller];
    assert_eq!(number(&shown["Active Firmware Slot (afi)"]) & 7, 2);
    let slot = shown["Firmware Rev Slot 2"].as_str().unwrap();
    assert!(slot.contains("2.0"), "{shown}");
    let id = tools.json("nvme id-ctrl CTRL -o json");
    assert_eq!(id["fr"].as_str().unwrap().trim_end(), "2.0");
    lab.finish();
}

/// Device Self-test (section 5.9): a short one ends, and is the newest result in the log.
#[test]
fn a_self_test_passes() {
    let lab = one_ssd("a_self_test_passes");
    let tools = Tools::new(&lab, "ssd0");
    tools.run("nvme device-self-test CTRL -n 1 --self-test-code=1");
    until("the self-test to end", || {
        log_page(&tools, 6, 564)[0] & 0xf == 0
    });
    // Code 1, short; result 0, completed without error (figure 213).
    assert_eq!(log_page(&tools, 6, 564)[4], 0x10);
    let shown = tools.json("nvme self-test-log CTRL -o json");
    assert_eq!(number(&shown["Current Device Self-Test Operation"]), 0);
    lab.finish();
}

/// Sanitize (section 5.24): a block erase ends well, and no block has its data any more.
#[test]
fn sanitize_erases_everything() {
    let lab = one_ssd("sanitize_erases_everything");
    let tools = Tools::new(&lab, "ssd0");
    let data = [0, 100_000].map(|lba| (lba, write_random(&tools, lba, 64)));
    tools.run("nvme sanitize CTRL --sanact=start-block-erase");
    // Sanitize Status, bits 2:0: 1 when the most recent operation completed (figure 233).
    until("the sanitize operation to end", || {
        log_page(&tools, 0x81, 512)[2] & 7 != 2
    });
    assert_eq!(log_page(&tools, 0x81, 512)[2] & 7, 1);
    tools.json("nvme sanitize-log CTRL -o json");
    for (lba, data) in data {
        let found = tools.read(lba, 64, 32768);
        let equal = found.iter().zip(&data).filter(|(a, b)| a == b).count();
        assert!(
            equal < data.len() / 8,
            "{equal} bytes at {lba} are the old ones"
        );
    }
    write_random(&tools, 0, 64);
    lab.finish();
}

/// NVM Subsystem Reset (section 3.7.1): the controller says that one happened, works again once the driver has
/// enabled it, and has its data.
#[test]
fn a_subsystem_reset_is_survived() {
    let lab = one_ssd("a_subsystem_reset_is_survived");
    let tools = Tools::new(&lab, "ssd0");
    let data = write_random(&tools, 0, 64);
    let status = || number(&tools.json("nvme show-regs CTRL -o json")["csts"]);
    assert_eq!(status() >> 4 & 1, 0, "CSTS.NSSRO");
    tools.run("nvme subsystem-reset CTRL");
    assert_eq!((status() >> 4 & 1, status() & 1), (1, 0), "NSSRO, not RDY");
    // The driver does not notice where the link stays up.
    tools.run("nvme reset CTRL");
    assert_eq!(status() & 1, 1);
    assert!(tools.read(0, 64, 32768) == data);
    lab.finish();
}
