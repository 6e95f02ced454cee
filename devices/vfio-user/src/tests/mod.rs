//! Protocol conformance over a socket pair, against a target that records what reaches it.

mod dma;
mod fake;
mod framing;
mod garbage;
mod info;
mod interrupts;
mod lifecycle;
mod neighbours;
mod raw;
mod regions;

use fake::Fake;
