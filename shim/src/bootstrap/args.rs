//! The command line as containerd writes it: flags of Go's `flag` package, then one action.

use std::path::PathBuf;

/// What is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Leave a daemon behind and print its address.
    Start,
    /// Clear away what is left of a container.
    Delete,
    /// Print what this runtime is, for containerd.
    Info,
    /// The same for a person.
    Version,
    Help,
    /// Without a word: be the daemon. That is how `start` calls it.
    #[default]
    Serve,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    pub namespace: String,
    /// containerd's gRPC socket.
    pub address: String,
    pub id: String,
    /// Given to `delete`; else it is the working directory.
    pub bundle: Option<PathBuf>,
    pub debug: bool,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    #[error("flag -{0}: there is no such flag; see -help")]
    Unknown(String),
    #[error("flag -{0}: needs a value")]
    NoValue(String),
    #[error("flag -{flag}: {value:?} is not true or false")]
    NotBoolean { flag: String, value: String },
    #[error("action {0:?}: must be start or delete")]
    Action(String),
}

pub const HELP: &str = "\
usage: containerd-shim-ampoule-v2 [flags] start|delete

The containerd runtime io.containerd.ampoule.v2: every sandbox in a virtual machine. containerd runs it; try
`ctr run --runtime io.containerd.ampoule.v2 IMAGE NAME`.

  -namespace NAME       containerd's namespace
  -id ID                of the container
  -address PATH         containerd's gRPC socket
  -bundle PATH          of the container; the default is the working directory
  -publish-binary PATH  accepted, not used: events go to $TTRPC_ADDRESS
  -debug                log more
  -info                 print what the runtime is, for containerd, and exit
  -v, -version          print the version and exit
";

impl Args {
    /// `words` without the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut args = Self::default();
        let mut words = words.into_iter();
        let mut rest = None;
        while let Some(word) = words.next() {
            let Some(flag) = flag(&word) else {
                rest = Some(word);
                break;
            };
            if flag.is_empty() {
                rest = words.next();
                break;
            }
            args.take(flag, &mut words)?;
        }
        match rest.as_deref() {
            None => {}
            // What a flag asks for comes first.
            Some(_) if args.action != Action::Serve => {}
            Some("start") => args.action = Action::Start,
            Some("delete") => args.action = Action::Delete,
            Some(other) => return Err(ArgsError::Action(other.into())),
        }
        Ok(args)
    }

    fn take(
        &mut self,
        flag: &str,
        words: &mut impl Iterator<Item = String>,
    ) -> Result<(), ArgsError> {
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (flag, None),
        };
        let asked = |action| match boolean(name, value.as_deref())? {
            true => Ok(Some(action)),
            false => Ok(None),
        };
        let action = match name {
            "debug" => {
                self.debug = boolean(name, value.as_deref())?;
                None
            }
            "v" | "version" => asked(Action::Version)?,
            "info" => asked(Action::Info)?,
            "h" | "help" => asked(Action::Help)?,
            "namespace" | "address" | "publish-binary" | "id" | "bundle" => {
                let value = value.or_else(|| words.next());
                let value = value.ok_or_else(|| ArgsError::NoValue(name.into()))?;
                self.set(name, value);
                None
            }
            _ => return Err(ArgsError::Unknown(name.into())),
        };
        self.action = action.unwrap_or(self.action);
        Ok(())
    }

    fn set(&mut self, name: &str, value: String) {
        match name {
            "namespace" => self.namespace = value,
            "address" => self.address = value,
            "id" => self.id = value,
            "bundle" => self.bundle = Some(value.into()).filter(|path: &PathBuf| path != ""),
            _ => {}
        }
    }
}

/// `-x` and `--x` are the same; `-` is no flag; `--` ends them and is the empty one.
fn flag(word: &str) -> Option<&str> {
    let flag = word.strip_prefix('-')?;
    if flag.is_empty() { None } else { Some(flag.strip_prefix('-').unwrap_or(flag)) }
}

fn boolean(flag: &str, value: Option<&str>) -> Result<bool, ArgsError> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgsError::NotBoolean { flag: flag.into(), value: value.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn containerds_command_lines_are_understood() {
        let start = "-namespace k8s.io -address /run/c.sock -publish-binary /bin/containerd -id c1";
        let args = Args {
            namespace: "k8s.io".into(),
            address: "/run/c.sock".into(),
            id: "c1".into(),
            ..Default::default()
        };
        for (line, action) in
            [("start", Action::Start), ("delete", Action::Delete), ("", Action::Serve)]
        {
            let expected = Args { action, ..args.clone() };
            assert_eq!(parse(&format!("{start} {line}")), Ok(expected));
        }
        let line = "-namespace k8s.io --address=/run/c.sock -bundle /b -id c1 -debug delete";
        let delete =
            Args { bundle: Some("/b".into()), debug: true, action: Action::Delete, ..args };
        assert_eq!(parse(line), Ok(delete));
    }

    #[test]
    fn flags_are_those_of_go() {
        for (line, action) in [
            ("-v", Action::Version),
            ("--version", Action::Version),
            ("-info", Action::Info),
            ("-info start", Action::Info),
            ("-v=false delete", Action::Delete),
            ("-help", Action::Help),
            ("-- start", Action::Start),
            ("start -whatever", Action::Start),
        ] {
            assert_eq!(parse(line).map(|args| args.action), Ok(action), "{line}");
        }
        assert_eq!(parse("-debug=0 start").map(|args| args.debug), Ok(false));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, part) in [
            ("-x start", "-x"),
            ("start1", "start1"),
            ("- start", "\"-\""),
            ("-id", "-id"),
            ("-debug=maybe", "maybe"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
