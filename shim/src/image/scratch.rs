//! The disk a container writes to: an empty ext4 of the wished size, made in a moment.
//!
//! `mkfs.ext4` runs once for each size; the few blocks it wrote are kept in the cache, as a list that no
//! file system can make larger (over 9p, holes are zeros to be read). A disk is a file of that size with
//! those blocks. Its file system has no reserved blocks, and inode tables that count as zeroed, so that
//! no guest spends its first seconds zeroing them.
//!
//! Most have no name, and so are gone with their last user, and no journal. One that outlives its sandbox has both.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::error::ImageError;
use super::lock::Lock;
use super::sparse;
use crate::cli::Memory;

/// Bytes; less leaves no room beside ext4's own tables, more is beyond any ext4.
const LEAST: u64 = 16 << 20;
const MOST: u64 = 16 << 40;
const BLOCK: u64 = 4096;
/// A block of a template with its number.
const RECORD: usize = 8 + BLOCK as usize;
/// Part of a template's name: raise it when the options of `mkfs.ext4` change.
const VERSION: u32 = 1;
/// Bytes: ext4 has no smaller one, and needs no larger one for the disk of a container.
const LEAST_JOURNAL: u64 = 4 << 20;
const MOST_JOURNAL: u64 = 32 << 20;
const JOURNAL_SHARE: u64 = 128;
/// For what takes milliseconds, on whatever host.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Features are named one by one so that the machine's mke2fs.conf has no say; a journal and room for
/// growing the group descriptors are left out.
const FEATURES: &str = "dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,\
     huge_file,large_file,metadata_csum,sparse_super2,64bit";
/// Discarding the file first tells mkfs that its inode tables are zeros already. Fixed identities make
/// all templates of a size the same.
const EXTENDED: &str = "discard,lazy_itable_init=1,packed_meta_blocks=1,num_backup_sb=0,\
     root_owner=0:0,hash_seed=00000000-0000-4000-8000-000000000001";
const UUID: &str = "00000000-0000-4000-8000-000000000002";

/// A new disk of `size` bytes, rounded up to whole blocks: sparse, unlinked, open for reading and
/// writing. Templates are kept in `cache`, where the disk's file also lies.
pub fn scratch(cache: &Path, size: u64) -> Result<File, ImageError> {
    let (template, size) = Template::read(cache, size, false)?;
    unnamed(cache)
        .and_then(|disk| template.unpack(&disk, size).map(|()| disk))
        .map_err(|source| ImageError::Store { path: template.path, source })
}

/// Makes the disk `path` likewise, with a journal, unless it is there.
pub fn lasting_scratch(cache: &Path, size: u64, path: &Path) -> Result<(), ImageError> {
    let failed = |source| ImageError::Store { path: path.into(), source };
    if path.try_exists().map_err(failed)? {
        return Ok(());
    }
    let (template, size) = Template::read(cache, size, true)?;
    // Half of a disk never has its name.
    let folder = path.parent().unwrap_or(Path::new("."));
    let disk = tempfile::Builder::new().prefix(".ampoule-").tempfile_in(folder).map_err(failed)?;
    template
        .unpack(disk.as_file(), size)
        .map_err(|source| ImageError::Store { path: template.path.clone(), source })?;
    disk.persist(path).map(drop).map_err(|e| failed(e.error))
}

/// The blocks of an empty disk of some size.
struct Template {
    path: PathBuf,
    blocks: Vec<u8>,
}

impl Template {
    /// That of a size, and the size in whole blocks; made if it is not there.
    fn read(cache: &Path, size: u64, journal: bool) -> Result<(Self, u64), ImageError> {
        if !(LEAST..=MOST).contains(&size) {
            let [size, least, most] = [size, LEAST, MOST].map(Memory);
            return Err(ImageError::ScratchSize { size, least, most });
        }
        let size = size.next_multiple_of(BLOCK);
        let kind = if journal { "journal" } else { "scratch" };
        let path = cache.join(format!("{kind}-v{VERSION}-{size}.blocks"));
        let blocks = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                make_template(cache, &path, size, journal)?
            }
            blocks => blocks.map_err(|source| ImageError::Store { path: path.clone(), source })?,
        };
        Ok((Self { path, blocks }, size))
    }

    /// Makes a disk of an empty file.
    fn unpack(&self, disk: &File, size: u64) -> io::Result<()> {
        disk.set_len(size)?;
        let (records, rest) = self.blocks.as_chunks::<RECORD>();
        for record in records {
            let (number, block) = record.split_first_chunk().ok_or(ErrorKind::InvalidData)?;
            let number = u64::from_le_bytes(*number);
            if number >= size / BLOCK {
                return Err(ErrorKind::InvalidData.into());
            }
            disk.write_all_at(block, number * BLOCK)?;
        }
        if records.is_empty() || !rest.is_empty() {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

/// All blocks of a disk that are not zero: the number of each, then its bytes.
fn pack(disk: &File, size: u64) -> io::Result<Vec<u8>> {
    let mut template = Vec::new();
    let mut at = 0;
    while let Some(run) = sparse::next_data(disk, at, size)? {
        at = run.offset + run.length;
        for number in run.offset / BLOCK..at.div_ceil(BLOCK) {
            let mut block = [0; BLOCK as usize];
            disk.read_exact_at(&mut block, number * BLOCK)?;
            if !sparse::is_zero(&block) {
                template.extend(number.to_le_bytes());
                template.extend(block);
            }
        }
    }
    Ok(template)
}

/// A file without a name; where the file system has no such thing, one whose name is removed at once.
fn unnamed(directory: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => tempfile::tempfile_in(directory),
        Err(error) => Err(error.into()),
    }
}

/// Makes the template, unless another has while this waited for the lock.
fn make_template(
    cache: &Path,
    path: &Path,
    size: u64,
    journal: bool,
) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Store { path: cache.into(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(cache).map_err(failed)?;
    let lock = Lock::take(&cache.join("scratch.lock"), PATIENCE, || {});
    let _lock = lock.map_err(|source| match source.kind() {
        ErrorKind::TimedOut => {
            ImageError::Busy { what: "a scratch disk".into(), minutes: PATIENCE.as_secs() / 60 }
        }
        _ => failed(source),
    })?;
    if let Ok(template) = fs::read(path) {
        return Ok(template);
    }
    let disk = unnamed(cache).map_err(failed)?;
    disk.set_len(size).map_err(failed)?;
    mkfs(&disk, path, journal.then(|| (size / JOURNAL_SHARE).clamp(LEAST_JOURNAL, MOST_JOURNAL)))?;
    let template = pack(&disk, size).map_err(failed)?;
    publish(&template, cache, path).map_err(failed)?;
    Ok(template)
}

/// The file gets its name when all of it is on disk.
fn publish(template: &[u8], cache: &Path, path: &Path) -> io::Result<()> {
    let temporary = cache.join("scratch.tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(template)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Makes a file system on `disk`, with a journal of so many bytes; `path` is for messages.
fn mkfs(disk: &File, path: &Path, journal: Option<u64>) -> Result<(), ImageError> {
    let device = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
    let mut command = Command::new(program());
    command.env_clear().args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0"]);
    command.args(["-O", &format!("none,{FEATURES}"), "-E", EXTENDED, "-U", UUID]);
    if let Some(bytes) = journal {
        command.args(["-O", "has_journal", "-J", &format!("size={}", bytes >> 20)]);
    }
    command.arg(device);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let failed = |source: io::Error| match source.kind() {
        ErrorKind::NotFound => ImageError::NoMkfs { source },
        _ => ImageError::Store { path: path.into(), source },
    };
    let mut child = child.map_err(failed)?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().map_err(failed)?.is_none() {
        if Instant::now() > deadline {
            child.kill().map_err(failed)?;
        }
        sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(ImageError::Mkfs { path: path.into(), output: format!("{} {text}", output.status) })
}

/// Where Debian keeps it, which is not in every user's PATH.
fn program() -> PathBuf {
    let places = ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"];
    places.iter().map(PathBuf::from).find(|path| path.exists()).unwrap_or("mkfs.ext4".into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn fsck(disk: &File) -> bool {
        let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
        let output = Command::new("/sbin/e2fsck").args(["-f", "-n", &path]).output().unwrap();
        println!("{}", String::from_utf8_lossy(&output.stdout));
        output.status.success()
    }

    #[test]
    fn a_disk_is_whole_small_and_gone_with_its_file() {
        let cache = tempfile::tempdir().unwrap();
        for size in [LEAST, 64 << 20, GIB + 1, 10 * GIB] {
            let disk = scratch(cache.path(), size).unwrap();
            let meta = disk.metadata().unwrap();
            assert_eq!(meta.len(), size.next_multiple_of(BLOCK));
            assert_eq!(meta.nlink(), 0);
            assert!(meta.blocks() * 512 < 1 << 20, "{} bytes for {size}", meta.blocks() * 512);
            assert!(fsck(&disk), "{size}");
        }
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 4);
    }

    #[test]
    fn one_that_lasts_has_a_journal_and_is_made_once() {
        let cache = tempfile::tempdir().unwrap();
        for size in [LEAST, 10 * GIB] {
            let path = cache.path().join(size.to_string());
            lasting_scratch(cache.path(), size, &path).unwrap();
            let disk = File::options().read(true).write(true).open(&path).unwrap();
            let meta = disk.metadata().unwrap();
            assert_eq!((meta.len(), meta.mode() & 0o777), (size, 0o600));
            assert!(meta.blocks() * 512 < 1 << 20, "{} bytes for {size}", meta.blocks() * 512);
            assert!(fsck(&disk), "{size}");
            let mut features = [0; 4];
            disk.read_exact_at(&mut features, 1024 + 0x5c).unwrap();
            assert_eq!(u32::from_le_bytes(features) & 4, 4, "has_journal");
            disk.write_all_at(&[7; 512], 0).unwrap();
            lasting_scratch(cache.path(), size, &path).unwrap();
            let mut boot_block = [0; 512];
            disk.read_exact_at(&mut boot_block, 0).unwrap();
            assert_eq!(boot_block, [7; 512]);
        }
        // Both and their templates.
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 4);
    }

    #[test]
    fn a_copy_is_quick() {
        let cache = tempfile::tempdir().unwrap();
        scratch(cache.path(), 10 * GIB).unwrap();
        let times = (0..20).map(|_| {
            let start = Instant::now();
            scratch(cache.path(), 10 * GIB).unwrap();
            start.elapsed()
        });
        let best = times.min().unwrap();
        println!("10 GiB scratch disk: {best:?}");
        assert!(best < Duration::from_millis(20), "{best:?}");
    }

    #[test]
    fn many_at_once_share_one_template_and_no_data() {
        let cache = tempfile::tempdir().unwrap();
        let make = || scratch(cache.path(), 64 << 20).unwrap();
        let disks: Vec<File> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        disks[0].write_all_at(&[7; 4096], 32 << 20).unwrap();
        assert!(disks[1..].iter().all(fsck));
        let mut block = [1; 4096];
        disks[1].read_exact_at(&mut block, 32 << 20).unwrap();
        assert_eq!(block, [0; 4096]);
    }

    #[test]
    fn what_a_killed_process_left_is_made_anew() {
        let cache = tempfile::tempdir().unwrap();
        fs::write(cache.path().join("scratch.tmp"), vec![1; 1 << 20]).unwrap();
        assert!(fsck(&scratch(cache.path(), LEAST).unwrap()));
    }

    #[test]
    fn a_template_is_small_and_a_damaged_one_is_named() {
        let cache = tempfile::tempdir().unwrap();
        scratch(cache.path(), 64 << 20).unwrap();
        let template = cache.path().join("scratch-v1-67108864.blocks");
        assert!(fs::metadata(&template).unwrap().len() < 256 << 10);
        fs::write(&template, &fs::read(&template).unwrap()[..5000]).unwrap();
        let error = scratch(cache.path(), 64 << 20).unwrap_err();
        assert!(error.to_string().contains("scratch-v1-67108864.blocks"), "{error}");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let cache = tempfile::tempdir().unwrap();
        for size in [0, LEAST - 1, MOST + 1, u64::MAX] {
            let error = scratch(cache.path(), size).unwrap_err();
            assert!(matches!(error, ImageError::ScratchSize { .. }), "{error}");
        }
    }
}
