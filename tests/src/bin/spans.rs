//! `spans AMPOULE RUNS`: runs `ampoule run --timings=json alpine echo` so often and prints the spans of
//! a start and the VM exits as rows of a table: least, median, 90th and 99th percentile, most.

use std::{collections::BTreeMap, env, process::Command};

const SPANS: [(&str, &str, &str); 7] = [
    ("t0_ns", "t1_ns", "exec of ampoule to its main"),
    ("t1_ns", "t2_ns", "to the VM's descriptor"),
    ("t2_ns", "t3_ns", "to the first KVM_RUN"),
    ("t3_ns", "t4_ns", "to the first exit of the guest kernel"),
    ("t4_ns", "t5_ns", "to the agent's first instructions"),
    ("t5_ns", "t6_ns", "to the agent's hello"),
    ("t6_ns", "t7_ns", "to the first byte of output"),
];
/// Runs before the first one that counts.
const WARM_UP: usize = 2;

fn main() {
    let mut args = env::args().skip(1);
    let usage = "usage: spans AMPOULE RUNS";
    let (ampoule, runs) = (args.next().expect(usage), args.next().expect(usage));
    let runs: usize = runs.parse().expect(usage);
    let mut columns: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let mut exits: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for n in 0..runs + WARM_UP {
        let timings = one_run(&ampoule);
        if n < WARM_UP {
            continue;
        }
        let at = |name: &str| timings[name].as_f64().unwrap_or(f64::NAN) / 1e6;
        for (row, (from, to, _)) in SPANS.iter().enumerate() {
            columns.entry(row).or_default().push(at(to) - at(from));
        }
        columns.entry(SPANS.len()).or_default().push(at("t6_ns") - at("t1_ns"));
        columns.entry(SPANS.len() + 1).or_default().push(at("t7_ns"));
        for (reason, count) in timings["exits"].as_object().expect("exits by reason") {
            exits.entry(reason.clone()).or_default().push(count.as_f64().unwrap_or(f64::NAN));
        }
    }
    println!(
        "\n| span, ms, {runs} runs | min | p50 | p90 | p99 | max |\n|---|---|---|---|---|---|"
    );
    for (row, values) in columns {
        let name = match SPANS.get(row) {
            Some((_, to, name)) => format!("{} {name}", &to[..2]),
            None if row == SPANS.len() => "**main to hello**".into(),
            None => "**all, to the first byte**".into(),
        };
        println!("| {name} | {} |", percentiles(values, 1));
    }
    for (reason, counts) in exits {
        println!("| VM exits: {} | {} |", reason.replace('_', " "), percentiles(counts, 0));
    }
}

fn one_run(ampoule: &str) -> serde_json::Value {
    let out = Command::new(ampoule)
        .args(["run", "--timings=json", "alpine", "--", "echo", "hi"])
        .output()
        .expect("ampoule can be run");
    let stderr = String::from_utf8_lossy(&out.stderr);
    let line = stderr.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {stderr}"))
}

fn percentiles(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    [0.0, 0.5, 0.9, 0.99, 1.0]
        .map(|p| format!("{:.digits$}", values[(p * last as f64).round() as usize]))
        .join(" | ")
}
