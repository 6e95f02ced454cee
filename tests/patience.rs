//! Waiting for what no event announces.

use std::time::{Duration, Instant};

/// Longer than anything here takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits until `condition` holds.
///
/// # Panics
/// Where it does not within a minute; the message names `what` was waited for.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "waited for {what}, in vain");
        std::thread::sleep(LOOK_AGAIN);
    }
}
