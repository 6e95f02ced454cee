//! [`Mistakes`]: how often a log may say that a guest, or a client, does the same wrong thing again.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts mistakes that are worth a line in the log, others' or those that are met, so that nobody who repeats one can
/// fill the disk with lines.
#[derive(Debug, Default)]
pub struct Mistakes(AtomicU64);

impl Mistakes {
    /// Counts one, and says whether to log it: the first 16, then every one that doubles the count.
    pub fn is_worth_a_line(&self) -> bool {
        let count = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        count <= 16 || count.is_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_rare() {
        let mistakes = Mistakes::default();
        let lines = (0..1 << 20).filter(|_| mistakes.is_worth_a_line()).count();
        assert_eq!(lines, 16 + 16);
    }
}
