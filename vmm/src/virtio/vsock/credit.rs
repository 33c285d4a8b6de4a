//! Flow control by credit (virtio 1.2, 5.10.6.3), both ways. Pure arithmetic on free-running counters.

use std::num::Wrapping;

/// The guest's counters contradict what happened.
#[derive(Debug, PartialEq, Eq)]
pub struct CreditLie;

/// What the guest may send: our buffer for it.
#[derive(Debug)]
pub struct Window {
    size: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
}

impl Window {
    pub fn new(size: u32) -> Self {
        let zero = Wrapping(0);
        Self { size, received: zero, forwarded: zero, told: zero }
    }

    /// Bytes came in.
    pub fn receive(&mut self, count: u32) -> Result<(), CreditLie> {
        let held = (self.received - self.forwarded).0;
        if count > self.size - held {
            return Err(CreditLie);
        }
        self.received += count;
        Ok(())
    }

    /// Bytes left the buffer.
    pub fn forward(&mut self, count: u32) {
        self.forwarded += count;
    }

    /// Whether the guest knows of less than half of the free space there is to know of. Then it may be
    /// waiting; before, it cannot be, for it sees the other half.
    pub fn is_update_due(&self) -> bool {
        (self.forwarded - self.told).0 >= self.size / 2
    }

    /// `buf_alloc` and `fwd_cnt` of a packet that is about to be sent.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.size, self.told.0)
    }
}

/// What we may send: the guest's buffer for us.
#[derive(Debug, Default)]
pub struct Credit {
    size: u32,
    sent: Wrapping<u32>,
    forwarded: Wrapping<u32>,
}

impl Credit {
    /// Takes `buf_alloc` and `fwd_cnt` of a packet of the guest. The size may change at will, even to less
    /// than is in flight. A count that goes back is an old one, which Linux sends when two threads race
    /// to the queue: no news. One ahead of what was sent is a lie.
    pub fn update(&mut self, size: u32, forwarded: u32) -> Result<(), CreditLie> {
        self.size = size;
        let progress = (Wrapping(forwarded) - self.forwarded).0;
        if progress > i32::MAX as u32 {
            return Ok(());
        }
        if progress > self.in_flight() {
            return Err(CreditLie);
        }
        self.forwarded += progress;
        Ok(())
    }

    pub fn available(&self) -> u32 {
        self.size.saturating_sub(self.in_flight())
    }

    /// At most [`available`](Self::available) bytes were sent.
    pub fn spend(&mut self, count: u32) {
        self.sent += count;
    }

    fn in_flight(&self) -> u32 {
        (self.sent - self.forwarded).0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_window_takes_its_size_and_no_more() {
        let mut window = Window::new(100);
        assert_eq!(window.receive(60), Ok(()));
        assert_eq!(window.receive(41), Err(CreditLie));
        assert_eq!(window.receive(40), Ok(()));
        window.forward(49);
        assert!(!window.is_update_due());
        window.forward(1);
        assert!(window.is_update_due());
        assert_eq!(window.tell(), (100, 50));
        assert!(!window.is_update_due());
        assert_eq!(window.receive(51), Err(CreditLie));
        assert_eq!(window.receive(50), Ok(()));
    }

    #[test]
    fn counters_wrap() {
        let start = Wrapping(u32::MAX - 10);
        let mut window = Window { size: 64, received: start, forwarded: start, told: start };
        assert_eq!(window.receive(64), Ok(()));
        window.forward(64);
        assert_eq!(window.tell(), (64, 53));
        let mut credit = Credit { size: 64, sent: start, forwarded: start };
        credit.spend(64);
        assert_eq!(credit.available(), 0);
        assert_eq!(credit.update(64, 53), Ok(()));
        assert_eq!(credit.available(), 64);
    }

    #[test]
    fn v03_credit_lies_are_found_and_old_news_is_ignored() {
        let mut credit = Credit::default();
        credit.update(1000, 0).unwrap();
        credit.spend(600);
        assert_eq!(credit.update(1000, 601), Err(CreditLie));
        assert_eq!(credit.update(1000, 500), Ok(()));
        assert_eq!(credit.update(1000, 400), Ok(()), "sent before, arrived after");
        assert_eq!(credit.available(), 900);
        assert_eq!(credit.update(50, 500), Ok(()), "shrinks below what is in flight");
        assert_eq!(credit.available(), 0);
    }

    proptest! {
        #[test]
        fn never_more_in_flight_than_the_guest_ever_offered(
            steps in proptest::collection::vec((any::<u32>(), any::<u32>(), any::<u32>()), 1..200)
        ) {
            let mut credit = Credit::default();
            let mut largest = 0;
            for (size, forwarded, wish) in steps {
                if credit.update(size, forwarded).is_err() {
                    break;
                }
                largest = largest.max(size);
                credit.spend(wish.min(credit.available()));
                prop_assert!(credit.in_flight() <= largest);
            }
        }
    }
}
