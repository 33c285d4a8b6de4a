//! The sandbox on the host.
