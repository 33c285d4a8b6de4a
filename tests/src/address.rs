//! An address of this host that is not its loopback's, by which guests behind passt reach it.

use std::{env, net::Ipv4Addr, process::Command, sync::Once};

/// `None` where there is none: passt takes a default route. A bed gets one.
pub fn host_address() -> Option<Ipv4Addr> {
    static MADE: Once = Once::new();
    if env::var_os("AMPOULE_BED").is_some() {
        MADE.call_once(|| {
            ip("link add outside type dummy");
            ip("address add 192.0.2.2/24 dev outside");
            ip("link set outside up");
            ip("route add default via 192.0.2.1");
        });
    }
    let found = ip("-4 route get 198.51.100.1");
    found.split_once(" src ")?.1.split_whitespace().next()?.parse().ok()
}

fn ip(words: &str) -> String {
    let out = Command::new("ip").args(words.split(' ')).output().expect("ip runs");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Why there can be no `--network user` here, if that is so.
pub fn no_passt() -> Option<&'static str> {
    if Command::new("passt").arg("--version").output().is_err() {
        Some("passt is missing: install Debian's package `passt`")
    } else if host_address().is_none() {
        Some("passt takes a default route")
    } else {
        None
    }
}
