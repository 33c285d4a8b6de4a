//! An amount of bytes that several writers share.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Bytes that may still be written, of two outputs.
#[derive(Debug)]
pub struct Budget {
    left: AtomicU64,
    news: Notify,
}

/// What `left` is once more was asked for than there was.
const OVERDRAWN: u64 = u64::MAX;

impl Budget {
    pub fn new(bytes: u64) -> Self {
        Self { left: AtomicU64::new(bytes.min(OVERDRAWN - 1)), news: Notify::new() }
    }

    /// Takes `wanted` bytes, or what is left.
    pub fn take(&self, wanted: usize) -> usize {
        let (mut given, wanted) = (0, wanted as u64);
        let rest = |left: u64| {
            given = if left == OVERDRAWN { 0 } else { left.min(wanted) };
            Some(if given < wanted { OVERDRAWN } else { left - given })
        };
        let _ = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        if given < wanted {
            self.news.notify_one();
        }
        given as usize
    }

    pub fn is_overdrawn(&self) -> bool {
        self.left.load(Ordering::Relaxed) == OVERDRAWN
    }

    /// Resolves, for one, when it is.
    pub async fn overdrawn(&self) {
        self.news.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_given_out_to_the_byte_and_overdrawn_once() {
        let budget = Budget::new(10);
        assert_eq!((budget.take(4), budget.take(6), budget.is_overdrawn()), (4, 6, false));
        assert_eq!((budget.take(1), budget.is_overdrawn()), (0, true));
        let budget = Budget::new(10);
        assert_eq!((budget.take(11), budget.is_overdrawn(), budget.take(1)), (10, true, 0));
        assert!(!Budget::new(u64::MAX).is_overdrawn());
    }
}
