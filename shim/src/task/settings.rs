//! What the configuration says of one container's sandbox: the files, then containerd's runtime options, then
//! the pod's annotations (see [`crate::config::Layers`]).

use std::path::Path;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::Spec;

use super::{error::TaskError, fields::fields};
use crate::{
    config::{Config, ConfigError, Layers},
    paths::Paths,
};

/// Options of a runtime that is not runc, as CRI and Docker pass them on. Others, as runc's own, say nothing to us.
pub const OPTIONS: &str = "runtimeoptions.v1.Options";

/// `runtimeoptions.v1.Options` of containerd; its `type_url` is of no use here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    config_path: String,
    config_body: Vec<u8>,
}

impl Options {
    fn parse(options: &Any) -> Result<Self, TaskError> {
        let mut parsed = Self::default();
        if !options.type_url.ends_with(OPTIONS) {
            return Ok(parsed);
        }
        let broken = |e| TaskError::Invalid(format!("runtime options: {e}"));
        for (number, field) in fields(&options.value).map_err(broken)? {
            match number {
                2 => parsed.config_path = field.text(),
                3 => parsed.config_body = field.bytes(),
                _ => {}
            }
        }
        Ok(parsed)
    }
}

/// The configuration for a container's sandbox.
pub fn settings(paths: &Paths, options: &Any, spec: &Spec) -> Result<Config, TaskError> {
    let Options { config_path, config_body } = Options::parse(options)?;
    let mut layers = Layers::read(&paths.config)?;
    if !config_path.is_empty() {
        layers.file(Path::new(&config_path))?;
    }
    let body = String::from_utf8(config_body)
        .map_err(|_| TaskError::Invalid("runtime options: ConfigBody is no UTF-8 text".into()))?;
    layers.text("ConfigBody of the runtime options", &body)?;
    layers.annotations(spec.annotations().iter().flatten())?;
    Ok(layers.config())
}

impl From<ConfigError> for TaskError {
    fn from(error: ConfigError) -> Self {
        Self::Invalid(crate::error::chain_text(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, fs};

    use containerd_shim_protos::protobuf::CodedOutputStream;

    use super::*;
    use crate::{cli::Memory, paths::Environment};

    fn any(path: &str, body: &[u8]) -> Any {
        let mut value = Vec::new();
        let mut out = CodedOutputStream::vec(&mut value);
        out.write_string(1, "io.ampoule.options").unwrap();
        out.write_string(2, path).unwrap();
        out.write_bytes(3, body).unwrap();
        out.flush().unwrap();
        drop(out);
        Any { type_url: OPTIONS.into(), value, ..Default::default() }
    }

    fn spec(annotations: &[(&str, &str)]) -> Spec {
        let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        let mut spec = Spec::default();
        spec.set_annotations(Some(annotations.collect::<HashMap<_, _>>()));
        spec
    }

    #[test]
    fn annotations_are_over_the_body_and_that_over_the_path_and_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut paths = Paths::new(&Environment::default());
        paths.config = vec![at("config.toml")];
        let all = "[sandbox]\nmemory = '1g'\nvcpus = 2\nscratch_size = '1g'\nboot_timeout = 11\n";
        fs::write(at("config.toml"), all).unwrap();
        let more = "[sandbox]\nmemory = '2g'\nvcpus = 3\nscratch_size = '2g'\n";
        fs::write(at("other.toml"), more).unwrap();
        let options =
            any(at("other.toml").to_str().unwrap(), b"sandbox.vcpus = 4\nsandbox.memory = '3g'");
        let pod = spec(&[("io.ampoule.sandbox.memory", "4g"), ("unrelated", "x")]);
        let sandbox = settings(&paths, &options, &pod).unwrap().sandbox;
        let gib = |n: u64| Memory(n << 30);
        assert_eq!((sandbox.memory, sandbox.vcpus), (gib(4), 4));
        assert_eq!((sandbox.scratch_size, sandbox.boot_timeout), (gib(2), 11));
    }

    #[test]
    fn mistakes_name_their_source_and_other_runtimes_options_say_nothing() {
        let mut paths = Paths::new(&Environment::default());
        paths.config.clear();
        for (options, annotations, part) in [
            (any("/no/such/file", b""), &[][..], "/no/such/file"),
            (any("", b"sandbox.vcpu = 1"), &[], "ConfigBody"),
            (any("", b"\xff"), &[], "UTF-8"),
            (any("", b""), &[("io.ampoule.sandbox.kernel", "/k")], "io.ampoule.sandbox.kernel"),
            (Any { value: vec![0x12, 0xff], ..any("", b"") }, &[], "runtime options"),
        ] {
            let error = settings(&paths, &options, &spec(annotations)).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        let runc = Any { type_url: "containerd.runc.v1.Options".into(), ..any("/no", b"\xff") };
        assert_eq!(settings(&paths, &runc, &spec(&[])).unwrap(), Config::default());
    }
}
