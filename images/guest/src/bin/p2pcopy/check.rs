//! Writing the pattern before and comparing it after, through ordinary memory.

use std::os::unix::fs::FileExt as _;

use p2plab_guest::{Mapping, pattern};

use crate::Failure;
use crate::copy::Plan;

/// Bytes handled at once by each thread; a multiple of every logical block size.
const STEP: u64 = 1 << 20;

/// Writes the pattern to the source. A byte's pattern depends on its position in the source.
pub fn seed(plan: &Plan) -> Result<(), Failure> {
    each_step(plan, |at, bytes| {
        let offset = plan.source_offset.saturating_add(at);
        pattern::fill(plan.seed, offset, bytes);
        plan.source
            .file
            .write_all_at(bytes, offset)
            .map_err(|error| {
                Failure::Io(format!(
                    "seeding {} at byte {offset} failed: {error}",
                    plan.source.name
                ))
            })?;
        Ok(None)
    })?;
    plan.source
        .file
        .sync_data()
        .map_err(|error| Failure::Io(format!("cannot flush {}: {error}", plan.source.name)))
}

/// Compares the destination; the position in it of the first byte that differs.
pub fn compare(plan: &Plan) -> Result<Option<u64>, Failure> {
    each_step(plan, |at, bytes| {
        let offset = plan.destination_offset.saturating_add(at);
        plan.destination
            .file
            .read_exact_at(bytes, offset)
            .map_err(|error| {
                let name = &plan.destination.name;
                Failure::Io(format!(
                    "reading back {name} at byte {offset} failed: {error}"
                ))
            })?;
        let first = plan.source_offset.saturating_add(at);
        let differs = pattern::verify(plan.seed, first, bytes);
        Ok(differs.map(|found| found.wrapping_sub(first).saturating_add(offset)))
    })
}

/// Calls `work` for every step of the copy on as many threads as the copy has; the least result.
fn each_step(
    plan: &Plan,
    work: impl Fn(u64, &mut [u8]) -> Result<Option<u64>, Failure> + Sync,
) -> Result<Option<u64>, Failure> {
    let threads = plan.threads.min(8) as u64;
    let work = &work;
    std::thread::scope(|scope| {
        let part = move |index: u64| -> Result<Option<u64>, Failure> {
            let mut memory = Mapping::anonymous(STEP as usize)
                .map_err(|error| Failure::Io(format!("no memory to check with: {error}")))?;
            let mut at = index * STEP;
            while at < plan.bytes {
                let length = (plan.bytes - at).min(STEP) as usize;
                let bytes = memory.slice_mut().get_mut(..length).unwrap_or_default();
                let found = work(at, bytes)?;
                if found.is_some() {
                    return Ok(found);
                }
                at += threads * STEP;
            }
            Ok(None)
        };
        let workers: Vec<_> = (0..threads)
            .map(|index| scope.spawn(move || part(index)))
            .collect();
        let mut least = None;
        for worker in workers {
            let found = worker
                .join()
                .map_err(|_| Failure::Io("a thread panicked".into()))??;
            least = match (least, found) {
                (Some(a), Some(b)) => Some(std::cmp::min::<u64>(a, b)),
                (a, b) => a.or(b),
            };
        }
        Ok(least)
    })
}
