use std::{
    thread,
    time::{Duration, Instant, UNIX_EPOCH},
};

use super::*;
use crate::signal_name::Signal;

fn record(name: &str) -> Record {
    Record {
        name: name.into(),
        image: "alpine".into(),
        digest: String::new(),
        command: vec!["sh".into()],
        created: Timestamp(UNIX_EPOCH),
        started: None,
        ended: None,
        pid: 1,
        detached: true,
        remove: false,
        terminal: false,
        interactive: false,
        memory: 1,
        vcpus: 1,
        boot_timeout: 30,
        network: "none".into(),
        ports: Vec::new(),
        egress: None,
        stop_signal: Signal::TERM,
        stop_timeout: 10,
        labels: [("a".to_string(), "b".to_string())].into(),
    }
}

fn id(name: &str) -> Id {
    name.parse().unwrap()
}

fn ended() -> Ended {
    Ended { code: 3, at: Timestamp(UNIX_EPOCH), oom: false, reason: None, console: Vec::new() }
}

#[test]
fn a_sandbox_is_created_then_runs_then_has_exited_until_it_is_removed() {
    let state = tempfile::tempdir().unwrap();
    let registry = Registry::new(state.path());
    let mut claim = registry.claim(&id("web"), record("web")).unwrap();
    assert_eq!(registry.find("web").unwrap().status, Status::Created);
    claim.started(Timestamp::now()).unwrap();
    assert_eq!(registry.find("w").unwrap().status, Status::Running);
    assert!(matches!(registry.remove(&id("web")), Err(RegistryError::Name(NameError::InUse(_)))));
    claim.ended(ended()).unwrap();
    let found = registry.find("web").unwrap();
    assert_eq!((found.status, found.record.ended), (Status::Exited, Some(ended())));
    // A test beside this one that forks has a copy of the lock until its child closes it.
    let deadline = Instant::now() + Duration::from_secs(5);
    let again = loop {
        match registry.claim(&id("web"), record("web")) {
            Err(RegistryError::Name(NameError::InUse(_))) if Instant::now() < deadline => {}
            again => break again,
        }
    };
    assert!(matches!(again, Err(RegistryError::Ended(_))), "{again:?}");
    registry.remove(&id("web")).unwrap();
    assert!(matches!(registry.find("web"), Err(RegistryError::NotFound(_))));
}

#[test]
fn what_is_dropped_leaves_nothing_and_what_was_killed_is_replaced() {
    let state = tempfile::tempdir().unwrap();
    let registry = Registry::new(state.path());
    drop(registry.claim(&id("c"), record("c")).unwrap());
    assert!(registry.list().unwrap().is_empty());
    // As after a SIGKILL: the folder stays, the lock does not.
    let claim = registry.claim(&id("a"), record("a")).unwrap();
    let folder = claim.folder().to_path_buf();
    drop(claim);
    fs::create_dir_all(&folder).unwrap();
    record("a").write(&folder).unwrap();
    // Likewise.
    let deadline = Instant::now() + Duration::from_secs(5);
    while registry.find("a").unwrap().status != Status::Dead {
        assert!(Instant::now() < deadline, "the lock stays");
        thread::sleep(Duration::from_millis(10));
    }
    let _claim = registry.claim(&id("a"), record("a")).unwrap();
    assert_eq!(registry.find("a").unwrap().status, Status::Created);
    let folder = folder.with_file_name("b");
    fs::create_dir_all(&folder).unwrap();
    Record { remove: true, ..record("b") }.write(&folder).unwrap();
    assert_eq!(registry.list().unwrap().len(), 1);
    assert!(!folder.exists());
}

#[test]
fn a_name_is_found_by_its_beginning_if_only_one_begins_so() {
    let state = tempfile::tempdir().unwrap();
    let registry = Registry::new(state.path());
    let _claims: Vec<_> =
        ["web", "web2", "db"].map(|n| registry.claim(&id(n), record(n)).unwrap()).into();
    assert_eq!(registry.find("web").unwrap().name, id("web"));
    assert_eq!(registry.find("d").unwrap().name, id("db"));
    assert!(matches!(registry.find("we"), Err(RegistryError::Ambiguous(..))));
    assert!(matches!(registry.find(""), Err(RegistryError::NotFound(_))));
}
