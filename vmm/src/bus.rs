//! The two address spaces a guest can exit through, port I/O and memory-mapped I/O.

/// A device that answers reads and writes of a range of ports or addresses. The bus guarantees that
/// `offset + data.len()` stays within the range the device was put at.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}
