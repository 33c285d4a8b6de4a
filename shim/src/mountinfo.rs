//! What is mounted where, by `/proc/self/mountinfo` (proc_pid_mountinfo(5)).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const PATH: &str = "/proc/self/mountinfo";

/// A mount as this process sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The directory of the file system that is mounted.
    pub root: String,
    pub kind: String,
    pub source: String,
    /// Of the file system.
    pub options: Vec<String>,
}

/// What is mounted on a directory, given without symbolic links, and on top there.
pub fn mounted_on(directory: &Path) -> io::Result<Option<Mounted>> {
    Ok(find(&fs::read_to_string(PATH)?, directory))
}

/// The image of the EROFS that is mounted on a directory, all of it, as containerd's snapshotter has its layers: a
/// file, also where a loop device is between, or a block device. `None` where something else is, or nothing,
/// or where it has no name any more.
pub fn erofs_image(directory: &Path) -> io::Result<Option<PathBuf>> {
    // That is known of most directories at once.
    if rustix::fs::statfs(directory)?.f_type != EROFS {
        return Ok(None);
    }
    let mounted = mounted_on(&fs::canonicalize(directory)?)?.filter(Mounted::is_one_erofs);
    let image = mounted.and_then(|mounted| behind(&mounted.source, Path::new("/sys/block")));
    // Where it cannot be reached any more, its mount still can.
    Ok(image.filter(|image| image.exists()))
}

const EROFS: i64 = 0xe0f5_e1e2;

impl Mounted {
    /// With all its data on one device.
    fn is_one_erofs(&self) -> bool {
        let devices = self.options.iter().any(|option| option.starts_with("device="));
        self.kind == "erofs" && self.root == "/" && !devices
    }
}

/// The file under a loop device, if that shows all of it; what is no loop device stands for itself.
fn behind(source: &str, disks: &Path) -> Option<PathBuf> {
    let Some(name) = source.strip_prefix("/dev/").filter(|name| name.starts_with("loop")) else {
        return Some(source.into()).filter(|path: &PathBuf| path.is_absolute());
    };
    let of = |what| fs::read_to_string(disks.join(name).join("loop").join(what)).ok();
    let file = of("backing_file")?;
    (of("offset")?.trim() == "0").then(|| file.trim_end_matches('\n').into())
}

fn find(mountinfo: &str, directory: &Path) -> Option<Mounted> {
    let mut found = None;
    for line in mountinfo.lines() {
        let (mount, system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3).map(unescape);
        let (root, place) = (fields.next()?, fields.next()?);
        if Some(&*place) == directory.to_str() {
            found = Some((root, system));
        }
    }
    let (root, system) = found?;
    let mut fields = system.split(' ');
    let (kind, source, options) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Mounted {
        root,
        kind: kind.into(),
        source: unescape(source),
        options: options.split(',').map(unescape).collect(),
    })
}

/// What the kernel writes as backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if byte == b'\\' => {
                plain.push(escaped);
                rest = &after[3..];
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
90 22 0:50 / /merged rw,relatime shared:2 - overlay overlay rw,lowerdir=/v/l/A:/v/l/B\\134:C\\040D,upperdir=/v/u
91 22 0:51 /sub /mnt/a\\040b rw - tmpfs tmp\\040fs rw,size=10k
92 22 0:52 / /mnt/two rw - overlay overlay rw,lowerdir=/x:/y
93 22 0:53 / /mnt/two rw - tmpfs tmpfs rw
94 22 7:3 / /s/1/fs ro - erofs /dev/loop3 ro,user_xattr
95 22 7:3 /etc /s/2/fs ro - erofs /dev/loop3 ro,user_xattr
96 22 7:3 / /s/3/fs ro - erofs /dev/loop3 ro,device=/dev/loop4
";

    fn found(directory: &str) -> Option<Mounted> {
        find(MOUNTINFO, Path::new(directory))
    }

    #[test]
    fn a_mount_is_found_by_its_directory_and_the_last_one_counts() {
        let overlay = found("/merged").unwrap();
        let options = ["rw", "lowerdir=/v/l/A:/v/l/B\\:C D", "upperdir=/v/u"];
        assert_eq!(
            (&*overlay.kind, &overlay.options[..]),
            ("overlay", &options.map(String::from)[..])
        );
        let spaces = found("/mnt/a b").unwrap();
        assert_eq!((&*spaces.root, &*spaces.source), ("/sub", "tmp fs"));
        assert_eq!(found("/mnt/two").unwrap().kind, "tmpfs");
        assert_eq!(found("/nowhere"), None);
        assert_eq!(unescape("a\\040b\\0\\999\\"), "a b\\0\\999\\");
    }

    #[test]
    fn an_image_is_what_shows_all_of_one_erofs() {
        let whole = |directory| found(directory).unwrap().is_one_erofs();
        assert_eq!(["/s/1/fs", "/s/2/fs", "/s/3/fs", "/"].map(whole), [true, false, false, false]);
        assert_eq!(erofs_image(Path::new("/")).unwrap(), None);
    }

    #[test]
    fn a_loop_device_stands_for_its_file() {
        let disks = tempfile::tempdir().unwrap();
        for (name, offset) in [("loop3", "0\n"), ("loop4", "4096\n")] {
            let folder = disks.path().join(name).join("loop");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("backing_file"), "/s/1/layer.erofs\n").unwrap();
            fs::write(folder.join("offset"), offset).unwrap();
        }
        let file = Some(PathBuf::from("/s/1/layer.erofs"));
        assert_eq!(behind("/dev/loop3", disks.path()), file);
        assert_eq!(behind("/s/1/layer.erofs", disks.path()), file);
        assert_eq!(behind("/dev/sda1", disks.path()), Some("/dev/sda1".into()));
        for none in ["/dev/loop4", "/dev/loop5", "none"] {
            assert_eq!(behind(none, disks.path()), None, "{none}");
        }
    }
}
