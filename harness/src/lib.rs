//! Placeholder.
pub mod agent;
pub mod shape;
pub mod topology;
pub mod qemu;
pub mod run_directory;
pub mod wait;
