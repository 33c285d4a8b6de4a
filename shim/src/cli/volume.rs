//! `--volume`: a directory or a file of this host in the container, or a directory of the sandbox's own disk, with docker's
//! meaning.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use super::values::ValueError;

/// What is seen where in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Of this host, absolute; or on the sandbox's scratch disk.
    pub source: Option<PathBuf>,
    pub destination: String,
    pub read_only: bool,
}

impl FromStr for Volume {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, destination, options) = match parts[..] {
            [destination] => (None, destination, "rw"),
            [source, destination] => (Some(source), destination, "rw"),
            [source, destination, options] => (Some(source), destination, options),
            _ => return Err(ValueError::Volume),
        };
        if !destination.starts_with('/') {
            return Err(ValueError::Volume);
        }
        let is_name = |source: &str| !source.contains('/') && source != "." && source != "..";
        if source.is_some_and(is_name) {
            return Err(ValueError::NamedVolume);
        }
        let read_only = match options {
            "ro" => true,
            "rw" => false,
            _ => return Err(ValueError::VolumeOption),
        };
        let absolute =
            |source| std::path::absolute(Path::new(source)).map_err(|_| ValueError::Volume);
        let source = source.map(absolute).transpose()?;
        Ok(Self { source, destination: destination.into(), read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read_as_docker_reads_them() {
        let here = std::env::current_dir().unwrap();
        for (text, source, destination, read_only) in [
            ("/srv/data:/data", Some("/srv/data".into()), "/data", false),
            ("./data:/x:ro", Some(here.join("data")), "/x", true),
            (".:/x:rw", Some(here.clone()), "/x", false),
            ("data/one:/x", Some(here.join("data/one")), "/x", false),
            ("/data", None, "/data", false),
        ] {
            let destination = destination.to_string();
            assert_eq!(text.parse(), Ok(Volume { source, destination, read_only }), "{text}");
        }
        for (text, error) in [
            ("", ValueError::Volume),
            ("data", ValueError::Volume),
            ("/a:b", ValueError::Volume),
            ("/a:/b:ro:ro", ValueError::Volume),
            ("data:/x", ValueError::NamedVolume),
            (":/x", ValueError::NamedVolume),
            ("/a:/b:z", ValueError::VolumeOption),
            ("/a:/b:", ValueError::VolumeOption),
        ] {
            assert_eq!(text.parse::<Volume>(), Err(error), "{text}");
        }
    }
}
