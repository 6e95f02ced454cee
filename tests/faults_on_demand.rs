//! Faults that a test orders from an SSD, and what Linux makes of them.

use std::time::Duration;

use p2plab::agent::Command;
use p2plab::lab::GuestNvme;
use p2plab_guest::protocol::Exit;
use p2plab_nvme::spec::command::io;
use p2plab_nvme::spec::status::Status;
use p2plab_nvme::{Fault, FaultEffect, FaultId, NvmeController};
use p2plab_tests::{TestLab, two_ssds};

/// The driver gives up on a command after this long, in milliseconds; its default, 30 s, would make the tests as long.
const IO_TIMEOUT: u64 = 4000;
/// Patience with a driver that recovers.
const RECOVERY: Duration = Duration::from_secs(120);

/// A lab, and what the guest calls the SSD that is to have faults.
fn start(name: &str) -> (TestLab, GuestNvme) {
    let lab = TestLab::start(name, two_ssds("faults"));
    let ssd = lab.guest().unwrap().nvme("ssd1").unwrap();
    let queue = ssd.block_device.replace("/dev/", "/sys/block/");
    let line = format!("echo {IO_TIMEOUT} > {queue}/queue/io_timeout");
    lab.guest().unwrap().sh(&line).unwrap();
    (lab, ssd)
}

fn controller(lab: &TestLab) -> &NvmeController {
    lab.devices().device("ssd1").unwrap().nvme().unwrap()
}

fn add(lab: &TestLab, fault: Fault) -> FaultId {
    controller(lab).faults().add(fault)
}

/// Writes a pattern and reads it back; how that ended, and what it said.
fn use_disk(lab: &TestLab, ssd: &GuestNvme) -> (Exit, String) {
    let disk = &ssd.block_device;
    let line = format!(
        "p2pcopy --check --size 1MiB --chunk 64KiB --destination-offset 8MiB {disk} {disk}"
    );
    let command = Command::shell(line).deadline(RECOVERY);
    let output = lab.agent().unwrap().run(&command).unwrap();
    (output.status, output.error_text())
}

/// The kernel's log has a line with all `parts`.
fn kernel_says(lab: &TestLab, parts: &[&str]) {
    let log = lab.guest().unwrap().sh("dmesg").unwrap();
    let found = log
        .lines()
        .any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line with {parts:?} in\n{log}");
}

/// A status that says not to retry reaches user space as an I/O error; without the fault the disk is as before.
#[test]
fn a_status_is_an_io_error() {
    let (lab, ssd) = start("a_status_is_an_io_error");
    let write_fault = Fault {
        opcode: Some(io::WRITE),
        // 8 MiB and on.
        lba: Some(16384..=16384 + 8),
        ..Fault::new(FaultEffect::Status(Status::WRITE_FAULT.dnr()))
    };
    let id = add(&lab, write_fault);
    let (exit, said) = use_disk(&lab, &ssd);
    assert_eq!(exit, Exit::Status(1), "{said}");
    assert!(said.contains("os error"), "{said}");
    let name = ssd.block_device.trim_start_matches("/dev/");
    kernel_says(&lab, &["error, dev", name, "sector 16384", "WRITE"]);
    assert!(controller(&lab).faults().remove(id).unwrap() > 0);
    assert_eq!(use_disk(&lab, &ssd).0, Exit::Status(0));
    lab.finish();
}

/// A completion that never comes: the driver aborts the command, then resets the controller, and loses nothing.
#[test]
fn a_dropped_completion_ends_in_a_reset() {
    let (lab, ssd) = start("a_dropped_completion_ends_in_a_reset");
    let dropped = Fault {
        opcode: Some(io::WRITE),
        count: Some(1),
        ..Fault::new(FaultEffect::DropCompletion)
    };
    add(&lab, dropped);
    let (exit, said) = use_disk(&lab, &ssd);
    assert_eq!(exit, Exit::Status(0), "{said}");
    kernel_says(&lab, &[&ssd.controller, "timeout, aborting"]);
    kernel_says(&lab, &[&ssd.controller, "timeout, reset controller"]);
    lab.finish();
}

/// A completion whose interrupt is lost: the driver finds it when it has waited long enough.
#[test]
fn a_lost_interrupt_is_found_by_polling() {
    let (lab, ssd) = start("a_lost_interrupt_is_found_by_polling");
    let lost = Fault {
        opcode: Some(io::WRITE),
        after: 15,
        count: Some(1),
        ..Fault::new(FaultEffect::LoseInterrupt)
    };
    add(&lab, lost);
    let (exit, said) = use_disk(&lab, &ssd);
    assert_eq!(exit, Exit::Status(0), "{said}");
    kernel_says(&lab, &[&ssd.controller, "timeout, completion polled"]);
    lab.finish();
}

/// A controller that fails is reset, and what was under way is done again.
#[test]
fn a_fatal_controller_is_reset() {
    let (lab, ssd) = start("a_fatal_controller_is_reset");
    let fatal = Fault {
        opcode: Some(io::READ),
        count: Some(1),
        ..Fault::new(FaultEffect::Fatal)
    };
    add(&lab, fatal);
    let (exit, said) = use_disk(&lab, &ssd);
    assert_eq!(exit, Exit::Status(0), "{said}");
    kernel_says(&lab, &[&ssd.controller, "controller is down; will reset"]);
    lab.finish();
}
