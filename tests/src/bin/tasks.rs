//! `tasks ROUNDS`: `ctr run` of an Alpine container that echoes a word, with ampoule and with runc in turns, so that
//! whatever else the machine does falls on both. Prints rows of tables: how long from its start to its first byte and to
//! its end; what the first use of an image takes; the memory of an idle task's shim; how long twenty at once take.

use std::{
    collections::BTreeMap,
    env,
    io::Read,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use ampoule_tests::{
    Memory,
    containerd::{Containerd, Runtime, Version},
    percentiles,
};

/// Rounds before the first one that counts.
const WARM_UP: usize = 2;
const AT_ONCE: usize = 20;
/// How long a task is idle before its shim is looked at.
const IDLE: Duration = Duration::from_secs(30);

/// Milliseconds to the first byte of output, and to the end.
#[derive(Default)]
struct Times {
    first: Vec<f64>,
    end: Vec<f64>,
}

fn main() {
    let rounds: usize =
        env::args().nth(1).and_then(|n| n.parse().ok()).expect("usage: tasks ROUNDS");
    let hosts = [Runtime::Ampoule, Runtime::Runc]
        .map(|runtime| Containerd::start(Version::V1_6, runtime).expect("a containerd"));
    let new = hosts.each_ref().map(|host| timed(host, "first").1);
    let mut times = [Times::default(), Times::default()];
    for round in 0..WARM_UP + rounds {
        for (host, times) in hosts.iter().zip(&mut times) {
            let (first, end) = timed(host, "one");
            if round >= WARM_UP {
                times.first.push(first);
                times.end.push(end);
            }
        }
    }
    let [ampoule, runc] = &times;
    println!(
        "\n| `ctr run`, ms, n = {rounds} in turns | min | p50 | p90 | p99 | max | ampoule's p50 by runc's |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (what, ampoule, runc) in [
        ("to the first byte", &ampoule.first, &runc.first),
        ("to the end", &ampoule.end, &runc.end),
    ] {
        let ratio = median(ampoule) / median(runc);
        println!("| ampoule, {what} | {} | {ratio:.2} |", percentiles::row(ampoule, 0));
        println!("| runc, {what} | {} | 1 |", percentiles::row(runc, 0));
    }
    println!("\n| | ampoule | runc |\n|---|---|---|");
    let of_new = [new[0] - median(&ampoule.end), new[1] - median(&runc.end)];
    println!(
        "| the first use of an image, beyond a later one, ms | {:.0} | {:.0} |",
        of_new[0], of_new[1]
    );
    println!(
        "\n| idle task, KiB after {} s, without a guest's | USS | RSS |\n|---|---|---|",
        IDLE.as_secs()
    );
    hosts.iter().for_each(print_memory);
    // Where one processor boots them all, some may take longer than they may.
    println!("\n| {AT_ONCE} at once | to the end of all, ms | ended well |\n|---|---|---|");
    for host in &hosts {
        let (took, well) = at_once(host);
        println!("| {} | {took:.0} | {well} |", host.runtime.name());
    }
}

fn median(values: &[f64]) -> f64 {
    percentiles::of(values, 0.5)
}

/// How long one takes to its first byte and to its end, in milliseconds.
fn timed(host: &Containerd, container: &str) -> (f64, f64) {
    let mut run = host.run(&["--rm"], "alpine", container, &["echo", "hi"]).command;
    let began = Instant::now();
    let mut child = run.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("ctr");
    let mut said = [0; 4];
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut said[..1]).expect("a byte");
    let first = began.elapsed();
    let rest = stdout.read(&mut said[1..]).expect("its output");
    let status = child.wait().expect("ctr");
    let end = began.elapsed();
    assert!(status.success() && &said[..=rest] == b"hi\n", "{status}: {said:?}");
    (first.as_secs_f64() * 1e3, end.as_secs_f64() * 1e3)
}

/// How long some together take to the end of all, in milliseconds, and how many of them do what they should.
fn at_once(host: &Containerd) -> (f64, usize) {
    let began = Instant::now();
    let well = thread::scope(|scope| {
        let run = |number| {
            let id = format!("s{number}");
            host.run(&["--rm"], "alpine", &id, &["echo", "hi"]).output().stdout == b"hi\n"
        };
        let running: Vec<_> = (0..AT_ONCE).map(|n| scope.spawn(move || run(n))).collect();
        running.into_iter().filter_map(|task| task.join().ok()).filter(|well| *well).count()
    });
    (began.elapsed().as_secs_f64() * 1e3, well)
}

/// Of all processes of a task on the host but its own, by program.
fn print_memory(host: &Containerd) {
    host.run(&["-d"], "alpine", "idle", &["sleep", "100000"]).output().ended_with(0);
    thread::sleep(IDLE);
    let mut all: BTreeMap<String, Memory> = BTreeMap::new();
    for process in host.inside.processes() {
        let others = ["catatonit", "containerd", "ctr", "sleep"];
        if !others.contains(&process.program()) {
            let memory = Memory::of(&host.inside.path(format!("/proc/{}", process.pid)));
            let sum = all.entry(process.program().to_owned()).or_default();
            *sum = *sum + memory;
        }
    }
    for (program, Memory { uss, rss, .. }) in all {
        println!("| {program} | {uss} | {rss} |");
    }
    host.remove("idle");
}
