//! What a controller does behind its host's back: a thread that ends when it is told to, and soon.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::locks::lock;

/// Between two steps an operation leaves the processor to commands.
const PAUSE: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
struct Orders {
    /// End.
    end: bool,
    /// Wait, for a test that wants to see an operation in progress.
    hold: bool,
}

/// How an operation's thread learns that it is to end.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    orders: Mutex<Orders>,
    changed: Condvar,
}

impl Signal {
    /// To be called between steps, each of which takes milliseconds: waits a moment. `false`: the thread is to
    /// end, and whoever said so knows why.
    pub(crate) fn go_on(&self) -> bool {
        let mut orders = lock(&self.orders);
        let mut waited = false;
        while !orders.end && (orders.hold || !waited) {
            // A wait that is cut short by a change of orders is as good as one that is not.
            let result = self.changed.wait_timeout(orders, PAUSE);
            orders = result.unwrap_or_else(PoisonError::into_inner).0;
            waited = true;
        }
        !orders.end
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut lock(&self.orders));
        self.changed.notify_all();
    }
}

/// Place for one operation at a time.
#[derive(Debug, Default)]
pub(crate) struct Background {
    thread: Mutex<Option<(Arc<Signal>, JoinHandle<()>)>>,
    hold: Mutex<bool>,
}

impl Background {
    /// Starts `operation`; an earlier one's thread ends first.
    pub(crate) fn start(
        &self,
        name: &str,
        operation: impl FnOnce(&Signal) + Send + 'static,
    ) -> io::Result<()> {
        self.end();
        let hold = *lock(&self.hold);
        let signal = Arc::new(Signal::default());
        signal.order(|orders| orders.hold = hold);
        let thread = Builder::new().name(name.into()).spawn({
            let signal = Arc::clone(&signal);
            move || operation(&signal)
        })?;
        *lock(&self.thread) = Some((signal, thread));
        Ok(())
    }

    /// Ends the thread, if there is one, and waits for it.
    pub(crate) fn end(&self) {
        let thread = lock(&self.thread).take();
        if let Some((signal, thread)) = thread {
            signal.order(|orders| orders.end = true);
            // One that panicked has said so.
            let _ = thread.join();
        }
    }

    /// Holds operations between their steps, or lets them go on.
    pub(crate) fn hold(&self, hold: bool) {
        *lock(&self.hold) = hold;
        if let Some((signal, _)) = &*lock(&self.thread) {
            signal.order(|orders| orders.hold = hold);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn an_operation_is_held_goes_on_and_ends() {
        let background = Background::default();
        background.hold(true);
        let steps = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&steps);
        background
            .start("test", move |signal| {
                while signal.go_on() {
                    counted.fetch_add(1, Ordering::SeqCst);
                }
            })
            .unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(steps.load(Ordering::SeqCst), 0);
        background.hold(false);
        while steps.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        background.end();
        let last = steps.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(steps.load(Ordering::SeqCst), last);
    }
}
