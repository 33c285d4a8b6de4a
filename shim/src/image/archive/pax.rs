//! Pax extended headers (POSIX.1-2017, pax "Extended Header"): records `LENGTH KEY=VALUE\n`.

use std::collections::BTreeMap;

use super::ArchiveError;

/// The prefix under which archivers keep extended attributes.
const XATTR: &str = "SCHILY.xattr.";
/// Attributes by which overlayfs talks to itself; from an image they would redirect its lookups.
const OVERLAY: &[u8] = b"trusted.overlay.";

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pax(BTreeMap<Vec<u8>, Vec<u8>>);

impl Pax {
    /// Parses all records; a later record of one key wins, an empty value means "not given".
    pub fn parse(mut bytes: &[u8]) -> Result<Self, ArchiveError> {
        let mut records = BTreeMap::new();
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or(ArchiveError::Pax)?;
            records.insert(key.to_vec(), value.to_vec());
            bytes = rest;
        }
        Ok(Self(records))
    }

    pub fn take(&mut self, key: &str) -> Option<Vec<u8>> {
        self.0.remove(key.as_bytes()).filter(|value| !value.is_empty())
    }

    pub fn number(&mut self, key: &str) -> Result<Option<u64>, ArchiveError> {
        self.take(key).map(|value| decimal(&value).ok_or(ArchiveError::Pax)).transpose()
    }

    /// A time as seconds and nanoseconds; digits beyond nanoseconds are cut.
    pub fn time(&mut self, key: &str) -> Result<Option<(i64, u32)>, ArchiveError> {
        self.take(key).map(|value| time(&value).ok_or(ArchiveError::Pax)).transpose()
    }

    /// The extended attributes, by their full names.
    pub fn attributes(&mut self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let records = std::mem::take(&mut self.0);
        let mut attributes = BTreeMap::new();
        for (key, value) in records {
            match key.strip_prefix(XATTR.as_bytes()) {
                Some(name) if !name.starts_with(OVERLAY) => {
                    attributes.insert(name.to_vec(), value);
                }
                Some(_) => {}
                None => {
                    self.0.insert(key, value);
                }
            }
        }
        attributes
    }
}

/// Splits off the first record: key, value, what follows.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(12).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let body = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], &bytes[length..]))
}

/// A number of digits only: no sign, no space.
pub fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let dot = text.iter().position(|&byte| byte == b'.').unwrap_or(text.len());
    let seconds = i64::try_from(decimal(&text[..dot])?).ok()?;
    let mut digits: Vec<u8> = text.get(dot + 1..).unwrap_or_default().to_vec();
    digits.resize(9, b'0');
    let nanos = u32::try_from(decimal(&digits)?).ok()?;
    Some(match (negative, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        // The fraction of a time always counts forward.
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
    }

    #[test]
    fn binary_values_keep_their_newlines() {
        let value = b"\x01\n5 a=b\n\0";
        let bytes =
            [encode("SCHILY.xattr.security.capability", value), encode("uid", b"7")].concat();
        let mut pax = Pax::parse(&bytes).unwrap();
        assert_eq!(pax.attributes(), [(b"security.capability".to_vec(), value.to_vec())].into());
        assert_eq!(pax.number("uid").unwrap(), Some(7));
    }

    #[test]
    fn overlayfs_attributes_stay_out() {
        let bytes = encode("SCHILY.xattr.trusted.overlay.redirect", b"/etc");
        assert!(Pax::parse(&bytes).unwrap().attributes().is_empty());
    }

    #[test]
    fn malformed_records_are_refused() {
        for bytes in [
            &b"5"[..],
            b"5 a=b",
            b"6 a=b",
            b"0 a=b\n",
            b"99 a=b\n",
            b"6 abb\n",
            b"-6 a=b\n",
            b"+6 a=b\n",
            b"18446744073709551616 a=b\n",
            b"3 \n",
            b" a=b\n",
        ] {
            assert!(Pax::parse(bytes).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn times_have_signs_and_fractions() {
        for (text, expected) in [
            ("1", Some((1, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("1.", Some((1, 0))),
            ("x", None),
            ("1.x", None),
            ("1e9", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes: Vec<u8>) {
            let _ = Pax::parse(&bytes);
        }

        #[test]
        fn what_is_encoded_is_parsed(key in "[a-z.]{1,20}", value: Vec<u8>) {
            let pax = Pax::parse(&encode(&key, &value)).unwrap();
            proptest::prop_assert_eq!(pax.0, BTreeMap::from([(key.into_bytes(), value)]));
        }
    }
}
