//! The mount option `tmpcopyup`: a new tmpfs begins with what the directory has that it is mounted on.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat,
};

/// Copies all that is in a directory into another, with owners and modes. Nobody else is in either yet.
pub fn copy_up(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let (from, to) = (from.as_fd(), to.as_fd());
    let mut directories = vec![PathBuf::from(".")];
    while let Some(directory) = directories.pop() {
        let listed = open(from, &directory, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        for entry in Dir::new(listed)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let path = directory.join(name);
            if copy(from, to, &path)? == FileType::Directory {
                directories.push(path);
            }
        }
    }
    Ok(())
}

fn copy(from: impl AsFd, to: impl AsFd, path: &Path) -> io::Result<FileType> {
    let stat = statat(&from, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let (kind, mode) =
        (FileType::from_raw_mode(stat.st_mode), Mode::from_raw_mode(stat.st_mode & 0o7777));
    match kind {
        FileType::Directory => mkdirat(&to, path, mode)?,
        FileType::Symlink => symlinkat(readlinkat(&from, path, Vec::new())?, &to, path)?,
        FileType::RegularFile => {
            let mut source = File::from(open(&from, path, OFlags::RDONLY, Mode::empty())?);
            let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            io::copy(&mut source, &mut File::from(open(&to, path, new, mode)?))?;
        }
        _ => mknodat(&to, path, kind, mode, stat.st_rdev)?,
    }
    let (user, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(&to, path, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    if kind != FileType::Symlink {
        // After chown(2), which takes set-user-ID away; and umask(2) has taken its share.
        chmodat(&to, path, mode, AtFlags::empty())?;
    }
    Ok(kind)
}

fn open(at: impl AsFd, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    Ok(openat(at, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode)?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn files_directories_and_links_come_along_as_they_are() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let [a, b] = [from.path(), to.path()];
        fs::create_dir_all(a.join("d/e")).unwrap();
        fs::write(a.join("d/e/file"), "words").unwrap();
        fs::set_permissions(a.join("d/e/file"), PermissionsExt::from_mode(0o4755)).unwrap();
        fs::set_permissions(a.join("d"), PermissionsExt::from_mode(0o1777)).unwrap();
        symlink("/etc/passwd", a.join("link")).unwrap();
        symlink("nowhere", a.join("d/dangling")).unwrap();
        copy_up(File::open(a).unwrap(), File::open(b).unwrap()).unwrap();
        assert_eq!(fs::read(b.join("d/e/file")).unwrap(), b"words");
        assert_eq!(fs::metadata(b.join("d/e/file")).unwrap().mode() & 0o7777, 0o4755);
        assert_eq!(fs::metadata(b.join("d")).unwrap().mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_link(b.join("link")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read_link(b.join("d/dangling")).unwrap(), Path::new("nowhere"));
    }
}
