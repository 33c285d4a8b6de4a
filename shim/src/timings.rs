//! The spans of a run, from the user's command to the first byte of output, on one clock (CLOCK_MONOTONIC).

use std::fmt::Write;

use ampoule_vmm_api::{guest::Mark, message::ExitCounts};
use serde_json::json;

use crate::{clock, sandbox::BootRecord};

/// How timings are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    Table,
    Json,
}

/// The instants, in nanoseconds; 0 for one that did not come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    at: [u64; 8],
    exits: ExitCounts,
}

const NAMES: [(&str, &str); 8] = [
    ("t0", "ampoule is executed"),
    ("t1", "main begins"),
    ("t2", "KVM gives the VM"),
    ("t3", "first KVM_RUN"),
    ("t4", "first exit: the guest kernel runs"),
    ("t5", "agent's first instructions"),
    ("t6", "agent's hello received"),
    ("t7", "first byte of output"),
];

impl Timings {
    /// To be called first thing in `main`. The execution of the program is taken to be as long ago as the CPU
    /// time it has used: nothing has been waited for yet but, perhaps, the disk.
    pub fn begin() -> Self {
        let main = clock::now_ns();
        let mut timings = Self::default();
        timings.at[0] = main.saturating_sub(clock::cpu_ns());
        timings.at[1] = main;
        timings
    }

    /// Takes over what is known of the boot.
    pub fn booted(&mut self, record: &BootRecord) {
        let agent = Mark::AgentStarted as u8;
        let started = record.marks.iter().find(|(mark, _)| *mark == agent);
        self.at[2] = record.stamps.vm_created_ns;
        self.at[3] = record.stamps.first_run_ns;
        self.at[4] = record.stamps.first_exit_ns;
        self.at[5] = started.map_or(0, |(_, at)| *at);
        self.at[6] = record.hello_ns;
    }

    /// Takes over the end: when output first came, and the VM's exits.
    pub fn ended(&mut self, first_byte_ns: u64, exits: ExitCounts) {
        self.at[7] = first_byte_ns;
        self.exits = exits;
    }

    pub fn print(&self, format: Format) -> String {
        match format {
            Format::Table => self.table(),
            Format::Json => self.json(),
        }
    }

    /// Aligned columns: the name, since t0 and since the span before in milliseconds, what happens.
    fn table(&self) -> String {
        let mut out = String::from("     since t0      delta   (milliseconds)\n");
        let mut before = self.at[0];
        for ((name, what), at) in NAMES.iter().zip(self.at) {
            let line = if at == 0 {
                writeln!(out, "{name}  {:>10} {:>10}   {what}", "-", "-")
            } else {
                let (since, delta) = (milliseconds(self.at[0], at), milliseconds(before, at));
                before = at;
                writeln!(out, "{name}  {since:>10.3} {delta:>10.3}   {what}")
            };
            let _ = line;
        }
        let e = &self.exits;
        let _ = writeln!(
            out,
            "exits to the VMM: {} until hello; in all {} port in, {} port out, {} MMIO read, {} MMIO write, {} other",
            e.until_hello, e.pio_in, e.pio_out, e.mmio_read, e.mmio_write, e.other
        );
        out
    }

    /// One line; nanoseconds since t0, null for what did not come.
    fn json(&self) -> String {
        let mut out = serde_json::Map::new();
        for ((name, _), at) in NAMES.iter().zip(self.at) {
            let since = (at != 0).then(|| at.saturating_sub(self.at[0]));
            out.insert(format!("{name}_ns"), since.into());
        }
        let e = &self.exits;
        out.insert(
            "exits".into(),
            json!({
                "until_hello": e.until_hello, "pio_in": e.pio_in, "pio_out": e.pio_out,
                "mmio_read": e.mmio_read, "mmio_write": e.mmio_write, "other": e.other,
            }),
        );
        let mut line = serde_json::Value::from(out).to_string();
        line.push('\n');
        line
    }
}

fn milliseconds(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings() -> Timings {
        let mut timings =
            Timings { at: [1_000_000, 2_500_000, 0, 0, 0, 0, 0, 0], ..Default::default() };
        timings.booted(&BootRecord {
            stamps: ampoule_vmm_api::Stamps {
                process_ns: 1,
                vm_created_ns: 3_000_000,
                first_run_ns: 4_000_000,
                first_exit_ns: 5_000_000,
            },
            marks: vec![(2, 9), (1, 1_234_567_890)],
            hello_ns: 1_240_000_000,
            ..Default::default()
        });
        timings.ended(0, ExitCounts { until_hello: 321, ..Default::default() });
        timings
    }

    #[test]
    fn the_table_is_aligned_and_complete() {
        let table = timings().print(Format::Table);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[2], "t1       1.500      1.500   main begins");
        assert_eq!(lines[6], "t5    1233.568   1229.568   agent's first instructions");
        assert_eq!(lines[8], "t7           -          -   first byte of output");
        assert!(lines[9].starts_with("exits to the VMM: 321 until hello"));
    }

    #[test]
    fn json_is_one_line_since_t0() {
        let json = timings().print(Format::Json);
        assert_eq!(json.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["t5_ns"], 1_233_567_890_u64);
        assert_eq!(value["t7_ns"], serde_json::Value::Null);
        assert_eq!(value["exits"]["until_hello"], 321);
    }
}
