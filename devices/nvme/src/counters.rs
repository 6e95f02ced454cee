//! What a controller has done since it was made.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

/// Counters that only grow.
#[derive(Debug)]
pub(crate) struct Counters {
    admin: [AtomicU64; 256],
    io: [AtomicU64; 256],
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) host_reads: AtomicU64,
    pub(crate) host_writes: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) media_errors: AtomicU64,
    pub(crate) interrupts: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Counters {
    pub(crate) fn new() -> Self {
        let zero = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            admin: zero(),
            io: zero(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            host_reads: AtomicU64::new(0),
            host_writes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            media_errors: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
        }
    }

    pub(crate) fn command(&self, admin: bool, opcode: u8) {
        let table = if admin { &self.admin } else { &self.io };
        if let Some(counter) = table.get(usize::from(opcode)) {
            add(counter, 1);
        }
    }

    /// I/O commands with this opcode.
    pub(crate) fn io_commands(&self, opcode: u8) -> u64 {
        self.io.get(usize::from(opcode)).map_or(0, get)
    }

    pub(crate) fn dump(&self) -> Value {
        let by_opcode = |table: &[AtomicU64; 256]| -> Map<String, Value> {
            let used = table
                .iter()
                .enumerate()
                .filter(|(_, counter)| get(counter) > 0);
            used.map(|(opcode, counter)| (format!("{opcode:#04x}"), get(counter).into()))
                .collect()
        };
        json!({
            "admin_commands": by_opcode(&self.admin),
            "io_commands": by_opcode(&self.io),
            "bytes_read": get(&self.bytes_read),
            "bytes_written": get(&self.bytes_written),
            "errors": get(&self.errors),
            "media_errors": get(&self.media_errors),
            "interrupts": get(&self.interrupts),
        })
    }
}
