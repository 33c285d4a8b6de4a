//! Programs that run in the kernel: bpf(2), as far as it is used. Numbers are those of include/uapi/linux/bpf.h.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// struct bpf_insn
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Instruction {
    pub code: u8,
    /// Destination in the low half, source in the high.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

// Opcodes: class | operation | source (include/uapi/linux/bpf_common.h).
pub const ADD: u8 = 0x07;
/// Takes two instructions.
pub const LOAD_LONG: u8 = 0x18;
pub const JUMP_EQUAL: u8 = 0x15;
pub const OR: u8 = 0x47;
pub const JUMP_NOT_EQUAL: u8 = 0x55;
pub const AND: u8 = 0x57;
pub const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
pub const AND_REGISTER: u8 = 0x5f;
pub const LOAD_WORD: u8 = 0x61;
pub const STORE_WORD: u8 = 0x62;
pub const STORE_WORD_REGISTER: u8 = 0x63;
pub const SHIFT_RIGHT: u8 = 0x77;
pub const CALL: u8 = 0x85;
pub const EXIT: u8 = 0x95;
pub const MOVE: u8 = 0xb7;
pub const MOVE_REGISTER: u8 = 0xbf;

/// With [`LOAD_LONG`]: the number is a map's descriptor.
pub const MAP: u8 = 1;

pub fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: destination | source << 4, offset, immediate: immediate as i32 }
}

/// What a program decides about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whether processes of a cgroup may use a device.
    Device,
    /// Which socket of a network namespace gets a connection that it has not had yet.
    SocketLookup,
    /// Whether processes of a cgroup may make a socket of IPv4 or IPv6.
    SocketCreate,
    /// Whether such a socket may be connected to an address of IPv4, of IPv6.
    Connect4,
    Connect6,
    /// Whether a datagram may be sent to an address, likewise, that its socket is not connected to.
    Send4,
    Send6,
}

impl Kind {
    /// Types of program and of attachment.
    fn numbers(self) -> (u32, u32) {
        match self {
            Self::Device => (15, 6),
            Self::SocketLookup => (30, 36),
            Self::SocketCreate => (9, 2),
            Self::Connect4 => (18, 10),
            Self::Connect6 => (18, 11),
            Self::Send4 => (18, 14),
            Self::Send6 => (18, 15),
        }
    }
}

/// A program that the kernel has accepted.
#[derive(Debug)]
pub struct Program(OwnedFd, Kind);

/// union bpf_attr for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    length: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// For BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: RawFd,
    program: RawFd,
    kind: u32,
    flags: u32,
}

/// For BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    program: RawFd,
    target: RawFd,
    kind: u32,
    flags: u32,
}

/// For BPF_MAP_CREATE.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

/// For BPF_MAP_UPDATE_ELEM, and BPF_MAP_DELETE_ELEM.
#[repr(C)]
struct MapUpdate {
    map: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const MAP_DELETE: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const LINK_CREATE: libc::c_long = 28;

/// Programs of nested cgroups all have a say.
const ALLOW_MULTI: u32 = 2;
const TYPE_HASH: u32 = 1;
const TYPE_SOCKMAP: u32 = 15;
/// Memory is taken for what is in a map only.
const NO_PREALLOCATION: u32 = 1;
/// How often a program is given to the kernel that says to try again, as libbpf does it.
const LOADS: usize = 5;

impl Program {
    pub fn load(kind: Kind, program: &[Instruction]) -> io::Result<Self> {
        let (program_type, attach_type) = kind.numbers();
        let attributes = Load {
            program_type,
            length: program.len() as u32,
            instructions: program.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            attach_type,
            ..Default::default()
        };
        // The kernel gives up looking at a program when a signal comes.
        for _ in 1..LOADS {
            match made(PROG_LOAD, &attributes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                loaded => return Ok(Self(loaded?, kind)),
            }
        }
        Ok(Self(made(PROG_LOAD, &attributes)?, kind))
    }

    /// Puts it on a cgroup. It goes when the cgroup goes.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        let attributes = Attach {
            target: cgroup.as_raw_fd(),
            program: self.0.as_raw_fd(),
            kind: self.1.numbers().1,
            flags: ALLOW_MULTI,
        };
        bpf(PROG_ATTACH, &attributes).map(drop)
    }

    /// Puts it on a network namespace, until what is returned is closed.
    pub fn link(&self, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let attributes = Link {
            program: self.0.as_raw_fd(),
            target: namespace.as_raw_fd(),
            kind: self.1.numbers().1,
            flags: 0,
        };
        made(LINK_CREATE, &attributes)
    }
}

/// A map that has a socket under the number 0.
pub fn map_of(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let size = mem::size_of::<u32>() as u32;
    let create = MapCreate {
        map_type: TYPE_SOCKMAP,
        key_size: size,
        value_size: size,
        entries: 1,
        flags: 0,
    };
    let map = made(MAP_CREATE, &create)?;
    change(MAP_UPDATE, &map, &0_u32.to_ne_bytes(), Some(&socket.as_fd().as_raw_fd()))?;
    Ok(map)
}

/// Keys that programs can look up.
#[derive(Debug)]
pub struct Set<const KEY: usize>(OwnedFd);

impl<const KEY: usize> Set<KEY> {
    /// An empty one, with room for so many.
    pub fn new(entries: u32) -> io::Result<Self> {
        let create = MapCreate {
            map_type: TYPE_HASH,
            key_size: KEY as u32,
            value_size: mem::size_of::<RawFd>() as u32,
            entries,
            flags: NO_PREALLOCATION,
        };
        Ok(Self(made(MAP_CREATE, &create)?))
    }

    pub fn insert(&self, key: &[u8; KEY]) -> io::Result<()> {
        change(MAP_UPDATE, &self.0, key, Some(&0))
    }

    pub fn remove(&self, key: &[u8; KEY]) -> io::Result<()> {
        change(MAP_DELETE, &self.0, key, None)
    }

    /// For [`MAP`].
    pub fn number(&self) -> u32 {
        self.0.as_raw_fd().cast_unsigned()
    }
}

/// The key is as long as the map's keys are, and so is the value.
fn change(
    command: libc::c_long,
    map: &OwnedFd,
    key: &[u8],
    value: Option<&RawFd>,
) -> io::Result<()> {
    let update = MapUpdate {
        map: map.as_raw_fd(),
        padding: 0,
        key: key.as_ptr() as u64,
        value: value.map_or(0, |value| ptr::from_ref(value) as u64),
        flags: 0,
    };
    bpf(command, &update).map(drop)
}

/// For commands that return a descriptor.
fn made<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: bpf(2) has just made this descriptor for us; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attributes outlive the call, and so does what they point to; the kernel only reads.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attributes, mem::size_of::<T>()) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
