//! The copy: every thread keeps `depth` chunks in flight, each read and then written.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use p2plab_guest::Mapping;
use p2plab_guest::aio::{Queue, Way};

use crate::Failure;
use crate::arguments::Arguments;
use crate::open::{Place, explain, place};

/// A copy that makes sense.
#[derive(Debug)]
pub struct Plan {
    pub source: Place,
    pub destination: Place,
    pub source_offset: u64,
    pub destination_offset: u64,
    pub bytes: u64,
    pub chunk: usize,
    pub threads: usize,
    pub depth: usize,
    pub buffer_offset: usize,
    pub buffer_bytes: usize,
    pub seed: u64,
    pub p2p: bool,
    pub read: bool,
    pub write: bool,
}

/// Opens both sides and checks that they suit the arguments.
pub fn plan(arguments: &Arguments) -> Result<Plan, Failure> {
    let seeding = arguments.check && !arguments.seeded;
    let source = place(&arguments.source, true, seeding, false)?;
    let writing = !arguments.skip_write;
    let destination = place(&arguments.destination, true, writing, writing)?;
    let left = |place: &Place, offset: u64| {
        place
            .length
            .checked_sub(offset)
            .filter(|left| *left > 0)
            .ok_or_else(|| {
                let (name, length) = (&place.name, place.length);
                Failure::Usage(format!(
                    "{name} has {length} bytes, none at offset {offset}"
                ))
            })
    };
    let mut room = u64::MAX;
    if !arguments.skip_read {
        room = left(&source, arguments.source_offset)?;
    }
    if writing && (destination.device || arguments.skip_read && arguments.size.is_none()) {
        room = room.min(left(&destination, arguments.destination_offset)?);
    }
    let bytes = arguments.size.unwrap_or(room);
    if bytes > room {
        return Err(Failure::Usage(format!(
            "{bytes} bytes are to be copied, but only {room} are there between the offsets and the ends \
             of {} and {}",
            source.name, destination.name
        )));
    }
    let block = source.block.max(destination.block);
    for (what, value) in [
        ("--chunk", arguments.chunk),
        ("the size", bytes),
        ("--source-offset", arguments.source_offset),
        ("--destination-offset", arguments.destination_offset),
    ] {
        if value % block != 0 && (source.direct || destination.direct) {
            return Err(Failure::Usage(format!(
                "{what} ({value}) is not a multiple of the logical block size of {block} bytes"
            )));
        }
    }
    let too_large = || Failure::Usage("threads x depth x chunk is too large".into());
    let chunk = usize::try_from(arguments.chunk).map_err(|_| too_large())?;
    let buffer_offset = usize::try_from(arguments.buffer_offset).map_err(|_| too_large())?;
    let buffer_bytes = chunk
        .checked_mul(arguments.threads)
        .and_then(|bytes| bytes.checked_mul(arguments.depth))
        .and_then(|bytes| bytes.checked_add(buffer_offset))
        .ok_or_else(too_large)?;
    Ok(Plan {
        source,
        destination,
        source_offset: arguments.source_offset,
        destination_offset: arguments.destination_offset,
        bytes,
        chunk,
        threads: arguments.threads,
        depth: arguments.depth,
        buffer_offset,
        buffer_bytes,
        seed: arguments.seed.unwrap_or_else(fresh_seed),
        p2p: arguments.buffer.is_some(),
        read: !arguments.skip_read,
        write: writing,
    })
}

fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_nanos() as u64 ^ u64::from(std::process::id()).rotate_left(48)
}

/// Copies; returns the seconds from the first to the last transfer.
pub fn copy(plan: &Plan, buffer: &Mapping) -> Result<f64, Failure> {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let mut queues = Vec::new();
    for _ in 0..plan.threads {
        let queue = Queue::new(buffer, plan.depth).map_err(|error| {
            Failure::Io(format!(
                "io_setup for {} transfers (see fs.aio-max-nr): {error}",
                plan.depth
            ))
        })?;
        queues.push(queue);
    }
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            let base = plan.buffer_offset + index * plan.depth * plan.chunk;
            let (next, stop) = (&next, &stop);
            workers.push(scope.spawn(move || {
                let mut worker = Worker {
                    plan,
                    queue,
                    base,
                    next,
                };
                worker
                    .run(stop)
                    .inspect_err(|_| stop.store(true, Ordering::Relaxed))
            }));
        }
        for worker in workers {
            worker
                .join()
                .map_err(|_| Failure::Io("a copying thread panicked".into()))??;
        }
        Ok(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    if plan.write {
        // Not timed: with direct I/O the bytes are where they belong, and only file metadata may not be.
        plan.destination.file.sync_data().map_err(|error| {
            Failure::Io(format!("cannot flush {}: {error}", plan.destination.name))
        })?;
    }
    Ok(seconds)
}

struct Worker<'a> {
    plan: &'a Plan,
    queue: Queue<'a>,
    /// Where this thread's part of the buffer begins.
    base: usize,
    next: &'a AtomicU64,
}

impl Worker<'_> {
    fn run(&mut self, stop: &AtomicBool) -> Result<(), Failure> {
        // For each slot of the buffer: the chunk in it and which way it is going.
        let mut slots: Vec<Option<(u64, Way)>> = vec![None; self.plan.depth];
        for (slot, state) in slots.iter_mut().enumerate() {
            *state = self.begin(slot)?;
        }
        while slots.iter().any(Option::is_some) {
            let mut ended = Vec::with_capacity(self.plan.depth);
            self.queue
                .wait(|tag, result| ended.push((tag as usize, result)))
                .map_err(|error| Failure::Io(format!("io_getevents: {error}")))?;
            for (slot, result) in ended {
                let Some((at, way)) = slots.get(slot).copied().flatten() else {
                    continue;
                };
                self.finished(at, way, result)?;
                let next = if way == Way::Read && self.plan.write {
                    self.submit(slot, at, Way::Write)?;
                    Some((at, Way::Write))
                } else if stop.load(Ordering::Relaxed) {
                    None
                } else {
                    self.begin(slot)?
                };
                if let Some(state) = slots.get_mut(slot) {
                    *state = next;
                }
            }
        }
        Ok(())
    }

    /// Starts the next chunk, if there is one.
    fn begin(&mut self, slot: usize) -> Result<Option<(u64, Way)>, Failure> {
        let at = self
            .next
            .fetch_add(self.plan.chunk as u64, Ordering::Relaxed);
        if at >= self.plan.bytes {
            return Ok(None);
        }
        let way = if self.plan.read {
            Way::Read
        } else {
            Way::Write
        };
        self.submit(slot, at, way)?;
        Ok(Some((at, way)))
    }

    /// Length of the chunk at `at`; the last one may be shorter.
    fn length(&self, at: u64) -> usize {
        let left = self.plan.bytes.saturating_sub(at);
        usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(self.plan.chunk)
    }

    fn side(&self, way: Way) -> (&Place, u64, &'static str) {
        match way {
            Way::Read => (&self.plan.source, self.plan.source_offset, "reading"),
            Way::Write => (
                &self.plan.destination,
                self.plan.destination_offset,
                "writing",
            ),
        }
    }

    fn submit(&mut self, slot: usize, at: u64, way: Way) -> Result<(), Failure> {
        let plan = self.plan;
        let length = self.length(at);
        let (place, base, verb) = match way {
            Way::Read => (&plan.source, plan.source_offset, "reading"),
            Way::Write => (&plan.destination, plan.destination_offset, "writing"),
        };
        let offset = base.saturating_add(at);
        let place_in_buffer = self.base + slot * plan.chunk;
        self.queue
            .submit(
                way,
                &place.file,
                offset,
                place_in_buffer,
                length,
                slot as u64,
            )
            .map_err(|error| failed(verb, offset, &error, place, plan.p2p))
    }

    fn finished(&self, at: u64, way: Way, result: std::io::Result<usize>) -> Result<(), Failure> {
        let (place, base, verb) = self.side(way);
        let offset = base.saturating_add(at);
        let length = self.length(at);
        match result {
            Ok(count) if count == length => Ok(()),
            Ok(count) => Err(Failure::Io(format!(
                "{verb} {length} bytes at {offset} of {} moved only {count}: the device is shorter than \
                 it said, or full",
                place.name
            ))),
            Err(error) => Err(failed(verb, offset, &error, place, self.plan.p2p)),
        }
    }
}

fn failed(verb: &str, offset: u64, error: &std::io::Error, place: &Place, p2p: bool) -> Failure {
    Failure::Io(format!(
        "{verb} at byte {offset} failed: {}",
        explain(error, place, p2p)
    ))
}
