//! What a person sees while artifacts are fetched.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Receives what a fetch is doing. All calls come from the thread that called
/// [`resolve`](crate::resolve()).
pub trait Progress {
    /// A new step begins; `total` is its size in bytes, if known.
    fn step(&mut self, what: &str, total: Option<u64>);
    /// `done` bytes of the step are done.
    fn at(&mut self, done: u64);
    /// Nothing more will follow.
    fn finish(&mut self);
}

/// Shows nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&mut self, _what: &str, _total: Option<u64>) {}
    fn at(&mut self, _done: u64) {}
    fn finish(&mut self) {}
}

/// A bar on standard error; plain lines, one a step, where that is no terminal.
#[derive(Debug)]
pub struct Terminal {
    bar: Option<ProgressBar>,
    interactive: bool,
}

impl Terminal {
    /// Looks once whether standard error is a terminal.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bar: None,
            interactive: std::io::stderr().is_terminal(),
        }
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Terminal {
    fn step(&mut self, what: &str, total: Option<u64>) {
        self.finish();
        if !self.interactive {
            // A closed standard error is no reason to give up a fetch.
            let _ = match total {
                Some(bytes) => {
                    writeln!(std::io::stderr(), "p2plab: {what} ({} MiB)", bytes >> 20)
                }
                None => writeln!(std::io::stderr(), "p2plab: {what}"),
            };
            return;
        }
        let (bar, template) = match total {
            Some(bytes) => (
                ProgressBar::new(bytes),
                "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
            ),
            None => (ProgressBar::new_spinner(), "{msg} {spinner} {elapsed}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bar = Some(bar);
    }

    fn at(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}
