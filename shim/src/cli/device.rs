//! `--device`: a disk of this host in the container, with docker's meaning.

use std::{path::PathBuf, str::FromStr};

use super::values::ValueError;

/// A block device of this host, and where and how the container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOption {
    pub source: PathBuf,
    pub path: String,
    /// Of "rwm".
    pub access: String,
}

impl FromStr for DeviceOption {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parts: Vec<&str> = text.split(':').collect();
        let (source, path, access) = match parts[..] {
            [source] => (source, source, "rwm"),
            [source, path] if path.starts_with('/') => (source, path, "rwm"),
            [source, access] => (source, source, access),
            [source, path, access] => (source, path, access),
            _ => return Err(ValueError::Device),
        };
        let known = !access.is_empty() && access.chars().all(|letter| "rwm".contains(letter));
        if !source.starts_with('/') || !path.starts_with('/') || !known {
            return Err(ValueError::Device);
        }
        Ok(Self { source: source.into(), path: path.into(), access: access.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_docker_reads_them() {
        for (text, source, path, access) in [
            ("/dev/sdb", "/dev/sdb", "/dev/sdb", "rwm"),
            ("/dev/sdb:r", "/dev/sdb", "/dev/sdb", "r"),
            ("/dev/sdb:/dev/xvda", "/dev/sdb", "/dev/xvda", "rwm"),
            ("/dev/sdb:/dev/xvda:rw", "/dev/sdb", "/dev/xvda", "rw"),
        ] {
            let expected =
                DeviceOption { source: source.into(), path: path.into(), access: access.into() };
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "sdb", "/dev/sdb:xvda", "/dev/sdb:", "/dev/sdb:/x:", "/a:/b:r:w", "/a:x:r"]
        {
            assert_eq!(text.parse::<DeviceOption>(), Err(ValueError::Device), "{text}");
        }
    }
}
