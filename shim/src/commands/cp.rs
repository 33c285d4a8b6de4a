//! `ampoule cp`: files between here and a running container, as a tar stream through the container's own `tar`.
//!
//! What a container sends is hostile: it is unpacked in a folder made for it, which no path and no link in the
//! stream leads out of, and only what was asked for is moved from there to its place.

use std::{
    fmt, fs,
    io::{self, Read},
    os::unix::net::UnixStream,
    path::Path,
};

use super::verb::{self, Result, VerbError, connect};
use crate::{
    cli::CpArgs,
    control::{Connection, ExecRequest, Request},
    id::Id,
    paths::Paths,
    registry::{Found, Registry},
    sandbox::Streams,
    stdio::blocking,
    text::one_line,
};

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Here(&'a Path),
    /// Name of the sandbox, path in its container.
    There(&'a str, &'a str),
}

/// `NAME:PATH` is in a sandbox; a path here that has a colon is written with a slash before it, as `./a:b`.
fn place(text: &str) -> Place<'_> {
    match text.split_once(':') {
        Some((name, path)) if !name.contains('/') && !name.is_empty() => Place::There(name, path),
        _ => Place::Here(Path::new(text)),
    }
}

pub fn cp(args: &CpArgs, paths: &Paths) -> u8 {
    verb::run("cp", async {
        let registry = Registry::new(&paths.state);
        match (place(&args.source), place(&args.target)) {
            (Place::There(name, path), Place::Here(target)) => {
                fetch(&registry.find(name)?, path, target).await?;
            }
            (Place::Here(source), Place::There(name, path)) => {
                send(&registry.find(name)?, source, path).await?;
            }
            _ => {
                let why = "one of the two must be NAME:PATH, the other a path here";
                return Err(VerbError::Options(why.into()));
            }
        }
        Ok(0)
    })
}

fn failed(what: &'static str, object: impl fmt::Display) -> impl FnOnce(io::Error) -> VerbError {
    move |source| VerbError::Copy { what, object: object.to_string(), source }
}

/// The folder of a path and its last part, which `/`, `.` and `..` do not have.
fn split(path: &str) -> Result<(&str, &str)> {
    let trimmed = path.trim_end_matches('/');
    let (folder, name) = trimmed.rsplit_once('/').unwrap_or((".", trimmed));
    if matches!(name, "" | "." | "..") {
        return Err(VerbError::Options(format!("{path:?} has no name to be copied by")));
    }
    Ok((if folder.is_empty() { "/" } else { folder }, name))
}

/// From the container.
async fn fetch(found: &Found, path: &str, target: &Path) -> Result<()> {
    let (folder, name) = split(path)?;
    let target = if target.is_dir() { target.join(name) } else { target.to_path_buf() };
    if target.is_dir() {
        return Err(failed("target", target.display())(io::ErrorKind::AlreadyExists.into()));
    }
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let room = tempfile::Builder::new().prefix(".ampoule-cp-").tempdir_in(parent);
    let room = room.map_err(failed("make a folder in", parent.display()))?;
    let tar = Tool::start(found, &["tar", "-cf", "-", "-C", folder, "--", name], false).await?;
    let to = room.path().to_path_buf();
    tar.run(move |_, stdout| {
        let stdout = stdout.ok_or(io::ErrorKind::BrokenPipe)?;
        tar::Archive::new(stdout).unpack(to)
    })
    .await?;
    fs::rename(room.path().join(name), &target).map_err(failed("move it to", target.display()))
}

/// To the container.
async fn send(found: &Found, source: &Path, path: &str) -> Result<()> {
    let source = source.canonicalize().map_err(failed("source", source.display()))?;
    let own = source.file_name().and_then(|name| name.to_str()).map(String::from);
    let into_folder = path.is_empty() || path.ends_with('/') || is_folder(found, path).await?;
    let (folder, name) = match own {
        Some(own) if into_folder => (if path.is_empty() { "." } else { path }, own),
        _ => split(path).map(|(folder, name)| (folder, name.to_string()))?,
    };
    let tar = Tool::start(found, &["tar", "-xf", "-", "-C", folder], true).await?;
    tar.run(move |stdin, _| pack(stdin.ok_or(io::ErrorKind::BrokenPipe)?, &source, &name)).await
}

fn pack(to: UnixStream, source: &Path, name: &str) -> io::Result<()> {
    let mut archive = tar::Builder::new(to);
    archive.follow_symlinks(false);
    if source.is_dir() {
        archive.append_dir_all(name, source)?;
    } else {
        archive.append_path_with_name(source, name)?;
    }
    archive.finish()
}

async fn is_folder(found: &Found, path: &str) -> Result<bool> {
    let test = Tool::start(found, &["test", "-d", path], false).await?;
    Ok(test.ended().await?.0 == 0)
}

/// A program of the container that does a part of the work.
struct Tool {
    name: Id,
    connection: Connection,
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

impl Tool {
    async fn start(found: &Found, args: &[&str], stdin: bool) -> Result<Self> {
        let at = |e| VerbError::Control(found.name.clone(), e);
        let connection = connect(found)?;
        let args = args.iter().map(ToString::to_string).collect();
        let exec = ExecRequest { args, stdin, output: true, ..Default::default() };
        let Streams { stdin, stdout, stderr } = connection.exec(exec).await.map_err(at)?;
        connection.ask(&Request::Start).await.map_err(at)?;
        let stream = |stream: Option<tokio::net::UnixStream>| stream.map(blocking).transpose();
        let streams = || io::Result::Ok((stream(stdin)?, stream(stdout)?, stream(stderr)?));
        let (stdin, stdout, stderr) = streams().map_err(failed("streams of", &found.name))?;
        Ok(Self { name: found.name.clone(), connection, stdin, stdout, stderr })
    }

    /// Does our part of the work on its streams, and sees it to its end. What it says is wrong comes first: it
    /// explains why ours failed.
    async fn run(
        mut self,
        work: impl FnOnce(Option<UnixStream>, Option<UnixStream>) -> io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let (stdin, stdout) = (self.stdin.take(), self.stdout.take());
        let work = tokio::task::spawn_blocking(move || work(stdin, stdout));
        let name = self.name.clone();
        let (code, complaint) = self.ended().await?;
        let worked = work.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        let said = failed("in the container of", &name);
        match (code, worked) {
            (1.., _) if !complaint.is_empty() => Err(said(io::Error::other(complaint))),
            (1.., Ok(())) => Err(said(io::Error::other(format!("exit code {code}")))),
            (_, worked) => worked.map_err(failed("copy with", &name)),
        }
    }

    /// Its exit code and what it wrote to stderr.
    async fn ended(self) -> Result<(u8, String)> {
        let stderr = self.stderr;
        let complaint =
            tokio::task::spawn_blocking(move || stderr.map(complaint).unwrap_or_default());
        let at = |e| VerbError::Control(self.name.clone(), e);
        self.connection.send(&Request::Wait).map_err(at)?;
        let ended = self.connection.ended().await.map_err(at)?;
        Ok((ended.code, complaint.await.unwrap_or_default()))
    }
}

/// The beginning of what is written, on one line; all of it is read.
fn complaint(mut stderr: UnixStream) -> String {
    let mut text = Vec::new();
    let _ = (&stderr).take(4096).read_to_end(&mut text);
    let _ = io::copy(&mut stderr, &mut io::sink());
    one_line(&String::from_utf8_lossy(&text), 500)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_sandbox_if_a_name_and_a_colon_come_first() {
        assert_eq!(place("web:/etc/x"), Place::There("web", "/etc/x"));
        assert_eq!(place("web:"), Place::There("web", ""));
        for here in ["x", "./a:b", "/a:b", ":x"] {
            assert_eq!(place(here), Place::Here(Path::new(here)));
        }
    }

    #[test]
    fn a_path_is_split_at_its_last_part() {
        for (path, parts) in [("/etc/x", ("/etc", "x")), ("/x/", ("/", "x")), ("x", (".", "x"))] {
            assert_eq!(split(path).unwrap(), parts);
        }
        for path in ["/", "", ".", "a/.."] {
            assert!(split(path).is_err(), "{path}");
        }
    }
}
