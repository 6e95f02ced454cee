//! PCIe peer-to-peer labs in software.
//!
//! A lab is a guest in QEMU, endpoints (device models in this process) and the virtual PCIe switch between
//! them, which counts every transaction. Tests, the command line and other programs use it alike.
//!
//! # Parts, from what a user names to what the machine does
//!
//! - [`topology`]: what a lab is made of, from TOML or from Rust.
//! - [`scenarios`]: the examples of the talk, each one command; [`report`]: what they print and write.
//! - [`lab`]: a running lab. Start here: [`lab::Lab`].
//! - [`agent`]: commands in the guest.
//! - [`shape`]: the machine without its endpoints, and QEMU's arguments for it.
//! - [`qemu`]: one QEMU child and everything that watches it; saving and restoring base images.
//! - [`run_directory`]: what a run leaves for people to read.
//! - [`wait`]: deadlines. Every wait has one, and says what it waited for.

pub mod agent;
pub mod lab;
pub mod qemu;
pub mod report;
pub mod run_directory;
pub mod scenarios;
pub mod shape;
pub mod topology;
pub mod wait;
