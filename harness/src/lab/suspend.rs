//! Suspending the guest to idle, and what an agent is worth meanwhile.
//!
//! The kernel goes as far as its own test of device suspend does (`devices` in /sys/power/pm_test,
//! Documentation/power/basic-pm-debugging.rst): all processes are frozen, every driver's suspend has run, and after a
//! wait everything is resumed. Power states of the functions are not part of it: the ports of a lab, which can be
//! hot-plugged, do not survive them in QEMU 11.1: the kernel finds their slots empty when it resumes.
//!
//! The agent's port is a device as well, and Linux 7.3 does not learn that the host's side of it is open when it resumes
//! one in use. So its driver lets go of it before and takes it again after; what was under way in it is lost, and a new
//! conversation begins. Processes of the guest that run in the background go on.

use std::time::{Duration, Instant};

use super::LabError;
use super::agent_port::{self, PORT_ID};
use super::machine::Machine;
use crate::agent::Command;
use crate::wait::{self, Deadline};

/// How long the guest stays suspended. QEMU reports a port's changes at most once a second.
const ASLEEP: Duration = Duration::from_secs(2);
/// What the kernel prints when all devices are suspended.
const SUSPENDED: &str = "PM: suspend debug: Waiting for";

impl Machine {
    /// Suspends the guest, does `meanwhile` when all its devices are suspended, and waits until it answers again.
    pub(super) fn suspend(&self, meanwhile: impl FnOnce()) -> Result<(), LabError> {
        self.going_down.set(true);
        let again = self.suspended(meanwhile).map_err(|error| self.cause(error));
        self.going_down.set(false);
        again
    }

    fn suspended(&self, meanwhile: impl FnOnce()) -> Result<(), LabError> {
        let seconds = ASLEEP.as_secs();
        // In the background: the reply could not be sent. The console stays awake to tell when all else sleeps.
        let line = format!(
            "rm -f /tmp/suspended; cd /sys/module && echo N > printk/parameters/console_suspend \
             && echo {seconds} > suspend/parameters/pm_test_delay && echo devices > /sys/power/pm_test \
             && cd /sys/bus/virtio/drivers/virtio_console && port=$(ls -d virtio*) || exit 1; \
             (sleep 0.2; echo $port > unbind; echo freeze > /sys/power/state; status=$?; echo none > /sys/power/pm_test; \
             echo $status > /tmp/suspended; echo $port > bind) > /dev/null 2>&1 < /dev/null &"
        );
        let mut events = self.qemu.qmp.events();
        let mark = self.qemu.console.mark();
        self.agent.check(&Command::shell(line))?;
        let deadline = Deadline::new("the guest to suspend its devices", wait::SHUTDOWN);
        let asleep = (self.qemu.console).wait_for_since(mark, SUSPENDED, &deadline);
        asleep.map_err(|error| LabError::Unexpected(error.to_string()))?;
        let begun = Instant::now();
        meanwhile();
        if begun.elapsed() >= ASLEEP {
            return Err(LabError::BadOption(format!(
                "what was to be done while the guest is suspended took longer than that, which is {seconds} s"
            )));
        }
        let deadline = Deadline::new("the guest to resume", wait::SHUTDOWN);
        events.wait("VSERPORT_CHANGE", &deadline, |data| {
            data["id"] == PORT_ID && data["open"] == true
        })?;
        self.hello(wait::RESTORED_AGENT)?;
        let status = self.agent.check(&Command::shell("cat /tmp/suspended"))?;
        let status = status.text();
        if status.trim() == "0" {
            return Ok(());
        }
        let told = agent_port::last_lines(&self.qemu.console);
        Err(LabError::Unexpected(format!(
            "the guest has not suspended itself: status {}{told}",
            status.trim()
        )))
    }
}
