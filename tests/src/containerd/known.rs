//! Where ampoule does not do what runc does: the one list, with reasons. Whatever is not here must be the same.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Containerd, Runtime};
use crate::skip;

/// What is different, and why that is right.
const DIFFERENT: &[(&str, &str)] = &[
    (
        "processes listed by their PIDs on the host",
        "they are listed by their PIDs in the guest; the host has no such processes",
    ),
    (
        "the loss of an ended task",
        "a task that ends while containerd 1.7 or later is away is still there, with its exit status",
    ),
];

impl Containerd {
    /// Checks an expectation by name. One that is known not to hold is reported as skipped with its reason, and fails
    /// the test when it begins to hold, so that the list gets shorter.
    #[track_caller]
    pub fn expects(&self, what: &str, check: impl FnOnce()) {
        let known = DIFFERENT.iter().find(|(name, _)| *name == what);
        let (Runtime::Ampoule, Some((_, why))) = (self.runtime, known) else { return check() };
        assert!(
            catch_unwind(AssertUnwindSafe(check)).is_err(),
            "{what} now holds: take it off the list in tests/src/containerd/known.rs"
        );
        skip(&format!("containerd: {what}"), why);
    }
}
