//! The hosts of a test: containerds of several versions, each with runc and with ampoule.

use super::{Containerd, Runtime, Version};
use crate::skip;

/// `host!(name = Runtime Version: test...)`: a module with these tests, each a function that takes a [`Containerd`].
#[macro_export]
macro_rules! host {
    ($host:ident = $runtime:ident $version:ident: $($test:ident)*) => {
        mod $host {
            use $crate::containerd::{Runtime, Version, on};
            $(#[test] fn $test() {
                let name = concat!(stringify!($host), "::", stringify!($test));
                on(name, Version::$version, Runtime::$runtime, super::$test);
            })*
        }
    };
}

/// Runs a test, or writes down why not.
pub fn on(name: &str, version: Version, runtime: Runtime, test: fn(&Containerd)) {
    match Containerd::start(version, runtime) {
        Ok(containerd) => test(&containerd),
        Err(why) => skip(name, &why),
    }
}
