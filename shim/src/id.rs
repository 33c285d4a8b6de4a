//! Identifiers of sandboxes, containers and execs. They end up in host names, file names and guest paths, so
//! every one that enters is checked: a letter or digit, then at most 75 of letters, digits, `_`, `.`, `-`.

use std::{fmt, str::FromStr};

use rustix::rand::{GetRandomFlags, getrandom};

/// Longest identifier in bytes (containerd's limit).
pub const MAX_LEN: usize = 76;

/// A checked identifier.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(String);

/// Why an identifier is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to {MAX_LEN} letters, digits, '_', '.' or '-', the first a letter or digit")]
pub struct BadId;

impl Id {
    /// Twelve random hexadecimal digits, as docker's short ids.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let good = text.len() <= MAX_LEN
            && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && text.bytes().all(allowed);
        if good { Ok(Self(text.to_string())) } else { Err(BadId) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_names_are_ids() {
        for good in ["a", "web-1", "0.x_Y", &"a".repeat(MAX_LEN)] {
            assert_eq!(good.parse::<Id>().map(|id| id.to_string()).as_deref(), Ok(good));
        }
        for bad in ["", "-rf", "../x", "a/b", "a b", "ä", "a\0", ".", &"a".repeat(MAX_LEN + 1)] {
            assert!(bad.parse::<Id>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn random_ids_are_ids_and_differ() {
        let (a, b) = (Id::random().unwrap(), Id::random().unwrap());
        assert_eq!(a.as_str().parse::<Id>().unwrap(), a);
        assert_ne!(a, b);
    }
}
