//! Ending the guest.

use std::time::Duration;

use p2plab_guest::children::Children;
use p2plab_guest::kill_everything;
use p2plab_guest::protocol::Power;
use rustix::mount::{UnmountFlags, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::boot::say;
use crate::console::Console;

const TERM: i32 = 15;
const KILL: i32 = 9;
/// What processes get to end by themselves; a shell at its prompt ignores the request.
const POLITE: Duration = Duration::from_millis(200);
/// What killed processes get to be gone, before file systems are unmounted under them.
const FIRM: Duration = Duration::from_secs(2);

/// Ends all processes, unmounts, and powers off or reboots.
pub fn end(power: Power, children: &Children, console: &Console) {
    say(format_args!(
        "{}",
        if power == Power::Poweroff {
            "powering off"
        } else {
            "rebooting"
        }
    ));
    console.stop();
    rustix::fs::sync();
    kill_everything(TERM);
    children.wait_none(POLITE);
    kill_everything(KILL);
    if !children.wait_none(FIRM) {
        say(format_args!("some processes did not end"));
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for place in mounts
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(1))
    {
        if place != "/" && !["/proc", "/sys", "/dev"].contains(&place) {
            let _ = unmount(place, UnmountFlags::empty());
        }
    }
    rustix::fs::sync();
    let command = match power {
        Power::Poweroff => RebootCommand::PowerOff,
        Power::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        say(format_args!("the kernel refuses to end: {error}"));
    }
}
