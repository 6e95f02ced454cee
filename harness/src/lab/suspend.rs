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

use std::time::Duration;

use super::LabError;
use super::agent_port::{self, PORT_ID};
use super::machine::Machine;
use crate::agent::Command;
use crate::wait::{self, Deadline};

/// How long the guest stays suspended, by its own clock. QEMU reports a port's changes at most once a second.
const ASLEEP: Duration = Duration::from_secs(2);
/// What the kernel prints when all devices are suspended.
const SUSPENDED: &str = "PM: suspend debug: Waiting for";
/// What it prints before each call of a driver, by /sys/power/pm_print_times: behind [`SUSPENDED`], it resumes.
const CALLING: &str = "PM: calling ";
/// What tells the guest that the lab has heard all that it had to say.
const HEARD: &str = "/tmp/suspend-now";

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
        // In the background, once the reply has arrived: it could not be sent. The console stays awake to tell when all
        // else sleeps.
        let line = format!(
            "rm -f /tmp/suspended {HEARD}; cd /sys/module && echo N > printk/parameters/console_suspend \
             && echo {seconds} > suspend/parameters/pm_test_delay && cd /sys/power && echo devices > pm_test \
             && echo 1 > pm_print_times \
             && cd /sys/bus/virtio/drivers/virtio_console && port=$(ls -d virtio*) || exit 1; \
             (until [ -e {HEARD} ]; do usleep 1000; done; echo $port > unbind; \
             echo freeze > /sys/power/state; status=$?; \
             echo none > /sys/power/pm_test; echo 0 > /sys/power/pm_print_times; \
             echo $status > /tmp/suspended; echo $port > bind) > /dev/null 2>&1 < /dev/null &"
        );
        let mut events = self.qemu.qmp.events();
        let mark = self.qemu.console.mark();
        self.agent.check(&Command::shell(line))?;
        self.agent.touch_unanswered(HEARD, wait::AGENT_COMMAND)?;
        let deadline = Deadline::new("the guest to suspend its devices", wait::SHUTDOWN);
        let asleep = (self.qemu.console).wait_for_since(mark, SUSPENDED, &deadline);
        asleep.map_err(|error| LabError::Unexpected(error.to_string()))?;
        // Its clock, too: it has as long to sleep afterwards as it has now.
        self.qemu.qmp.stop()?;
        meanwhile();
        let printed = self.qemu.console.printed_since(mark);
        self.qemu.qmp.cont()?;
        let slept = printed.split_once(SUSPENDED);
        if slept.is_none_or(|(_, after)| after.contains(CALLING)) {
            return Err(LabError::Unexpected(format!(
                "the guest was suspended for {seconds} s, and the lab came too late to find it so"
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
