//! Which of a guest's mistakes are worth a line in the log.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts mistakes that are worth a line in the log, a host's or those that it meets, so that a host cannot fill the
/// disk with them.
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
    fn a_flood_of_mistakes_is_a_few_lines() {
        let mistakes = Mistakes::default();
        let lines = (0..100_000).filter(|_| mistakes.is_worth_a_line()).count();
        assert_eq!(lines, 16 + 12);
    }
}
