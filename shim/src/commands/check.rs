//! `ampoule check`.

use crate::{
    check::{self, Finding},
    cli::CheckArgs,
    paths::Paths,
};

/// Prints what was found, the first problem first for whoever reads one line only; 1 if there is a problem.
pub fn check(args: &CheckArgs, paths: &Paths) -> u8 {
    let mut findings = if args.kvm { check::kvm() } else { check::all(paths) };
    findings.sort_by_key(Finding::is_good);
    if !args.quiet {
        findings.iter().for_each(|finding| println!("{finding}"));
    }
    u8::from(!findings.iter().all(Finding::is_good))
}
