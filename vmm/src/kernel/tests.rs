use std::io::Write;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::memory;

const RAM_MIB: u32 = 8;

fn header(phnum: u16) -> Elf64_Ehdr {
    let mut header = Elf64_Ehdr {
        e_type: ET_EXEC,
        e_machine: EM_X86_64,
        e_entry: 0x20_0000,
        e_phoff: size_of::<Elf64_Ehdr>() as u64,
        e_phentsize: size_of::<Elf64_Phdr>() as u16,
        e_phnum: phnum,
        ..Default::default()
    };
    header.e_ident[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', ELFCLASS64, ELFDATA2LSB]);
    header
}

fn segment(offset: u64, start: u64, filesz: u64, memsz: u64) -> Elf64_Phdr {
    Elf64_Phdr {
        p_type: PT_LOAD,
        p_offset: offset,
        p_paddr: start,
        p_filesz: filesz,
        p_memsz: memsz,
        ..Default::default()
    }
}

/// An ELF file of `len` bytes in which every byte past the headers is a function of its place.
fn image(header: &Elf64_Ehdr, segments: &[Elf64_Phdr], len: usize) -> File {
    let mut bytes: Vec<u8> = (0..len).map(pattern).collect();
    let mut at = 0;
    for part in std::iter::once(header.as_slice()).chain(segments.iter().map(|s| s.as_slice())) {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn pattern(at: usize) -> u8 {
    (at * 7 + at / 251) as u8
}

fn load_image(header: &Elf64_Ehdr, segments: &[Elf64_Phdr]) -> Result<GuestMemory, KernelError> {
    let memory = memory::map(RAM_MIB).unwrap();
    load(&memory, &image(header, segments, 0x8000)).map(|_| memory)
}

/// Checks that guest memory holds the file's bytes and, behind them, zeroes.
fn assert_loaded(memory: &GuestMemory, s: &Elf64_Phdr) {
    let mut bytes = vec![0; s.p_memsz as usize];
    memory.read_slice(&mut bytes, GuestAddress(s.p_paddr)).unwrap();
    for (i, &byte) in bytes.iter().enumerate() {
        let expected = if i < s.p_filesz as usize { pattern(s.p_offset as usize + i) } else { 0 };
        assert_eq!(byte, expected, "byte {i} of the segment at {:#x}", s.p_paddr);
    }
}

#[test]
fn segments_arrive_with_zeroes_behind_them() {
    let segments = [
        segment(0x1000, 0x20_0000, 0x2345, 0x5000),
        segment(0x4123, 0x30_0123, 0x2fff, 0x3000),
        segment(0x1200, 0x40_0000, 0x1800, 0x1801),
        segment(0x1200, 0x50_0000, 0, 0x1000),
    ];
    let memory = load_image(&header(4), &segments).unwrap();
    for s in &segments {
        assert_loaded(&memory, s);
    }
}

#[test]
fn neighbours_in_one_page_do_not_clobber_each_other() {
    let segments =
        [segment(0x1000, 0x20_0000, 0x1800, 0x1800), segment(0x3800, 0x20_1800, 0x1800, 0x2000)];
    let memory = load_image(&header(2), &segments).unwrap();
    for s in &segments {
        assert_loaded(&memory, s);
    }
}

/// Row P6: each damage is named by its own error.
#[test]
fn p6_damaged_kernels_are_refused_with_the_reason() {
    let good = segment(0x1000, 0x20_0000, 0x1000, 0x1000);
    let with = |change: fn(&mut Elf64_Ehdr)| {
        let mut h = header(1);
        change(&mut h);
        load_image(&h, &[good]).unwrap_err()
    };
    assert!(matches!(with(|h| h.e_ident[0] = 0), KernelError::NotElf));
    assert!(matches!(with(|h| h.e_ident[4] = 1), KernelError::WrongMachine { .. }));
    assert!(matches!(with(|h| h.e_ident[5] = 2), KernelError::WrongMachine { .. }));
    assert!(matches!(with(|h| h.e_machine = 183), KernelError::WrongMachine { machine: 183 }));
    assert!(matches!(with(|h| h.e_type = 3), KernelError::WrongMachine { .. }));
    assert!(matches!(with(|h| h.e_phentsize = 32), KernelError::ProgramHeaders));
    assert!(matches!(with(|h| h.e_phnum = 0), KernelError::ProgramHeaders));
    assert!(matches!(with(|h| h.e_phnum = 0xffff), KernelError::ProgramHeaders));
    assert!(matches!(with(|h| h.e_phoff = u64::MAX), KernelError::ProgramHeaders));
    assert!(matches!(with(|h| h.e_phoff = 0x7fff), KernelError::Truncated { .. }));
    assert!(matches!(with(|h| h.e_entry = 0x20_1000), KernelError::Entry { .. }));
    assert!(matches!(with(|h| h.e_entry = 0), KernelError::Entry { entry: 0 }));

    let of = |s: &[Elf64_Phdr]| load_image(&header(s.len() as u16), s).unwrap_err();
    let bad = |s| of(&[s]);
    assert!(matches!(bad(segment(u64::MAX, 0x20_0000, 1, 1)), KernelError::Segment { .. }));
    assert!(matches!(bad(segment(0, u64::MAX, 1, 1)), KernelError::Segment { .. }));
    assert!(matches!(bad(segment(0, 0x20_0000, 2, 1)), KernelError::Segment { .. }));
    assert!(matches!(
        bad(segment(0x7000, 0x20_0000, 0x1001, 0x1001)),
        KernelError::Truncated { .. }
    ));
    assert!(matches!(bad(segment(0, 0xf_f000, 0x1000, 0x1000)), KernelError::OutsideRam { .. }));
    assert!(matches!(bad(segment(0, 0x20_0000, 1, 0x60_0001)), KernelError::OutsideRam { .. }));
    assert!(matches!(
        of(&[good, segment(0, 0x20_0fff, 1, 1)]),
        KernelError::Overlap { first: 0, second: 1 }
    ));
}

#[test]
fn p6_a_kernel_cut_anywhere_is_refused() {
    let s = segment(0x1000, 0x20_0000, 0x1000, 0x1000);
    for len in [0, 1, 63, 64, 119, 120, 0x1000, 0x1fff] {
        let file = image(&header(1), &[s], 0x8000);
        file.set_len(len).unwrap();
        let memory = memory::map(RAM_MIB).unwrap();
        let error = load(&memory, &file).unwrap_err();
        let cut = matches!(error, KernelError::TooShort { .. } | KernelError::Truncated { .. });
        assert!(cut, "{len}: {error}");
    }
}

fn any_segment() -> impl Strategy<Value = Elf64_Phdr> {
    let number = || prop_oneof![0..0x9000u64, 0x1f_f000..0x81_0000u64, any::<u64>()];
    (number(), number(), number(), number()).prop_map(|(a, b, c, d)| segment(a, b, c, d))
}

proptest! {
    #[test]
    fn an_accepted_plan_stays_inside_ram_and_file(
        entry in 0x1f_0000..0x81_0000u64,
        segments in proptest::collection::vec(any_segment(), 0..4),
    ) {
        let (len, ram) = (0x8000, 0x80_0000);
        if let Ok(plan) = Plan::new(entry, &segments, len, ram) {
            for s in &plan.segments {
                prop_assert!(s.start >= HIGH_RAM.0 && s.end <= ram && s.start < s.end);
                prop_assert!(s.offset + s.filesz <= len);
            }
        }
    }

    #[test]
    fn any_bytes_load_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512), good_start: bool) {
        let mut file = tempfile::tempfile().unwrap();
        let skip = if good_start { file.write_all(header(2).as_slice()).unwrap(); 64 } else { 0 };
        file.write_all(&bytes[skip.min(bytes.len())..]).unwrap();
        let _ = load(&memory::map(RAM_MIB).unwrap(), &file);
    }
}
