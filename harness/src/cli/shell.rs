//! The guest's serial console as a person's shell.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use p2plab::agent::{AgentClient, AgentError, Command};
use p2plab::lab::Lab;
use p2plab::qemu::Qemu;
use p2plab::qemu::attach::{Detach, Left};
use p2plab::wait::{self, Deadline};

use super::CliError;

/// A person may stay for as long as they like; a command needs some deadline.
const FOR_EVER: Duration = Duration::from_secs(30 * 86_400);
/// How long the wait for a reset goes on after the shell was left.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Joins the console to our standard input and output until the shell ends (`exit`, Ctrl-D, the end of a
/// pipe), the guest powers off, or the person presses Ctrl-]. Then ends the lab.
pub(super) fn shell(mut lab: Lab) -> Result<(), CliError> {
    eprintln!(
        "p2plab: the guest's shell follows; `exit` or Ctrl-] ends the lab. Logs: {}",
        lab.run_directory().display()
    );
    let left = relay(lab.qemu()?, lab.agent()?)?;
    eprintln!();
    match left {
        Left::ConsoleClosed => {
            powered_off(lab.qemu()?)?;
            // Nothing is left to kill: this waits until the endpoints have noticed.
            lab.kill_qemu()?;
        }
        // The conversation with the agent was broken off to end the relay's helper.
        Left::ByKey | Left::Detached | Left::TerminalGone => lab.wait_ready()?,
        Left::BySignal => return Err(CliError::Failed("ended by a signal".into())),
    }
    lab.finish()?;
    Ok(())
}

/// Tells a guest that was powered off by its user from one that broke.
pub(super) fn powered_off(qemu: &Qemu) -> Result<(), CliError> {
    let deadline = Deadline::new("QEMU's end after its console's", wait::SHUTDOWN);
    let fault = qemu
        .faults
        .wait(&deadline)
        .map_err(|error| CliError::Failed(error.to_string()))?;
    if fault.is_power_off() {
        Ok(())
    } else {
        Err(CliError::Failed(fault.to_string()))
    }
}

fn relay(qemu: &Qemu, agent: &AgentClient) -> Result<Left, CliError> {
    let failed = |error: std::io::Error| CliError::Failed(format!("the console: {error}"));
    let console = &qemu.console;
    let (attachment, detach) = console.attach(console.mark()).map_err(failed)?;
    // The shell has printed its prompt long ago; an empty line makes it print another.
    let deadline = Deadline::new("the console to take a line", wait::QMP_COMMAND);
    console
        .write(b"\r", &deadline)
        .map_err(|error| CliError::Failed(error.to_string()))?;
    let left = AtomicBool::new(false);
    let (watching, watched) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| detach_at_exit(agent, &detach, &left, watching));
        scope.spawn(|| notice_resets(qemu, agent, &left));
        // Somebody may have typed `exit` already. Without an answer the shell is there all the same.
        if watched.recv_timeout(wait::AGENT_COMMAND).is_err() {
            tracing::debug!("the guest does not watch its shell");
        }
        let result = attachment.run(std::io::stdin(), std::io::stdout());
        left.store(true, Ordering::SeqCst);
        agent.fail("the shell was left");
        result.map_err(failed)
    })
}

/// Ends the relay when the shell on the console has ended, also when it does so after a reboot.
fn detach_at_exit(agent: &AgentClient, detach: &Detach, left: &AtomicBool, watching: Sender<()>) {
    let ended = Command::new("/init")
        .arg("--await-shell")
        .deadline(FOR_EVER);
    while !left.load(Ordering::SeqCst) {
        let told = agent.run_streaming(&ended, |_, _| {
            let _ = watching.send(());
        });
        match told {
            Ok(exit) if exit.success() => return detach.detach(),
            Ok(exit) => {
                tracing::debug!("no news of the shell's end: {exit}");
                return;
            }
            // The guest was reset, or is gone: in that case the console ends, and the relay with it.
            Err(AgentError::Lost { .. }) if !left.load(Ordering::SeqCst) => {
                if agent.hello(wait::BOOT).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!("no news of the shell's end: {error}");
                return;
            }
        }
    }
}

/// A request to an agent that was reset is never answered; this makes it fail.
fn notice_resets(qemu: &Qemu, agent: &AgentClient, left: &AtomicBool) {
    let mut events = qemu.qmp.events();
    while !left.load(Ordering::SeqCst) && !qemu.qmp.is_closed() {
        let deadline = Deadline::new("a reset", LOOK_AGAIN);
        if events.wait("RESET", &deadline, |_| true).is_ok() {
            agent.fail("the guest was reset");
        }
    }
}
