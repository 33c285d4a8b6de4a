//! When the guest is asked to forget files, so that there is room for others. Pure. It is its agent that is asked, by way of the
//! shim: Linux' virtio-fs has no notifications of FUSE's, by which a server tells the kernel itself.
//!
//! ```text
//!           as many as the mark                 half of the mark, or PATIENCE is over
//!  settled ─────────────────────▶ asked: further ones are slow ─────────────────────▶ settled
//! ```
//!
//! What it has not forgotten in the end is in use: the mark is then above it, in the middle of what is left.

use std::time::{Duration, Instant};

/// How long it may take.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Of files that a guest knows.
#[derive(Debug)]
pub struct Crowd {
    most: usize,
    mark: usize,
    asked: Option<Instant>,
}

/// What is to be done before it learns of a further one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Nothing,
    /// It is to be asked, now, and waited for as well.
    Ask,
    Wait,
}

impl Crowd {
    pub fn new(most: usize) -> Self {
        Self { most, mark: lowest(most), asked: None }
    }

    /// As many as it knows without being asked.
    pub fn mark(&self) -> usize {
        self.mark
    }

    pub fn next(&mut self, count: usize, now: Instant) -> Next {
        if let Some(asked) = self.asked
            && (count < self.mark / 2 || now.saturating_duration_since(asked) >= PATIENCE)
        {
            self.asked = None;
            self.mark = lowest(self.most).max(count + self.most.saturating_sub(count) / 2);
        }
        match self.asked {
            _ if count < self.mark => Next::Nothing,
            Some(_) => Next::Wait,
            None => {
                self.asked = Some(now);
                Next::Ask
            }
        }
    }
}

fn lowest(most: usize) -> usize {
    most - most / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_forgets_is_asked_each_time_it_knows_many() {
        let (mut crowd, now) = (Crowd::new(100), Instant::now());
        for _ in 0..3 {
            assert_eq!(crowd.next(74, now), Next::Nothing);
            assert_eq!(crowd.next(75, now), Next::Ask);
            assert_eq!(crowd.next(76, now), Next::Wait);
            assert_eq!(crowd.next(60, now), Next::Nothing);
            assert_eq!(crowd.next(3, now), Next::Nothing);
        }
    }

    #[test]
    fn what_is_in_use_is_asked_for_less_and_less_often_until_there_is_no_room() {
        let (mut crowd, mut now) = (Crowd::new(1000), Instant::now());
        let mut asked = Vec::new();
        for count in 0..1000 {
            if crowd.next(count, now) == Next::Ask {
                asked.push(count);
            }
            now += PATIENCE / 10;
        }
        assert_eq!(asked[0], 750);
        assert!((3..30).contains(&asked.len()), "{asked:?}");
        assert_eq!(crowd.next(1000, now + PATIENCE), Next::Ask);
        // Files are closed, and it is as before.
        assert_eq!(crowd.next(10, now + PATIENCE), Next::Nothing);
        assert_eq!((crowd.next(749, now), crowd.next(750, now)), (Next::Nothing, Next::Ask));
    }

    #[test]
    fn there_may_be_no_room_at_all() {
        assert_eq!(Crowd::new(0).next(0, Instant::now()), Next::Ask);
    }
}
