//! Which queues exist.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::queue::{CompletionQueue, SubmissionQueue};

/// The queues by identifier; 0 are the admin queues.
pub(crate) struct QueueTable {
    sqs: Vec<Option<Arc<SubmissionQueue>>>,
    cqs: Vec<Option<Arc<CompletionQueue>>>,
}

impl QueueTable {
    pub(crate) fn new(io_queues: u16) -> Self {
        let count = usize::from(io_queues) + 1;
        Self {
            sqs: vec![None; count],
            cqs: vec![None; count],
        }
    }

    pub(crate) fn sq(&self, qid: u16) -> Option<Arc<SubmissionQueue>> {
        self.sqs.get(usize::from(qid)).cloned().flatten()
    }

    pub(crate) fn cq(&self, qid: u16) -> Option<Arc<CompletionQueue>> {
        self.cqs.get(usize::from(qid)).cloned().flatten()
    }

    pub(crate) fn set_sq(&mut self, qid: u16, sq: Option<Arc<SubmissionQueue>>) {
        if let Some(slot) = self.sqs.get_mut(usize::from(qid)) {
            *slot = sq;
        }
    }

    pub(crate) fn set_cq(&mut self, qid: u16, cq: Option<Arc<CompletionQueue>>) {
        if let Some(slot) = self.cqs.get_mut(usize::from(qid)) {
            *slot = cq;
        }
    }

    /// The I/O submission queues.
    pub(crate) fn io_sqs(&self) -> Vec<Arc<SubmissionQueue>> {
        self.sqs.iter().skip(1).flatten().cloned().collect()
    }

    /// The I/O completion queues.
    pub(crate) fn io_cqs(&self) -> Vec<Arc<CompletionQueue>> {
        self.cqs.iter().skip(1).flatten().cloned().collect()
    }

    pub(crate) fn clear(&mut self) {
        self.sqs.fill(None);
        self.cqs.fill(None);
    }

    /// Ends the workers of all submission queues, without waiting for them.
    pub(crate) fn stop_submissions(&self) {
        for sq in self.sqs.iter().flatten() {
            sq.stop.store(true, Ordering::Release);
            sq.wake.notify();
        }
    }

    pub(crate) fn has_io_queues(&self) -> bool {
        self.sqs.iter().skip(1).any(Option::is_some) || self.cqs.iter().skip(1).any(Option::is_some)
    }

    /// Whether a completion queue that interrupts on an unmasked vector has completions to consume.
    pub(crate) fn completions_waiting(&self, mask: u32) -> bool {
        self.cqs.iter().flatten().any(|cq| {
            let unmasked = cq.vector.is_some_and(|vector| {
                // INTMS has a bit for each of the first 32 vectors.
                1u32.checked_shl(vector.into())
                    .is_none_or(|bit| mask & bit == 0)
            });
            unmasked && cq.outstanding() > 0
        })
    }

    pub(crate) fn dump(&self) -> Value {
        let sqs: Vec<Value> = self
            .sqs
            .iter()
            .flatten()
            .map(|sq| {
                json!({ "id": sq.id, "base": format!("{:#x}", sq.base), "entries": sq.entries,
                    "cq": sq.cq.id, "head": sq.head(), "tail": sq.tail() })
            })
            .collect();
        let cqs: Vec<Value> = self
            .cqs
            .iter()
            .flatten()
            .map(|cq| {
                json!({ "id": cq.id, "base": format!("{:#x}", cq.base), "entries": cq.entries,
                    "vector": cq.vector, "head": cq.head(), "tail": cq.tail() })
            })
            .collect();
        json!({ "submission": sqs, "completion": cqs })
    }
}
