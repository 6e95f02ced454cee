//! Sanitize operations (Base 8.21): all that the namespaces and the PMR hold is erased, in the background.
//!
//! Meanwhile, and after a failure, the host may do little else: the `gate` keeps I/O commands out, and
//! [`Sanitize::admit_admin`] the rest. An operation goes on over resets; a loss of power makes it begin again.
//! Blocks are deallocated in the end (SANICAP.NDI) and read as zeros. The CMB is not touched: queues live there.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use crate::background::{Background, Signal};
use crate::controller::Shared;
use crate::events::Event;
use crate::extents;
use crate::locks::lock;
use crate::logs;
use crate::namespace::Namespace;
use crate::spec::command::{Command, GetLogPageCdw10, SanitizeCdw10, admin};
use crate::spec::log::{SanitizeStatus, lid, self_test_result};
use crate::spec::status::Status;

/// Sanitize Capabilities (SANICAP): Block Erase, Overwrite, No-Deallocate Inhibited, and media that are not
/// modified once an operation is over (NODMMAS 01b).
pub(crate) const SANICAP: u32 = 1 << 1 | 1 << 2 | 1 << 29 | 1 << 30;

/// Bytes that are overwritten in a step.
const WRITE_STEP: u64 = 1 << 20;
/// Bytes that are deallocated in a step.
const ERASE_STEP: u64 = 256 << 20;

/// Status of the most recent operation, as in SSTAT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u16)]
enum Outcome {
    #[default]
    Never = 0,
    Completed = 1,
    InProgress = 2,
    Failed = 3,
    /// Blocks were deallocated though the host had asked for the contrary.
    Deallocated = 4,
}

/// What an operation does before blocks are deallocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Overwrite {
    /// 0 for Block Erase.
    passes: u16,
    pattern: u32,
    /// Invert the pattern between passes.
    invert: bool,
}

impl Overwrite {
    /// The pattern of `pass`, counted from 1: the last one writes what the host gave.
    fn pattern(self, pass: u16) -> u32 {
        let inverted = self.invert && self.passes.saturating_sub(pass) % 2 == 1;
        if inverted {
            !self.pattern
        } else {
            self.pattern
        }
    }
}

#[derive(Debug, Default)]
struct State {
    outcome: Outcome,
    /// Dword 10 of the command that began the operation.
    cdw10: SanitizeCdw10,
    overwrite: Overwrite,
    passes_done: u16,
    /// In 65536ths.
    progress: u16,
    /// Commands that change blocks, as counted when the last operation completed.
    writes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Sanitize {
    state: Mutex<State>,
    pub(crate) background: Background,
}

impl Sanitize {
    /// Lets an admin command through (Base 8.21.3), unless an operation is in progress, or has failed and nobody
    /// has dealt with it.
    pub(crate) fn admit_admin(&self, shared: &Shared, command: &Command) -> Result<(), Status> {
        let Some(refusal) = shared.gate.refusal() else {
            return Ok(());
        };
        let page = GetLogPageCdw10::from_bits(command.cdw10.get()).lid();
        let allowed = match command.opcode {
            admin::DELETE_IO_SQ
            | admin::CREATE_IO_SQ
            | admin::DELETE_IO_CQ
            | admin::CREATE_IO_CQ
            | admin::IDENTIFY
            | admin::ABORT
            | admin::SET_FEATURES
            | admin::GET_FEATURES
            | admin::ASYNC_EVENT_REQUEST => true,
            admin::GET_LOG_PAGE => matches!(
                page,
                lid::ERROR_INFORMATION
                    | lid::SMART
                    | lid::CHANGED_NAMESPACES
                    | lid::RESERVATION_NOTIFICATION
                    | lid::SANITIZE_STATUS
            ),
            // The way out of a failure.
            admin::SANITIZE => refusal == Status::SANITIZE_FAILED,
            _ => false,
        };
        if allowed { Ok(()) } else { Err(refusal) }
    }

    /// Exit Failure Mode: only after an operation in unrestricted completion mode.
    pub(crate) fn exit_failure_mode(&self, shared: &Shared) -> Result<(), Status> {
        let state = lock(&self.state);
        if state.outcome == Outcome::Failed {
            if !state.cdw10.ause() {
                return Err(Status::SANITIZE_FAILED);
            }
            shared.gate.open();
        }
        Ok(())
    }

    /// Begins an operation. The caller has checked the command.
    pub(crate) fn start(
        &self,
        shared: &Arc<Shared>,
        cdw10: SanitizeCdw10,
        pattern: Option<u32>,
    ) -> Result<(), Status> {
        {
            let mut state = lock(&self.state);
            // What failed in restricted completion mode is not to be reached around it.
            let restricted = state.outcome == Outcome::Failed && !state.cdw10.ause();
            if restricted && cdw10.ause() {
                return Err(Status::SANITIZE_FAILED);
            }
            // 0 stands for 16.
            let passes = match u16::from(cdw10.owpass()) {
                0 => 16,
                passes => passes,
            };
            *state = State {
                outcome: Outcome::InProgress,
                cdw10,
                overwrite: Overwrite {
                    passes: pattern.map_or(0, |_| passes),
                    pattern: pattern.unwrap_or(0),
                    invert: cdw10.oipbp(),
                },
                ..State::default()
            };
            shared.gate.close(Status::SANITIZE_IN_PROGRESS);
        }
        let why = self_test_result::ABORTED_BY_SANITIZE;
        shared.self_test.abort(shared, why);
        self.spawn(shared)
    }

    fn spawn(&self, shared: &Arc<Shared>) -> Result<(), Status> {
        let thread = self.background.start("nvme-sanitize", {
            let shared = Arc::clone(shared);
            move |signal| run(&shared, signal)
        });
        thread.map_err(|error| {
            tracing::error!(%error, "no thread for a sanitize operation");
            lock(&self.state).outcome = Outcome::Failed;
            shared.gate.close(Status::SANITIZE_FAILED);
            Status::INTERNAL_ERROR
        })
    }

    /// Power is back: what it interrupted begins again.
    pub(crate) fn resume(&self, shared: &Arc<Shared>) {
        let interrupted = {
            let mut state = lock(&self.state);
            let interrupted = state.outcome == Outcome::InProgress;
            if interrupted {
                (state.passes_done, state.progress) = (0, 0);
            }
            interrupted
        };
        if interrupted {
            // Without a thread it has failed, which the log tells.
            let _ = self.spawn(shared);
        }
    }

    /// Sanitize Status (Base 5.16.1.25).
    pub(crate) fn page(&self, shared: &Shared) -> Vec<u8> {
        let state = lock(&self.state);
        let mut page = SanitizeStatus::new_zeroed();
        let in_progress = state.outcome == Outcome::InProgress;
        page.sprog = U16::new(if in_progress { state.progress } else { 0xffff });
        let completed = matches!(state.outcome, Outcome::Completed | Outcome::Deallocated);
        let erased = completed && state.writes == logs::writes(shared);
        page.sstat = U16::new(
            state.outcome as u16 | (state.passes_done & 0x1f) << 3 | u16::from(erased) << 8,
        );
        page.scdw10 = U32::new(state.cdw10.into_bits());
        // No time is estimated.
        page.estimates = [U32::new(u32::MAX); 6];
        page.as_bytes().to_vec()
    }

    pub(crate) fn dump(&self) -> Value {
        let state = lock(&self.state);
        json!({
            "outcome": format!("{:?}", state.outcome),
            "passes_done": state.passes_done,
            "progress": state.progress,
        })
    }
}

/// Why an operation stops before its end.
enum Stop {
    /// Its thread is to end.
    Told,
    Failed(std::io::Error),
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error)
    }
}

fn run(shared: &Shared, signal: &Signal) {
    let overwrite = lock(&shared.sanitize.state).overwrite;
    let result = perform(shared, overwrite, signal);
    if matches!(result, Err(Stop::Told)) {
        return;
    }
    let sanitize = &shared.sanitize;
    let mut event = Event::SANITIZE_COMPLETED;
    {
        let mut state = lock(&sanitize.state);
        state.writes = logs::writes(shared);
        if result.is_ok() {
            state.outcome = Outcome::Completed;
            if state.cdw10.ndas() {
                state.outcome = Outcome::Deallocated;
                event = Event::SANITIZE_DEALLOCATED;
            }
            shared.gate.open();
        } else {
            state.outcome = Outcome::Failed;
            shared.gate.close(Status::SANITIZE_FAILED);
        }
    }
    if let Err(Stop::Failed(error)) = result {
        tracing::warn!(%error, "a sanitize operation failed");
        shared.keep_telemetry("a sanitize operation failed");
    }
    shared.event(event);
}

fn perform(shared: &Shared, overwrite: Overwrite, signal: &Signal) -> Result<(), Stop> {
    let sanitize = &shared.sanitize;
    while !shared.gate.is_empty() {
        go_on(signal)?;
    }
    if let Some(pmr) = &shared.pmr {
        pmr.erase()?;
    }
    let namespaces = shared.namespaces.all_allocated();
    // What blocks held before is not to come back.
    namespaces.iter().for_each(|ns| ns.forget_cached());
    let size: u128 = namespaces.iter().map(|ns| u128::from(ns.bytes())).sum();
    // Erasing is the last pass.
    let all = size * (u128::from(overwrite.passes) + 1);
    let mut before: u128 = 0;
    for pass in 1..=overwrite.passes + 1 {
        let pattern = (pass <= overwrite.passes).then(|| overwrite.pattern(pass));
        for ns in &namespaces {
            let mut offset = 0;
            while let Some(next) = step(ns, offset, pattern)? {
                offset = next;
                let done = (before + u128::from(offset)) << 16;
                let progress = done.checked_div(all).unwrap_or(0);
                lock(&sanitize.state).progress = u16::try_from(progress).unwrap_or(u16::MAX);
                go_on(signal)?;
            }
            if pattern.is_none() {
                ns.erase_rest()?;
            }
            ns.flush()?;
            before += u128::from(ns.bytes());
        }
        if pattern.is_some() {
            lock(&sanitize.state).passes_done = pass;
        }
    }
    Ok(())
}

fn go_on(signal: &Signal) -> Result<(), Stop> {
    if signal.go_on() {
        Ok(())
    } else {
        Err(Stop::Told)
    }
}

/// Overwrites with `pattern`, or else erases, at `offset` or behind it: where to go on, if anywhere.
///
/// Holes hold nothing, so there is nothing to overwrite: a namespace that is larger than the memory stays so.
fn step(ns: &Namespace, offset: u64, pattern: Option<u32>) -> std::io::Result<Option<u64>> {
    let (start, end, most) = match pattern {
        Some(_) => match extents::next(ns, offset) {
            Some((start, end)) => (start, end, WRITE_STEP),
            None => return Ok(None),
        },
        None if offset < ns.bytes() => (offset, ns.bytes(), ERASE_STEP),
        None => return Ok(None),
    };
    let length = end.saturating_sub(start).min(most);
    match pattern {
        Some(pattern) => {
            let words = usize::try_from(length.div_ceil(4)).unwrap_or(0);
            let data = pattern.to_le_bytes().repeat(words);
            let data = data.get(..length as usize).unwrap_or(&data);
            ns.file.write_all_at(data, start)?;
        }
        None => {
            let extent = ns.extent(start >> ns.block_shift, length >> ns.block_shift);
            ns.erase(&extent.ok_or(std::io::ErrorKind::InvalidInput)?)?;
        }
    }
    // A range of nothing was punched meanwhile.
    Ok(Some(start + length.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pass_writes_the_pattern() {
        let overwrite = |passes, invert| Overwrite {
            passes,
            pattern: 0x0f0f_0f0f,
            invert,
        };
        let patterns = |o: Overwrite| (1..=o.passes).map(|p| o.pattern(p)).collect::<Vec<_>>();
        assert_eq!(patterns(overwrite(2, false)), [0x0f0f_0f0f; 2]);
        assert_eq!(patterns(overwrite(2, true)), [0xf0f0_f0f0, 0x0f0f_0f0f]);
        assert_eq!(
            patterns(overwrite(3, true)),
            [0x0f0f_0f0f, 0xf0f0_f0f0, 0x0f0f_0f0f]
        );
    }
}
