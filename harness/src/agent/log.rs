//! The record of all traffic with the agent: `agent.jsonl` in the run directory.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A file of lines `{"t":SECONDS,"to":MESSAGE}` and `{"t":SECONDS,"from":MESSAGE}`.
pub(super) struct Log {
    begun: Instant,
    file: Mutex<BufWriter<File>>,
}

impl Log {
    /// Creates the file, or appends to it: a lab's second QEMU has an agent too.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = Mutex::new(BufWriter::new(
            File::options().create(true).append(true).open(path)?,
        ));
        Ok(Self {
            begun: Instant::now(),
            file,
        })
    }

    /// Adds a line. What is no JSON is written as a string. A full disk must not fail the lab.
    pub fn add(&self, direction: &str, line: &[u8]) {
        let line = line.trim_ascii();
        if line.is_empty() {
            return;
        }
        let text = String::from_utf8_lossy(line);
        let message = if serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok() {
            text.into_owned()
        } else {
            serde_json::Value::String(text.into_owned()).to_string()
        };
        let seconds = self.begun.elapsed().as_secs_f64();
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(file, "{{\"t\":{seconds:.6},\"{direction}\":{message}}}");
        // A killed run must explain itself.
        let _ = file.flush();
    }
}
