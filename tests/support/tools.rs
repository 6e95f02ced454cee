//! The system image's tools in a guest: what they print, read.

use p2plab::lab::{Guest, GuestNvme};
use p2plab::topology::{Nvme, Topology, TopologyBuilder};
use serde_json::Value;

use crate::TestLab;

/// One switch with four ports and these SSDs, `ssd0` in its first; the guest has the system image. The tools'
/// scenarios share this machine, and so one base image.
///
/// # Panics
/// Where the SSDs are not sound, or more than four.
pub fn with_tools(name: &str, ssds: impl IntoIterator<Item = Nvme>) -> Topology {
    match machine(name, ssds).build() {
        Ok(topology) => topology,
        Err(error) => panic!("{error}"),
    }
}

/// As [`with_tools`], to be added to.
pub fn machine(name: &str, ssds: impl IntoIterator<Item = Nvme>) -> TopologyBuilder {
    let mut builder = Topology::builder(name)
        .root_port("rp0")
        .switch("sw0", "rp0", 4)
        .system();
    for (number, ssd) in (0..).zip(ssds) {
        builder = builder.nvme(format!("ssd{number}"), format!("sw0.{number}"), ssd);
    }
    builder
}

/// One SSD of a lab, as its guest's tools see it.
pub struct Tools<'a> {
    /// The guest.
    pub guest: Guest<'a>,
    /// What the guest calls the SSD.
    pub nvme: GuestNvme,
}

impl<'a> Tools<'a> {
    /// The SSD `name` of `lab`.
    ///
    /// # Panics
    /// Where the guest has not bound it.
    pub fn new(lab: &'a TestLab, name: &str) -> Self {
        let guest = lab.guest().unwrap_or_else(|error| panic!("{error}"));
        let nvme = guest.nvme(name).unwrap_or_else(|error| panic!("{error}"));
        Self { guest, nvme }
    }

    /// The line with `CTRL` for the controller and `DISK` for the namespace's block device.
    fn line(&self, line: &str) -> String {
        line.replace("CTRL", &format!("/dev/{}", self.nvme.controller))
            .replace("DISK", &self.nvme.block_device)
    }

    /// Runs a line of shell with `CTRL` and `DISK` in it, which must succeed.
    ///
    /// # Panics
    /// Where it fails; the message has standard error.
    pub fn run(&self, line: &str) -> String {
        let line = self.line(line);
        self.guest
            .system(&line)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`run`](Self::run), for a command that prints JSON. What stands before it is passed over.
    ///
    /// # Panics
    /// As [`run`](Self::run), and where it is no JSON.
    pub fn json(&self, line: &str) -> Value {
        parse(&self.run(line))
    }

    /// Runs a line that must fail, and returns what it said on either output.
    ///
    /// # Panics
    /// Where it succeeds.
    pub fn refused(&self, line: &str) -> String {
        let line = self.line(line);
        let output = self.guest.try_system(&line);
        let output = output.unwrap_or_else(|error| panic!("{error}"));
        assert!(!output.status.success(), "`{line}` should have failed");
        output.text() + &output.error_text()
    }

    /// Runs a line whose standard output is binary.
    ///
    /// # Panics
    /// Where it fails.
    pub fn bytes(&self, line: &str) -> Vec<u8> {
        let line = self.line(line);
        let output = self.guest.try_system(&line);
        let output = output.unwrap_or_else(|error| panic!("{error}"));
        let error = output.error_text();
        assert!(output.status.success(), "`{line}`: {error}");
        output.stdout
    }

    /// Bytes from block `lba` on, as `nvme read` gets them with one command.
    ///
    /// # Panics
    /// Where it fails.
    pub fn read(&self, lba: u64, blocks: u64, bytes: u64) -> Vec<u8> {
        let count = blocks - 1;
        // It would leave the end of a longer file as it is.
        self.bytes(&format!(
            "rm -f /tmp/read && nvme read DISK -s {lba} -c {count} -z {bytes} -d /tmp/read >&2 && cat /tmp/read"
        ))
    }
}

/// The JSON in what a tool printed.
///
/// # Panics
/// Where there is none.
pub fn parse(text: &str) -> Value {
    let start = text.find(['{', '[']).unwrap_or(text.len());
    let json = text.get(start..).unwrap_or_default();
    serde_json::from_str(json).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
}

/// A number of a tool's JSON, which may be a text such as `0x1f`.
///
/// # Panics
/// Where it is none.
pub fn number(value: &Value) -> u64 {
    let read = match value {
        Value::String(text) => match text.trim().strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.trim().parse().ok(),
        },
        other => other.as_u64(),
    };
    read.unwrap_or_else(|| panic!("{value} is no number"))
}
