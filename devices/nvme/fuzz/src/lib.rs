//! What the fuzz targets share: a machine with one controller in it, and what an input makes of it.
//!
//! - [`machine`]: switch, controller, host memory; what must hold whatever a guest does.
//! - [`input`]: from bytes to a configuration, addresses and commands, mostly valid ones.
//! - [`driver`]: a host that keeps queues, so that a completion that is due and does not come is found.
//! - [`commands`], [`registers`]: the two targets.
//!
//! Every input gets a controller of its own, so that it fails alone as it failed among others. The controller has its
//! threads, as ever: what depends on their turns may need a repetition to show.

pub mod commands;
pub mod driver;
pub mod input;
pub mod machine;
pub mod registers;
