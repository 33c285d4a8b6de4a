//! The guest kernel: an uncompressed ELF64 `vmlinux`, checked whole before a byte of guest RAM changes, then
//! read into it.
//!
//! Mapping the file copy-on-write instead looks cheaper and is not: while it boots, the kernel patches every
//! page of its text (retpolines, alternatives), so that nothing stays shared, and each page costs three
//! nested page faults (read, write-protected, written): some 6,000 in all, where 2 MiB pages cost 8.

use std::{
    fs::File,
    io,
    mem::size_of,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, EM_X86_64,
    ET_EXEC, Elf64_Ehdr, Elf64_Phdr, PT_LOAD,
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use crate::memory::{GuestMemory, HIGH_RAM};

/// A vmlinux has 4 or 5 program headers; more than this is not a kernel.
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("the kernel cannot be read")]
    Read(#[from] io::Error),
    #[error("the kernel is {len} bytes long, too short for an ELF header")]
    TooShort { len: u64 },
    #[error("the kernel is not an ELF file (an uncompressed vmlinux is needed)")]
    NotElf,
    #[error("the kernel is not a 64-bit little-endian executable for x86-64 (machine {machine})")]
    WrongMachine { machine: u16 },
    #[error("the kernel's program headers are not valid")]
    ProgramHeaders,
    #[error("the kernel is cut short: its headers need {needed} bytes, the file has {len}")]
    Truncated { needed: u64, len: u64 },
    #[error("kernel segment {index} is not valid: its addresses or sizes wrap or disagree")]
    Segment { index: usize },
    #[error(
        "kernel segment {index} at {start:#x}..{end:#x} lies outside the guest's RAM ({ram:#x} bytes)"
    )]
    OutsideRam { index: usize, start: u64, end: u64, ram: u64 },
    #[error("kernel segments {first} and {second} overlap")]
    Overlap { first: usize, second: usize },
    #[error("the kernel's entry point {entry:#x} is not inside a segment")]
    Entry { entry: u64 },
    #[error("kernel segment {index} cannot be put into guest memory")]
    Load { index: usize, source: io::Error },
}

/// One `PT_LOAD` segment: `filesz` bytes at `offset` of the file go to guest-physical `start`, the rest up
/// to `end` is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    start: u64,
    filesz: u64,
    end: u64,
}

/// Where everything of a kernel goes. Built by [`Plan::new`] only, so it is known to be sound.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    entry: u64,
    segments: Vec<Segment>,
}

/// Loads the kernel in `file`. Returns the guest-physical address of its 64-bit entry point.
///
/// # Errors
/// [`KernelError`]; nothing has been loaded unless it is `Load`.
pub fn load(memory: &GuestMemory, file: &File) -> Result<GuestAddress, KernelError> {
    let ram = memory.iter().next().map_or(0, |region| region.size() as u64);
    let plan = Plan::read(file, ram)?;
    for (index, segment) in plan.segments.iter().enumerate() {
        load_segment(memory, file, segment)
            .map_err(|source| KernelError::Load { index, source })?;
    }
    Ok(GuestAddress(plan.entry))
}

impl Plan {
    /// Reads and checks the headers; `ram` is the size of guest RAM below the hole in bytes.
    fn read(file: &File, ram: u64) -> Result<Self, KernelError> {
        let len = file.metadata()?.len();
        if len < size_of::<Elf64_Ehdr>() as u64 {
            return Err(KernelError::TooShort { len });
        }
        let mut header = Elf64_Ehdr::default();
        file.read_exact_at(header.as_mut_slice(), 0)?;
        check_header(&header, len)?;
        let mut program_headers = vec![Elf64_Phdr::default(); usize::from(header.e_phnum)];
        for (at, program_header) in
            (header.e_phoff..).step_by(size_of::<Elf64_Phdr>()).zip(&mut program_headers)
        {
            file.read_exact_at(program_header.as_mut_slice(), at)?;
        }
        Self::new(header.e_entry, &program_headers, len, ram)
    }

    /// Decides from the headers alone. `len` is the file's size.
    fn new(entry: u64, headers: &[Elf64_Phdr], len: u64, ram: u64) -> Result<Self, KernelError> {
        let segments = headers
            .iter()
            .enumerate()
            .filter(|(_, h)| h.p_type == PT_LOAD && h.p_memsz > 0)
            .map(|(index, h)| Segment::new(index, h, len, ram))
            .collect::<Result<Vec<_>, _>>()?;
        for (second, b) in segments.iter().enumerate() {
            for (first, a) in segments[..second].iter().enumerate() {
                if a.start < b.end && b.start < a.end {
                    return Err(KernelError::Overlap { first, second });
                }
            }
        }
        if !segments.iter().any(|s| (s.start..s.start + s.filesz).contains(&entry)) {
            return Err(KernelError::Entry { entry });
        }
        Ok(Self { entry, segments })
    }
}

impl Segment {
    fn new(index: usize, header: &Elf64_Phdr, len: u64, ram: u64) -> Result<Self, KernelError> {
        let wraps = KernelError::Segment { index };
        let Some(needed) = header.p_offset.checked_add(header.p_filesz) else { return Err(wraps) };
        let Some(end) = header.p_paddr.checked_add(header.p_memsz) else { return Err(wraps) };
        if header.p_filesz > header.p_memsz {
            return Err(wraps);
        }
        if needed > len {
            return Err(KernelError::Truncated { needed, len });
        }
        if header.p_paddr < HIGH_RAM.0 || end > ram {
            return Err(KernelError::OutsideRam { index, start: header.p_paddr, end, ram });
        }
        Ok(Self { offset: header.p_offset, start: header.p_paddr, filesz: header.p_filesz, end })
    }
}

fn check_header(header: &Elf64_Ehdr, len: u64) -> Result<(), KernelError> {
    let ident = &header.e_ident;
    if ident[..4] != [ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3] {
        return Err(KernelError::NotElf);
    }
    if ident[EI_CLASS] != ELFCLASS64
        || ident[EI_DATA] != ELFDATA2LSB
        || header.e_machine != EM_X86_64
        || header.e_type != ET_EXEC
    {
        return Err(KernelError::WrongMachine { machine: header.e_machine });
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>()
        || !(1..=MAX_PROGRAM_HEADERS).contains(&header.e_phnum)
    {
        return Err(KernelError::ProgramHeaders);
    }
    let table = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    let needed = header.e_phoff.checked_add(table).ok_or(KernelError::ProgramHeaders)?;
    if needed > len {
        return Err(KernelError::Truncated { needed, len });
    }
    Ok(())
}

/// Reads the segment from the page cache straight into guest RAM, which is zero before: what follows `filesz`
/// needs no touch.
fn load_segment(memory: &GuestMemory, file: &File, segment: &Segment) -> io::Result<()> {
    let len = segment.filesz as usize;
    let target = memory.get_slice(GuestAddress(segment.start), len).map_err(io::Error::other)?;
    let target = target.ptr_guard_mut();
    let mut done = 0;
    while done < len {
        // SAFETY: `done..len` of the target lies in guest RAM, as `get_slice` checked, and stays mapped; no
        // vCPU runs yet and no reference to guest RAM exists.
        let read = unsafe {
            libc::pread(
                file.as_raw_fd(),
                target.as_ptr().add(done).cast(),
                len - done,
                segment.offset as i64 + done as i64,
            )
        };
        match read {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => done += read as usize,
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
