//! Ending the guest.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use p2plab_guest::children::Children;
use p2plab_guest::kill_everything;
use p2plab_guest::protocol::Power;
use rustix::mount::{UnmountFlags, unmount};
use rustix::system::{RebootCommand, reboot};
use signal_hook::consts::{SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::boot::say;
use crate::console::Console;

const TERM: i32 = 15;
const KILL: i32 = 9;
/// What processes get to end by themselves; a shell at its prompt ignores the request.
const POLITE: Duration = Duration::from_millis(200);
/// What killed processes get to be gone, before file systems are unmounted under them.
const FIRM: Duration = Duration::from_secs(2);

/// Ends the guest when somebody in it says `poweroff`, `halt` or `reboot`: busybox's programs of these names
/// only send init a signal (init/halt.c). A virtual machine that halts is of no use to anyone, so it is
/// powered off as well.
pub fn obey_signals(children: Children, console: Arc<Console>) -> io::Result<()> {
    let mut signals = Signals::new([SIGUSR1, SIGUSR2, SIGTERM])?;
    std::thread::Builder::new()
        .name("power".into())
        .spawn(move || {
            for signal in signals.forever() {
                let power = if signal == SIGTERM {
                    Power::Reboot
                } else {
                    Power::Poweroff
                };
                end(power, &children, &console);
            }
        })?;
    Ok(())
}

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
