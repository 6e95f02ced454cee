//! Device Self-test (Base 8.6): reads what the namespaces hold, in the background.
//!
//! The short test reads the first and the last blocks of each namespace, the extended one all that is allocated.
//! A Controller Level Reset aborts the short one; the extended one goes on over resets, and over a loss of power
//! when that is back.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::background::{Background, Signal};
use crate::controller::Shared;
use crate::counters::add;
use crate::events::Event;
use crate::extents;
use crate::io;
use crate::locks::lock;
use crate::namespace::Namespace;
use crate::spec::log::{SelfTestResult, self_test_result as result};
use crate::spec::status::Status;

/// Device Self-test Options (DSTO): one test at a time in the subsystem, which has one controller.
pub(crate) const DSTO: u8 = 1;
/// Extended Device Self-test Time (EDSTT) in minutes. It is nominal.
pub(crate) const EDSTT: u16 = 1;

/// Results that the page has room for.
const RESULTS: usize = 20;

/// Bytes that the short test reads at each end of a namespace.
const SHORT: u64 = 64 << 10;
/// Bytes that the extended test reads in a step.
const STEP: u64 = 1 << 20;

/// The segment that reads; there is no other.
const READING: u8 = 1;

/// Which test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Short = 1,
    Extended = 2,
}

/// A test in progress.
#[derive(Debug)]
struct Running {
    /// Which of all tests it is: its thread stops when another number runs, or none.
    number: u64,
    kind: Kind,
    /// Namespaces and their sizes.
    namespaces: Vec<(u32, u64)>,
    /// The next to read: index of a namespace, offset in it.
    at: (usize, u64),
}

impl Running {
    fn percent(&self) -> u8 {
        let (index, offset) = self.at;
        let size = |(_, size): &(u32, u64)| u128::from(*size);
        let all: u128 = self.namespaces.iter().map(size).sum();
        let before: u128 = self.namespaces.iter().take(index).map(size).sum();
        let done = (before + u128::from(offset)) * 100;
        u8::try_from(done.checked_div(all).unwrap_or(0).min(99)).unwrap_or(99)
    }
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// Tests started so far.
    started: u64,
    /// Newest first.
    results: VecDeque<SelfTestResult>,
}

/// What a read found wrong.
struct Failure {
    nsid: u32,
    lba: u64,
}

#[derive(Debug, Default)]
pub(crate) struct SelfTest {
    state: Mutex<State>,
    pub(crate) background: Background,
}

impl SelfTest {
    /// Begins a test of `namespaces`.
    pub(crate) fn start(
        &self,
        shared: &Arc<Shared>,
        kind: Kind,
        namespaces: &[Arc<Namespace>],
    ) -> Result<(), Status> {
        let number = {
            let mut state = lock(&self.state);
            if state.running.is_some() {
                return Err(Status::SELF_TEST_IN_PROGRESS);
            }
            state.started += 1;
            let number = state.started;
            state.running = Some(Running {
                number,
                kind,
                namespaces: namespaces.iter().map(|ns| (ns.nsid, ns.bytes())).collect(),
                at: (0, 0),
            });
            number
        };
        self.spawn(shared, number)
    }

    fn spawn(&self, shared: &Arc<Shared>, number: u64) -> Result<(), Status> {
        let thread = self.background.start("nvme-self-test", {
            let shared = Arc::clone(shared);
            move |signal| run(&shared, number, signal)
        });
        thread.map_err(|error| {
            tracing::error!(%error, "no thread for a self-test");
            lock(&self.state).running = None;
            Status::INTERNAL_ERROR
        })
    }

    /// Power is back: goes on with the test that it interrupted.
    pub(crate) fn resume(&self, shared: &Arc<Shared>) {
        let number = lock(&self.state).running.as_ref().map(|test| test.number);
        if let Some(number) = number {
            // Without a thread there is no test any more, and the log has been told.
            let _ = self.spawn(shared, number);
        }
    }

    /// Ends the test in progress, if there is one, for the reason `why`.
    pub(crate) fn abort(&self, shared: &Shared, why: u8) {
        lock(&self.state).finish(shared, None, why, None);
    }

    /// The same if it is a test of namespace `nsid`, or `nsid` is all.
    pub(crate) fn abort_for_format(&self, shared: &Shared, nsid: u32) {
        let mut state = lock(&self.state);
        let tested = state.running.as_ref().is_some_and(|test| {
            let mut ids = test.namespaces.iter();
            ids.any(|(id, _)| *id == nsid || nsid == u32::MAX)
        });
        if tested {
            state.finish(shared, None, result::ABORTED_BY_FORMAT, None);
        }
    }

    /// A Controller Level Reset.
    pub(crate) fn controller_reset(&self, shared: &Shared) {
        let mut state = lock(&self.state);
        if matches!(&state.running, Some(test) if test.kind == Kind::Short) {
            state.finish(shared, None, result::ABORTED_BY_RESET, None);
        }
    }

    /// Device Self-test log page (Base 5.16.1.7).
    pub(crate) fn page(&self) -> Vec<u8> {
        let state = lock(&self.state);
        let (operation, percent) = match &state.running {
            Some(test) => (test.kind as u8, test.percent()),
            None => (0, 0),
        };
        let mut page = vec![operation, percent, 0, 0];
        let mut unused = SelfTestResult::new_zeroed();
        unused.status = result::UNUSED;
        let results = state.results.iter().chain(std::iter::repeat(&unused));
        for entry in results.take(RESULTS) {
            page.extend(entry.as_bytes());
        }
        page
    }

    pub(crate) fn dump(&self) -> Value {
        let state = lock(&self.state);
        json!({
            "running": state.running.as_ref().map(|test| format!("{:?}", test.kind)),
            "percent": state.running.as_ref().map(Running::percent),
            "started": state.started,
        })
    }
}

impl State {
    /// The running test, if it is test `number`.
    fn running(&mut self, number: u64) -> Option<&mut Running> {
        self.running.as_mut().filter(|test| test.number == number)
    }

    /// Ends test `number`, or whichever runs; whether there was one.
    fn finish(
        &mut self,
        shared: &Shared,
        number: Option<u64>,
        why: u8,
        failure: Option<&Failure>,
    ) -> bool {
        let test = self
            .running
            .take_if(|test| number.is_none_or(|n| n == test.number));
        let Some(test) = test else { return false };
        let mut entry = SelfTestResult::new_zeroed();
        entry.status = (test.kind as u8) << 4 | why;
        entry.power_on_hours = U64::new(shared.health.vitals().power_on_hours);
        if let Some(failure) = failure {
            entry.segment = READING;
            // NSID, FLBA, SCT and SC are valid.
            entry.valid = 0b1111;
            entry.nsid = U32::new(failure.nsid);
            entry.failing_lba = U64::new(failure.lba);
            let [code, kind] = Status::UNRECOVERED_READ_ERROR.code().to_le_bytes();
            (entry.status_code_type, entry.status_code) = (kind, code);
        }
        self.results.truncate(RESULTS - 1);
        self.results.push_front(entry);
        true
    }
}

/// Test `number`, until it is over, was aborted, or its thread is to end.
fn run(shared: &Shared, number: u64, signal: &Signal) {
    let mut buffer = vec![0; STEP as usize];
    while signal.go_on() {
        let (kind, next) = {
            let mut state = lock(&shared.self_test.state);
            let Some(test) = state.running(number) else {
                return;
            };
            let nsid = test.namespaces.get(test.at.0).map(|(nsid, _)| *nsid);
            (test.kind, nsid.map(|nsid| (nsid, test.at.1)))
        };
        let Some((nsid, offset)) = next else {
            lock(&shared.self_test.state).finish(shared, Some(number), result::NO_ERROR, None);
            return;
        };
        // Held for a step only: who formats or deletes it does not wait for the test.
        let read = match io::namespace(shared, nsid) {
            Ok(ns) => step(&ns, kind, offset, &mut buffer),
            Err(_) => {
                let why = result::ABORTED_BY_NAMESPACE_REMOVAL;
                lock(&shared.self_test.state).finish(shared, Some(number), why, None);
                return;
            }
        };
        match read {
            Ok(next) => {
                let mut state = lock(&shared.self_test.state);
                let Some(test) = state.running(number) else {
                    return;
                };
                test.at = next.map_or((test.at.0 + 1, 0), |offset| (test.at.0, offset));
            }
            Err(failure) => return fail(shared, number, &failure),
        }
    }
}

fn fail(shared: &Shared, number: u64, failure: &Failure) {
    let why = result::SEGMENT_FAILED;
    let ended = lock(&shared.self_test.state).finish(shared, Some(number), why, Some(failure));
    if ended {
        add(&shared.counters.media_errors, 1);
        let (nsid, lba, status) = (failure.nsid, failure.lba, Status::UNRECOVERED_READ_ERROR);
        lock(&shared.errors).medium(nsid, lba, status);
        shared.event(Event::DIAGNOSTIC_FAILURE);
        shared.keep_telemetry("a device self-test failed");
    }
}

/// Reads at `offset` or behind it: where to go on, if anywhere in this namespace.
fn step(
    ns: &Namespace,
    kind: Kind,
    offset: u64,
    buffer: &mut [u8],
) -> Result<Option<u64>, Failure> {
    let size = ns.bytes();
    if offset == 0 {
        // A file that has lost its end has only holes there, which the extended test would pass over.
        read(ns, size.saturating_sub(SHORT), SHORT, buffer)?;
    }
    let (start, most) = match kind {
        Kind::Short => (0, SHORT),
        Kind::Extended => match extents::next(ns, offset) {
            Some((start, _)) => (start, STEP),
            None => return Ok(None),
        },
    };
    let next = read(ns, start, most, buffer)?;
    Ok((kind == Kind::Extended && next < size).then_some(next))
}

/// Reads at most `most` bytes from `start`: where they end.
fn read(ns: &Namespace, start: u64, most: u64, buffer: &mut [u8]) -> Result<u64, Failure> {
    let failure = Failure {
        nsid: ns.nsid,
        lba: start >> ns.block_shift,
    };
    let length = ns.bytes().saturating_sub(start).min(most);
    let Some(buffer) = buffer.get_mut(..length as usize) else {
        return Err(failure);
    };
    match ns.file.read_exact_at(buffer, start) {
        Ok(()) => Ok(start + length),
        Err(error) => {
            tracing::warn!(%error, nsid = ns.nsid, offset = start, "self-test");
            Err(failure)
        }
    }
}
