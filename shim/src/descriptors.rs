//! How many descriptors a process that has a sandbox may have: each process in the sandbox takes several, and most hosts
//! grant 1024 to who does not ask for more.

use std::{io, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// More than a VM has streams for.
const ENOUGH: u64 = 16_384;

/// What this process began with.
static GIVEN: OnceLock<(u64, Option<u64>)> = OnceLock::new();

/// Asks for enough, as far as the host grants them.
pub fn raise() {
    let Rlimit { current: Some(current), maximum } = getrlimit(Resource::Nofile) else { return };
    let wanted = maximum.unwrap_or(ENOUGH).min(ENOUGH);
    if current < wanted && GIVEN.set((current, maximum)).is_ok() {
        // It only asks for what is granted; and it works without.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
    }
}

/// Undoes that in a child, before it becomes somebody else's program: some close all that they may have. Safe between fork
/// and exec.
///
/// # Errors
/// Those of setrlimit(2).
pub fn give_back() -> io::Result<()> {
    match GIVEN.get() {
        Some(&(current, maximum)) => {
            Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum })?)
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::CommandExt, process::Command};

    use super::*;

    #[test]
    fn programs_of_others_have_what_was_given() {
        let before = getrlimit(Resource::Nofile);
        raise();
        let now = getrlimit(Resource::Nofile);
        let enough = now.maximum.unwrap_or(ENOUGH).min(ENOUGH);
        assert!(now.maximum == before.maximum && now.current.is_none_or(|now| now >= enough));
        let mut sh = Command::new("sh");
        sh.args(["-c", "ulimit -Sn"]);
        // SAFETY: between fork and exec it makes one system call.
        unsafe { sh.pre_exec(give_back) };
        let said = String::from_utf8(sh.output().unwrap().stdout).unwrap();
        // Another test may have raised it before this one.
        let given = GIVEN.get().map_or(before.current, |(current, _)| Some(*current));
        let given = given.map_or("unlimited".to_string(), |given| given.to_string());
        assert_eq!(said.trim(), given);
    }
}
