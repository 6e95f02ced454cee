//! Guests with the p2pmem driver.

use std::time::Duration;

use p2plab::lab::{Guest, GuestNvme, LabError};
use p2plab::topology::{GIB, NamespaceOptions, Nvme, TopologyBuilder};
use p2plab_pcie::{TlpKind, Traffic};

use crate::TestLab;

/// Loads the driver, in the guest.
pub const LOAD_P2PMEM: &str = "insmod /lib/modules/$(uname -r)/extra/p2pmem.ko";
/// Loads the importer of dma-bufs.
pub const LOAD_IMPORTER: &str = "insmod /lib/modules/$(uname -r)/extra/dmabuf_importer.ko";
/// BAR of an SSD's Controller Memory Buffer, and of an NVRAM card's memory.
pub const CMB_BAR: u8 = 4;
/// See [`CMB_BAR`].
pub const NVRAM_BAR: u8 = 4;
/// BAR of an SSD's Persistent Memory Region.
pub const PMR_BAR: u8 = 2;

/// Ways of taking a device away without touching it, and back, for [`Memory::sh`].
pub const AWAY: [(&str, &str); 2] = [
    ("echo OWNER > DRIVER/unbind", "echo OWNER > DRIVER/bind"),
    (
        "echo 1 > /sys/bus/pci/devices/OWNER/remove",
        "echo 1 > /sys/bus/pci/rescan",
    ),
];
/// What the kernel says of modules that are not its own.
const LOADING: [&str; 2] = ["loading out-of-tree module", "module verification failed"];
/// Until a device of the guest is back, or has been let go of.
const PATIENCE: Duration = Duration::from_secs(60);

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
/// them; a `*` in one is for anything.
///
/// # Errors
/// The agent's.
pub fn complaints(guest: &Guest<'_>, expected: &[&str]) -> Result<Vec<String>, LabError> {
    Ok(complaints_in(&guest.sh("dmesg -r")?, expected))
}

/// As [`complaints`], in a log that `dmesg -r` gave.
pub fn complaints_in(log: &str, expected: &[&str]) -> Vec<String> {
    // `<N>` before the time: facility and level; 4 is a warning.
    let level = |line: &str| {
        let (number, _) = line.strip_prefix('<')?.split_once('>')?;
        Some(number.parse::<u32>().ok()? & 7)
    };
    let lines = log
        .lines()
        .filter(|line| level(line).is_some_and(|level| level <= 4))
        .filter(|line| !expected.iter().any(|words| has(line, words)));
    lines.map(str::to_owned).collect()
}

/// Whether `line` has `words` in it, whose parts between `*` come in that order.
fn has(line: &str, words: &str) -> bool {
    let rest = words
        .split('*')
        .try_fold(line, |rest, part| Some(rest.split_once(part)?.1));
    rest.is_some()
}

/// The kernel has not complained but about our modules, which are not its own, and what has one of `expected` in it.
///
/// # Panics
/// Where it has.
pub fn assert_quiet(lab: &TestLab, expected: &[&str]) {
    let expected = [expected, &LOADING].concat();
    let complaints = lab.guest().and_then(|guest| complaints(&guest, &expected));
    match complaints {
        Ok(lines) => assert_eq!(lines, Vec::<String>::new()),
        Err(error) => panic!("{error}"),
    }
}

/// SSD `ssd1`, which uses memory of others: 256 MiB that keep what they get, and a namespace without an end that does not.
pub fn user() -> Nvme {
    Nvme::memory(GIB / 4).namespace(NamespaceOptions::null(1024 * GIB))
}

/// The disk that is namespace `nsid` of `ssd`. The kernel looks for namespaces in parallel, and numbers disks as it finds
/// them.
fn namespace(guest: &Guest<'_>, ssd: &GuestNvme, nsid: u32) -> Result<String, LabError> {
    let disks = format!("/sys/class/block/{}n*/nsid", ssd.controller);
    let found = guest.sh(&format!(
        "until grep -lx {nsid} {disks}; do usleep 10000; done"
    ))?;
    let disk = found.trim().rsplit('/').nth(1).unwrap_or_default();
    Ok(format!("/dev/{disk}"))
}

/// Memory of an endpoint, and SSD `ssd1` ([`user`]) that uses it. Its methods panic where something is not as it should be.
pub struct Memory {
    /// The endpoint.
    pub name: String,
    size: u64,
    /// The driver that has published it.
    driver: &'static str,
    /// PCI address of the endpoint.
    owner: String,
    node: String,
    /// PCI address of the SSD, and its disk.
    peer: String,
    disk: String,
    /// The disk that keeps nothing.
    endless: String,
}

impl Memory {
    /// The `size` bytes in `bar` of endpoint `name`.
    ///
    /// # Panics
    /// Where the guest does not find it, or `ssd1`.
    pub fn of(lab: &TestLab, name: &str, bar: u8, size: u64) -> Self {
        let find = || -> Result<Self, LabError> {
            let guest = lab.guest()?;
            let peer = guest.nvme("ssd1")?;
            let is_card = lab.devices().device(name)?.nvram().is_some();
            Ok(Self {
                name: name.to_owned(),
                size,
                driver: if is_card { "p2pmem" } else { "nvme" },
                owner: guest.pci_address(name)?,
                node: node(&guest, name, bar)?,
                disk: namespace(&guest, &peer, 1)?,
                endless: namespace(&guest, &peer, 2)?,
                peer: peer.address,
            })
        };
        find().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Runs a line of shell, which must succeed, with `OWNER` and `PEER` (PCI addresses), `DRIVER` (its folder), `DISK` and
    /// `ENDLESS` (of `ssd1`), `MEMORY` (the node) and `NAME` (of the endpoint) in it.
    ///
    /// # Panics
    /// Where it does not.
    pub fn sh(&self, lab: &TestLab, line: &str) -> String {
        let line = line
            .replace("OWNER", &self.owner)
            .replace("PEER", &self.peer)
            .replace("DRIVER", &format!("/sys/bus/pci/drivers/{}", self.driver))
            .replace("DISK", &self.disk)
            .replace("ENDLESS", &self.endless)
            .replace("MEMORY", &self.node)
            .replace("NAME", &self.name);
        let output = lab
            .guest()
            .and_then(|guest| guest.sh_within(&line, PATIENCE));
        output.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Holds memory in all ways at once, a dma-buf that the peer has mapped among them.
    pub fn hold(&self, lab: &TestLab) {
        self.sh(
            lab,
            "p2pmemtest hold MEMORY DISK PEER > /tmp/held-NAME 2>&1 & echo $! > /tmp/holder-NAME; \
             until grep -q ready /tmp/held-NAME; do kill -0 $(cat /tmp/holder-NAME) && usleep 10000; done",
        );
    }

    /// Waits for what held memory, which must have found all as it should be.
    ///
    /// # Panics
    /// Where it has not.
    pub fn released(&self, lab: &TestLab) {
        let text = self.sh(
            lab,
            "while kill -0 $(cat /tmp/holder-NAME) 2> /dev/null; do usleep 10000; done; cat /tmp/held-NAME",
        );
        assert!(text.contains("5 passed, 0 failed"), "{text}");
    }

    /// Copies through the memory until it is gone. Returns when transfers are under way, with the counters of before.
    pub fn copy(&self, lab: &TestLab) -> Traffic {
        let before = lab.traffic();
        self.sh(
            lab,
            "p2pcopy --size 256GiB --chunk 256KiB --depth 4 --threads 2 --buffer MEMORY ENDLESS ENDLESS \
             --destination-offset 512GiB > /tmp/copy-NAME 2>&1 & echo $! > /tmp/copier-NAME; \
             while grep -q '^ *0 *0$' /sys/class/block/$(basename ENDLESS)/inflight; do \
             kill -0 $(cat /tmp/copier-NAME) || { cat /tmp/copy-NAME >&2; exit 1; }; done",
        );
        before
    }

    /// Waits for the end of the copy, which must be an error that tells of it, and copies on the disk without it. Bytes must
    /// have gone into the memory, or requests to where it was, since `before`, which [`copy`](Self::copy) returned.
    ///
    /// # Panics
    /// Where it is not, or nothing has.
    pub fn copy_failed(&self, lab: &TestLab, before: &Traffic) {
        let said = self.sh(
            lab,
            "while kill -0 $(cat /tmp/copier-NAME) 2> /dev/null; do usleep 10000; done; tail -n 1 /tmp/copy-NAME; \
             p2pcopy --check --size 1MiB DISK DISK --destination-offset 8MiB > /dev/null",
        );
        let possible = [
            "Bad address",
            // Some of its pages were there.
            "moved only",
            "No such device",
            "No such file",
            "Input/output error",
        ];
        assert!(possible.iter().any(|why| said.contains(why)), "{said}");
        let traffic = lab.traffic().since(before);
        let moved = traffic.between("ssd1", &self.name, TlpKind::MWr);
        let refused: u64 = traffic.ports.iter().map(|p| p.unsupported_requests).sum();
        assert!(moved.payload_bytes + refused > 0, "{said}\n{traffic}");
    }

    /// What the kernel says of transfers of `ssd1` whose buffer was pulled out: Data Transfer Error, and what that means to
    /// the block layer.
    pub fn lost_transfers(&self) -> [String; 4] {
        let disk = self.endless.trim_start_matches("/dev/");
        [
            format!(" {disk}: *I/O Error (sct 0x0 / sc 0x4)"),
            format!("I/O error, dev {disk}, "),
            // There would be more of the same.
            "nvme_log_error: *callbacks suppressed".to_owned(),
            "blk_print_req_error: *callbacks suppressed".to_owned(),
        ]
    }

    /// Waits until the memory is there, all of it free, and a copy passes through it, after which all of it is free again.
    ///
    /// # Panics
    /// Where it is not, or does not.
    pub fn back(&self, lab: &TestLab) {
        self.is_free(lab);
        self.sh(
            lab,
            "p2pcopy --check --size 1MiB --chunk 256KiB --depth 2 --buffer MEMORY DISK DISK --destination-offset 8MiB",
        );
        self.is_free(lab);
    }

    /// Waits until the memory is there, all of it free.
    ///
    /// # Panics
    /// Where it is not.
    pub fn is_free(&self, lab: &TestLab) {
        let info = self.sh(
            lab,
            "until [ -e MEMORY ]; do usleep 10000; done; p2pmemtest info MEMORY",
        );
        let size = self.size;
        assert!(
            info.contains(&format!("size {size} free {size}\n")),
            "{info}"
        );
    }

    /// The memory is gone.
    ///
    /// # Panics
    /// Where it is not.
    pub fn gone(&self, lab: &TestLab) {
        self.sh(lab, "[ ! -e MEMORY ]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_expected_is_no_complaint() {
        let log = "<4>[1.0] nvme0n2: I/O Cmd(0x2) @ LBA 8, 8 blocks, I/O Error (sct 0x0 / sc 0x4) MORE\n\
                   <3>[1.1] I/O error, dev nvme0n1, sector 8 op 0x0:(READ)\n<6>[1.2] fine\n";
        let disk = " nvme0n2: *I/O Error (sct 0x0 / sc 0x4)";
        assert_eq!(
            complaints_in(log, &[disk, "I/O error, dev nvme0n1, "]).len(),
            0
        );
        assert_eq!(
            complaints_in(log, &[disk, "I/O error, dev nvme0n2, "]).len(),
            1
        );
        assert_eq!(complaints_in(log, &["sc 0x4*nvme0n2"]).len(), 2);
    }
}
