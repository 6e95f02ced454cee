//! Faults on demand: rules that say which commands meet with what.
//!
//! A worker asks for the faults of a command between fetching and executing it. Every rule that matches has its
//! effect: delays add up, the first status wins. Rules outlive resets, as a broken disk does; they are the test's
//! to remove.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::controller::Shared;
use crate::io::modifies;
use crate::locks::lock;
use crate::queue::SubmissionQueue;
use crate::spec::command::{Command, ReadWriteCdw12, io};
use crate::spec::status::Status;

/// A rule. Fields that are `None` match everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Submission queue; 0 is the admin queue. `None` are all I/O queues.
    pub queue: Option<u16>,
    /// Opcode.
    pub opcode: Option<u8>,
    /// Namespace.
    pub nsid: Option<u32>,
    /// Logical blocks, first and last: matches commands that address at least one of them by dwords 10 to 12
    /// (Read, Write, Compare, Verify, Write Zeroes, Write Uncorrectable).
    pub lba: Option<RangeInclusive<u64>>,
    /// Matching commands that pass before the first one meets the fault.
    pub after: u64,
    /// Matching commands that meet it then; `None` are all.
    pub count: Option<u64>,
    /// What they meet.
    pub effect: FaultEffect,
}

impl Fault {
    /// A fault of every command on every I/O queue, to be narrowed.
    pub fn new(effect: FaultEffect) -> Self {
        Self {
            queue: None,
            opcode: None,
            nsid: None,
            lba: None,
            after: 0,
            count: None,
            effect,
        }
    }
}

/// What happens to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultEffect {
    /// It is not executed and completes with this status.
    Status(Status),
    /// The same with the status of a defect of the medium: Write Fault for commands that change blocks,
    /// Unrecovered Read Error for others.
    MediaError,
    /// It is executed after this time.
    Delay(Duration),
    /// It is executed and never completed.
    DropCompletion,
    /// It is executed and completed without an interrupt.
    LoseInterrupt,
    /// The controller fails: CSTS.CFS, and nothing is completed until a reset.
    Fatal,
    /// Commands that would change blocks complete with Namespace is Write Protected. Other commands pass, and are
    /// not counted. Without a namespace all media are read-only, and SMART warns of it.
    ReadOnly,
    /// The power is cut: see [`NvmeController::power_cut`](crate::NvmeController::power_cut).
    PowerCut,
}

/// Names a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FaultId(u64);

impl fmt::Display for FaultId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault {}", self.0)
    }
}

/// The rules of a controller.
#[derive(Debug, Default)]
pub struct Faults {
    /// Number of rules, so that a command without faults costs one load.
    armed: AtomicUsize,
    rules: Mutex<Rules>,
    /// Whose they are: it looks at its health again when rules go.
    controller: OnceLock<Weak<Shared>>,
}

#[derive(Debug, Default)]
struct Rules {
    next: u64,
    list: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    id: FaultId,
    fault: Fault,
    matched: u64,
    hits: u64,
}

/// What a command meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Not executed, and completed with this.
    pub(crate) status: Option<Status>,
    /// Executed, if there is no status.
    pub(crate) execute: bool,
    pub(crate) complete: bool,
    pub(crate) interrupt: bool,
}

impl Verdict {
    pub(crate) const NOTHING: Self = Self {
        status: None,
        execute: true,
        complete: true,
        interrupt: true,
    };

    const LOST: Self = Self {
        status: None,
        execute: false,
        complete: false,
        interrupt: false,
    };
}

impl Faults {
    pub(crate) fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        let this = Self::default();
        for fault in faults {
            this.add(fault);
        }
        this
    }

    pub(crate) fn belong_to(&self, controller: &Arc<Shared>) {
        // Set once.
        let _ = self.controller.set(Arc::downgrade(controller));
    }

    fn check_health(&self) {
        if let Some(shared) = self.controller.get().and_then(Weak::upgrade) {
            shared.check_health();
        }
    }

    /// Adds a rule behind the others; it applies to commands that are fetched from now on.
    pub fn add(&self, fault: Fault) -> FaultId {
        let mut rules = lock(&self.rules);
        let id = FaultId(rules.next);
        rules.next = rules.next.wrapping_add(1);
        let (matched, hits) = (0, 0);
        rules.list.push(Rule {
            id,
            fault,
            matched,
            hits,
        });
        self.armed.store(rules.list.len(), Ordering::Relaxed);
        id
    }

    /// Takes a rule away; how many commands met it, or `None` where there is no such rule.
    pub fn remove(&self, id: FaultId) -> Option<u64> {
        let rule = {
            let mut rules = lock(&self.rules);
            let index = rules.list.iter().position(|rule| rule.id == id)?;
            let rule = rules.list.remove(index);
            self.armed.store(rules.list.len(), Ordering::Relaxed);
            rule
        };
        self.check_health();
        Some(rule.hits)
    }

    /// Takes all rules away.
    pub fn clear(&self) {
        {
            let mut rules = lock(&self.rules);
            rules.list.clear();
            self.armed.store(0, Ordering::Relaxed);
        }
        self.check_health();
    }

    /// How many commands have met the fault; `None` where there is no such rule (any more).
    pub fn hits(&self, id: FaultId) -> Option<u64> {
        let rules = lock(&self.rules);
        let rule = rules.list.iter().find(|rule| rule.id == id)?;
        Some(rule.hits)
    }

    /// Whether there is any rule.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed) != 0
    }

    /// Whether a rule has made all media read-only (SMART, Critical Warning bit 3).
    pub(crate) fn read_only(&self) -> bool {
        self.is_armed()
            && lock(&self.rules).list.iter().any(|rule| {
                let all = rule.fault.nsid.is_none() && rule.fault.lba.is_none();
                rule.fault.effect == FaultEffect::ReadOnly && all && rule.hits > 0
            })
    }

    pub(crate) fn dump(&self) -> Value {
        let rules = lock(&self.rules);
        let rule = |rule: &Rule| {
            json!({ "id": rule.id.0, "fault": format!("{:?}", rule.fault), "matched": rule.matched,
                "hits": rule.hits })
        };
        rules.list.iter().map(rule).collect()
    }

    /// The effects of all rules that `command` meets.
    fn effects(&self, queue: u16, command: &Command) -> Vec<FaultEffect> {
        let mut rules = lock(&self.rules);
        let met = rules.list.iter_mut().filter_map(|rule| {
            let matches = rule.fault.matches(queue, command);
            (matches && rule.strikes()).then_some(rule.fault.effect)
        });
        met.collect()
    }
}

impl Rule {
    /// Counts a command that matches; whether it meets the fault.
    fn strikes(&mut self) -> bool {
        self.matched = self.matched.saturating_add(1);
        let strikes = self.matched > self.fault.after
            && self.fault.count.is_none_or(|count| self.hits < count);
        if strikes {
            self.hits = self.hits.saturating_add(1);
        }
        strikes
    }
}

impl Fault {
    fn matches(&self, queue: u16, command: &Command) -> bool {
        let on_queue = self.queue.map_or(queue != 0, |wanted| wanted == queue);
        on_queue
            && self.opcode.is_none_or(|opcode| opcode == command.opcode)
            && self.nsid.is_none_or(|nsid| nsid == command.nsid.get())
            && self
                .lba
                .as_ref()
                .is_none_or(|lba| queue != 0 && addresses(command, lba))
            && (self.effect != FaultEffect::ReadOnly || (queue != 0 && modifies(command.opcode)))
    }
}

/// Whether a command addresses at least one of the blocks `lba` by dwords 10 to 12.
fn addresses(command: &Command, lba: &RangeInclusive<u64>) -> bool {
    let by_dwords = matches!(
        command.opcode,
        io::READ
            | io::WRITE
            | io::WRITE_UNCORRECTABLE
            | io::COMPARE
            | io::WRITE_ZEROES
            | io::VERIFY
    );
    let nlb_z = ReadWriteCdw12::from_bits(command.cdw12.get()).nlb_z();
    let first = command.slba();
    by_dwords && first <= *lba.end() && first.saturating_add(nlb_z.into()) >= *lba.start()
}

/// Lets `command`, just fetched from `sq`, meet its faults; returns what is left of it.
#[inline]
pub(crate) fn meet(shared: &Shared, sq: &SubmissionQueue, command: &Command) -> Verdict {
    if shared.faults.is_armed() {
        meet_rules(shared, sq, command)
    } else {
        Verdict::NOTHING
    }
}

fn meet_rules(shared: &Shared, sq: &SubmissionQueue, command: &Command) -> Verdict {
    let mut verdict = Verdict::NOTHING;
    for effect in shared.faults.effects(sq.id, command) {
        tracing::debug!(queue = sq.id, opcode = command.opcode, ?effect, "fault");
        match effect {
            FaultEffect::Status(status) => verdict.status = verdict.status.or(Some(status)),
            FaultEffect::MediaError => {
                let status = if modifies(command.opcode) {
                    Status::WRITE_FAULT
                } else {
                    Status::UNRECOVERED_READ_ERROR
                };
                verdict.status = verdict.status.or(Some(status));
            }
            FaultEffect::ReadOnly => {
                verdict.status = verdict.status.or(Some(Status::WRITE_PROTECTED));
                shared.check_health();
            }
            FaultEffect::Delay(time) => match wait(shared, sq, command, time) {
                Waited::Passed => {}
                Waited::Aborted => {
                    verdict.status = verdict.status.or(Some(Status::ABORT_REQUESTED));
                }
                Waited::Ended => return Verdict::LOST,
            },
            FaultEffect::DropCompletion => verdict.complete = false,
            FaultEffect::LoseInterrupt => verdict.interrupt = false,
            FaultEffect::Fatal => {
                shared.fatal("a fault on demand");
                return Verdict::LOST;
            }
            FaultEffect::PowerCut => {
                // The controller's thread does it: it waits for this one to end.
                lock(&shared.registers).pending.power_cut = true;
                sq.stop.store(true, Ordering::Release);
                shared.wake.notify();
                return Verdict::LOST;
            }
        }
    }
    verdict.execute = verdict.status.is_none();
    verdict
}

/// How a delay ended.
enum Waited {
    Passed,
    /// The host took the command back.
    Aborted,
    /// The queue's end cut it short.
    Ended,
}

/// Lets `time` pass, or less. It looks for what cuts it short each millisecond: faults are rare, and the queue's own
/// wake keeps its one meaning.
fn wait(shared: &Shared, sq: &SubmissionQueue, command: &Command, time: Duration) -> Waited {
    let held = shared.held.hold(sq.id, command.cid.get());
    let begin = Instant::now();
    while let Some(left) = time.checked_sub(begin.elapsed()).filter(|t| !t.is_zero()) {
        if shared.is_ending(sq) {
            return Waited::Ended;
        }
        if held.is_aborted() {
            return Waited::Aborted;
        }
        std::thread::sleep(left.min(Duration::from_millis(1)));
    }
    // Abort told the host that the command is taken back, however late.
    if held.is_aborted() {
        Waited::Aborted
    } else {
        Waited::Passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(opcode: u8, nsid: u32, slba: u32, nlb_z: u32) -> Command {
        Command {
            opcode,
            nsid: nsid.into(),
            cdw10: slba.into(),
            cdw12: nlb_z.into(),
            ..Command::default()
        }
    }

    fn read_only() -> Fault {
        Fault::new(FaultEffect::ReadOnly)
    }

    #[test]
    fn every_field_narrows() {
        let read = command(io::READ, 1, 100, 7);
        let any = Fault::new(FaultEffect::MediaError);
        assert!(any.matches(1, &read) && any.matches(9, &read) && !any.matches(0, &read));
        let with = |change: fn(&mut Fault)| {
            let mut fault = any.clone();
            change(&mut fault);
            fault
        };
        assert!(with(|f| f.queue = Some(0)).matches(0, &read));
        assert!(!with(|f| f.queue = Some(2)).matches(1, &read));
        assert!(!with(|f| f.opcode = Some(io::WRITE)).matches(1, &read));
        assert!(!with(|f| f.nsid = Some(2)).matches(1, &read));
        for (lba, met) in [
            (0..=99, false),
            (0..=100, true),
            (107..=107, true),
            (108..=u64::MAX, false),
            (0..=u64::MAX, true),
        ] {
            let mut fault = any.clone();
            fault.lba = Some(lba.clone());
            assert_eq!(fault.matches(1, &read), met, "{lba:?}");
            // A flush has no blocks, whatever is in its dwords.
            assert!(!fault.matches(1, &command(io::FLUSH, 1, 100, 7)));
        }
        assert!(read_only().matches(1, &command(io::WRITE, 1, 0, 0)));
        assert!(!read_only().matches(1, &read));
    }

    #[test]
    fn after_and_count_choose_among_the_commands_that_match() {
        let faults = Faults::default();
        let mut fault = Fault::new(FaultEffect::MediaError);
        (fault.after, fault.count) = (2, Some(3));
        let id = faults.add(fault);
        let read = command(io::READ, 1, 0, 0);
        let met: Vec<bool> = (0..8)
            .map(|_| !faults.effects(1, &read).is_empty())
            .collect();
        assert_eq!(met, [false, false, true, true, true, false, false, false]);
        assert_eq!(faults.hits(id), Some(3));
        let other = faults.add(read_only());
        assert_eq!(faults.remove(id), Some(3));
        assert_eq!((faults.hits(id), faults.remove(id)), (None, None));
        assert!(faults.is_armed() && !faults.read_only());
        faults.effects(1, &command(io::WRITE, 1, 0, 0));
        assert!(faults.read_only());
        faults.clear();
        assert!(!faults.is_armed() && faults.hits(other).is_none());
    }
}
