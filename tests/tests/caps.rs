//! Caps that the host keeps, and the receipt of a run.

use std::{fs, time::Duration};

use ampoule_tests::run;
use tempfile::TempDir;

#[test]
fn time_and_cpu_time_are_capped() {
    let out = run(["--timeout", "2", "alpine", "sleep", "600"]).output().ended_with(124);
    out.says(&["ended after 2 s", "--timeout"]);
    let script = "while :; do :; done";
    let out = run(["--cpu-time", "2", "alpine", "sh", "-c", script]).output().ended_with(152);
    out.says(&["ended after 2 s of CPU time", "--cpu-time"]);
    // Nothing that is met later than the end is in the way.
    let out = run(["--timeout", "600", "--cpu-time", "600", "alpine", "true"]).output();
    assert!(out.ended_with(0).took < Duration::from_secs(100));
}

#[test]
fn output_is_capped_to_the_byte() {
    let options = ["--output-limit", "100000", "alpine", "sh", "-c"];
    let words = |script| [&options[..], &[script]].concat();
    let out = run(words("yes; echo not reached >&2")).output().ended_with(153);
    assert_eq!(out.stdout.len(), 100_000);
    let out = out.says(&["--output-limit"]);
    assert!(!out.error().contains("not reached"), "{}", out.error());
    let out = run(words("head -c 50000 /dev/zero; head -c 50000 /dev/zero >&2")).output();
    assert_eq!(out.ended_with(0).stdout.len(), 50_000);
}

#[test]
fn a_receipt_tells_what_the_run_was() {
    let folder = TempDir::new().unwrap();
    let receipt = |name: &str, words: &[&str], code: i32| -> serde_json::Value {
        let path = folder.path().join(name);
        let options = ["--receipt", path.to_str().unwrap(), "--hostname", "box"];
        run([&options[..], words].concat()).output().ended_with(code);
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    let first = receipt("1", &["alpine", "true"], 0);
    let second = receipt("2", &["alpine", "true"], 0);
    for part in [
        "/kernel/digest",
        "/guest_image/digest",
        "/vmm/digest",
        "/image/digest",
        "/spec",
        "/seccomp",
    ] {
        let digest = first.pointer(part).unwrap();
        assert!(digest.as_str().unwrap().starts_with("sha256:"), "{part}: {digest}");
        assert_eq!(Some(digest), second.pointer(part), "{part}");
    }
    assert_eq!(first["ended"]["code"], 0);
    assert_eq!(first["limits"]["memory"], 512 << 20);
    let capped = receipt("3", &["--timeout", "1", "alpine", "sleep", "60"], 124);
    assert_eq!(capped["ended"]["code"], 124);
    assert!(capped["ended"]["reason"].as_str().unwrap().contains("--timeout"));
    assert_ne!(capped["spec"], first["spec"]);
    run(["--receipt", "/no/such/file", "alpine", "true"])
        .output()
        .ended_with(125)
        .says(&["/no/such/file"]);
}
