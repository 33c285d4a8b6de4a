//! Everything the driver wrote since the last reset: status, features, queue registers. Pure state; the
//! transport acts on it.
//!
//! ```text
//! 0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK      bits are only ever added, one at a time, in
//! ^                                               |           this order; writing 0 resets from anywhere;
//! +------------------- 0 written -----------------+           FAILED may be added at any time, and is last
//! ```
//!
//! Writes answer `None` if they meant nothing in this state.

use virtio_bindings::{virtio_config::*, virtio_mmio::*};

use crate::virtio::queue::QueueConfig;

/// The order in which a driver adds status bits (3.1.1).
const STATUS_ORDER: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// See the top of this file.
#[derive(Debug)]
pub struct DriverState {
    status: u32,
    feature_select: u32,
    accepted: u64,
    /// A feature beyond bit 63, which nobody offered.
    beyond: bool,
    queue_select: u32,
    queues: Vec<QueueConfig>,
}

impl DriverState {
    /// Nothing written yet, for a device of so many queues.
    pub fn new(queues: usize) -> Self {
        Self {
            status: 0,
            feature_select: 0,
            accepted: 0,
            beyond: false,
            queue_select: 0,
            queues: vec![QueueConfig::default(); queues],
        }
    }

    pub fn status(&self) -> u32 {
        self.status
    }

    /// The features the driver accepted.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    pub fn has_feature(&self, bit: u32) -> bool {
        self.accepted & (1 << bit) != 0
    }

    pub fn queues(&self) -> &[QueueConfig] {
        &self.queues
    }

    /// DriverFeaturesSel.
    pub fn select_features(&mut self, word: u32) {
        self.feature_select = word;
    }

    /// QueueSel: any number.
    pub fn select_queue(&mut self, index: u32) {
        self.queue_select = index;
    }

    /// The queue that is selected, whether there is one or not.
    pub fn selected(&self) -> usize {
        self.queue_select as usize
    }

    pub fn selected_queue(&self) -> Option<&QueueConfig> {
        self.queues.get(self.selected())
    }

    /// A step of the status machine (2.1, 3.1.1) other than the reset. Says whether the driver is now ready.
    pub fn write_status(&mut self, value: u32, offered: u64) -> Option<bool> {
        let added = value & !self.status;
        let taken_back = self.status & !value;
        if taken_back != 0 || added & !(VIRTIO_CONFIG_S_FAILED | self.next_status()) != 0 {
            return None;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable(offered) {
            // The driver reads the status back and finds the bit missing (3.1.1, step 6).
            return None;
        }
        self.status = value;
        Some(added & VIRTIO_CONFIG_S_DRIVER_OK != 0)
    }

    /// Features can be written between `DRIVER` and `FEATURES_OK` (3.1.1).
    pub fn accept_features(&mut self, value: u32) -> Option<()> {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return None;
        }
        match self.feature_select {
            0 => set_low(&mut self.accepted, value),
            1 => set_high(&mut self.accepted, value),
            _ => self.beyond |= value != 0,
        }
        Some(())
    }

    /// Queue registers can be written between `FEATURES_OK` and `DRIVER_OK`, and, but for QueueReady, only
    /// while the queue is not ready (4.2.2.2).
    pub fn write_queue_register(&mut self, offset: u32, value: u32) -> Option<()> {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return None;
        }
        let queue = self.queues.get_mut(self.queue_select as usize)?;
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return Some(());
        }
        if queue.ready {
            return None;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.available, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => return None,
        }
        Some(())
    }

    /// The bit the driver may add now; none after it gave up.
    fn next_status(&self) -> u32 {
        if self.has(VIRTIO_CONFIG_S_FAILED) {
            return 0;
        }
        STATUS_ORDER.into_iter().find(|&bit| !self.has(bit)).unwrap_or(0)
    }

    fn features_acceptable(&self, offered: u64) -> bool {
        !self.beyond && self.accepted & !offered == 0 && self.has_feature(VIRTIO_F_VERSION_1)
    }

    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }
}

fn set_low(field: &mut u64, value: u32) {
    *field = *field & !0xffff_ffff | u64::from(value);
}

fn set_high(field: &mut u64, value: u32) {
    *field = *field & 0xffff_ffff | u64::from(value) << 32;
}
