//! Extended attributes behind an inode (`struct erofs_xattr_ibody_header`, `erofs_xattr_entry`).

use std::collections::BTreeMap;

const HEADER: usize = 12;
const ENTRY: usize = 4;
/// `i_xattr_icount` counts words of 4 bytes in 16 bits.
const MAX: usize = HEADER + 4 * (u16::MAX as usize - 1);

/// The inode's field for attributes of this many bytes: words, of which the header counts as one.
pub fn count(size: usize) -> u16 {
    if size == 0 { 0 } else { ((size - HEADER) / 4 + 1) as u16 }
}

/// The attributes that follow an inode; nothing where there are none.
pub fn encode(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut body = vec![0; HEADER];
    for (name, value) in xattrs {
        let Some((index, suffix)) = split_prefix(name) else { continue };
        body.extend([suffix.len() as u8, index]);
        body.extend((value.len() as u16).to_le_bytes());
        body.extend(suffix);
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    if body.len() == HEADER { Vec::new() } else { body }
}

/// The length of [`encode`]; `None` if no inode can hold them.
pub fn size(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Option<u64> {
    let known = xattrs.iter().filter_map(|(name, value)| Some((split_prefix(name)?.1, value)));
    let mut size = 0;
    for (suffix, value) in known {
        if suffix.len() > u8::MAX.into() || value.len() > u16::MAX.into() {
            return None;
        }
        size += (ENTRY + suffix.len() + value.len()).next_multiple_of(4);
    }
    match size {
        0 => Some(0),
        size => Some(size + HEADER).filter(|size| *size <= MAX).map(|size| size as u64),
    }
}

/// A name's prefix as its number, and the rest. Of `system.`, EROFS knows the two POSIX ACLs; any other
/// is private to the file system it came from and stays behind.
fn split_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => {
            prefixes.iter().find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_as_large_as_planned() {
        let name = |name: &str| name.as_bytes().to_vec();
        let xattrs = BTreeMap::from([
            (name("user.a"), vec![1; 5]),
            (name("security.capability"), vec![2; 20]),
            (name("system.posix_acl_access"), vec![3; 28]),
            (name("system.nfs4_acl"), vec![4; 9]),
        ]);
        assert_eq!(size(&xattrs), Some(12 + 12 + 36 + 32));
        assert_eq!(encode(&xattrs).len(), 12 + 12 + 36 + 32);
        assert_eq!(encode(&BTreeMap::new()).len(), 0);
    }

    #[test]
    fn what_no_inode_can_hold_is_refused() {
        let one = |name: String, size: usize| BTreeMap::from([(name.into_bytes(), vec![0; size])]);
        assert!(size(&one(format!("user.{}", "x".repeat(256)), 1)).is_none());
        assert!(size(&one("user.x".into(), 65536)).is_none());
        let many = (0..5).map(|i| (format!("user.{i}").into_bytes(), vec![0; 65535])).collect();
        assert!(size(&many).is_none());
    }
}
