//! How many completions share an interrupt while commands come as a stream.
//!
//! An interrupt costs a host as much as a small command does, on an emulated machine more. The completions of a host
//! that is busy with its next commands may wait for each other; those of a host that has sent all it wants in flight
//! must not, as it waits for them. Which of the two it is cannot be seen, so it is learned: while the host goes on
//! sending, one completion more is held each time, and when it falls silent instead, fewer ([`Moderation::sent`]).
//!
//! This is the controller's own affair, beside Interrupt Coalescing (Base 5.27.1.6), which is the host's wish. Nothing
//! is held where nobody looks for the next command, nor behind a command that takes long.

use std::time::{Duration, Instant};

/// Completions that share an interrupt at most.
const MOST: u32 = 24;

/// No completion waits longer for its interrupt while others come.
const HOLD: Duration = Duration::from_micros(500);

/// A host that sends nothing for twice its pace, and at least and at most so long, is silent. The least is what a host
/// needs for an interrupt and its completions, during which it sends nothing either.
const SILENCE: [Duration; 2] = [Duration::from_micros(100), Duration::from_micros(180)];

/// Full interrupts after which one completion more is held: at first, and at most, where that has often failed. A host
/// with one command in flight meets that many interrupts for each one that is late by [`SILENCE`].
const PATIENCE: [u32; 2] = [8, 256];

/// A host that was silent for so long may be doing something else afterwards.
const BREAK: Duration = Duration::from_millis(10);

/// What is known of the host of one submission queue.
#[derive(Debug)]
pub(crate) struct Moderation {
    /// Completions that an interrupt waits for.
    target: u32,
    /// Full interrupts since the target changed, and how many it takes to raise it.
    streak: u32,
    patience: u32,
    /// The target was raised, and whether that was wise is not known yet.
    probing: bool,
    /// The last interrupt came of silence.
    silent: bool,
    /// Time between two commands of a host that does not wait.
    pace: Duration,
    /// When the last command came.
    last: Option<Instant>,
}

impl Default for Moderation {
    fn default() -> Self {
        let [patience, _] = PATIENCE;
        Self {
            target: 1,
            streak: 0,
            patience,
            probing: false,
            silent: false,
            pace: Duration::ZERO,
            last: None,
        }
    }
}

/// What completions that have had no interrupt wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// For more of them.
    Hold,
    /// Nothing: there are enough.
    Full,
    /// Nothing: they have waited long enough, though the host may go on sending.
    Late,
    /// Nothing: the host sends no more.
    Silence,
}

impl Moderation {
    /// A command has come, while completions are `held` or not.
    pub(crate) fn came(&mut self, now: Instant, held: bool) {
        let gap = self
            .last
            .map_or(BREAK, |last| now.saturating_duration_since(last));
        if gap >= BREAK {
            *self = Self::default();
        } else if held || self.pace.is_zero() {
            self.pace = (self.pace * 3 + gap) / 4;
        }
        self.last = Some(now);
    }

    /// What `count` completions wait for, the first of them `since` then.
    pub(crate) fn verdict(&self, count: u32, since: Instant, now: Instant) -> Verdict {
        if count >= self.target {
            return Verdict::Full;
        }
        if now.saturating_duration_since(since) >= HOLD {
            return Verdict::Late;
        }
        let [least, most] = SILENCE;
        let silence = (self.pace * 2).clamp(least, most);
        let sends = self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < silence);
        if sends {
            Verdict::Hold
        } else {
            Verdict::Silence
        }
    }

    /// `count` completions get their interrupt. Learns from why.
    pub(crate) fn sent(&mut self, count: u32, why: Verdict) {
        let [patient, most_patient] = PATIENCE;
        // A host with so many in flight has something to do while a third of them are executed.
        let two_thirds = count.saturating_mul(2).div_ceil(3);
        match why {
            Verdict::Hold => return,
            Verdict::Full => {
                self.streak += 1;
                if self.probing && self.streak >= patient {
                    self.probing = false;
                    self.patience = (self.patience / 2).max(patient);
                }
                if self.streak >= self.patience {
                    self.probing = true;
                    self.aim(self.target + (self.target / 4).max(1));
                }
            }
            Verdict::Late => {
                self.probing = false;
                self.aim(two_thirds);
            }
            Verdict::Silence if self.probing && self.streak == 0 => {
                self.patience = (self.patience * 2).min(most_patient);
                self.probing = false;
                self.aim(two_thirds);
            }
            // Twice in a row.
            Verdict::Silence if self.silent => self.aim(two_thirds.max(self.target / 2)),
            // Something else may have kept the host: its own scheduler, or that of the machine it runs on.
            Verdict::Silence => {}
        }
        self.silent = why == Verdict::Silence;
    }

    fn aim(&mut self, target: u32) {
        self.target = target.clamp(1, MOST);
        self.streak = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a host that keeps `depth` commands in flight, sends one each `pace`, and when it has an interrupt takes
    /// `turnaround` to find its completions. The controller takes no time. Returns interrupts, and how long the host waited.
    fn play(
        moderation: &mut Moderation,
        depth: u32,
        pace: Duration,
        commands: u32,
    ) -> (u32, Duration) {
        let turnaround = Duration::from_micros(30);
        let mut now = Instant::now();
        let (mut free, mut held, mut since) = (depth, 0, now);
        let (mut interrupts, mut waited, mut done) = (0, Duration::ZERO, 0);
        while done < commands {
            if free > 0 {
                free -= 1;
                done += 1;
                now += pace;
                moderation.came(now, held > 0);
                if held == 0 {
                    since = now;
                }
                held += 1;
            } else {
                now += Duration::from_micros(1);
                waited += Duration::from_micros(1);
            }
            let verdict = moderation.verdict(held, since, now);
            if held > 0 && verdict != Verdict::Hold {
                moderation.sent(held, verdict);
                interrupts += 1;
                free += std::mem::take(&mut held);
                now += turnaround;
            }
        }
        (interrupts, waited)
    }

    #[test]
    fn one_command_at_a_time_is_hardly_ever_late() {
        let mut moderation = Moderation::default();
        play(&mut moderation, 1, Duration::from_micros(60), 4000);
        let (interrupts, waited) = play(&mut moderation, 1, Duration::from_micros(60), 4000);
        assert_eq!(interrupts, 4000);
        assert!(waited < Duration::from_millis(4), "{waited:?}");
    }

    #[test]
    fn a_stream_shares_interrupts_and_the_host_does_not_wait() {
        for (depth, pace) in [(8, 50), (16, 30), (32, 15), (128, 15)] {
            let mut moderation = Moderation::default();
            let pace = Duration::from_micros(pace);
            play(&mut moderation, depth, pace, 4000);
            let (interrupts, waited) = play(&mut moderation, depth, pace, 8000);
            assert!(interrupts < 8000 / 4, "{depth}: {interrupts}");
            // Of the time that the commands alone take.
            assert!(waited < pace * 8000 / 50, "{depth}: {waited:?}");
        }
    }

    #[test]
    fn what_was_learned_of_a_deep_queue_is_forgotten_for_a_shallow_one() {
        let mut moderation = Moderation::default();
        play(&mut moderation, 32, Duration::from_micros(15), 8000);
        assert!(moderation.target > 8);
        let (interrupts, waited) = play(&mut moderation, 1, Duration::from_micros(60), 4000);
        assert_eq!(interrupts, 4000);
        assert!(waited < Duration::from_millis(10), "{waited:?}");
    }

    #[test]
    fn a_host_that_is_kept_now_and_then_keeps_its_batches() {
        let mut moderation = Moderation::default();
        for _ in 0..100 {
            play(&mut moderation, 32, Duration::from_micros(15), 500);
            moderation.sent(1, Verdict::Silence);
        }
        assert!(moderation.target > 8, "{moderation:?}");
    }

    #[test]
    fn nothing_is_held_for_ever() {
        let mut moderation = Moderation::default();
        let begin = Instant::now();
        moderation.came(begin, false);
        moderation.target = MOST;
        let at = |microseconds| begin + Duration::from_micros(microseconds);
        assert_eq!(moderation.verdict(1, begin, at(50)), Verdict::Hold);
        assert_eq!(moderation.verdict(1, begin, at(180)), Verdict::Silence);
        moderation.came(at(490), true);
        assert_eq!(moderation.verdict(1, begin, at(495)), Verdict::Hold);
        assert_eq!(moderation.verdict(1, begin, at(500)), Verdict::Late);
        assert_eq!(moderation.verdict(MOST, begin, begin), Verdict::Full);
    }
}
