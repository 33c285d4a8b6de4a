//! VM exits by reason, counted by the vCPU threads and read when the VM ends.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ampoule_vmm_api::ExitCounts;

/// One field for each of [`ExitCounts`].
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub pio_in: AtomicU64,
    pub pio_out: AtomicU64,
    pub mmio_read: AtomicU64,
    pub mmio_write: AtomicU64,
    pub other: AtomicU64,
    until_hello: AtomicU64,
}

impl ExitCounters {
    /// The guest said hello: remembers all exits so far. Later calls change nothing.
    pub fn mark_hello(&self) {
        let _ = self.until_hello.compare_exchange(0, self.total(), Relaxed, Relaxed);
    }

    pub fn snapshot(&self) -> ExitCounts {
        ExitCounts {
            pio_in: self.pio_in.load(Relaxed),
            pio_out: self.pio_out.load(Relaxed),
            mmio_read: self.mmio_read.load(Relaxed),
            mmio_write: self.mmio_write.load(Relaxed),
            other: self.other.load(Relaxed),
            until_hello: self.until_hello.load(Relaxed),
        }
    }

    fn total(&self) -> u64 {
        let c = self.snapshot();
        c.pio_in + c.pio_out + c.mmio_read + c.mmio_write + c.other
    }
}

/// Counts one more.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hello_is_marked_once() {
        let counters = ExitCounters::default();
        for _ in 0..3 {
            count(&counters.pio_out);
        }
        count(&counters.other);
        counters.mark_hello();
        count(&counters.mmio_read);
        counters.mark_hello();
        let expected =
            ExitCounts { pio_out: 3, other: 1, mmio_read: 1, until_hello: 4, ..Default::default() };
        assert_eq!(counters.snapshot(), expected);
    }
}
