//! The host's client of the guest agent.
//!
//! [`AgentClient`] speaks [`p2plab_guest::protocol`] over the socket of a virtio-serial port. Any thread
//! may use it through `&self`; requests overlap. Every wait has a deadline, and [`AgentClient::fail`] ends
//! all waits at once when the lab learns that no answer will come (a kernel panic on the console, QEMU
//! gone).

mod client;
mod error;
mod files;
mod log;
mod run;

pub use client::{AgentClient, Hello};
pub use error::AgentError;
pub use p2plab_guest::protocol::{Entry, EntryKind, Exit, ModuleFailure, Power, Status};
pub use run::{Command, Output, RunningCommand, Stream};

#[cfg(test)]
mod tests;
