//! Placeholder.
pub mod shape;
pub mod topology;
