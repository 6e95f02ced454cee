//! What ends or hurts a guest is reported as what it is, at once, to whoever waits for the guest.

use std::time::{Duration, Instant};

use p2plab::agent::{AgentError, Command};
use p2plab::lab::LabError;
use p2plab::qemu::fault::{Fault, FaultKind};
use p2plab::wait::{self, Deadline};
use p2plab_tests::{TestLab, two_ssds};

/// From the request to the report. A second or two on an idle machine; a loaded one is slow. Whatever is missed here
/// would be the request's own deadline, ten times as long.
const AT_ONCE: Duration = Duration::from_secs(30);

/// Runs `line`, which ends the guest in one way or another, and returns how the request for it failed.
fn fatal(lab: &TestLab, line: &str) -> String {
    let began = Instant::now();
    let command = Command::shell(format!("{line}; sleep 600")).deadline(Duration::from_secs(300));
    let error = lab.agent().unwrap().run(&command).unwrap_err();
    assert!(
        began.elapsed() < AT_ONCE,
        "after {:?}: {error}",
        began.elapsed()
    );
    assert!(matches!(error, AgentError::Lost { .. }), "{error}");
    error.to_string()
}

/// A kernel panic fails the request that waits and those to come, with the panic's lines.
#[test]
fn a_kernel_panic_is_reported() {
    let lab = TestLab::start("a_kernel_panic_is_reported", two_ssds("panic"));
    let text = fatal(&lab, "echo c > /proc/sysrq-trigger");
    assert!(
        text.contains("kernel panic in the guest: Kernel panic - not syncing"),
        "{text}"
    );
    assert!(
        text.contains("sysrq triggered crash") && text.contains("Call Trace"),
        "{text}"
    );
    let later = lab.guest().unwrap().sh("true").unwrap_err();
    assert!(later.to_string().contains("Kernel panic"), "{later}");
    let Some(Fault::Guest(fault)) = lab.qemu().unwrap().faults.first().as_deref().cloned() else {
        panic!("the panic is not on the board")
    };
    assert_eq!(fault.kind, FaultKind::Panic);
    assert!(
        fault
            .tail
            .iter()
            .any(|line| line.contains("end Kernel panic")),
        "{:?}",
        fault.tail
    );
}

/// An oops is one too. (Debian's kernels have no LKDTM, so the kernel is made to print one, not to have one.)
#[test]
fn a_kernel_oops_is_reported() {
    let lab = TestLab::start("a_kernel_oops_is_reported", two_ssds("oops"));
    // Two records, a moment apart at most: between them the console is not silent for as long as ends a report.
    let report = "exec 3>/dev/kmsg; echo '<1>BUG: kernel NULL pointer dereference, address: 0000000000000008' >&3; \
                  echo '<1>Oops: Oops: 0000 [#1] SMP NOPTI' >&3";
    let text = fatal(&lab, report);
    assert!(text.contains("kernel oops in the guest"), "{text}");
    assert!(text.contains("NULL pointer dereference"), "{text}");
}

/// A task that hangs is reported when the kernel says so, not when the request's deadline passes. An SSD that may
/// not fetch commands keeps its readers waiting.
#[test]
fn a_hung_task_is_reported() {
    let lab = TestLab::start("a_hung_task_is_reported", two_ssds("hung"));
    let guest = lab.guest().unwrap();
    let disk = guest.nvme("ssd0").unwrap();
    // The lab's 40 s, shortened for the test; the driver gives up on a command after 30 s only.
    assert_eq!(
        guest
            .sh("cat /proc/sys/kernel/hung_task_timeout_secs")
            .unwrap(),
        "40\n"
    );
    // Who waits for a page's writeback cannot be killed; direct I/O wakes up now and then so as not to be reported.
    let line = format!(
        "echo 5 > /proc/sys/kernel/hung_task_timeout_secs; setpci -s {} COMMAND=0:4; \
         dd if=/dev/zero of={} bs=4096 count=1 conv=fsync",
        disk.address, disk.block_device
    );
    let command = Command::shell(line).deadline(Duration::from_secs(300));
    let error = lab.agent().unwrap().run(&command).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("hung task in the guest") && text.contains("for more than 5 seconds"),
        "{text}"
    );
}

/// A guest that lives on without its agent is reported as that.
#[test]
fn a_lost_agent_is_reported() {
    let lab = TestLab::start("a_lost_agent_is_reported", two_ssds("lost"));
    // The agent is init and cannot be killed; its port can be taken from it.
    let unbind = "echo virtio0 > /sys/bus/virtio/drivers/virtio_console/unbind";
    let text = fatal(&lab, unbind);
    assert!(
        text.contains("the guest agent is lost: its port was closed"),
        "{text}"
    );
    assert!(
        lab.qemu().unwrap().child.try_wait().unwrap().is_none(),
        "QEMU runs on"
    );
}

/// QEMU's own death is told from the guest's troubles.
#[test]
fn the_death_of_qemu_is_reported() {
    let lab = TestLab::start("the_death_of_qemu_is_reported", two_ssds("dead"));
    let agent = lab.agent().unwrap();
    let running = agent.start(&Command::shell("sleep 600")).unwrap();
    let killed = Instant::now();
    lab.qemu().unwrap().child.kill();
    let text = running.wait(|_, _| {}).unwrap_err().to_string();
    assert!(killed.elapsed() < AT_ONCE, "after {:?}", killed.elapsed());
    // The port's end comes before the exit status: either may fail the request; the board has the cause.
    let deadline = Deadline::new("the fault", wait::KILL);
    let fault = lab.qemu().unwrap().faults.wait(&deadline).unwrap();
    assert!(
        fault
            .to_string()
            .starts_with("QEMU has ended (signal: 9 (SIGKILL)"),
        "{fault}"
    );
    assert!(text.contains("QEMU has ended"), "{text}");
    let error = lab.reboot().unwrap_err();
    assert!(matches!(error, LabError::Fault(_)), "{error}");
}

/// A guest that goes down as it was told is no fault, however it was told.
#[test]
fn a_guest_that_reboots_by_itself_is_no_fault() {
    let lab = TestLab::start(
        "a_guest_that_reboots_by_itself_is_no_fault",
        two_ssds("self"),
    );
    let mut events = lab.qemu().unwrap().qmp.events();
    drop(
        lab.agent()
            .unwrap()
            .start(&Command::shell("reboot -f"))
            .unwrap(),
    );
    let deadline = Deadline::new("the guest's reset", wait::SHUTDOWN);
    events.wait("RESET", &deadline, |_| true).unwrap();
    lab.wait_ready().unwrap();
    assert!(lab.qemu().unwrap().faults.first().is_none());
    lab.finish();
}
