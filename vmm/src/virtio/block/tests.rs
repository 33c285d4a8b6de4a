//! The block device as a driver sees it: what it does, and the A6 and D rows.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    sync::Mutex,
};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::*;
use crate::virtio::{lock, testing::*};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
const SECTORS: u64 = 4096;
const HEADER_AT: u64 = BUFFERS;
const STATUS_AT: u64 = BUFFERS + 0x800;
const DATA_AT: u64 = BUFFERS + 0x1000;

fn config(read_only: bool) -> DiskConfig {
    DiskConfig { id: "disk-0123456789".into(), read_only }
}

/// A file of `SECTORS` sectors, each full of its number.
fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&sector_bytes(sector)).unwrap();
    }
    file
}

fn sector_bytes(sector: u64) -> Vec<u8> {
    sector.to_le_bytes().repeat(64)
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

struct Bench {
    guest: Guest,
    block: Arc<Mutex<Block>>,
}

impl Bench {
    fn on(fd: impl Into<OwnedFd>, read_only: bool) -> Self {
        Self::with(Block::new(&config(read_only), Some(fd.into())).unwrap())
    }

    fn with(block: Block) -> Self {
        let block = Arc::new(Mutex::new(block));
        Self { guest: Guest::new(block.clone()), block }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.guest.put(HEADER_AT, kind);
        self.guest.put(HEADER_AT + 4, 0u32);
        self.guest.put(HEADER_AT + 8, sector);
        self.guest.put(STATUS_AT, 0xaau8);
    }

    /// Header, `data`, status; the status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        self.header(kind, sector);
        let mut pieces = vec![out(HEADER_AT, 16)];
        pieces.extend(data);
        pieces.push(into(STATUS_AT, 1));
        self.chain(&pieces)
    }

    fn chain(&mut self, pieces: &[Piece]) -> (u8, u32) {
        self.guest.submit(0, 0, pieces);
        self.guest.run();
        let (head, written) = self.guest.used(0).expect("every request is used");
        assert_eq!(head, 0);
        (self.guest.get(STATUS_AT), written)
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        self.guest.put(DATA_AT, sector);
        self.guest.put(DATA_AT + 8, sectors);
        self.guest.put(DATA_AT + 12, flags);
        self.request(kind, 0, &[out(DATA_AT, 16)]).0
    }

    fn capacity(&mut self) -> u64 {
        u64::from_le_bytes(self.guest.config(0))
    }
}

#[test]
fn reads_in_any_number_of_pieces() {
    let mut bench = Bench::on(image(), false);
    assert_eq!(bench.capacity(), SECTORS);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 7, &[into(DATA_AT, 1024)]), (OK, 1025));
    assert_eq!(bench.guest.get_bytes(DATA_AT, 1024), [sector_bytes(7), sector_bytes(8)].concat());
    let pieces: Vec<_> = (0..64).map(|i| into(DATA_AT + 16 * (63 - i), 8)).collect();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 9, &pieces), (OK, 513));
    for i in 0..64 {
        assert_eq!(bench.guest.get::<u64>(DATA_AT + 16 * i), 9);
    }
    let whole = [into(DATA_AT, (SECTORS * 512) as u32)];
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &whole), (OK, (SECTORS * 512) as u32 + 1));
    bench.guest.assert_works();
}

#[test]
fn writes_flushes_and_reads_back() {
    let file = image();
    let mut bench = Bench::on(file.try_clone().unwrap(), false);
    let bytes: Vec<u8> = (0..1536u32).map(|i| (i * 7) as u8).collect();
    bench.guest.put_bytes(DATA_AT, &bytes[..1000]);
    bench.guest.put_bytes(DATA_AT + 0x2000, &bytes[1000..]);
    let pieces = [out(DATA_AT, 1000), out(DATA_AT + 0x2000, 536)];
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 100, &pieces), (OK, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    let now = contents(&file);
    assert_eq!(now[100 * 512..103 * 512], bytes);
    assert_eq!(now[99 * 512..100 * 512], sector_bytes(99));
    assert_eq!(now[103 * 512..104 * 512], sector_bytes(103));
    assert_eq!(now.len() as u64, SECTORS * 512);
}

#[test]
fn discard_and_write_zeroes() {
    let file = image();
    let mut bench = Bench::on(file.try_clone().unwrap(), false);
    let blocks = file.metadata().unwrap().blocks();
    assert_eq!(bench.range(VIRTIO_BLK_T_DISCARD, 1024, 1024, 0), OK);
    assert!(file.metadata().unwrap().blocks() < blocks, "space is given back");
    assert_eq!(bench.range(VIRTIO_BLK_T_WRITE_ZEROES, 64, 8, 1), OK);
    let kept = bench.range(VIRTIO_BLK_T_WRITE_ZEROES, 128, 8, 0);
    assert!(kept == OK || kept == UNSUPP, "not every file system can, but none may fail");
    let now = contents(&file);
    for sector in 0..SECTORS {
        let zero = (1024..2048).contains(&sector)
            || (64..72).contains(&sector)
            || kept == OK && (128..136).contains(&sector);
        let expected = if zero { vec![0; 512] } else { sector_bytes(sector) };
        assert_eq!(now[sector as usize * 512..][..512], expected, "sector {sector}");
    }
    bench.guest.assert_works();
}

#[test]
fn the_configuration_says_what_is_possible() {
    let mut bench = Bench::on(image(), false);
    let field = |guest: &mut Guest, at| u32::from_le_bytes(guest.config(at));
    assert_eq!(field(&mut bench.guest, 12), 254);
    assert_eq!(field(&mut bench.guest, 20), 512);
    assert_eq!(field(&mut bench.guest, 28), 512);
    assert_eq!(field(&mut bench.guest, 36), MAX_RANGE_SECTORS);
    assert_eq!(field(&mut bench.guest, 52), 1);
    assert_eq!(bench.guest.config::<1>(56), [1]);
    assert_eq!(bench.guest.config::<8>(57), [0; 8]);
    let features = |block: &Mutex<Block>| lock(block).features() & !ALWAYS;
    assert_eq!(features(&bench.block), WRITABLE);
    assert_eq!(features(&Bench::on(image(), true).block), READ_ONLY);
}

#[test]
fn a_spare_slot_gets_a_disk_and_loses_it() {
    let mut bench = Bench::with(Block::new(&config(true), None).unwrap());
    assert_eq!(lock(&bench.block).features() & !ALWAYS, WRITABLE);
    assert_eq!(bench.capacity(), 0);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID] {
        assert_eq!(bench.request(kind, 0, &[into(DATA_AT, 512)]).0, IOERR);
    }
    assert_eq!(bench.guest.read(0x60) & 2, 0);
    let generation = bench.guest.read(0xfc);
    bench.guest.interrupts();
    lock(&bench.block).attach(&config(false), image().into()).unwrap();
    assert_eq!(bench.guest.interrupts(), 1);
    assert_eq!((bench.guest.read(0x60) & 2, bench.guest.read(0xfc)), (2, generation + 1));
    assert_eq!(bench.capacity(), SECTORS);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 5, &[into(DATA_AT, 512)]).0, OK);
    let again = lock(&bench.block).attach(&config(false), image().into());
    assert!(matches!(again, Err(SlotError::Occupied)));

    lock(&bench.block).detach().unwrap();
    assert!(matches!(lock(&bench.block).detach(), Err(SlotError::Empty)));
    assert_eq!((bench.capacity(), bench.guest.read(0xfc)), (0, generation + 2));
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 5, &[into(DATA_AT, 512)]).0, IOERR);
    bench.guest.assert_works();

    let file = image();
    lock(&bench.block).attach(&config(true), file.try_clone().unwrap().into()).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 5, &[out(DATA_AT, 512)]).0, IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 5, &[into(DATA_AT, 512)]).0, OK);
    assert_eq!(contents(&file), contents(&image()), "read-only by the answer");
}

#[test]
fn backings_that_are_none() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(
        Block::new(&config(false), Some(null.into())),
        Err(SlotError::Disk(DiskError::Type(_)))
    ));
    let long = DiskConfig { id: "123456789012345678901".into(), read_only: false };
    assert!(matches!(
        Block::new(&long, Some(image().into())),
        Err(SlotError::Disk(DiskError::Id(_)))
    ));
}

#[test]
fn a04_every_part_of_a_request_outside_ram() {
    let mut bench = Bench::on(image(), false);
    let before = contents(&image());
    for address in [END, HOLE, HOLE - 100, AFTER_HOLE - 1, END - 100, u64::MAX - 511] {
        let read = bench.request(VIRTIO_BLK_T_IN, 0, &[into(address, 512)]);
        assert_eq!(read, (IOERR, 1), "{address:#x}");
        let write = bench.request(VIRTIO_BLK_T_OUT, 0, &[out(address, 512)]);
        assert_eq!(write, (IOERR, 1), "{address:#x}");
        bench.header(VIRTIO_BLK_T_IN, 0);
        let header = bench.chain(&[out(address, 512), into(DATA_AT, 512), into(STATUS_AT, 1)]);
        assert_eq!(header, (IOERR, 1));
        bench.header(VIRTIO_BLK_T_IN, 0);
        let status = [out(HEADER_AT, 16), into(DATA_AT, 512), into(address, 512)];
        let in_ram = address == AFTER_HOLE - 1;
        assert_eq!(bench.chain(&status), (0xaa, in_ram.into()), "nowhere to say so");
    }
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[into(TOUCH - 100, 512)]), (OK, 513));
    assert_eq!(bench.guest.get_bytes(TOUCH - 100, 512), before[..512]);
    bench.guest.assert_works();
}

#[test]
fn a05_empty_parts() {
    let mut bench = Bench::on(image(), false);
    bench.header(VIRTIO_BLK_T_IN, 0);
    for pieces in [
        &[out(HEADER_AT, 0), into(DATA_AT, 512), into(STATUS_AT, 1)][..],
        &[out(HEADER_AT, 16), into(DATA_AT, 0), into(STATUS_AT, 1)],
        &[out(HEADER_AT, 15), into(DATA_AT, 512), into(STATUS_AT, 1)],
        &[into(DATA_AT, 512), into(STATUS_AT, 1)],
    ] {
        assert_eq!(bench.chain(pieces), (IOERR, 1));
    }
    bench.header(VIRTIO_BLK_T_IN, 0);
    for pieces in [&[out(HEADER_AT, 16), into(STATUS_AT, 0)][..], &[out(HEADER_AT, 16)]] {
        assert_eq!(bench.chain(pieces), (0xaa, 0));
    }
    let huge = [out(HEADER_AT, 16), into(DATA_AT, u32::MAX - 32), into(STATUS_AT, 1)];
    assert_eq!(bench.chain(&huge), (IOERR, 1));
    bench.guest.assert_works();
}

#[test]
fn a06_parts_of_the_wrong_kind_or_in_the_wrong_order() {
    let mut bench = Bench::on(image(), false);
    let before = contents(&image());
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[out(DATA_AT, 512)]), (IOERR, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[into(DATA_AT, 512)]), (IOERR, 1));
    bench.header(VIRTIO_BLK_T_OUT, 0);
    let early_status = [out(HEADER_AT, 16), into(STATUS_AT, 1), out(DATA_AT, 512)];
    assert_eq!(bench.chain(&early_status), (IOERR, 1));
    bench.header(VIRTIO_BLK_T_OUT, 0);
    let status_first = [into(STATUS_AT, 1), out(HEADER_AT, 16), out(DATA_AT, 512)];
    assert_eq!(bench.chain(&status_first), (IOERR, 1));
    bench.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!(bench.chain(&[into(HEADER_AT, 16), into(DATA_AT, 512)]), (0xaa, 1));
    assert_eq!(contents(&image()), before);
    bench.guest.assert_works();
}

#[test]
fn a06_a_header_of_sixteen_pieces_works() {
    let mut bench = Bench::on(image(), false);
    bench.header(VIRTIO_BLK_T_IN, 3);
    let mut pieces: Vec<_> = (0..16).map(|i| out(HEADER_AT + i, 1)).collect();
    pieces.extend([into(DATA_AT, 500), into(DATA_AT + 500, 12), into(STATUS_AT, 1)]);
    assert_eq!(bench.chain(&pieces), (OK, 513));
    assert_eq!(bench.guest.get_bytes(DATA_AT, 512), sector_bytes(3));
    bench.header(VIRTIO_BLK_T_IN, 4);
    let joined = [out(HEADER_AT, 16), into(DATA_AT, 513)];
    assert_eq!(bench.chain(&joined), (0xaa, 513), "the status is the last byte, wherever that is");
    assert_eq!(bench.guest.get::<u8>(DATA_AT + 512), OK);
}

#[test]
fn d01_out_of_range_and_uneven() {
    let file = image();
    let mut bench = Bench::on(file.try_clone().unwrap(), false);
    let last = SECTORS - 1;
    let overflow = u64::MAX / 512;
    for (sector, len) in [
        (SECTORS, 512),
        (last, 1024),
        (0, (SECTORS as u32 + 1) * 512),
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
        (overflow, 512),
        (overflow + 1, 512),
        (1 << 55, 512),
        (0, 0),
        (0, 1),
        (0, 511),
        (0, 513),
    ] {
        let read = bench.request(VIRTIO_BLK_T_IN, sector, &[into(DATA_AT, len)]);
        assert_eq!(read, (IOERR, 1), "sector {sector:#x} len {len}");
        let write = bench.request(VIRTIO_BLK_T_OUT, sector, &[out(DATA_AT, len)]);
        assert_eq!(write, (IOERR, 1), "sector {sector:#x} len {len}");
    }
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[]), (IOERR, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[]), (IOERR, 1));
    assert_eq!(contents(&file), contents(&image()), "nothing written");
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, last, &[out(DATA_AT, 512)]), (OK, 1));
    bench.guest.assert_works();
}

#[test]
fn d02_a_read_only_disk_stays_as_it_is() {
    let file = image();
    for slot in [true, false] {
        let fd = file.try_clone().unwrap();
        let mut bench = if slot {
            Bench::on(fd, true)
        } else {
            let mut block = Block::new(&config(false), None).unwrap();
            block.attach(&config(true), fd.into()).unwrap();
            Bench::with(block)
        };
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA_AT, 512)]), (IOERR, 1));
        assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (IOERR, 1));
        assert_eq!(bench.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
        assert_eq!(bench.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 0), IOERR);
        assert_eq!(bench.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 1), IOERR);
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, 1, &[into(DATA_AT, 512)]), (OK, 513));
        bench.guest.assert_works();
    }
    assert_eq!(contents(&file), contents(&image()));
}

#[test]
fn d02_a_descriptor_that_cannot_write() {
    let mut named = tempfile::NamedTempFile::new().unwrap();
    named.write_all(&contents(&image())).unwrap();
    let mut bench = Bench::on(File::open(named.path()).unwrap(), false);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA_AT, 512)]), (IOERR, 1));
    assert_eq!(bench.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
    assert_eq!(contents(named.as_file()), contents(&image()));
    bench.guest.assert_works();
}

#[test]
fn d03_ranges_that_make_no_sense() {
    let file = image();
    let mut bench = Bench::on(file.try_clone().unwrap(), false);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (sector, sectors, flags, status) in [
            (0, 0, 0, IOERR),
            (0, u32::MAX, 0, IOERR),
            (0, MAX_RANGE_SECTORS + 1, 0, IOERR),
            (0, SECTORS as u32 + 1, 0, IOERR),
            (SECTORS, 1, 0, IOERR),
            (SECTORS - 1, 2, 0, IOERR),
            (u64::MAX, 1, 0, IOERR),
            (u64::MAX / 512, 1, 0, IOERR),
            (u64::MAX / 512 + 1, 8, 0, IOERR),
            (0, 8, 2, UNSUPP),
            (0, 8, 3, UNSUPP),
            (0, 8, 1 << 31, UNSUPP),
        ] {
            let got = bench.range(kind, sector, sectors, flags);
            assert_eq!(got, status, "{kind}: {sector:#x} + {sectors:#x}, flags {flags:#x}");
        }
        for len in [0, 1, 15, 17, 32, 16 * 255, 65_536] {
            let pieces = [out(DATA_AT, len)];
            assert_eq!(bench.request(kind, 0, &pieces), (IOERR, 1), "{len} bytes of ranges");
        }
    }
    assert_eq!(bench.range(VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPP, "unmap is not a discard's");
    assert_eq!(contents(&file), contents(&image()));
    bench.guest.assert_works();
}

#[test]
fn d04_the_id_is_twenty_bytes_at_most() {
    let mut bench = Bench::on(image(), false);
    let mut id = [0; 20];
    id[..15].copy_from_slice(b"disk-0123456789");
    for len in [0, 1, 19, 20, 21, 4096] {
        bench.guest.put_bytes(DATA_AT, &[0xee; 4096]);
        let count = len.min(20);
        let got = bench.request(VIRTIO_BLK_T_GET_ID, 0, &[into(DATA_AT, len)]);
        assert_eq!(got, (OK, count + 1));
        let bytes = bench.guest.get_bytes(DATA_AT, 4096);
        assert_eq!(bytes[..count as usize], id[..count as usize]);
        assert!(bytes[count as usize..].iter().all(|&b| b == 0xee));
    }
}

#[test]
fn d04_unknown_types() {
    let mut bench = Bench::on(image(), false);
    let scsi = VIRTIO_BLK_T_SCSI_CMD;
    let erase = VIRTIO_BLK_T_SECURE_ERASE;
    for kind in [scsi, 3, erase, VIRTIO_BLK_T_ZONE_APPEND, VIRTIO_BLK_T_BARRIER, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[into(DATA_AT, 512)]), (UNSUPP, 1));
    }
    bench.guest.assert_works();
}

#[test]
fn d05_many_requests_over_one_page() {
    let mut bench = Bench::on(image(), false);
    bench.header(VIRTIO_BLK_T_IN, 0);
    let table = BUFFERS + (8 << 20);
    let mut pieces = vec![out(HEADER_AT, 16)];
    pieces.extend([into(DATA_AT, 16 * 1024); 64]);
    pieces.push(into(STATUS_AT, 1));
    bench.guest.chain(table, 0, &pieces);
    let (rings, len) = (bench.guest.queues[0].descriptors, 16 * pieces.len() as u32);
    for head in 0..256 {
        bench.guest.descriptor(rings, head, table, len, INDIRECT_FLAG, 0);
        bench.guest.publish(0, head);
    }
    bench.guest.kick(0);
    let mut turns = 0;
    while bench.guest.step() {
        turns += 1;
    }
    assert_eq!(turns, 5, "four turns of {TURN} and a look");
    assert_eq!(std::iter::from_fn(|| bench.guest.used(0)).count(), 256);
    bench.guest.assert_works();
}

#[test]
fn d05_a_file_that_shrinks_under_its_disk() {
    let file = image();
    let mut bench = Bench::on(file.try_clone().unwrap(), false);
    file.set_len(10 * 512 + 100).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 9, &[into(DATA_AT, 512)]), (OK, 513));
    for sector in [10, 11, SECTORS - 1] {
        let read = bench.request(VIRTIO_BLK_T_IN, sector, &[into(DATA_AT, 512)]);
        assert_eq!(read, (IOERR, 1), "sector {sector}");
    }
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 9, &[into(DATA_AT, 1024)]), (IOERR, 1));
    bench.guest.assert_works();
}

#[test]
fn d05_writes_that_the_backing_refuses() {
    let sealed = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&sealed, SECTORS * 512).unwrap();
    let mut bench = Bench::on(sealed.try_clone().unwrap(), false);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA_AT, 512)]), (OK, 1));
    fcntl_add_seals(sealed.as_fd(), SealFlags::WRITE).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, &[out(DATA_AT, 512)]), (IOERR, 1));
    assert_eq!(bench.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, &[into(DATA_AT, 512)]), (OK, 513));
    bench.guest.assert_works();
}

proptest! {
    /// Any header, any data, in any pieces: used once, with a status that means something.
    #[test]
    fn any_request_is_answered(
        kind in prop_oneof![0..16u32, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        range in (0..SECTORS + 2, prop_oneof![0..5000u32, any::<u32>()], 0..4u32),
        pieces in proptest::collection::vec(
            (
                prop_oneof![
                    Just(HEADER_AT), Just(DATA_AT), Just(HOLE - 256), Just(END), any::<u64>()
                ],
                prop_oneof![Just(16u32), Just(512), Just(0), Just(1), 0..2000u32, any::<u32>()],
                any::<bool>(),
            ),
            0..6,
        ),
    ) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SECTORS * 512).unwrap();
        let mut bench = Bench::on(file.try_clone().unwrap(), false);
        bench.header(kind, sector);
        bench.guest.put(DATA_AT, range.0);
        bench.guest.put(DATA_AT + 8, range.1);
        bench.guest.put(DATA_AT + 12, range.2);
        let mut chain = vec![out(HEADER_AT, 16)];
        chain.extend(pieces.iter().map(|&(address, len, write)| Piece { address, len, write }));
        chain.push(into(STATUS_AT, 1));
        bench.guest.submit(0, 0, &chain);
        bench.guest.run();
        if bench.guest.status() == DRIVER_OK {
            prop_assert!(bench.guest.used(0).is_some());
            prop_assert!(bench.guest.get::<u8>(STATUS_AT) <= UNSUPP);
        } else {
            let total: u64 = chain.iter().map(|p| u64::from(p.len)).sum();
            prop_assert!(total > 1 << 32, "only that is a broken ring here");
        }
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * 512);
    }
}
