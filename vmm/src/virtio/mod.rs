//! The virtio devices (virtio 1.2) and their MMIO transport.
