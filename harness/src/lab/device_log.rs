//! `device.log` in the run directory: what the device models say, and what the lab does with them.
//!
//! Device models speak through `tracing`, which has one subscriber for a whole process. [`install`] makes it
//! one that also writes into the `device.log` of every lab that is running. An event that names its endpoint
//! (field `function`) goes to the labs that have an endpoint of that name, one without a name to all: where
//! labs of the same names share a process, as tests in parallel do, their logs contain each other's lines.
//! A program that has a subscriber of its own keeps it, and its logs hold only what the lab itself notes.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::wait::lock;

/// Environment variable that says what goes to standard error, as a filter of `tracing_subscriber`.
pub const FILTER_VARIABLE: &str = "P2PLAB_LOG";
/// Bytes after which a log takes no more lines: a guest that provokes warnings in a loop fills no disk.
const LONGEST: u64 = 16 << 20;
/// Crates whose events belong into a device log.
const DEVICE_CRATES: [&str; 4] = [
    "p2plab_pcie",
    "p2plab_nvme",
    "p2plab_nvram",
    "p2plab_vfio_user",
];

/// The logs of all labs that run in this process.
static RUNNING: Mutex<Vec<Weak<DeviceLog>>> = Mutex::new(Vec::new());

/// Subscribes this process to `tracing`: standard error by `P2PLAB_LOG` (by `otherwise` where that is not
/// set), device logs always. Returns whether it did; it does not where there is a subscriber already.
pub fn install(otherwise: &str) -> bool {
    let filter =
        EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(otherwise));
    let terminal = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    tracing_subscriber::registry()
        .with(terminal.with_filter(filter))
        .with(layer())
        .try_init()
        .is_ok()
}

/// The part of [`install`] that fills device logs, for a subscriber of one's own. It takes events down to
/// level `DEBUG`: register and state changes, but not every command.
pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    let filter = FilterFn::new(is_device_event).with_max_level_hint(Level::DEBUG);
    DeviceLayer.with_filter(filter)
}

fn is_device_event(metadata: &Metadata<'_>) -> bool {
    let part = metadata.target().split("::").next().unwrap_or_default();
    *metadata.level() <= Level::DEBUG && DEVICE_CRATES.contains(&part)
}

struct DeviceLayer;

impl<S: Subscriber> Layer<S> for DeviceLayer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let running: Vec<_> = lock(&RUNNING).iter().filter_map(Weak::upgrade).collect();
        if running.is_empty() {
            return;
        }
        let mut words = Words::default();
        event.record(&mut words);
        let metadata = event.metadata();
        let thread = std::thread::current();
        let line = format!(
            "{:5} {} [{}]{}{}",
            metadata.level(),
            metadata.target(),
            thread.name().unwrap_or_default(),
            words.message,
            words.fields
        );
        for log in running {
            if words
                .function
                .as_ref()
                .is_none_or(|name| log.endpoints.contains(name))
            {
                log.add(&line);
            }
        }
    }
}

/// An event's fields as text.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
    function: Option<String>,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, " {value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "function" {
            self.function = Some(value.to_owned());
        }
        self.record_debug(field, &value);
    }
}

/// The device log of one lab.
pub(super) struct DeviceLog {
    began: Instant,
    endpoints: Vec<String>,
    state: Mutex<Sink>,
}

struct Sink {
    file: File,
    written: u64,
}

impl DeviceLog {
    /// Creates the log of a lab with these endpoints; it takes events until it is dropped.
    pub(super) fn create(path: &Path, endpoints: Vec<String>) -> io::Result<Arc<Self>> {
        let log = Arc::new(Self {
            began: Instant::now(),
            endpoints,
            state: Mutex::new(Sink {
                file: File::create(path)?,
                written: 0,
            }),
        });
        let mut running = lock(&RUNNING);
        running.retain(|other| other.strong_count() > 0);
        running.push(Arc::downgrade(&log));
        Ok(log)
    }

    /// Adds what the lab does or sees itself.
    pub(super) fn note(&self, text: &str) {
        self.add(&format!("LAB   {text}"));
    }

    /// Adds a line. A full disk must not fail the lab.
    fn add(&self, line: &str) {
        let line = format!("{:12.6} {line}\n", self.began.elapsed().as_secs_f64());
        let mut sink = lock(&self.state);
        if sink.written > LONGEST {
            return;
        }
        sink.written = sink.written.saturating_add(line.len() as u64);
        let _ = sink.file.write_all(line.as_bytes());
        if sink.written > LONGEST {
            let _ = sink
                .file
                .write_all(b"(this log is full; what follows is not recorded)\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_go_to_the_labs_that_have_the_endpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let ours = DeviceLog::create(&path("ours"), vec!["ssd-ours".into()]).unwrap();
        let other = DeviceLog::create(&path("other"), vec!["ssd-other".into()]).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer());
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!(target: "p2plab_nvme::controller", function = "ssd-ours", x = 1, "one");
            tracing::warn!(target: "p2plab_pcie", "for all");
            tracing::debug!(target: "p2plab::lab", "not a device");
            tracing::trace!(target: "p2plab_nvme", "too fine");
        });
        ours.note("two");
        drop((ours, other));
        let read = |name| std::fs::read_to_string(path(name)).unwrap();
        let lines: Vec<String> = read("ours").lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(
            lines[0].contains(" DEBUG p2plab_nvme::controller ["),
            "{lines:?}"
        );
        assert!(
            lines[0].ends_with("] one function=\"ssd-ours\" x=1"),
            "{lines:?}"
        );
        assert!(lines[1].ends_with(" for all") && lines[2].ends_with(" LAB   two"));
        assert_eq!(read("other").lines().count(), 1);
    }

    #[test]
    fn a_log_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let log = DeviceLog::create(&path, Vec::new()).unwrap();
        let line = "x".repeat(1 << 20);
        (0..40).for_each(|_| log.note(&line));
        let size = std::fs::metadata(path).unwrap().len();
        assert!((LONGEST..LONGEST + (2 << 20)).contains(&size), "{size}");
    }
}
