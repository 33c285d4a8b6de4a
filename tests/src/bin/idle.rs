//! `idle AMPOULE SECONDS`: the host's memory for an idle sandbox with a shared directory besides its guest's, by process,
//! from smaps after so many seconds; first when it is the only one, then beside another one, with which it shares the
//! programs' code.

use std::{env, fs, path::Path, process::Command, thread, time::Duration};

use ampoule_tests::Memory;

const NAMES: [&str; 2] = ["bench-idle-1", "bench-idle-2"];
/// Sandboxes in the background, removed at the end.
struct Sandboxes<'a>(&'a str);

fn main() {
    let usage = "usage: idle AMPOULE SECONDS";
    let mut args = env::args().skip(1);
    let (ampoule, seconds) = (args.next().expect(usage), args.next().expect(usage));
    let idle = Duration::from_secs(seconds.parse().expect(usage));
    let sandboxes = Sandboxes(&ampoule);
    println!(
        "\n| memory besides the guest's, KiB, after {seconds} s | USS | PSS | of it dirty |\n|---|---|---|---|"
    );
    for (name, others) in NAMES.iter().zip(["alone", "beside another"]) {
        sandboxes.start(name);
        thread::sleep(idle);
        let of_all = sandboxes.processes(NAMES[0]);
        let mut all = Memory::default();
        for (program, pid) in of_all {
            let memory = Memory::of(&Path::new("/proc").join(pid.to_string()));
            row(&program, others, memory);
            all = all + memory;
        }
        row("**all**", others, all);
    }
}

fn row(what: &str, others: &str, Memory { uss, pss, dirty, .. }: Memory) {
    println!("| {what}, {others} | {uss} | {pss} | {dirty} |");
}

impl Sandboxes<'_> {
    fn start(&self, name: &str) {
        self.ampoule(&[
            "run",
            "-d",
            "--name",
            name,
            "-v",
            "/etc:/mnt:ro",
            "alpine",
            "--",
            "sleep",
            "100000",
        ]);
    }

    /// Names and PIDs of its shim and of what that started.
    fn processes(&self, name: &str) -> Vec<(String, u64)> {
        let all: serde_json::Value =
            serde_json::from_str(&self.ampoule(&["inspect", name])).expect("JSON");
        let shim = all[0]["pid"].as_u64().expect("a PID");
        let mut pids = vec![shim];
        for task in fs::read_dir(format!("/proc/{shim}/task")).expect("its threads").flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u64>().ok()));
        }
        let name = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        pids.into_iter().map(|pid| (name(pid).trim_end().to_owned(), pid)).collect()
    }

    fn ampoule(&self, args: &[&str]) -> String {
        let out = Command::new(self.0).args(args).output().expect("ampoule can be run");
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
}

impl Drop for Sandboxes<'_> {
    fn drop(&mut self) {
        let _ = Command::new(self.0).args(["rm", "-f"]).args(NAMES).output();
    }
}
