//! Paths inside an image: bytes, from its root, and never leading upwards.

use super::TreeError;

/// Linux: NAME_MAX, and PATH_MAX without its NUL.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;

/// The components of a path inside an image; `.` and doubled slashes vanish, the root is empty. A path
/// that begins with a slash begins at the image's root all the same: umoci writes such layers.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    match path {
        path if path.len() > MAX_PATH => return Err(TreeError::LongPath),
        path if path.contains(&0) => return Err(TreeError::NulPath),
        _ => {}
    }
    let parts = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<&[u8]> = parts.collect();
    match parts.iter().find(|part| **part == b".." || part.len() > MAX_NAME) {
        Some(&b"..") => Err(TreeError::ParentPath),
        Some(_) => Err(TreeError::LongName),
        None => Ok(parts),
    }
}

/// What a symbolic link may hold; where it leads is the guest's affair.
pub fn is_link_target(target: &[u8]) -> bool {
    !target.is_empty() && target.len() <= MAX_PATH && !target.contains(&0)
}

/// A path for a message.
pub fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_PATH)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_remain() {
        for (path, parts) in [
            ("", vec![]),
            (".", vec![]),
            ("/", vec![]),
            ("./a//b/./c/", vec!["a", "b", "c"]),
            ("/etc/x", vec!["etc", "x"]),
        ] {
            let parts: Vec<&[u8]> = parts.into_iter().map(str::as_bytes).collect();
            assert_eq!(components(path.as_bytes()), Ok(parts));
        }
    }

    #[test]
    fn hostile_paths_are_refused() {
        let (name, path) = ("n".repeat(256), "a/".repeat(2100));
        for (path, error) in [
            ("..", TreeError::ParentPath),
            ("a/../b", TreeError::ParentPath),
            ("a/..", TreeError::ParentPath),
            ("./../x", TreeError::ParentPath),
            ("a\0b", TreeError::NulPath),
            (&name, TreeError::LongName),
            (&path, TreeError::LongPath),
        ] {
            assert_eq!(components(path.as_bytes()), Err(error), "{path:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whatever_passes_is_plain(path in "[a./\0-]{0,12}") {
            if let Ok(parts) = components(path.as_bytes()) {
                let plain = |part: &&[u8]| !part.is_empty() && *part != b"." && *part != b"..";
                proptest::prop_assert!(parts.iter().all(|part| plain(part) && !part.contains(&b'/')));
            }
        }
    }
}
