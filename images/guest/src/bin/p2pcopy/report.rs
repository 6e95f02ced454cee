//! What is printed.

use crate::arguments::Arguments;
use crate::copy::Plan;

/// Prints the result. `mismatch` is `None` if nothing was checked.
pub fn print(arguments: &Arguments, plan: &Plan, seconds: f64, mismatch: Option<Option<u64>>) {
    let rate = if seconds > 0.0 {
        plan.bytes as f64 / seconds
    } else {
        0.0
    };
    let buffer = arguments.buffer.as_deref().unwrap_or("memory");
    let verified = mismatch.map(|found| found.is_none());
    let notes: Vec<String> = [&plan.source, &plan.destination]
        .iter()
        .filter(|place| !place.direct)
        .map(|place| format!("{} has no O_DIRECT: the page cache was used", place.name))
        .collect();
    if arguments.json {
        let object = serde_json::json!({
            "bytes": plan.bytes,
            "seconds": seconds,
            "bytes_per_second": rate,
            "chunk_bytes": plan.chunk,
            "threads": plan.threads,
            "depth": plan.depth,
            "buffer": buffer,
            "source": plan.source.name,
            "destination": plan.destination.name,
            "source_offset": plan.source_offset,
            "destination_offset": plan.destination_offset,
            "read": plan.read,
            "write": plan.write,
            "seed": arguments.check.then_some(plan.seed),
            "verified": verified,
            "mismatch": mismatch.flatten(),
            "notes": notes,
        });
        println!("{object}");
        return;
    }
    let check = match verified {
        Some(true) => ", verified",
        Some(false) => ", DIFFERS",
        None => "",
    };
    let verb = match (plan.read, plan.write) {
        (true, true) => "copied",
        (true, false) => "read",
        _ => "wrote",
    };
    println!(
        "{verb} {} bytes in {seconds:.3} s, {:.1} MB/s, chunk {}, {} thread(s) x depth {}, buffer \
         {buffer}{check}",
        plan.bytes,
        rate / 1e6,
        plan.chunk,
        plan.threads,
        plan.depth
    );
    for note in notes {
        eprintln!("p2pcopy: note: {note}");
    }
}
