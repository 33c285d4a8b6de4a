//! Messages of containerd's for which no crate has types: read field by field.

use containerd_shim_protos::protobuf::{CodedInputStream, Result};

/// What a field holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    Number(u64),
    /// A string, bytes or a message.
    Bytes(Vec<u8>),
}

impl Field {
    pub fn number(&self) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Bytes(_) => 0,
        }
    }

    pub fn text(self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    pub fn bytes(self) -> Vec<u8> {
        match self {
            Self::Number(_) => Vec::new(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// The fields of a message in their order, by number. Those of fixed width are left out.
pub fn fields(message: &[u8]) -> Result<Vec<(u32, Field)>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut fields = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag & 7 {
            0 => fields.push((tag >> 3, Field::Number(input.read_raw_varint64()?))),
            1 => drop(input.read_raw_little_endian64()?),
            5 => drop(input.read_raw_little_endian32()?),
            // Whatever else there was once has no meaning now: it fails as a length.
            _ => fields.push((tag >> 3, Field::Bytes(input.read_bytes()?))),
        }
    }
    Ok(fields)
}

/// An entry of a map of strings.
pub fn entry(message: &[u8]) -> Result<(String, String)> {
    let (mut key, mut value) = Default::default();
    for (number, field) in fields(message)? {
        match number {
            1 => key = field.text(),
            2 => value = field.text(),
            _ => {}
        }
    }
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_broken_messages_are_errors() {
        let message =
            [0x08, 0x96, 0x01, 0x12, 2, b'a', b'b', 0x1d, 1, 2, 3, 4, 0x21, 0, 0, 0, 0, 0, 0, 0, 0];
        let expected = [(1, Field::Number(150)), (2, Field::Bytes(b"ab".into()))];
        assert_eq!(fields(&message).unwrap(), expected);
        assert_eq!(entry(&[0x0a, 1, b'k', 0x12, 1, b'v']).unwrap(), ("k".into(), "v".into()));
        for broken in [&[0x12, 5, b'a'][..], &[0x08], &[0x1d, 1], &[0]] {
            assert!(fields(broken).is_err(), "{broken:?}");
        }
    }
}
