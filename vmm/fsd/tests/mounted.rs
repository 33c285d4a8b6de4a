//! Shares as this machine's kernel sees them through `/dev/fuse`.

#![allow(clippy::unwrap_used)]

mod relay;

use std::{
    fs,
    io::ErrorKind,
    time::{Duration, Instant},
};

use relay::{Mounted, impossible};
use rustix::io::Errno;

#[test]
fn files_of_a_share_are_those_of_the_host() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "of the host").unwrap();
    let single = host.path().join("single");
    fs::write(&single, "alone").unwrap();
    let mounted = Mounted::new(&[(host.path(), false), (host.path(), true), (&single, false)]);
    let (share, read_only) = (mounted.share(0), mounted.share(1));
    assert_eq!(fs::read_to_string(share.join("a")).unwrap(), "of the host");
    fs::write(share.join("b"), "of the guest").unwrap();
    assert_eq!(fs::read_to_string(host.path().join("b")).unwrap(), "of the guest");

    // The same directory, read-only.
    assert_eq!(fs::read_to_string(read_only.join("b")).unwrap(), "of the guest");
    for refused in [
        fs::write(read_only.join("b"), "no"),
        fs::write(read_only.join("c"), "no"),
        fs::remove_file(read_only.join("b")),
        fs::create_dir(read_only.join("d")),
        fs::set_permissions(read_only.join("b"), fs::metadata(&single).unwrap().permissions()),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }

    // A file alone, which has no directory.
    let alone = mounted.share(2);
    assert_eq!(fs::read_to_string(&alone).unwrap(), "alone");
    fs::write(&alone, "written").unwrap();
    assert_eq!(fs::read_to_string(&single).unwrap(), "written");
    assert!(fs::metadata(alone.join("..")).is_err());

    // The root lists the shares, and is nobody's to change.
    let mut names: Vec<_> =
        fs::read_dir(&mounted.root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["0", "1", "2"]);
    assert!(fs::write(mounted.root.join("x"), "no").is_err());
    let across = fs::rename(share.join("b"), read_only.join("c")).unwrap_err();
    assert_eq!(Errno::from_io_error(&across), Some(Errno::XDEV));
}

#[test]
fn what_the_host_changes_is_seen_within_a_second() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("a");
    fs::write(&file, "before").unwrap();
    let mounted = Mounted::new(&[(host.path(), false)]);
    let (seen, new) = (mounted.share(0).join("a"), mounted.share(0).join("new"));
    assert_eq!(fs::read_to_string(&seen).unwrap(), "before");
    assert!(!new.exists());
    fs::write(&file, "after it").unwrap();
    fs::write(host.path().join("new"), "").unwrap();
    let changed = Instant::now();
    while fs::metadata(&seen).unwrap().len() != 8 || !new.exists() {
        assert!(changed.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(fs::read_to_string(&seen).unwrap(), "after it");
    fs::remove_file(&file).unwrap();
    let changed = Instant::now();
    while seen.exists() {
        assert!(changed.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn shares_come_and_go_and_a_killed_server_is_an_error_at_once() {
    if impossible().is_some() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "a").unwrap();
    let mut mounted = Mounted::new(&[(host.path(), false)]);
    let later = relay::path_of(host.path());
    mounted.fsd.add(7, std::os::fd::AsFd::as_fd(&later), true).unwrap();
    assert_eq!(fs::read_to_string(mounted.share(7).join("a")).unwrap(), "a");
    assert!(mounted.fsd.add(7, std::os::fd::AsFd::as_fd(&later), true).is_err());
    mounted.fsd.remove(7).unwrap();
    assert!(mounted.fsd.remove(7).is_err());
    assert!(fs::write(mounted.share(7).join("a"), "no").is_err());

    let open = fs::File::open(mounted.share(0).join("a")).unwrap();
    mounted.fsd.process().kill();
    mounted.fsd.process().wait().unwrap();
    let killed = Instant::now();
    let error = std::io::Read::read(&mut &open, &mut [0; 4]).unwrap_err();
    assert_eq!(Errno::from_io_error(&error), Some(Errno::IO));
    assert!(fs::write(mounted.share(0).join("b"), "b").is_err());
    assert!(killed.elapsed() < Duration::from_secs(2));
}
