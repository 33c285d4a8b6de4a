//! The two address spaces a guest can exit through, port I/O and memory-mapped I/O: which device answers
//! which range. Filled by [`crate::builder`]; fixed once the guest runs. Every vCPU thread reads it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// A device that answers reads and writes of a range of ports or addresses. The bus guarantees that
/// `offset + data.len()` stays within the range the device was put at.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as several vCPU threads share it.
pub type SharedBusDevice = Arc<Mutex<dyn BusDevice>>;

/// Two devices claim the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{start:#x}..{end:#x} on the bus is taken")]
pub struct Taken {
    start: u64,
    end: u64,
}

/// One address space. Whatever no device claims reads as all ones, as on a PC, and is counted, not logged.
#[derive(Default)]
pub struct Bus {
    /// First address to (length, device).
    ranges: BTreeMap<u64, (u64, SharedBusDevice)>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// Puts a device at `start..start + len`.
    pub fn insert(&mut self, start: u64, len: u64, device: SharedBusDevice) -> Result<(), Taken> {
        let end = start.saturating_add(len);
        let last_before_end = self.ranges.range(..end).next_back();
        if last_before_end.is_some_and(|(&other, &(len, _))| other + len > start) {
            return Err(Taken { start, end });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    /// Fills `data` from the device at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Gives `data` to the device at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// Accesses that no device answered.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    /// The device that all of `len` bytes at `address` belong to.
    fn find(&self, address: u64, len: usize) -> Option<(u64, &SharedBusDevice)> {
        let found =
            self.ranges.range(..=address).next_back().and_then(|(start, (size, device))| {
                let offset = address - start;
                let end = offset.checked_add(len as u64)?;
                (end <= *size).then_some((offset, device))
            });
        if found.is_none() {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with the offset's low byte and keeps what was asked.
    #[derive(Default)]
    struct Probe(Vec<(u64, usize)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.0.push((offset, data.len()));
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.len()));
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Probe>>, Arc<Mutex<Probe>>) {
        let (a, b) =
            (Arc::new(Mutex::new(Probe::default())), Arc::new(Mutex::new(Probe::default())));
        let mut bus = Bus::default();
        bus.insert(0x100, 8, a.clone()).unwrap();
        bus.insert(0x108, 1, b.clone()).unwrap();
        (bus, a, b)
    }

    #[test]
    fn ranges_do_not_overlap() {
        let (mut bus, a, _) = bus();
        for (start, len) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x104, 0x100), (0, u64::MAX)] {
            assert!(bus.insert(start, len, a.clone()).is_err(), "{start:#x}");
        }
        bus.insert(0x109, 1, a.clone()).unwrap();
        bus.insert(0xff, 1, a).unwrap();
    }

    #[test]
    fn accesses_reach_the_device_at_their_offset() {
        let (bus, a, b) = bus();
        let mut data = [0; 4];
        bus.read(0x104, &mut data);
        assert_eq!(data, [4; 4]);
        bus.write(0x108, &[1]);
        assert_eq!(
            (&a.lock().unwrap().0[..], &b.lock().unwrap().0[..]),
            (&[(4, 4)][..], &[(0, 1)][..])
        );
        assert_eq!(bus.unclaimed(), 0);
    }

    /// Row A14: every address around and far from the devices, all widths, both directions.
    #[test]
    fn a14_no_access_leaves_a_device_range() {
        let (bus, a, b) = bus();
        let addresses = (0xf0..0x120).chain([0, 0xffff, 1 << 32, u64::MAX - 3, u64::MAX]);
        let widths = [0, 1, 2, 3, 4, 7, 8, 9, 4096];
        let mut unclaimed = 0;
        for address in addresses {
            for width in widths {
                let mut data = vec![0x5a; width];
                bus.read(address, &mut data);
                bus.write(address, &data);
                let inside = |start: u64, len: u64| {
                    address >= start && address.saturating_add(width as u64) <= start + len
                };
                if !inside(0x100, 8) && !inside(0x108, 1) {
                    assert!(data.iter().all(|&byte| byte == 0xff));
                    unclaimed += 2;
                }
            }
        }
        let fits = |probe: &Arc<Mutex<Probe>>, size: u64| {
            probe.lock().unwrap().0.iter().all(|&(at, len)| at + len as u64 <= size)
        };
        assert!(fits(&a, 8) && fits(&b, 1));
        // A zero-length access at the seam of the two ranges belongs to the second one's start.
        assert!(bus.unclaimed() <= unclaimed && bus.unclaimed() >= unclaimed - 2);
    }

    /// Row A14: all 65 536 ports, in every width a port instruction has.
    #[test]
    fn a14_every_port_answers() {
        let (bus, _, _) = bus();
        for port in 0..=0xffff_u64 {
            for width in [1, 2, 4] {
                let mut data = vec![0; width];
                bus.read(port, &mut data);
                bus.write(port, &data);
            }
        }
        assert!(bus.unclaimed() > 2 * 3 * 65_000);
    }
}
