//! Errors as a user reads them: one line with the whole chain of causes, what the guest said last, the way out.
//!
//! ```text
//! ampoule: run: boot: the guest kernel panicked
//!   guest console | Kernel panic - not syncing: VFS: Unable to mount root fs
//!   hint: ...
//! ```

use std::{error::Error, fmt::Write};

use crate::{
    commands::FAILURE,
    image::RegistryError,
    sandbox::StartFailure,
    vm::{Death, KERNEL, VmError},
};

/// The chain's texts after `ampoule: `, joined by colons, with the console of a dead guest and a hint if the
/// chain holds one.
pub fn report(phase: &str, error: &(dyn Error + 'static)) -> String {
    let mut out = format!("ampoule: {phase}: {}", chain_text(error));
    out.push('\n');
    if let Some(death) = find::<Death>(error) {
        out.push_str(&console(death));
    }
    if let Some(hint) = hint(error) {
        let _ = writeln!(out, "  hint: {hint}");
    }
    out
}

/// The chain's texts, joined by colons.
pub fn chain_text(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = chain(error).map(ToString::to_string).collect();
    // A transparent link says what its cause says.
    texts.dedup();
    texts.retain(|text| !text.is_empty());
    texts.join(": ")
}

/// The exit code for a failure of ours, as docker's: a command that does not exist is 127, one that cannot be
/// executed 126, all else 125.
pub fn exit_code(error: &(dyn Error + 'static)) -> u8 {
    match find::<StartFailure>(error) {
        Some(StartFailure::NotFound(_)) => 127,
        Some(StartFailure::NotExecutable(_)) => 126,
        None => FAILURE,
    }
}

/// The last lines of a dead guest's console.
pub fn console(death: &Death) -> String {
    death.console.iter().fold(String::new(), |mut out, line| {
        let _ = writeln!(out, "  guest console | {line}");
        out
    })
}

/// The way out, where one is known.
fn hint(error: &(dyn Error + 'static)) -> Option<&'static str> {
    match find::<VmError>(error) {
        Some(VmError::Kvm(kvm)) => return Some(kvm.hint()),
        Some(VmError::Open { what, .. }) if *what == KERNEL => {
            return Some("name another with --kernel, or build it with `make kernel`");
        }
        Some(VmError::Open { .. }) => {
            return Some("name another with --guest-image, or build it with `make guest`");
        }
        Some(VmError::Spawn(_)) => {
            return Some("ampoule-vmm belongs beside ampoule; AMPOULE_VMM names another");
        }
        _ => {}
    }
    use RegistryError::{Client, Slow, Unreachable};
    if let Some(Unreachable { .. } | Client { .. } | Slow { .. }) = find(error) {
        return Some(
            "`ampoule images` lists what is here, `ampoule image import SOURCE NAME` needs no registry; \
             for mirrors and plain HTTP see `ampoule image pull --help`",
        );
    }
    let blamed = find::<Death>(error).is_some_and(Death::blames_kvm);
    blamed.then_some("this /dev/kvm may be emulated: see `ampoule check`")
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&e| e.source())
}

fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    chain(error).find_map(|link| {
        link.downcast_ref::<T>()
            .or_else(|| link.downcast_ref::<std::sync::Arc<T>>().map(std::sync::Arc::as_ref))
    })
}

#[cfg(test)]
mod tests {
    use std::{io, path::PathBuf, sync::Arc};

    use ampoule_vmm_api::StopCause;

    use super::*;
    use crate::{kvm::KvmError, sandbox::SandboxError, vm::Cause};

    #[test]
    fn a_chain_is_one_line_with_its_hint() {
        let missing = VmError::Open {
            what: KERNEL,
            path: PathBuf::from("/x/vmlinux"),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        let text = report("run", &SandboxError::Boot(missing));
        let mut lines = text.lines();
        assert_eq!(
            lines.next(),
            Some(
                "ampoule: run: boot: guest kernel /x/vmlinux: No such file or directory (os error 2)"
            )
        );
        assert!(lines.next().is_some_and(|l| l.starts_with("  hint: ") && l.contains("--kernel")));
    }

    #[test]
    fn a_transparent_link_is_not_said_twice() {
        let kvm = KvmError::Open(io::Error::from_raw_os_error(libc::EACCES));
        let text = report("run", &SandboxError::Boot(VmError::Kvm(kvm)));
        assert!(text.starts_with("ampoule: run: boot: /dev/kvm: Permission denied"), "{text}");
        assert!(text.contains("hint: run as root"), "{text}");
    }

    #[test]
    fn a_guests_death_comes_with_its_console() {
        let mut death = Death::lost();
        death.cause = Cause::Stopped(StopCause::KvmError);
        death.console = vec!["one".into(), "two".into()];
        let error = SandboxError::Died {
            kernel: "/k".into(),
            guest_image: "/g".into(),
            source: Arc::new(death),
        };
        assert_eq!(
            report("run", &error),
            "ampoule: run: boot of /k with /g: KVM could not run the guest\n  guest console | one\n  \
             guest console | two\n  hint: this /dev/kvm may be emulated: see `ampoule check`\n"
        );
    }
}
