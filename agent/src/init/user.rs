//! Who the process runs as. Names are looked up in the container's own /etc/passwd and /etc/group, read
//! as plain text: never through the C library, whose NSS modules an image could bring along.
//!
//! `username` is as in an image's config: "user", "uid", "user:group", "uid:gid", ... A user known by
//! its name (or found by its uid) has its group and supplementary groups from the files, unless a group
//! is given.

use std::{fs::File, io::Read};

use rustix::{
    fs::{OFlags, ResolveFlags},
    io::Errno,
};

use super::paths::{Root, kind};
use crate::{
    oci,
    plan::{StepError, cause, refuse},
};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Longer files are refused.
const MAX_FILE: u64 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    pub home: String,
}

/// Finds out who a process of this container is.
pub fn resolve(root: &Root, wanted: &oci::User) -> Result<User, StepError> {
    let passwd = read(root, PASSWD);
    let (uid, gid, mut groups) = match wanted.username.as_str() {
        "" => (wanted.uid, wanted.gid, Vec::new()),
        name => {
            let group = read(root, GROUP);
            let refused = |cause: String| refuse("user", name, cause);
            let passwd = needed(&passwd, PASSWD).map_err(refused)?;
            let group = needed(&group, GROUP).map_err(refused)?;
            look_up(name, passwd, group).map_err(|cause| refuse("user", name, cause))?
        }
    };
    groups.extend(&wanted.additional_gids);
    groups.sort_unstable();
    groups.dedup();
    let home = users(passwd.as_deref().unwrap_or_default())
        .find(|u| u.uid == uid)
        .map(|u| u.home.to_owned())
        .filter(|home| home.starts_with('/'));
    Ok(User { uid, gid, groups, home: home.unwrap_or_else(|| "/".to_owned()) })
}

/// A missing file knows nobody; one that cannot be read is an error once it is needed.
fn needed<'a>(file: &'a Result<String, Errno>, path: &str) -> Result<&'a str, String> {
    let why = match file {
        Ok(text) => return Ok(text),
        Err(Errno::NOENT) => return Ok(""),
        Err(Errno::LOOP) => "a symbolic link".to_owned(),
        Err(Errno::INVAL) => "no regular file".to_owned(),
        Err(Errno::FBIG) => format!("larger than {} KiB", MAX_FILE >> 10),
        Err(e) => cause((*e).into()),
    };
    Err(format!("{path} of the image cannot be read: {why}"))
}

/// Reads a file of the image: a plain one, not through links, not waiting for a FIFO, not without end.
fn read(root: &Root, path: &str) -> Result<String, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = root.open_with(path, flags, ResolveFlags::empty())?;
    if kind(&file)? != rustix::fs::FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let mut bytes = Vec::new();
    let mut file = File::from(file).take(MAX_FILE + 1);
    file.read_to_end(&mut bytes).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(Errno::FBIG),
        false => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

struct PasswdUser<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// Lines of passwd(5) that can be understood.
fn users(passwd: &str) -> impl Iterator<Item = PasswdUser<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|n| !n.is_empty())?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        Some(PasswdUser { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

/// Name, gid and members of the lines of group(5) that can be understood.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|n| !n.is_empty())?;
        let gid = id(fields.nth(1)?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// An id. The highest number means "unchanged" to the kernel and is nobody's.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// uid, gid and supplementary groups.
fn look_up(wanted: &str, passwd: &str, group: &str) -> Result<(u32, u32, Vec<u32>), &'static str> {
    let (user, wanted_group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (wanted, None),
    };
    let number = id(user);
    let known = users(passwd)
        .find(|u| u.name == user)
        .or_else(|| users(passwd).find(|u| Some(u.uid) == number));
    let (uid, own_gid, name) = match (known, number) {
        (Some(known), _) => (known.uid, known.gid, Some(known.name)),
        (None, Some(uid)) => (uid, 0, None),
        (None, None) if user.is_empty() => (0, 0, None),
        (None, None) => return Err("no such user in /etc/passwd"),
    };
    if let Some(wanted) = wanted_group {
        let by_name = groups(group).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
        let gid = by_name.or_else(|| id(wanted)).ok_or("no such group in /etc/group")?;
        return Ok((uid, gid, Vec::new()));
    }
    let member = |members: &str| members.split(',').any(|m| Some(m) == name);
    let supplementary =
        groups(group).filter(|(.., members)| member(members)).map(|(_, gid, _)| gid).collect();
    Ok((uid, own_gid, supplementary))
}

#[cfg(test)]
mod tests;
