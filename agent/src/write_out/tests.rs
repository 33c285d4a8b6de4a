//! A container's overlay and the host's, by real overlays: whatever is done in the first, the second one shows the same
//! once that was written out.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    fs::{CWD, lgetxattr, lsetxattr, makedev},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::*;

/// In a mount namespace of its own, on a tmpfs, if this machine has them to give.
fn on_overlays(test: impl FnOnce(Bench) + Send + 'static) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let run = move || {
        // SAFETY: no descriptors are unshared.
        let apart = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
        if apart.is_err() {
            return eprintln!("skipped: it takes a mount namespace");
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        mount("none", &root, "tmpfs", MountFlags::empty(), None).unwrap();
        let bench = Bench { root };
        for name in ["image", "host", "merged"] {
            fs::create_dir(bench.path(name)).unwrap();
        }
        test(bench);
    };
    // Debug builds take more of it than an agent's threads have, in directories that lie deep.
    let thread = thread::Builder::new().stack_size(8 << 20);
    thread.spawn(run).unwrap().join().unwrap();
}

const MOST: Amount = Amount { files: 1000, bytes: 1 << 30 };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

struct Bench {
    root: PathBuf,
}

/// A container that runs: its overlay, mounted.
struct Guest<'a> {
    bench: &'a Bench,
    earlier: Earlier,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Starts the container, above what the host has now.
    fn start(&self) -> Guest<'_> {
        for name in ["start", "upper", "work"] {
            let _ = fs::remove_dir_all(self.path(name));
        }
        for name in ["upper", "work"] {
            fs::create_dir(self.path(name)).unwrap();
        }
        self.start_again()
    }

    /// With what the last one had written, too.
    fn start_again(&self) -> Guest<'_> {
        let _ = fs::remove_dir_all(self.path("start"));
        let mut copy = Command::new("cp");
        copy.arg("-a").args([self.path("host"), self.path("start")]);
        assert!(copy.status().unwrap().success());
        self.mount(&["start", "image"], "upper", "work", "merged");
        Guest { bench: self, earlier: Earlier::default() }
    }

    fn mount(&self, lowers: &[&str], upper: &str, work: &str, at: &str) {
        let lowers: Vec<_> =
            lowers.iter().map(|name| self.path(name).display().to_string()).collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=off,index=off,metacopy=off",
            lowers.join(":"),
            self.path(upper).display(),
            self.path(work).display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let at = self.path(at);
        fs::create_dir_all(&at).unwrap();
        mount("overlay", &at, "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    }

    /// Programs that other threads start have our descriptors for a moment.
    fn unmount(&self, name: &str) {
        let unmount = || unmount(self.path(name), UnmountFlags::empty());
        let done = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(1));
            unmount().is_ok()
        });
        assert!(done, "{name} stays in use");
    }

    /// What the host sees in the container's root.
    fn seen(&self) -> BTreeMap<PathBuf, String> {
        let _ = fs::remove_dir_all(self.path("host-work"));
        fs::create_dir(self.path("host-work")).unwrap();
        self.mount(&["image"], "host", "host-work", "host-merged");
        let tree = tree(&self.path("host-merged"));
        self.unmount("host-merged");
        tree
    }

    fn host(&self) -> Vec<String> {
        tree(&self.path("host")).into_keys().map(|path| path.display().to_string()).collect()
    }
}

impl Guest<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.bench.path("merged").join(name)
    }

    fn overlay(&self) -> Overlay {
        let open = |name: &str| directory(CWD, self.bench.path(name).as_os_str()).unwrap();
        let (upper, start) = (open("upper"), Some(open("start")));
        Overlay { upper, start, image: vec![open("image")], is_live: false }
    }

    fn write_out(&mut self) -> LeftOut {
        let to = directory(CWD, self.bench.path("host").as_os_str()).unwrap();
        let left_out = self.overlay().write_out(to, &mut self.earlier, MOST, soon()).unwrap();
        let (guest, host) = (tree(&self.bench.path("merged")), self.bench.seen());
        same(&guest, &host);
        left_out
    }

    fn end(self) {
        self.bench.unmount("merged");
    }
}

fn same(left: &BTreeMap<PathBuf, String>, right: &BTreeMap<PathBuf, String>) {
    for path in left.keys().chain(right.keys()) {
        assert_eq!(left.get(path), right.get(path), "{}", path.display());
    }
}

/// All that is to be the same, by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut tree, mut directories) = (BTreeMap::new(), vec![PathBuf::new()]);
    let mut names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    while let Some(directory) = directories.pop() {
        let mut entries: Vec<_> =
            fs::read_dir(root.join(&directory)).unwrap().map(|e| e.unwrap().file_name()).collect();
        entries.sort();
        for name in entries {
            let path = directory.join(name);
            let (full, mut said) = (root.join(&path), String::new());
            let found = fs::symlink_metadata(&full).unwrap();
            let kind = found.file_type();
            if kind.is_dir() {
                directories.push(path.clone());
            } else if kind.is_symlink() {
                said = format!("{:?}", fs::read_link(&full).unwrap());
            } else if kind.is_file() {
                said = format!("{:?} {}", fs::read(&full).unwrap(), found.blocks());
            }
            if kind.is_file() && found.nlink() > 1 {
                let first = names.entry((found.dev(), found.ino())).or_insert(path.clone());
                if *first != path {
                    said += &format!(" = {}", first.display());
                }
            }
            let mut value = [0; 100];
            let own =
                lgetxattr(&full, "user.x", &mut value).map(|size| value[..size].to_vec()).ok();
            let (user, group, mode) = (found.uid(), found.gid(), found.mode());
            // Overlays that are mounted touch the times of directories that they merge.
            let time = (found.mtime(), found.mtime_nsec());
            let is_char = kind.is_char_device();
            tree.insert(path, format!("{mode:o} {user}:{group} {time:?} {is_char} {own:?} {said}"));
        }
    }
    tree
}

fn write(path: impl AsRef<Path>, text: &str) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn make_image(bench: &Bench) {
    let image = bench.path("image");
    for name in ["etc/motd", "etc/passwd", "usr/bin/a", "usr/bin/b", "usr/lib/deep/er/c", "opt/x"] {
        write(image.join(name), name);
    }
    symlink("motd", image.join("etc/link")).unwrap();
    fs::hard_link(image.join("usr/bin/a"), image.join("usr/bin/twin")).unwrap();
}

#[test]
fn all_that_a_container_does_is_seen_on_the_host() {
    on_overlays(|bench| {
        make_image(&bench);
        let mut guest = bench.start();
        let at = |name: &str| bench.path("merged").join(name);
        write(at("new/file"), "new");
        write(at("etc/motd"), "changed");
        fs::remove_file(at("etc/passwd")).unwrap();
        // Replaced: a directory by one, by a file, a file by a directory.
        fs::remove_dir_all(at("usr/lib/deep")).unwrap();
        write(at("usr/lib/deep/other"), "other");
        fs::remove_dir_all(at("opt")).unwrap();
        write(at("opt"), "a file");
        fs::remove_file(at("usr/bin/b")).unwrap();
        write(at("usr/bin/b/c/d"), "");
        fs::rename(at("usr/lib"), at("lib")).unwrap_err();
        fs::rename(at("new"), at("usr/new")).unwrap();
        fs::rename(at("usr/new"), at("new")).unwrap();
        symlink("/etc/passwd", at("new/link")).unwrap();
        fs::hard_link(at("new/file"), at("new/twin")).unwrap();
        mknodat(CWD, at("new/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        chown(at("new/file"), Some(7), Some(8)).unwrap();
        fs::set_permissions(at("new/file"), PermissionsExt::from_mode(0o4751)).unwrap();
        fs::set_permissions(at("new"), PermissionsExt::from_mode(0o1777)).unwrap();
        let hole = File::create(at("hole")).unwrap();
        hole.set_len(64 << 20).unwrap();
        hole.write_all_at(b"x", 32 << 20).unwrap();
        drop(hole);
        let own = lsetxattr(at("etc/motd"), "user.x", b"y", XattrFlags::empty());
        let most = Amount { files: 1000, bytes: 1 << 20 };
        let amount = guest.overlay().amount(&most, &guest.earlier).unwrap();
        assert!((10..40).contains(&amount.files) && amount.bytes < 1 << 18, "{amount:?}");
        assert_eq!(guest.write_out(), LeftOut::default());
        assert!(bench.seen()[Path::new("etc/motd")].contains("121") == own.is_ok());
        assert!(fs::metadata(bench.path("host/hole")).unwrap().blocks() < 1000);
        let few = Amount { files: 3, ..most };
        let counted = guest.overlay().amount(&few, &guest.earlier).unwrap();
        assert_eq!(counted.files, 4, "no more are counted");
        guest.end();
    });
}

#[test]
fn what_has_not_changed_is_not_written_again_and_what_was_removed_goes() {
    on_overlays(|bench| {
        make_image(&bench);
        write(bench.path("host/given/by"), "an engine");
        let mut guest = bench.start();
        for name in ["stays", "goes", "etc/goes", "folder/goes", "folder/stays"] {
            write(guest.path(name), name);
        }
        thread::sleep(Duration::from_millis(1100));
        guest.write_out();
        let number = |name: &str| fs::metadata(bench.path("host").join(name)).unwrap().ino();
        let stays = number("stays");
        // By somebody else, meanwhile.
        write(bench.path("host/meanwhile"), "");
        for name in ["goes", "etc/goes", "folder/goes"] {
            fs::remove_file(guest.path(name)).unwrap();
        }
        write(guest.path("etc/new"), "");
        fs::remove_file(bench.path("host/meanwhile")).unwrap();
        guest.write_out();
        assert_eq!(number("stays"), stays);
        assert_eq!(
            bench.host(),
            ["etc", "etc/new", "folder", "folder/stays", "given", "given/by", "stays"]
        );
        // No more is written out: the next start is to hide what goes now.
        fs::remove_file(guest.path("folder/stays")).unwrap();
        fs::remove_file(guest.path("stays")).unwrap();
        guest.overlay().hide(&guest.earlier).unwrap();
        let Guest { earlier, .. } = &guest;
        assert!(earlier.created.values().flatten().count() > 3);
        guest.end();
        let guest = bench.start_again();
        assert!(!guest.path("stays").exists() && !guest.path("folder/stays").exists());
        assert!(guest.path("given/by").exists());
        guest.end();
    });
}

#[test]
fn what_was_written_out_and_is_undone_is_something_to_write_out() {
    on_overlays(|bench| {
        make_image(&bench);
        let most = Amount { files: 1000, bytes: 1 << 20 };
        let mut guest = bench.start();
        let is_empty = |guest: &Guest| {
            guest.overlay().amount(&most, &guest.earlier).unwrap() == Amount::default()
        };
        assert!(is_empty(&guest));
        write(guest.path("goes"), "");
        guest.write_out();
        fs::remove_file(guest.path("goes")).unwrap();
        assert_eq!(fs::read_dir(bench.path("upper")).unwrap().count(), 0);
        assert!(!is_empty(&guest));
        guest.write_out();
        assert_eq!(bench.host(), Vec::<String>::new());
        guest.end();
    });
}

#[test]
fn a_directory_that_took_the_place_of_another_has_no_whiteouts_for_what_was_written_out() {
    on_overlays(|bench| {
        make_image(&bench);
        let mut guest = bench.start();
        for name in ["opt/new", "opt/folder/new"] {
            write(guest.path(name), "");
        }
        guest.write_out();
        fs::remove_dir_all(guest.path("opt")).unwrap();
        fs::create_dir_all(guest.path("opt/folder")).unwrap();
        guest.overlay().hide(&guest.earlier).unwrap();
        guest.end();
        let guest = bench.start_again();
        let listed = |name: &str| fs::read_dir(guest.path(name)).unwrap().count();
        assert_eq!((listed("opt"), listed("opt/folder")), (1, 0));
        guest.end();
    });
}

#[test]
fn what_the_host_cannot_have_is_left_out_and_hides_what_it_hid() {
    on_overlays(|bench| {
        make_image(&bench);
        let mut guest = bench.start();
        let null = makedev(1, 3);
        fs::remove_file(guest.path("opt/x")).unwrap();
        for name in ["opt/x", "null"] {
            mknodat(CWD, guest.path(name), FileType::CharacterDevice, Mode::RUSR, null).unwrap();
        }
        let to = directory(CWD, bench.path("host").as_os_str()).unwrap();
        let left_out = guest.overlay().write_out(to, &mut guest.earlier, MOST, soon()).unwrap();
        assert_eq!(left_out, LeftOut { count: 2, path: "null".into() });
        let seen = bench.seen();
        assert!(!seen.contains_key(Path::new("opt/x")) && !seen.contains_key(Path::new("null")));
        guest.end();
    });
}

#[test]
fn directories_lie_as_deep_in_each_other_as_is_written_out_and_what_is_deeper_is_refused() {
    on_overlays(|bench| {
        let most = Amount { files: 1000, bytes: 1 << 20 };
        let mut guest = bench.start();
        let deep = ["d"; DEPTH - 1].join("/");
        write(guest.path(&deep).join("file"), "");
        guest.write_out();
        // Another thing by the name of the first: what it had goes.
        fs::remove_dir_all(guest.path("d")).unwrap();
        write(guest.path("d"), "");
        guest.write_out();
        fs::remove_file(guest.path("d")).unwrap();
        fs::create_dir_all(guest.path(&deep).join("d")).unwrap();
        let refused = guest.overlay().amount(&most, &guest.earlier).unwrap_err();
        assert_eq!(refused.source.raw_os_error(), Some(libc::ENAMETOOLONG));
        guest.end();
    });
}

/// A generator that is the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }

    /// A path of few names, so that things meet.
    fn path(&mut self) -> String {
        let depth = 1 + self.below(4);
        let names: Vec<_> =
            (0..depth).map(|_| ["etc", "usr", "bin", "x", "deep"][self.below(5)]).collect();
        names.join("/")
    }

    /// Does something, which may fail as it likes.
    fn act(&mut self, root: &Path) {
        let (a, b) = (root.join(self.path()), root.join(self.path()));
        let _ = match self.below(10) {
            0 | 1 => fs::create_dir_all(&a),
            2 | 3 => fs::write(&a, format!("{}", self.below(1000))),
            4 => fs::remove_file(&a),
            5 => fs::remove_dir_all(&a),
            6 => fs::rename(&a, &b),
            7 => fs::hard_link(&a, &b),
            8 => symlink("etc", &a),
            _ => fs::set_permissions(&a, PermissionsExt::from_mode(0o700 | self.below(64) as u32)),
        };
    }
}

#[test]
fn what_changes_meanwhile_is_left_for_the_next_time() {
    on_overlays(|bench| {
        make_image(&bench);
        let mut guest = bench.start();
        let is_over = Arc::new(AtomicBool::new(false));
        let busy = |seed| {
            let (root, is_over) = (bench.path("merged"), is_over.clone());
            // In this mount namespace.
            thread::spawn(move || {
                let mut dice = Dice(seed);
                while !is_over.load(Ordering::Relaxed) {
                    dice.act(&root);
                }
            })
        };
        let threads = [busy(1), busy(2)];
        for _ in 0..50 {
            let to = directory(CWD, bench.path("host").as_os_str()).unwrap();
            let overlay = Overlay { is_live: true, ..guest.overlay() };
            overlay.amount(&MOST, &guest.earlier).unwrap();
            overlay.write_out(to, &mut guest.earlier, MOST, soon()).unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        guest.write_out();
        guest.end();
    });
}

#[test]
fn what_is_too_much_or_takes_too_long_is_given_up() {
    on_overlays(|bench| {
        let mut guest = bench.start();
        (0..5).for_each(|n| write(guest.path(&format!("folder/{n}")), ""));
        for (files, end, why) in [
            (5, soon(), "it has become more than is written out"),
            (6, Instant::now(), "timed out"),
        ] {
            let to = directory(CWD, bench.path("host").as_os_str()).unwrap();
            let overlay = Overlay { is_live: true, ..guest.overlay() };
            let most = Amount { files, ..MOST };
            let error = overlay.write_out(to, &mut guest.earlier, most, end).unwrap_err();
            assert_eq!(error.source.to_string(), why);
        }
        guest.write_out();
        guest.end();
    });
}

#[test]
fn whatever_is_done_over_pauses_ends_and_starts_the_host_sees_what_the_container_does() {
    for seed in 0..12 {
        on_overlays(move |bench| {
            let mut dice = Dice(seed);
            make_image(&bench);
            (0..20).for_each(|_| dice.act(&bench.path("image")));
            let mut guest = bench.start();
            for _ in 0..12 {
                (0..dice.below(12)).for_each(|_| dice.act(&bench.path("merged")));
                match dice.below(4) {
                    // A pause.
                    0 => drop(guest.write_out()),
                    // An end.
                    1 => {
                        guest.write_out();
                        guest.end();
                        // By an engine, to a container that is stopped.
                        let _ = fs::create_dir(bench.path("host-work"));
                        bench.mount(&["image"], "host", "host-work", "host-merged");
                        (0..dice.below(3)).for_each(|_| dice.act(&bench.path("host-merged")));
                        bench.unmount("host-merged");
                        guest = bench.start();
                    }
                    // An end of which nothing, or not all, is written out.
                    2 => {
                        let before = tree(&bench.path("merged"));
                        guest.overlay().hide(&guest.earlier).unwrap();
                        guest.end();
                        guest = bench.start_again();
                        let after = tree(&bench.path("merged"));
                        same(&before, &after);
                    }
                    _ => {}
                }
            }
            guest.write_out();
            guest.end();
        });
    }
}
