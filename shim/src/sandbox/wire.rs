//! Between the sandbox's words and the agent's messages.

use std::time::{SystemTime, UNIX_EPOCH};

use ampoule_agent_api::agent::{
    self, StartResponse, WaitResponse, root_fs, start_response::Failure,
};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::net::UnixStream;

use super::{Exit, HostFile, IdMaps, Lower, RootFs, StartFailure, Stdio, Streams, Upper};
use crate::{
    network::Resolver,
    text::one_line,
    vm::{Vm, VmError},
};

/// Exit status of an end nobody knows.
pub(super) const UNKNOWN: u8 = 255;

pub(super) fn exit(status: u8) -> Exit {
    Exit { status, oom_kills: 0, at: SystemTime::now(), death: None }
}

/// The time is the host's: a guest's clock says what the guest wants.
pub(super) fn exit_of(end: &WaitResponse) -> Exit {
    let status = u8::try_from(end.status).unwrap_or(UNKNOWN);
    Exit { oom_kills: end.oom_kills, ..exit(status) }
}

pub(super) fn failure(response: &StartResponse) -> Option<(u8, StartFailure)> {
    let message = one_line(&response.message, 500);
    match response.failure.enum_value() {
        Ok(Failure::NONE) => None,
        Ok(Failure::NOT_FOUND) => Some((127, StartFailure::NotFound(message))),
        Ok(Failure::NOT_EXECUTABLE) | Err(_) => Some((126, StartFailure::NotExecutable(message))),
    }
}

pub(super) fn rootfs(rootfs: &RootFs) -> agent::RootFs {
    let (upper, slot) = match rootfs.upper {
        Upper::None => (root_fs::Upper::NONE, 0),
        Upper::Disk(slot) => (root_fs::Upper::DISK, slot),
        Upper::Kept(slot) => (root_fs::Upper::KEPT, slot),
        Upper::Tmpfs => (root_fs::Upper::TMPFS, 0),
    };
    let lower = |lower: &Lower| root_fs::Lower {
        slot: lower.slot.into(),
        type_: lower.kind.clone(),
        devices: lower.devices.iter().map(|&slot| slot.into()).collect(),
        mapped: lower.mapped,
        ..Default::default()
    };
    let IdMaps { uids, gids } = rootfs.owners.clone().unwrap_or_default();
    agent::RootFs {
        uid_map: uids,
        gid_map: gids,
        lowers: rootfs.lowers.iter().map(lower).collect(),
        upper: upper.into(),
        upper_slot: slot.into(),
        ..Default::default()
    }
}

/// Never 0, which is none.
pub(super) fn realtime_ns(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).max(1)
}

pub(super) fn file(file: HostFile) -> agent::File {
    agent::File { content: file.content, mode: file.mode, ..Default::default() }
}

/// Asks for the streams of a process, each on a port that nobody can guess.
pub(super) fn streams(vm: &Vm, wanted: Stdio) -> Result<(agent::Stdio, Streams), VmError> {
    let stream = |wanted: bool| -> Result<(u32, Option<UnixStream>), VmError> {
        if !wanted {
            return Ok((0, None));
        }
        let (port, stream) = listen(vm)?;
        Ok((port, Some(stream)))
    };
    let (stdin, stdout, stderr) =
        (stream(wanted.stdin)?, stream(wanted.stdout)?, stream(wanted.stderr)?);
    let ports =
        agent::Stdio { stdin: stdin.0, stdout: stdout.0, stderr: stderr.0, ..Default::default() };
    Ok((ports, Streams { stdin: stdin.1, stdout: stdout.1, stderr: stderr.1 }))
}

/// Awaits the guest on a port that nobody can guess, once.
pub(super) fn listen(vm: &Vm) -> Result<(u32, UnixStream), VmError> {
    let port = random_port().map_err(|e| VmError::Prepare("draw a random port", e))?;
    Ok((port, vm.listen(port)?))
}

/// Has a server of names answer the guest; returns the port on which that asks. 0: there is none.
pub(super) fn answers(vm: &Vm, resolver: Option<Resolver>) -> Result<u32, VmError> {
    let Some(resolver) = resolver else { return Ok(0) };
    let (port, stream) = listen(vm)?;
    resolver.serve(stream).map_err(|e| VmError::Prepare("have names looked up", e))?;
    Ok(port)
}

/// Above the ports that mean something, below VMADDR_PORT_ANY.
fn random_port() -> std::io::Result<u32> {
    loop {
        let mut bytes = [0; 4];
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        match u32::from_ne_bytes(bytes) {
            ..=0xffff | u32::MAX => {}
            port => return Ok(port),
        }
    }
}
