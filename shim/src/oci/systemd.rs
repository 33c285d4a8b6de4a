//! A transient scope of systemd's for a container, asked for by systemd's own busctl(1): org.freedesktop.systemd1(5),
//! StartTransientUnit. It is gone when nobody is in it any more.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{OciError, Result};
use crate::text::one_line;

/// There where systemd is PID 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
const CALL: [&str; 8] = [
    "--system",
    "--quiet",
    "call",
    "org.freedesktop.systemd1",
    "/org/freedesktop/systemd1",
    "org.freedesktop.systemd1.Manager",
    "StartTransientUnit",
    "ssa(sv)a(sa(sv))",
];

/// A scope in a slice, as `SLICE:PREFIX:NAME` says.
#[derive(Debug, PartialEq, Eq)]
pub struct Scope {
    slice: String,
    unit: String,
}

impl Scope {
    /// As runc: no slice is `system.slice`.
    pub fn parse(path: &Path) -> Result<Self> {
        let refuse = || {
            let why = "with --systemd-cgroup it is SLICE:PREFIX:NAME, as machine.slice:libpod:1";
            OciError::refused(format!("linux.cgroupsPath ({})", path.display()), why)
        };
        let parts: Vec<&str> = path.to_str().unwrap_or_default().split(':').collect();
        let [slice, prefix, name] = parts[..] else { return Err(refuse()) };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let plain = |name: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || "_.-@\\".contains(c);
            name.chars().all(known) && !name.starts_with('.')
        };
        if name.is_empty()
            || !slice.ends_with(".slice")
            || ![slice, prefix, name].into_iter().all(plain)
        {
            return Err(refuse());
        }
        let unit = if prefix.is_empty() {
            format!("{name}.scope")
        } else {
            format!("{prefix}-{name}.scope")
        };
        Ok(Self { slice: slice.into(), unit })
    }

    /// Below the root of systemd's cgroups: a slice lies in those whose names its own begins with (systemd.slice(5)).
    pub fn path(&self) -> PathBuf {
        let slice = self.slice.trim_end_matches(".slice");
        let ends = slice.match_indices('-').map(|(end, _)| end).chain([slice.len()]);
        // `-.slice` is the root itself.
        let slices = ends.map(|end| &slice[..end]).filter(|name| !["", "-"].contains(name));
        let slices: PathBuf = slices.map(|name| format!("{name}.slice")).collect();
        slices.join(&self.unit)
    }

    /// Asks systemd to make it and to put this process there, which then takes a moment.
    pub fn enter(&self) -> Result<()> {
        if !Path::new(BOOTED).exists() {
            let why = "systemd does not run on this host: have the caller use cgroupfs";
            return Err(OciError::refused("--systemd-cgroup", why));
        }
        let mut command = Command::new("busctl");
        command.args(CALL).args(self.arguments(std::process::id())).stdin(Stdio::null());
        let said = command.output().map_err(|e| OciError::Host("ask systemd with busctl", e))?;
        if said.status.success() {
            return Ok(());
        }
        let why = one_line(&String::from_utf8_lossy(&said.stderr), 500);
        let asked = format!("ask systemd for {}", self.unit);
        Err(OciError::Systemd(asked, io::Error::other(why)))
    }

    /// Without limits: those of a container are met in its guest, or set once we are there ([`super::block_io`]).
    fn arguments(&self, pid: u32) -> Vec<String> {
        let mut arguments = vec![self.unit.clone(), "fail".into()];
        let pid = pid.to_string();
        let properties: [&[&str]; 8] = [
            &["Description", "s", "ampoule's sandbox"],
            &["Slice", "s", &self.slice],
            &["PIDs", "au", "1", &pid],
            &["Delegate", "b", "true"],
            &["DefaultDependencies", "b", "false"],
            &["CollectMode", "s", "inactive-or-failed"],
            &["MemoryAccounting", "b", "true"],
            &["IOAccounting", "b", "true"],
        ];
        arguments.push(properties.len().to_string());
        arguments.extend(properties.concat().into_iter().map(String::from));
        // No auxiliary units.
        arguments.push("0".into());
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_lie_where_systemd_has_them() {
        for (path, found) in [
            ("machine.slice:libpod:1", Some("machine.slice/libpod-1.scope")),
            (":docker:ab", Some("system.slice/docker-ab.scope")),
            ("a-b-c.slice::x", Some("a.slice/a-b.slice/a-b-c.slice/x.scope")),
            ("-.slice:p:x", Some("p-x.scope")),
            ("/libpod/1", None),
            ("machine:libpod:1", None),
            ("machine.slice:libpod:", None),
            ("machine.slice:lib/pod:1", None),
            ("../x.slice:libpod:1", None),
            ("a.slice:b:c:d", None),
        ] {
            let scope = Scope::parse(Path::new(path)).ok();
            assert_eq!(scope.map(|scope| scope.path()), found.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn what_systemd_is_asked_for_has_as_many_properties_as_it_says() {
        let scope = Scope::parse(Path::new("machine.slice:libpod:1")).unwrap();
        let arguments = scope.arguments(42).join(" ");
        assert_eq!(
            arguments,
            "libpod-1.scope fail 8 Description s ampoule's sandbox Slice s machine.slice PIDs au 1 42 Delegate b true \
             DefaultDependencies b false CollectMode s inactive-or-failed MemoryAccounting b true IOAccounting b true 0"
        );
    }
}
