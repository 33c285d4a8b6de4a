//! Mount options of the spec, as util-linux and runc spell them: pure.

use ampoule_vmm_api::attributes::Attributes;
use rustix::mount::MountAttrFlags;

/// A list of options, sorted by whom they concern.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// "bind" or "rbind".
    pub bind: bool,
    /// Binds take what is mounted below along.
    pub recursive: bool,
    /// Of this mount.
    pub attributes: Attributes,
    /// Of this mount and of all below ("rro", ...).
    pub recursive_attributes: Attributes,
    /// `MS_*` and whether it goes for all mounts below.
    pub propagation: Option<(u64, bool)>,
    /// "tmpcopyup": a tmpfs begins with what it is mounted on.
    pub copy_up: bool,
    /// The rest, for the file system.
    pub data: Vec<String>,
}

/// The access-time options are values of one field, not bits (mount_setattr(2)).
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Name, bits to set, bits to clear.
const ATTRIBUTES: [(&str, u64, u64); 17] = [
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, libc::MOUNT_ATTR_NODIRATIME),
    ("noatime", libc::MOUNT_ATTR_NOATIME, ATIME),
    ("strictatime", libc::MOUNT_ATTR_STRICTATIME, ATIME),
    ("relatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("atime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("nostrictatime", libc::MOUNT_ATTR_RELATIME, ATIME),
];

/// Name, and value of struct mount_attr's propagation field.
const PROPAGATIONS: [(&str, u64); 4] = [
    ("private", libc::MS_PRIVATE),
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// Sorts options. What is not known here is for the file system to know.
pub fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Options {
    let mut parsed = Options::default();
    for option in options {
        parsed.add(option);
    }
    parsed
}

/// "shared", "rslave", ...
pub fn propagation(name: &str) -> Option<(u64, bool)> {
    let find = |name| PROPAGATIONS.iter().find(|(n, _)| *n == name).map(|(_, flag)| *flag);
    match name.strip_prefix('r').and_then(find) {
        Some(flag) => Some((flag, true)),
        None => find(name).map(|flag| (flag, false)),
    }
}

impl Options {
    fn add(&mut self, option: &str) {
        let attribute = |name: &str| ATTRIBUTES.iter().find(|(n, ..)| *n == name);
        match option {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            "defaults" => {}
            _ => {
                if let Some(propagation) = propagation(option) {
                    self.propagation = Some(propagation);
                } else if let Some((_, set, clear)) = attribute(option) {
                    change(&mut self.attributes, *set, *clear);
                } else if let Some((_, set, clear)) = option.strip_prefix('r').and_then(attribute) {
                    change(&mut self.recursive_attributes, *set, *clear);
                } else {
                    self.data.push(option.to_owned());
                }
            }
        }
    }

    /// For a new mount, where nothing needs clearing. What is to be copied into has to be writable first.
    pub fn new_attributes(&self) -> MountAttrFlags {
        let mut attributes = MountAttrFlags::from_bits_retain(self.attributes.set as u32);
        attributes.set(
            MountAttrFlags::MOUNT_ATTR_RDONLY,
            !self.copy_up && attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY),
        );
        attributes
    }
}

/// The later of two contradicting options wins.
fn change(attributes: &mut Attributes, set: u64, clear: u64) {
    attributes.set = attributes.set & !clear | set;
    attributes.clear = attributes.clear & !(set & !ATIME) | clear;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted() {
        let o = parse(["nosuid", "strictatime", "mode=755", "size=65536k", "rslave", "defaults"]);
        assert_eq!(o.attributes.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(o.attributes.clear, ATIME);
        assert_eq!(o.data, ["mode=755", "size=65536k"]);
        assert_eq!(o.propagation, Some((libc::MS_SLAVE, true)));
        assert!(!o.bind);
    }

    #[test]
    fn the_names_that_are_told_to_others_are_those_known_here() {
        assert_eq!(parse(ampoule_agent_api::MOUNT_OPTIONS.iter().copied()).data, [""; 0]);
        let known =
            ATTRIBUTES.iter().map(|(name, ..)| name).chain(PROPAGATIONS.iter().map(|(n, _)| n));
        for name in known.flat_map(|name| [name.to_string(), format!("r{name}")]) {
            assert!(ampoule_agent_api::MOUNT_OPTIONS.contains(&name.as_str()), "{name}");
        }
    }

    #[test]
    fn binds_and_recursion() {
        let o = parse(["rbind", "rro", "noexec", "private"]);
        assert!(o.bind && o.recursive);
        assert_eq!(o.recursive_attributes.set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(o.attributes.set, libc::MOUNT_ATTR_NOEXEC);
        assert_eq!(o.propagation, Some((libc::MS_PRIVATE, false)));
        assert!(!parse(["bind"]).recursive);
    }

    #[test]
    fn the_later_word_wins() {
        let o = parse(["ro", "rw"]);
        assert_eq!((o.attributes.set, o.attributes.clear), (0, libc::MOUNT_ATTR_RDONLY));
        let o = parse(["rw", "ro"]);
        assert_eq!((o.attributes.set, o.attributes.clear), (libc::MOUNT_ATTR_RDONLY, 0));
        let o = parse(["noatime", "relatime"]);
        assert_eq!((o.attributes.set, o.attributes.clear), (libc::MOUNT_ATTR_RELATIME, ATIME));
    }

    #[test]
    fn words_that_begin_with_r_are_not_all_recursive() {
        assert_eq!(parse(["relatime"]).recursive_attributes, Attributes::default());
        assert_eq!(parse(["rw"]).attributes.clear, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(parse(["rubbish"]).data, ["rubbish"]);
        assert_eq!(propagation("shared"), Some((libc::MS_SHARED, false)));
        assert_eq!(propagation("rshared"), Some((libc::MS_SHARED, true)));
        assert_eq!(propagation("rrshared"), None);
    }
}
