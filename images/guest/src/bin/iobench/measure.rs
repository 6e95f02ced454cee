//! The measurement: keeps `depth` transfers in flight until the time is over.

use std::fs::OpenOptions;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Instant;

use p2plab_guest::Mapping;
use p2plab_guest::aio::{Queue, Way};

use crate::arguments::Arguments;

/// What was measured.
#[derive(Debug)]
pub struct Measured {
    operations: u64,
    bytes: u64,
    seconds: f64,
    /// Latencies in nanoseconds, sorted.
    latencies: Vec<u64>,
}

/// Latencies kept for the percentiles; later ones do not change them any more.
const LATENCIES: usize = 1 << 20;

impl Measured {
    fn percentile(&self, percent: usize) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let at = self.latencies.get(last * percent / 100);
        at.copied().unwrap_or_default() as f64 / 1e3
    }

    /// One line, or one JSON object.
    pub fn text(&self, json: bool) -> String {
        let rate = self.operations as f64 / self.seconds;
        let bytes_rate = self.bytes as f64 / self.seconds;
        let (median, tail) = (self.percentile(50), self.percentile(99));
        if json {
            return serde_json::json!({
                "operations": self.operations, "bytes": self.bytes, "seconds": self.seconds,
                "operations_per_second": rate, "bytes_per_second": bytes_rate,
                "latency_microseconds": { "p50": median, "p99": tail, "max": self.percentile(100) },
            })
            .to_string();
        }
        format!(
            "{} operations in {:.3} s: {rate:.0}/s, {:.1} MB/s; latency {median:.0} us (median), {tail:.0} us (99%)",
            self.operations,
            self.seconds,
            bytes_rate / 1e6
        )
    }
}

/// Measures; the error is a sentence.
pub fn measure(arguments: &Arguments) -> Result<Measured, String> {
    let name = &arguments.device;
    let file = OpenOptions::new()
        .read(true)
        .write(arguments.write)
        .custom_flags(libc::O_DIRECT)
        .open(name)
        .map_err(|error| format!("cannot open {name} with O_DIRECT: {error}"))?;
    let length = (&file)
        .seek(SeekFrom::End(0))
        .map_err(|error| format!("cannot tell the size of {name}: {error}"))?;
    let block = arguments.block;
    let places = length / block as u64;
    if places == 0 {
        return Err(format!(
            "{name} has {length} bytes, less than one block of {block}"
        ));
    }
    let bytes = block.checked_mul(arguments.depth);
    let bytes = bytes.ok_or("--block times --depth is too large")?;
    let mut buffer =
        Mapping::anonymous(bytes).map_err(|error| format!("{bytes} bytes of memory: {error}"))?;
    // Touched before the clock runs: the first transfer must not pay for the kernel's zeroing.
    buffer.slice_mut().fill(0x5a);
    let mut queue = Queue::new(&buffer, arguments.depth)
        .map_err(|error| format!("io_setup for {} transfers: {error}", arguments.depth))?;
    let way = if arguments.write {
        Way::Write
    } else {
        Way::Read
    };
    let mut random = arguments.seed.max(1);
    let mut next = 0;
    let mut place = || {
        if arguments.sequential {
            next = (next + 1) % places;
            return next * block as u64;
        }
        // Xorshift (Marsaglia 2003): a few instructions, so that the generator is not measured.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % places * block as u64
    };
    let mut started = vec![Instant::now(); arguments.depth];
    let mut latencies = Vec::with_capacity(LATENCIES);
    let begin = Instant::now();
    let mut free: Vec<usize> = (0..arguments.depth).collect();
    let (mut operations, mut in_flight, mut failure) = (0u64, 0usize, None);
    loop {
        let over = begin.elapsed() >= arguments.duration || failure.is_some();
        while !over && let Some(slot) = free.pop() {
            if let Some(since) = started.get_mut(slot) {
                *since = Instant::now();
            }
            queue
                .submit(way, &file, place(), slot * block, block, slot as u64)
                .map_err(|error| format!("io_submit to {name}: {error}"))?;
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        queue
            .wait(|slot, result| {
                let slot = slot as usize;
                in_flight -= 1;
                free.push(slot);
                match result {
                    Ok(moved) if moved == block => operations += 1,
                    Ok(moved) => failure = Some(format!("{name} moved {moved} of {block} bytes")),
                    Err(error) => failure = Some(format!("I/O to {name}: {error}")),
                }
                if latencies.len() < LATENCIES
                    && let Some(since) = started.get(slot)
                {
                    let nanoseconds = since.elapsed().as_nanos();
                    latencies.push(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
                }
            })
            .map_err(|error| format!("io_getevents: {error}"))?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    if let Some(why) = failure {
        return Err(why);
    }
    latencies.sort_unstable();
    Ok(Measured {
        operations,
        bytes: operations * block as u64,
        seconds,
        latencies,
    })
}
