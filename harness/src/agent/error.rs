//! What can go wrong between the harness and the agent.

use std::time::Duration;

use p2plab_guest::protocol::{ErrorKind, Exit};

/// Why a request to the guest agent failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// No answer in time.
    #[error("the guest agent did not answer within {} ms: {what}", .after.as_millis())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// The agent is out of reach, and why.
    #[error("the guest agent is lost: {why}")]
    Lost {
        /// What was seen.
        why: String,
    },
    /// The agent refused, or the guest's system did.
    #[error("in the guest: {message}")]
    Guest {
        /// What kind of failure.
        kind: ErrorKind,
        /// The agent's sentence.
        message: String,
    },
    /// A command did not exit with status 0 where that was asked for.
    #[error("in the guest: `{command}`: {exit}{}", tail(.stderr))]
    Failed {
        /// The command.
        command: String,
        /// How it ended.
        exit: Exit,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A command wrote more than its limit allows to keep.
    #[error("in the guest: `{command}` wrote more than {limit} bytes of output and was killed")]
    TooMuchOutput {
        /// The command.
        command: String,
        /// The limit in bytes, both streams together.
        limit: usize,
    },
    /// The agent said something that makes no sense.
    #[error("the guest agent broke its protocol: {what}")]
    Protocol {
        /// What it said.
        what: String,
    },
    /// A file of the host could not be used.
    #[error("{what}: {error}")]
    Host {
        /// Which file, for what.
        what: String,
        /// The system's reason.
        error: String,
    },
}

fn tail(stderr: &str) -> String {
    let stderr = stderr.trim();
    if stderr.is_empty() {
        String::new()
    } else {
        format!(": {stderr}")
    }
}
