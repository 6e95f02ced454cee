//! Notices that the guest's agent is lost, by what QEMU says of its port.
//!
//! QEMU reports when the guest closes a virtio-serial port (event VSERPORT_CHANGE, QEMU QMP Reference Manual).
//! That is also what a guest does on its way down; a guest that goes down says so at once, one that has lost
//! its agent says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::qemu::console::Console;
use crate::qemu::fault::Fault;
use crate::qemu::qmp::{Event, Events, QmpError};
use crate::qemu::{Qemu, process};
use crate::wait::Deadline;

/// QEMU's id of the port; it reports only on ports that have one.
pub(super) const PORT_ID: &str = "agent-port";
/// From the port's end to the machine's reset or power-off, where the guest goes down by itself. It has some devices to
/// shut down meanwhile: a tenth of a second, on a loaded host many times that.
const GOING_DOWN: Duration = Duration::from_secs(5);
/// A lab outlives any deadline that could be given here; its end ends the wait.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// Whether the lab has told the guest to go down, so that its silence means nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct GoingDown(Arc<AtomicBool>);

impl GoingDown {
    pub(super) fn set(&self, going_down: bool) {
        self.0.store(going_down, Ordering::Release);
    }

    fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Puts a lost agent on the board of `qemu`'s faults, until QEMU ends.
pub(super) fn watch(qemu: &Qemu, going_down: GoingDown) -> std::io::Result<()> {
    let (mut events, faults) = (qemu.qmp.events(), qemu.faults.clone());
    let console = qemu.console.clone();
    std::thread::Builder::new()
        .name("agent-port".into())
        .spawn(move || {
            while let Ok(lost) = next_loss(&mut events, &going_down) {
                if lost {
                    let mut text = String::from(
                        "the guest agent is lost: its port was closed, and the guest neither resets nor \
                         powers off",
                    );
                    text.push_str(&last_lines(&console));
                    faults.raise(Fault::Other(text));
                }
            }
        })
        .map(drop)
}

/// The console's last lines, as the end of an error's text.
pub(super) fn last_lines(console: &Console) -> String {
    let lines = console.tail();
    let tail = lines.len().saturating_sub(process::TAIL_LINES);
    let mut text = String::from("\nThe last lines of console:");
    for line in lines.iter().skip(tail) {
        text.push_str("\n    ");
        text.push_str(line);
    }
    text
}

/// Waits until the port closes and says whether that is a loss. Fails when QEMU is gone.
fn next_loss(events: &mut Events, going_down: &GoingDown) -> Result<bool, QmpError> {
    let idle = Deadline::new("the agent's port to close", FOR_EVER);
    match events.wait_any("the end of the agent's port", &idle, |e| {
        is_change(e, false)
    }) {
        Err(QmpError::Deadline(_)) => return Ok(false),
        other => other?,
    };
    let soon = Deadline::new("the guest to go down", GOING_DOWN);
    let explained = |event: &Event| {
        matches!(event.name.as_str(), "RESET" | "SHUTDOWN" | "GUEST_PANICKED")
            || is_change(event, true)
    };
    match events.wait_any("a reason for the agent's silence", &soon, explained) {
        Err(QmpError::Deadline(_)) => Ok(!going_down.get()),
        other => other.map(|_| false),
    }
}

fn is_change(event: &Event, open: bool) -> bool {
    event.name == "VSERPORT_CHANGE" && event.data["id"] == PORT_ID && event.data["open"] == open
}
