//! Words of the end-to-end tests.
