//! The page `shim/oci-spec.md`, which is also what `ampoule features --table` prints.

use std::fmt::Write;

use super::fields::{By, FIELDS};

const INTRODUCTION: &str = "\
# The OCI runtime specification, field by field

This is what `ampoule features --table` prints. No field of a container's `config.json`, of an exec's process or of an
update is dropped in silence: each is seen to by one of those below, or the container does not start, and the error names
the field.

- **guest**: the agent enforces it inside the VM, as runc would on a host.
- **host**: the shim does, on the host.
- **cgroup**: the host's kernel does, in the cgroup that `linux.cgroupsPath` names, which the VM and its file server are in:
  for containers with a VM of their own that are made by the OCI command line, where it may make that cgroup. Elsewhere,
  and so for containerd's tasks, as *strict*.
- **VM**: every sandbox has it, or something stronger, by being a VM.
- **refused**: asking for it is an error.
- **strict**: likewise, and so is a field that is not in this table; with `strict = false` in `config.toml` the shim logs
  it once for each container and goes on without. No protection is lost with these.

A refused field may be there as long as it asks for nothing: `null`, `0`, `false`, `\"\"`, `[]`, `{}`.

| field | by | how; or why not, and the way out |
|---|---|---|
";

pub fn page() -> String {
    FIELDS.iter().fold(INTRODUCTION.to_string(), |mut page, field| {
        let by = match field.by {
            By::Guest => "guest",
            By::Host => "host",
            By::Cgroup => "cgroup",
            By::Vm => "VM",
            By::Refused => "refused",
            By::Strict => "strict",
        };
        let _ = writeln!(page, "| `{}` | {by} | {} |", field.path, field.note);
        page
    })
}
