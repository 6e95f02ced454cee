//! Shadow doorbells (Base 5.8, Doorbell Buffer Config, and 8.6): the host writes tails and heads into its own memory,
//! and into the doorbell register only where the controller has asked for it.
//!
//! The controller asks by an event index: the host writes the register when it moves a doorbell past that index. So a
//! queue's worker that has nothing to do asks, looks once more, and sleeps; one that works does not ask, and looks
//! into the host's memory when it runs out of commands. Completion queues' heads are looked at only when a queue
//! seems full. What is looked at is traffic of the controller's like any other, and is counted and traced.
//!
//! A write to the register itself then says only that there is something to see: its value may be older than the one
//! in memory, as it takes another way.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use p2plab_pcie::{DmaError, DmaRange};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::dma::Dma;
use crate::trace::Trace;

/// Bytes of the two pages that a doorbell has (CAP.DSTRD = 0).
const STRIDE: u64 = 4;

/// No address is this one: those of doorbells are multiples of four.
const NONE: u64 = u64::MAX;

/// The host's two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DoorbellBuffer {
    /// Shadow Doorbell buffer.
    pub(crate) doorbells: u64,
    /// EventIdx buffer.
    pub(crate) events: u64,
}

/// Which of a queue pair's doorbells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doorbell {
    /// Submission Queue `qid` Tail.
    Tail(u16),
    /// Completion Queue `qid` Head.
    Head(u16),
}

/// One doorbell's place in the host's memory, if it has one.
#[derive(Debug)]
pub(crate) struct Shadow {
    doorbell: AtomicU64,
    event: AtomicU64,
}

impl Default for Shadow {
    fn default() -> Self {
        let (doorbell, event) = (AtomicU64::new(NONE), AtomicU64::new(NONE));
        Self { doorbell, event }
    }
}

impl Shadow {
    /// Whether the host's memory, and not the register, has the value.
    pub(crate) fn is_used(&self) -> bool {
        self.doorbell.load(Ordering::Acquire) != NONE
    }

    /// Goes over to `buffer`, in which the doorbell and its event index begin as `index`.
    pub(crate) fn adopt(
        &self,
        dma: &Dma,
        trace: &Trace,
        buffer: DoorbellBuffer,
        which: Doorbell,
        index: u32,
    ) -> Result<(), DmaError> {
        let number = match which {
            Doorbell::Tail(qid) => u64::from(qid) * 2,
            Doorbell::Head(qid) => u64::from(qid) * 2 + 1,
        };
        let at = |page: u64| page.saturating_add(number * STRIDE);
        let (doorbell, event) = (at(buffer.doorbells), at(buffer.events));
        write(dma, trace, doorbell, index)?;
        write(dma, trace, event, index)?;
        self.event.store(event, Ordering::Release);
        self.doorbell.store(doorbell, Ordering::Release);
        Ok(())
    }

    /// What the host has written; `None` where there is no shadow.
    pub(crate) fn look(&self, dma: &Dma, trace: &Trace) -> Result<Option<u32>, DmaError> {
        let address = self.doorbell.load(Ordering::Acquire);
        if address == NONE {
            return Ok(None);
        }
        // In one load: aligned in both places.
        let mut value = 0u32;
        trace.doorbell(dma, range(address), false);
        dma.read(address, value.as_mut_bytes())?;
        Ok(Some(u32::from_le(value)))
    }

    /// Asks the host for a register write when it moves the doorbell past `index`. The caller looks afterwards: a
    /// host that moved it before it saw the request writes no register.
    pub(crate) fn ask(&self, dma: &Dma, trace: &Trace, index: u32) -> Result<(), DmaError> {
        let address = self.event.load(Ordering::Acquire);
        if address == NONE {
            return Ok(());
        }
        write(dma, trace, address, index)?;
        // The request must be visible before the doorbell is looked at; the host has a barrier in its place.
        fence(Ordering::SeqCst);
        Ok(())
    }
}

fn range(address: u64) -> DmaRange {
    DmaRange {
        address,
        length: STRIDE,
    }
}

fn write(dma: &Dma, trace: &Trace, address: u64, value: u32) -> Result<(), DmaError> {
    trace.doorbell(dma, range(address), true);
    dma.write(address, U32::new(value).as_bytes())
}
