//! Finding the command in the container, and becoming it.

use std::{
    ffi::{CString, NulError},
    io, ptr,
};

use rustix::io::Errno;

use crate::{
    oci::Process,
    plan::{Fault, StepError, at, cause},
};

/// Where commands are looked for when the environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything execve(2) needs, in order of trial.
pub struct Command {
    name: String,
    candidates: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Command {
    /// `home` goes into an environment that has none.
    pub fn new(process: &Process, home: &str) -> Result<Self, StepError> {
        let name = process.args.first().cloned().unwrap_or_default();
        let mut environment = process.env.clone();
        if variable(&environment, "HOME").is_none_or(str::is_empty) {
            environment.retain(|e| !e.starts_with("HOME="));
            environment.push(format!("HOME={home}"));
        }
        let path = variable(&environment, "PATH").unwrap_or(PATH);
        let strings = |list: Vec<String>| list.into_iter().map(CString::new).collect();
        let built = |result: Result<Vec<CString>, NulError>| {
            result.map_err(|e| at("exec", &name)(io::Error::from(e)))
        };
        Ok(Self {
            candidates: built(strings(candidates(&name, path)))?,
            arguments: built(strings(process.args.clone()))?,
            environment: built(strings(environment))?,
            name,
        })
    }

    /// Becomes the command. Returns only if none could be executed.
    pub fn exec(&self) -> StepError {
        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        let mut denied = None;
        for candidate in &self.candidates {
            // SAFETY: a C string and two null-terminated arrays of C strings, all alive.
            unsafe {
                libc::execve(candidate.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            }
            let error = io::Error::last_os_error();
            match Errno::from_io_error(&error) {
                // As execvp(3): the next directory may have it.
                Some(Errno::NOENT | Errno::NOTDIR) => {}
                Some(Errno::ACCESS) => denied = Some(error),
                _ => return self.failure(Fault::NotExecutable, error),
            }
        }
        match denied {
            Some(error) => self.failure(Fault::NotExecutable, error),
            None => self.failure(Fault::NotFound, Errno::NOENT.into()),
        }
    }

    /// In lower case, as runc has it: by "permission denied" Docker's client knows its exit code.
    fn failure(&self, fault: Fault, error: io::Error) -> StepError {
        StepError::new(fault, "exec", &self.name, cause(error).to_lowercase())
    }
}

/// The last of several settings counts.
fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    environment.iter().rev().find_map(|e| e.strip_prefix(name)?.strip_prefix('='))
}

/// The paths a command's name stands for (execvp(3)).
fn candidates(name: &str, path: &str) -> Vec<String> {
    match name {
        "" => Vec::new(),
        name if name.contains('/') => vec![name.to_owned()],
        name => path
            .split(':')
            .map(|directory| match directory {
                "" => format!("./{name}"),
                directory => format!("{directory}/{name}"),
            })
            .collect(),
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_for_as_execvp_does() {
        assert_eq!(candidates("sh", "/bin:/usr/bin"), ["/bin/sh", "/usr/bin/sh"]);
        assert_eq!(candidates("sh", "/bin::rel"), ["/bin/sh", "./sh", "rel/sh"]);
        assert_eq!(candidates("/bin/sh", "/x"), ["/bin/sh"]);
        assert_eq!(candidates("./a", "/x"), ["./a"]);
        assert!(candidates("", "/bin").is_empty());
    }

    fn environment(env: &[&str]) -> Vec<CString> {
        let process = Process {
            args: vec!["sh".into()],
            env: env.iter().map(|e| (*e).to_owned()).collect(),
            ..Default::default()
        };
        Command::new(&process, "/home/me").unwrap().environment
    }

    #[test]
    fn home_is_added_where_there_is_none() {
        assert_eq!(environment(&["A=b"]), [c"A=b".into(), CString::from(c"HOME=/home/me")]);
        assert_eq!(environment(&["HOME=/x"]), [CString::from(c"HOME=/x")]);
        assert_eq!(environment(&["HOME="]), [CString::from(c"HOME=/home/me")]);
        assert_eq!(environment(&["HOMER=1"]).len(), 2);
    }

    #[test]
    fn failures_tell_missing_from_forbidden() {
        let failure = |name: &str, path: &str| {
            let process = Process {
                args: vec![name.into()],
                env: vec![format!("PATH={path}")],
                ..Default::default()
            };
            Command::new(&process, "/").unwrap().exec()
        };
        let missing = failure("nope", "/bin:/usr/bin");
        assert_eq!(missing.fault, Fault::NotFound);
        assert_eq!(missing.to_string(), "exec: nope: no such file or directory");
        assert_eq!(failure("/etc/passwd/x", "").fault, Fault::NotFound);
        assert_eq!(failure("/etc/passwd", "").fault, Fault::NotExecutable);
        assert_eq!(failure("passwd", "/nowhere:/etc:/bin/none").fault, Fault::NotExecutable);
        assert_eq!(failure("/tmp", "").fault, Fault::NotExecutable);
        assert_eq!(failure("", "/bin").fault, Fault::NotFound);
    }
}
