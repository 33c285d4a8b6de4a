//! The VMM of ampoule.
pub mod bus;
