//! The spans of ampoule's starts and its VM exits, from `--timings=json`.

use std::collections::BTreeMap;

use ampoule_tests::percentiles;

const SPANS: [(&str, &str, &str); 9] = [
    ("t0_ns", "t1_ns", "t1 exec of ampoule to its main"),
    ("t1_ns", "t2_ns", "t2 to the VM's descriptor"),
    ("t2_ns", "t3_ns", "t3 to the first KVM_RUN"),
    ("t3_ns", "t4_ns", "t4 to the first exit of the guest kernel"),
    ("t4_ns", "t5_ns", "t5 to the agent's first instructions"),
    ("t5_ns", "t6_ns", "t6 to the agent's hello"),
    ("t6_ns", "t7_ns", "t7 to the first byte of output"),
    ("t1_ns", "t6_ns", "**main to hello**"),
    ("t0_ns", "t7_ns", "**all, to the first byte**"),
];

#[derive(Default)]
pub struct Spans {
    rows: [Vec<f64>; SPANS.len()],
    exits: BTreeMap<String, Vec<f64>>,
}

impl Spans {
    /// Takes in what a run printed; the timings are its last line.
    pub fn add(&mut self, stderr: &str) {
        let line = stderr.lines().last().unwrap_or_default();
        let timings: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {stderr}"));
        let at = |name: &str| timings[name].as_f64().unwrap_or(f64::NAN) / 1e6;
        for (row, (from, to, _)) in self.rows.iter_mut().zip(SPANS) {
            row.push(at(to) - at(from));
        }
        for (reason, count) in timings["exits"].as_object().expect("exits by reason") {
            let counts = self.exits.entry(reason.clone()).or_default();
            counts.push(count.as_f64().unwrap_or(f64::NAN));
        }
    }

    pub fn print(&self) {
        println!(
            "\n| span of ampoule run, ms | min | p50 | p90 | p99 | max |\n|---|---|---|---|---|---|"
        );
        for (row, (_, _, name)) in self.rows.iter().zip(SPANS) {
            println!("| {name} | {} |", percentiles::row(row, 1));
        }
        for (reason, counts) in &self.exits {
            println!(
                "| VM exits: {} | {} |",
                reason.replace('_', " "),
                percentiles::row(counts, 0)
            );
        }
    }
}
