//! One VM with several containers: life cycle, order of events, streams, limits.

use std::time::Duration;

use ampoule_shim::sandbox::{Event, ProcessId, SandboxError};
use ampoule_tests::sandbox::{Pod, id, init};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// An event as a word: "exited a/x".
fn word(event: &Event) -> String {
    let name = |p: &ProcessId| match &p.exec {
        Some(exec) => format!("{}/{exec}", p.container),
        None => p.container.to_string(),
    };
    match event {
        Event::Created { process, .. } => format!("created {}", name(process)),
        Event::Started { process, .. } => format!("started {}", name(process)),
        Event::Paused { container } => format!("paused {container}"),
        Event::Resumed { container } => format!("resumed {container}"),
        Event::Oom { container } => format!("oom {container}"),
        Event::Exited { process, exit, .. } => format!("exited {} {}", name(process), exit.status),
        Event::Deleted { process } => format!("deleted {}", name(process)),
        Event::Stopped { .. } => "stopped".into(),
    }
}

#[tokio::test]
async fn events_come_in_the_order_of_a_life() {
    let mut pod = Pod::boot("order", 1).await;
    let streams = pod.start("a", "read line; exit 3").await;
    pod.exec("a", "x", "exit 4").await;
    pod.sandbox.pause(&id("a")).await.unwrap();
    pod.sandbox.resume(&id("a")).await.unwrap();
    let mut stdin = streams.stdin.unwrap();
    stdin.write_all(b"go\n").await.unwrap();
    let exit = pod.sandbox.wait(&init("a")).await.unwrap();
    assert_eq!((exit.status, exit.oom_kills), (3, 0));
    assert_eq!(pod.sandbox.wait(&init("a")).await.unwrap().status, 3, "also after the end");
    pod.sandbox.delete(&init("a")).await.unwrap();
    pod.sandbox.shutdown().await;
    let mut seen = Vec::new();
    while seen.last().is_none_or(|w| w != "stopped") {
        seen.push(word(&pod.event().await));
    }
    let expected = [
        "created a",
        "started a",
        "created a/x",
        "started a/x",
        "exited a/x 4",
        "deleted a/x",
        "paused a",
        "resumed a",
        "exited a 3",
        "deleted a",
        "stopped",
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn several_containers_share_a_vm_and_nothing_else() {
    let mut pod = Pod::boot("several", 3).await;
    let mut streams = Vec::new();
    for name in ["a", "b", "c"] {
        let script =
            format!("echo {name} > /mine; cat /mine; hostname; echo $$; read line; cat /mine");
        streams.push((name, pod.start(name, &script).await));
    }
    assert!(pod.exec("b", "look", "ls -d /proc/[0-9]*").await.text().lines().count() <= 4);
    assert_eq!(
        pod.exec("b", "write", "cat /mine; cat /proc/1/cmdline | tr -d '\\0'")
            .await
            .text()
            .lines()
            .next(),
        Some("b")
    );
    for (name, mut streams) in streams {
        streams.stdin.take().unwrap().write_all(b"\n").await.unwrap();
        let ended = pod.end(&init(name), streams).await;
        assert_eq!(ended.text(), format!("{name}\n{name}\n1\n{name}"));
        assert_eq!(ended.exit.status, 0, "{:?}", ended.exit);
    }
    pod.sandbox.shutdown().await;
}

#[tokio::test]
async fn output_just_before_exit_is_complete_200_times() {
    let mut pod = Pod::boot("output", 1).await;
    let _streams = pod.start("a", "sleep 600").await;
    for n in 0..200 {
        let ended =
            pod.exec("a", &format!("x{n}"), "head -c 100000 /dev/zero; printf end >&2").await;
        let complete = (ended.stdout.len(), ended.exit.status);
        assert_eq!(complete, (100_000, 0), "round {n}: {:?}", ended.exit);
        assert_eq!(ended.stderr, b"end", "round {n}");
    }
    pod.sandbox.shutdown().await;
}

#[tokio::test]
async fn a_slow_reader_holds_the_writer_back_and_loses_nothing() {
    let mut pod = Pod::boot("slow", 1).await;
    let mut streams = pod.start("a", "head -c 8000000 /dev/zero; echo done >&2").await;
    let mut stdout = streams.stdout.take().unwrap();
    let mut stderr = streams.stderr.take().unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_secs(2), stderr.read(&mut byte)).await;
    assert!(early.is_err(), "the writer ran ahead of its reader");
    let mut bytes = Vec::new();
    stdout.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), 8_000_000);
    assert_eq!(pod.sandbox.wait(&init("a")).await.unwrap().status, 0);
    pod.sandbox.shutdown().await;
}

#[tokio::test]
async fn term_then_kill_ends_a_stubborn_workload() {
    let mut pod = Pod::boot("stubborn", 1).await;
    let mut streams = pod.start("a", "trap '' TERM; echo ready; while :; do sleep 1; done").await;
    let mut ready = [0; 6];
    streams.stdout.as_mut().unwrap().read_exact(&mut ready).await.unwrap();
    pod.sandbox.signal(&init("a"), 15, false).await.unwrap();
    let waiting = tokio::time::timeout(Duration::from_secs(1), pod.sandbox.wait(&init("a"))).await;
    assert!(waiting.is_err(), "TERM was not ignored");
    pod.sandbox.signal(&init("a"), 9, true).await.unwrap();
    assert_eq!(pod.end(&init("a"), streams).await.exit.status, 137);
    pod.sandbox.shutdown().await;
}

#[tokio::test]
async fn an_oom_kill_is_reported_for_its_container_only() {
    let mut pod = Pod::boot("oom", 2).await;
    let other = pod.start("b", "read line; exit 0").await;
    let streams = pod.start("a", "dd if=/dev/zero of=/dev/null bs=128M count=1; exit $?").await;
    let ended = pod.end(&init("a"), streams).await;
    assert!(ended.exit.oom_kills > 0, "{ended:?}");
    drop(other.stdin);
    let exit = pod.sandbox.wait(&init("b")).await.unwrap();
    assert_eq!(exit.oom_kills, 0);
    pod.sandbox.shutdown().await;
}

#[tokio::test]
async fn what_does_not_exist_or_is_not_ready_is_refused() {
    let mut pod = Pod::boot("refuse", 1).await;
    assert!(pod.sandbox.start(&init("nobody")).await.is_err());
    assert!(pod.sandbox.wait(&init("nobody")).await.is_err());
    let _streams = pod.start("a", "sleep 600").await;
    assert!(pod.sandbox.start(&init("a")).await.is_err(), "started twice");
    assert!(pod.sandbox.delete(&init("a")).await.is_err(), "deleted while it runs");
    let stats = pod.sandbox.stats(&id("a")).await.unwrap();
    assert_eq!(stats.memory_max, 64 << 20);
    assert!(stats.pids_current >= 1);
    assert!(!pod.sandbox.pids(&id("a")).await.unwrap().processes.is_empty());
    pod.sandbox.shutdown().await;
    assert!(matches!(pod.sandbox.stats(&id("a")).await, Err(SandboxError::Gone(_))));
    assert_eq!(pod.sandbox.wait(&init("a")).await.unwrap().status, 137);
}

#[tokio::test]
async fn disks_come_and_go_at_run_time() {
    let mut pod = Pod::boot("disks", 1).await;
    let _streams = pod.start("a", "sleep 600").await;
    let sizes =
        || async { pod.exec("a", "size", "cat /sys/block/vd[cd]/size | xargs").await.text() };
    assert_eq!(sizes().await, "0 0");
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let disk = ampoule_shim::vm::Disk { id: "extra".into(), read_only: false, file: file.into() };
    let slot = pod.sandbox.attach_disk(disk).await.unwrap();
    assert_eq!(sizes().await, if slot == 2 { "16384 0" } else { "0 16384" });
    pod.sandbox.detach_disk(slot).await.unwrap();
    assert_eq!(sizes().await, "0 0");
    pod.sandbox.shutdown().await;
}
