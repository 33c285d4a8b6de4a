//! Words that stand for earlier mounts: `{{ mount 0 }}`, `{{ overlay 0 3 }}` (containerd, `docs/mounts.md`).

use super::{Mount, RootFsError, plan::refuse};

/// The earlier mounts that a word stands for, first to last; `None` if it is a path.
pub fn mounts(text: &str) -> Result<Option<Vec<usize>>, RootFsError> {
    let Some(inside) = text.trim().strip_prefix("{{") else {
        return match text.contains("{{") {
            true => Err(unknown(text)),
            false => Ok(None),
        };
    };
    let inside = inside.strip_suffix("}}").ok_or_else(|| unknown(text))?;
    let words: Vec<&str> = inside.split_whitespace().collect();
    let number = |word: &str| word.parse::<u8>().map(usize::from).map_err(|_| unknown(text));
    match words[..] {
        ["mount", index] => Ok(Some(vec![number(index)?])),
        ["overlay", start, end] => {
            let (start, end) = (number(start)?, number(end)?);
            Ok(Some(if start > end {
                (end..=start).rev().collect()
            } else {
                (start..=end).collect()
            }))
        }
        _ => Err(unknown(text)),
    }
}

/// The one earlier mount that a word stands for.
pub fn mount(text: &str) -> Result<Option<usize>, RootFsError> {
    match mounts(text)?.as_deref() {
        None => Ok(None),
        Some([index]) => Ok(Some(*index)),
        Some(_) => Err(unknown(text)),
    }
}

/// The earlier mount of a word, and the path below it: `{{ mount 0 }}/upper`.
pub fn below(text: &str) -> Result<Option<(usize, &str)>, RootFsError> {
    match text.split_once("}}") {
        None => Ok(None),
        Some((word, path)) => Ok(mount(&format!("{word}}}}}"))?.map(|index| (index, path))),
    }
}

pub fn find(earlier: &[Mount], index: usize) -> Result<&Mount, RootFsError> {
    let missing = || refuse("mounts", format!("there is no mount {index} before the last one"));
    earlier.get(index).ok_or_else(missing)
}

fn unknown(text: &str) -> RootFsError {
    refuse("mounts", format!("`{text}` stands for nothing that is known here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_paths() {
        for (text, expected) in [
            ("/a/b", None),
            ("{{ mount 0 }}", Some(vec![0])),
            ("{{mount 12}}", Some(vec![12])),
            ("{{ overlay 1 3 }}", Some(vec![1, 2, 3])),
            ("{{ overlay 3 1 }}", Some(vec![3, 2, 1])),
            ("{{ overlay 2 2 }}", Some(vec![2])),
        ] {
            assert_eq!(mounts(text).unwrap(), expected, "{text}");
        }
        assert_eq!(below("{{ mount 0 }}/upper").unwrap(), Some((0, "/upper")));
        assert_eq!(below("/a/upper").unwrap(), None);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in [
            "{{ mount }}",
            "{{ mount -1 }}",
            "{{ mount 999 }}",
            "{{ source 0 }}",
            "{{ mount 0",
            "a{{ mount 0 }}",
            "{{ overlay 0 99999999 }}",
            "{{ mount 0 }}/x",
        ] {
            assert!(mounts(text).is_err(), "{text}");
        }
        assert!(mount("{{ overlay 0 1 }}").is_err());
    }
}
