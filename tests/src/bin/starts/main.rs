//! `starts AMPOULE ALPINE_TAR ROUNDS`: an Alpine container that echoes a word, by `ampoule run`, `runc run` and
//! `podman run` in turns, so that whatever else the machine does falls on all of them alike. Prints rows of tables: how
//! long each takes from its start to its end, the spans of ampoule's, and its VM exits.

mod peers;
mod spans;

use std::{env, path::PathBuf, process::Command, time::Instant};

use ampoule_tests::percentiles;

use peers::Peer;
use spans::Spans;

/// Rounds before the first one that counts.
const WARM_UP: usize = 2;
pub const WORKLOAD: [&str; 2] = ["echo", "hi"];

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let [ampoule, tar, rounds] = &args[..] else {
        panic!("usage: starts AMPOULE ALPINE_TAR ROUNDS")
    };
    let rounds: usize = rounds.parse().expect("a number of rounds");
    let peers = [Peer::runc(&PathBuf::from(tar)), Peer::podman(&PathBuf::from(tar))];
    let mut run = Command::new(ampoule);
    run.args(["run", "--timings=json", "alpine", "--"]).args(WORKLOAD);
    let (mut spans, mut own, mut theirs) = (Spans::default(), Vec::new(), [vec![], vec![]]);
    for round in 0..WARM_UP + rounds {
        let (stderr, took) = timed(&mut run);
        let others = [0, 1].map(|peer| timed(&mut peers[peer].command()).1);
        if round >= WARM_UP {
            spans.add(&stderr);
            own.push(took);
            theirs.iter_mut().zip(others).for_each(|(all, took)| all.push(took));
        }
    }
    println!(
        "\n| start to end, ms, n = {rounds} in turns | min | p50 | p90 | p99 | max | ampoule's p50 by its |"
    );
    println!("|---|---|---|---|---|---|---|");
    let median = percentiles::of(&own, 0.5);
    println!("| ampoule run | {} | 1 |", percentiles::row(&own, 0));
    for (peer, took) in peers.iter().zip(&theirs) {
        let ratio = median / percentiles::of(took, 0.5);
        println!("| {} | {} | {ratio:.2} |", peer.name, percentiles::row(took, 0));
    }
    spans.print();
}

/// What a command says as error, and how many milliseconds it takes; it must do what it should.
fn timed(command: &mut Command) -> (String, f64) {
    let began = Instant::now();
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let took = began.elapsed().as_secs_f64() * 1e3;
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && out.stdout == b"hi\n", "{command:?}: {stderr}");
    (stderr, took)
}
