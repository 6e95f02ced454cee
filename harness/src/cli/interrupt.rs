//! Ctrl-C and SIGTERM, noticed by waiting for them rather than by dying of them.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::CliError;

/// The signals that ask us to end.
pub(crate) struct Interrupt {
    pipe: UnixStream,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP over; from here on they end nothing by themselves.
    pub(crate) fn new() -> Result<Self, CliError> {
        let failed = |error: std::io::Error| CliError::Failed(format!("signals: {error}"));
        let (pipe, writer) = UnixStream::pair().map_err(failed)?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let writer = writer.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, OwnedFd::from(writer))
                .map_err(failed)?;
        }
        Ok(Self { pipe })
    }

    /// Waits for one of them.
    pub(crate) fn wait(&mut self) {
        let mut byte = [0];
        // An error or an end of file cannot come while the writers are registered; both mean: stop.
        let _ = self.pipe.read(&mut byte);
    }
}
