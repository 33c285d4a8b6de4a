//! `ampoule check`.

use crate::{
    check::{self, Finding},
    cli::CheckArgs,
    paths::Paths,
    text::{is_json, print},
};

/// Prints what was found, the first problem first for whoever reads one line only; 1 if there is a problem.
pub fn check(args: &CheckArgs, paths: &Paths) -> u8 {
    let mut findings = if args.kvm { check::kvm() } else { check::all(paths) };
    findings.sort_by_key(Finding::is_good);
    if is_json() {
        print(&format!("{}\n", serde_json::json!(findings)));
    } else if !args.quiet {
        print(&findings.iter().map(|finding| format!("{finding}\n")).collect::<String>());
    }
    u8::from(!findings.iter().all(Finding::is_good))
}
