//! Commands that were fetched and wait to be executed: those that Abort can still take back.

use std::sync::Mutex;

use crate::locks::lock;

#[derive(Debug)]
struct Waiting {
    queue: u16,
    cid: u16,
    aborted: bool,
}

/// The commands that wait, of all queues.
#[derive(Debug, Default)]
pub(crate) struct HeldCommands(Mutex<Vec<Waiting>>);

/// One of them, for as long as it waits.
#[derive(Debug)]
pub(crate) struct Held<'a> {
    commands: &'a HeldCommands,
    queue: u16,
    cid: u16,
}

impl HeldCommands {
    /// Command `cid` of submission queue `queue` begins to wait.
    pub(crate) fn hold(&self, queue: u16, cid: u16) -> Held<'_> {
        lock(&self.0).push(Waiting {
            queue,
            cid,
            aborted: false,
        });
        Held {
            commands: self,
            queue,
            cid,
        }
    }

    /// Abort: whether that command waits and has not been aborted before. It completes with Command Abort
    /// Requested as soon as whoever holds it looks.
    pub(crate) fn abort(&self, queue: u16, cid: u16) -> bool {
        let mut commands = lock(&self.0);
        let found = commands
            .iter_mut()
            .find(|c| (c.queue, c.cid, c.aborted) == (queue, cid, false));
        found.is_some_and(|command| {
            command.aborted = true;
            true
        })
    }
}

impl Held<'_> {
    fn position(&self, commands: &[Waiting]) -> Option<usize> {
        let mine = |c: &Waiting| (c.queue, c.cid) == (self.queue, self.cid);
        commands.iter().position(mine)
    }

    /// Whether the command was aborted meanwhile.
    pub(crate) fn is_aborted(&self) -> bool {
        let commands = lock(&self.commands.0);
        let at = self.position(&commands);
        at.and_then(|at| commands.get(at))
            .is_some_and(|c| c.aborted)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut commands = lock(&self.commands.0);
        if let Some(at) = self.position(&commands) {
            commands.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_aborted_once_and_only_while_it_waits() {
        let commands = HeldCommands::default();
        assert!(!commands.abort(1, 7));
        let held = commands.hold(1, 7);
        let other = commands.hold(2, 7);
        assert!(!held.is_aborted());
        assert!(!commands.abort(1, 8));
        assert!(commands.abort(1, 7));
        assert!(!commands.abort(1, 7), "aborted already");
        assert!(held.is_aborted() && !other.is_aborted());
        drop(held);
        assert!(!commands.abort(1, 7));
        assert!(commands.abort(2, 7));
    }
}
