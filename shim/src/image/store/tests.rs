use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::time::{Instant, SystemTime};

use serde_json::json;

use super::*;
use crate::image::testing::{
    Bench, LAYER, Mounted, Tar, TestLayout, fsck, gzip, killed_at_any_moment, look, zstd,
};

impl Bench {
    fn tar(&self, name: &str, bytes: &[u8]) -> Reference {
        fs::write(self.path(name), bytes).unwrap();
        Reference::Tar(self.path(name))
    }

    fn count(&self, part: &str) -> usize {
        self.store.files(part).unwrap().len()
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn oci(layout: &TestLayout) -> Reference {
    Reference::Oci { layout: layout.path().into(), tag: None }
}

fn small() -> Vec<u8> {
    Tar::default().file("hello", b"world").end()
}

#[test]
fn one_import_many_names() {
    let bench = Bench::new();
    let source = bench.tar("a.tar", &small());
    let imported = bench.store.import(&source, &[name("alpine"), name("alpine:3.23")]).unwrap();
    assert_eq!(imported.reference, "docker.io/library/alpine:latest");
    assert_eq!(imported.digest, Digest::of(&small()).to_string());
    assert_eq!(imported.config, ImageConfig::of_rootfs());
    for text in ["alpine", "alpine:3.23", "docker.io/library/alpine:latest"] {
        let image = bench.store.resolve(&text.parse().unwrap()).unwrap();
        assert_eq!(
            (image.rootfs, image.digest),
            (imported.rootfs.clone(), imported.digest.clone())
        );
    }
    let again = Reference::Name(name("alpine"));
    bench.store.import(&again, &[name("mine/base:1")]).unwrap();
    let names: Vec<_> =
        bench.store.list().unwrap().into_iter().map(|image| image.reference).collect();
    assert_eq!(
        names,
        [
            "docker.io/library/alpine:3.23",
            "docker.io/library/alpine:latest",
            "docker.io/mine/base:1",
        ]
    );
    assert_eq!((bench.count("rootfs"), bench.count("tmp"), bench.count("locks")), (1, 0, 0));
}

#[test]
fn an_unknown_image_says_what_there_is_and_what_to_do() {
    let bench = Bench::new();
    let resolve = |text: &str| bench.store.resolve(&text.parse().unwrap()).unwrap_err().to_string();
    assert!(resolve("alpine").contains("no images"));
    bench.store.import(&bench.tar("a.tar", &small()), &[name("alpine")]).unwrap();
    let text = resolve("alpin");
    for part in ["`alpin:latest`", "alpine:latest"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn it_is_the_store_that_a_conversion_fills() {
    let bench = Bench::new();
    let read = |errno| ImageError::Source {
        path: "/image/file".into(),
        source: io::Error::from_raw_os_error(errno),
    };
    let full = bench.store.out_of_room(read(libc::ENOSPC));
    assert!(full.object().unwrap().ends_with("/tmp"), "{full}");
    assert_eq!(bench.store.out_of_room(read(libc::EIO)).object().unwrap(), "/image/file");
}

#[test]
fn conversion_happens_once_for_each_content() {
    let bench = Bench::new();
    let layout = TestLayout::new();
    let compressed = layout.blob(LAYER, &gzip(&small()));
    let again = layout.blob(LAYER, &zstd(&small()));
    let config = layout.config("amd64", &[Digest::of(&small())], json!({}));
    let (one, two) = (layout.manifest(&config, &[compressed]), layout.manifest(&config, &[again]));
    let layout = layout.tag(one, "one").tag(two, "two");
    let resolve = |tag: &str| {
        let (path, tag) = (layout.path().into(), Some(tag.into()));
        bench.store.resolve(&Reference::Oci { layout: path, tag }).unwrap()
    };
    let (one, two) = (resolve("one"), resolve("two"));
    assert_eq!(one.rootfs, two.rootfs, "the same layers, compressed differently");
    assert_ne!(one.digest, two.digest);
    let inode = fs::metadata(&one.rootfs).unwrap().ino();
    assert_eq!(fs::metadata(resolve("one").rootfs).unwrap().ino(), inode);
}

#[test]
fn the_same_layers_give_the_same_file_in_every_store() {
    let image = |bench: &Bench| {
        let layout = TestLayout::new();
        let upper = Tar::default().file("new", vec![1; 9000]).file(".wh.hello", b"").end();
        let manifest = layout.image(&[small(), upper]);
        let layout = layout.tag(manifest, "x");
        fs::read(bench.store.resolve(&oci(&layout)).unwrap().rootfs).unwrap()
    };
    assert!(image(&Bench::new()) == image(&Bench::new()));
}

#[test]
fn a_directory_is_converted_again_when_anything_in_it_changes() {
    let bench = Bench::new();
    let root = bench.path("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/f"), "one").unwrap();
    let source = Reference::Directory(root.clone());
    let mut seen = vec![bench.store.resolve(&source).unwrap().rootfs];
    assert_eq!(bench.store.resolve(&source).unwrap().rootfs, seen[0]);
    let mut changed = |change: &dyn Fn()| {
        change();
        let rootfs = bench.store.resolve(&source).unwrap().rootfs;
        assert!(!seen.contains(&rootfs));
        seen.push(rootfs);
    };
    changed(&|| fs::write(root.join("sub/f"), "two").unwrap());
    changed(&|| {
        fs::set_permissions(root.join("sub/f"), fs::Permissions::from_mode(0o600)).unwrap()
    });
    changed(&|| {
        // Nothing but the change time tells.
        let before = fs::metadata(root.join("sub/f")).unwrap().modified().unwrap();
        fs::write(root.join("sub/f"), "owt").unwrap();
        let file = fs::File::options().write(true).open(root.join("sub/f")).unwrap();
        file.set_modified(before).unwrap();
    });
    changed(&|| symlink("f", root.join("sub/link")).unwrap());
    changed(&|| fs::rename(root.join("sub/f"), root.join("sub/g")).unwrap());
    changed(&|| fs::remove_file(root.join("sub/g")).unwrap());
}

#[test]
fn a_directory_arrives_as_it_is() {
    let bench = Bench::new();
    let root = bench.path("root");
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/big"), vec![3; 100_000]).unwrap();
    fs::write(root.join("a/empty"), "").unwrap();
    fs::hard_link(root.join("a/big"), root.join("a/b/hard")).unwrap();
    symlink("/etc/passwd", root.join("a/link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, root.join("pipe"), 0o640.into()).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
    let flags = rustix::fs::XattrFlags::empty();
    let xattr = rustix::fs::setxattr(root.join("a/big"), "user.note", b"x\n", flags);
    println!("user attributes on this file system: {xattr:?}");
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::lchown(root.join("a/link"), Some(1234), Some(5678)).unwrap();
        let device = rustix::fs::makedev(10, 229);
        let kind = rustix::fs::FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, root.join("dev"), kind, 0o666.into(), device).unwrap();
    }
    let image = bench.store.resolve(&Reference::Directory(root.clone())).unwrap();
    fsck(&image.rootfs);
    assert!(fs::metadata(&image.rootfs).unwrap().blocks() * 512 < 1 << 20, "the hole was filled");
    fs::remove_file(root.join("sparse")).unwrap();
    let Some(mounted) = Mounted::new(&image.rootfs) else { return };
    let mut inside = look(&mounted.path().join("a"));
    let mut outside = look(&root.join("a"));
    assert_eq!(inside.remove(Path::new("")).is_some(), outside.remove(Path::new("")).is_some());
    assert_eq!(inside, outside);
    for name in ["pipe", "socket", "dev"].iter().filter(|name| root.join(name).exists()) {
        let kind = |root: &Path| fs::symlink_metadata(root.join(name)).unwrap();
        assert_eq!(kind(mounted.path()).mode(), kind(&root).mode());
        assert_eq!(kind(mounted.path()).rdev(), kind(&root).rdev());
    }
}

#[test]
fn a_mount_in_a_directory_is_an_empty_directory() {
    let bench = Bench::new();
    let (root, mount) = (bench.path("root"), bench.path("root/proc"));
    fs::create_dir_all(&mount).unwrap();
    let tmpfs = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&mount).output().unwrap();
    if !tmpfs.status.success() {
        return eprintln!("SKIPPED: mounting a tmpfs needs root");
    }
    let source = Reference::Directory(root);
    fs::write(mount.join("one"), "").unwrap();
    let before = bench.store.resolve(&source);
    fs::write(mount.join("two"), "").unwrap();
    let after = bench.store.resolve(&source);
    assert!(Command::new("umount").arg("-l").arg(&mount).status().unwrap().success());
    let (before, after) = (before.unwrap(), after.unwrap());
    assert_eq!(before.rootfs, after.rootfs);
    let Some(mounted) = Mounted::new(&after.rootfs) else { return };
    assert_eq!(look(mounted.path()).len(), 2);
}

#[test]
fn bad_sources_leave_nothing_behind() {
    let bench = Bench::new();
    let cut = Tar::default().file("f", vec![1; 5000]).cut();
    let upwards = Tar::default().file("../f", b"").end();
    fs::write(bench.path("file"), "x").unwrap();
    for (source, part) in [
        (bench.tar("cut.tar", &cut[..3000]), "middle of an entry"),
        (bench.tar("cut.tar.gz", &gzip(&cut)), "cut off"),
        (bench.tar("half.tar.gz", &gzip(&small())[..40]), "middle of an entry"),
        (bench.tar("empty.tar", b""), "cut off"),
        (bench.tar("noise.tar", &[9; 5000]), "checksum"),
        (bench.tar("upwards.tar", &upwards), "../f"),
        (Reference::Tar(bench.path("none.tar")), "none.tar"),
        (Reference::Tar("/dev/null".into()), "/dev/null"),
        (Reference::Directory(bench.path("none")), "none"),
        (Reference::Directory(bench.path("file")), "not a directory"),
        (Reference::Oci { layout: bench.path("none"), tag: None }, "not an OCI layout"),
    ] {
        let error = bench.store.import(&source, &[name("x")]).unwrap_err();
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        assert!(text.contains(part), "{source}: {text}");
    }
    let counts = ["images", "rootfs", "tmp", "locks"].map(|part| bench.count(part));
    assert_eq!(counts, [0; 4]);
}

#[test]
fn a_damaged_root_file_system_is_not_run() {
    let bench = Bench::new();
    let source = bench.tar("a.tar", &small());
    let image = bench.store.import(&source, &[name("x")]).unwrap();
    let file = fs::File::options().write(true).open(&image.rootfs).unwrap();
    file.set_len(4096).unwrap();
    let error = bench.store.resolve(&"x".parse().unwrap()).unwrap_err();
    assert!(matches!(&error, ImageError::Damaged { .. }), "{error}");
    assert!(error.hint().unwrap().contains("import the image again"));
    bench.store.import(&source, &[name("x")]).unwrap();
    fsck(&bench.store.resolve(&"x".parse().unwrap()).unwrap().rootfs);
}

#[test]
fn what_nobody_needs_goes_and_names_keep_the_rest() {
    let bench = Bench::new();
    let named = bench.store.import(&bench.tar("a.tar", &small()), &[name("x")]).unwrap();
    let other = Tar::default().file("other", b"").end();
    let loose = bench.store.resolve(&bench.tar("b.tar", &other)).unwrap();
    bench.store.prune(KEEP).unwrap();
    assert!(loose.rootfs.exists(), "it has just been used");
    bench.store.prune(Duration::ZERO).unwrap();
    assert_eq!((named.rootfs.exists(), loose.rootfs.exists()), (true, false));
    bench.store.remove(&name("x")).unwrap();
    assert!(matches!(bench.store.remove(&name("x")), Err(ImageError::Unknown { .. })));
    bench.store.prune(Duration::ZERO).unwrap();
    assert_eq!((bench.count("rootfs"), bench.count("locks")), (0, 0));
}

#[test]
fn what_is_on_its_way_to_a_name_stays() {
    let bench = Bench::new();
    let old = bench.store.resolve(&bench.tar("a.tar", &small())).unwrap();
    let used = fs::File::options().write(true).open(&old.rootfs).unwrap();
    used.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    let arrivals = [bench.store.arrival().unwrap(), bench.store.arrival().unwrap()];
    let other = Tar::default().file("other", b"").end();
    let arriving = bench.store.resolve(&bench.tar("b.tar", &other)).unwrap();
    bench.store.prune(Duration::ZERO).unwrap();
    assert_eq!((old.rootfs.exists(), arriving.rootfs.exists()), (false, true));
    drop(arrivals);
    bench.store.prune(Duration::ZERO).unwrap();
    assert_eq!((bench.count("rootfs"), bench.count("locks")), (0, 0));
}

#[test]
fn concurrent_imports_convert_once() {
    let bench = Bench::new();
    let source = bench.tar("a.tar", &Tar::default().file("f", vec![5; 3 << 20]).end());
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let import = |i| {
            let store = Store::open(&bench.path("store")).unwrap();
            let image = store.import(&source, &[name(&format!("x:{i}"))]).unwrap();
            fs::metadata(image.rootfs).unwrap().ino()
        };
        let threads: Vec<_> = (0..8).map(|i| scope.spawn(move || import(i))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(bench.store.list().unwrap().len(), 8);
    assert_eq!((bench.count("rootfs"), bench.count("tmp"), bench.count("locks")), (1, 0, 0));
}

const STORE: &str = "AMPOULE_TEST_STORE";
const SOURCE: &str = "AMPOULE_TEST_SOURCE";

/// Not a test of its own: the process that the next one kills.
#[test]
fn import_in_a_process_of_its_own() {
    let (Ok(root), Ok(source)) = (std::env::var(STORE), std::env::var(SOURCE)) else { return };
    let store = Store::open(Path::new(&root)).unwrap();
    store.import(&source.parse().unwrap(), &[name("x")]).unwrap();
}

fn spawn_import(root: &Path, source: &Reference) -> Child {
    let module = module_path!().split_once("::").unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::import_in_a_process_of_its_own")])
        .env(STORE, root)
        .env(SOURCE, source.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn an_import_killed_at_any_moment_leaves_a_store_that_works() {
    let bench = Bench::new();
    let mut tar = Tar::default();
    for i in 0..40 {
        tar = tar.file(&format!("f{i}"), vec![i; 1 << 20]);
    }
    let source = bench.tar("a.tar", &tar.end());
    let root = bench.path("killed");
    let spawn = || spawn_import(&root, &source);
    killed_at_any_moment(&root.join("rootfs"), spawn, erofs_is_whole);
    let store = Store::open(&root).unwrap();
    assert_eq!(store.files("tmp").unwrap().len(), 0);
    let image = store.import(&source, &[name("x")]).unwrap();
    erofs_is_whole(&image.rootfs);
    assert_eq!(store.files("rootfs").unwrap(), [image.rootfs]);
}

fn erofs_is_whole(path: &Path) {
    crate::image::erofs::check(&fs::File::open(path).unwrap()).unwrap();
    fsck(path);
}

#[test]
fn a_held_lock_keeps_its_work() {
    let bench = Bench::new();
    let work = bench.path("store/tmp/0123.erofs");
    fs::write(&work, "work").unwrap();
    let held = Lock::try_take(&bench.path("store/locks/0123")).unwrap();
    Store::open(&bench.path("store")).unwrap();
    assert!(held.is_some() && work.exists());
    drop(held);
    Store::open(&bench.path("store")).unwrap();
    assert!(!work.exists());
}

/// Unpacks a tar with GNU tar as root, converts it, and compares all that can be seen.
fn compare_with_gnu_tar(archive: &Path) {
    let bench = Bench::new();
    let start = Instant::now();
    let image = bench.store.resolve(&Reference::Tar(archive.into())).unwrap();
    println!("{}: converted in {:?}", archive.display(), start.elapsed());
    fsck(&image.rootfs);
    let Some(mounted) = Mounted::new(&image.rootfs) else { return };
    let unpacked = bench.path("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"]).arg(archive);
    assert!(tar.arg("-C").arg(&unpacked).status().unwrap().success());
    let (mut inside, mut outside) = (look(mounted.path()), look(&unpacked));
    // An archive need not say anything of the root.
    inside.remove(Path::new(""));
    outside.remove(Path::new(""));
    assert_eq!(inside.keys().collect::<Vec<_>>(), outside.keys().collect::<Vec<_>>());
    assert!(inside.len() > 3);
    for (path, seen) in &inside {
        assert!(
            seen == &outside[path],
            "{}: {seen:?} instead of {:?}",
            path.display(),
            outside[path]
        );
    }
}

#[test]
fn an_archive_by_gnu_tar_arrives_as_gnu_tar_unpacks_it() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: comparing owners and devices needs root");
    }
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    fs::create_dir_all(root.join("deep").join("n".repeat(200)).join("m".repeat(200))).unwrap();
    fs::write(root.join("caps"), "x").unwrap();
    fs::hard_link(root.join("caps"), root.join("caps2")).unwrap();
    fs::write(root.join("suid"), vec![1; 10_000]).unwrap();
    std::os::unix::fs::chown(root.join("suid"), Some(100_000), Some(70_000)).unwrap();
    fs::set_permissions(root.join("suid"), fs::Permissions::from_mode(0o4755)).unwrap();
    symlink("t".repeat(300), root.join("long")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    let capability = b"\x01\0\0\x02\0\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    rustix::fs::setxattr(root.join("caps"), "security.capability", capability, flags).unwrap();
    rustix::fs::setxattr(root.join("deep"), "trusted.note", b"a\nb", flags).unwrap();
    for (kind, name) in [
        (rustix::fs::FileType::CharacterDevice, "tty"),
        (rustix::fs::FileType::BlockDevice, "disk"),
        (rustix::fs::FileType::Fifo, "pipe"),
    ] {
        let device = rustix::fs::makedev(253, 70_000);
        rustix::fs::mknodat(rustix::fs::CWD, root.join(name), kind, 0o660.into(), device).unwrap();
    }
    let archive = directory.path().join("a.tar");
    let mut tar = Command::new("tar");
    tar.args(["--format=pax", "--xattrs", "--xattrs-include=*", "-cf"]).arg(&archive);
    assert!(tar.arg("-C").arg(&root).arg(".").status().unwrap().success());
    compare_with_gnu_tar(&archive);
}

#[test]
fn a_real_alpine_arrives_as_gnu_tar_unpacks_it() {
    let Some(archive) = std::env::var_os("AMPOULE_ALPINE_TAR") else {
        return eprintln!("SKIPPED: AMPOULE_ALPINE_TAR names no Alpine root file system");
    };
    if !rustix::process::geteuid().is_root() {
        return eprintln!("SKIPPED: comparing owners needs root");
    }
    compare_with_gnu_tar(Path::new(&archive));
}

#[test]
fn a_layout_made_by_umoci_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let layout = directory.path().join("oci");
    let root = directory.path().join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::write(root.join("bin/hello"), vec![1; 10_000]).unwrap();
    fs::write(root.join("gone"), "x").unwrap();
    let image = format!("{}:1.0", layout.display());
    let umoci = |args: &[&str]| Command::new("umoci").args(args).output();
    let Ok(made) = umoci(&["init", "--layout", &layout.display().to_string()]) else {
        return eprintln!("SKIPPED: umoci is not installed (package umoci)");
    };
    assert!(made.status.success());
    let run = |args: &[&str]| {
        let output = umoci(args).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["new", "--image", &image]);
    run(&["insert", "--image", &image, &root.display().to_string(), "/"]);
    run(&["insert", "--image", &image, "--whiteout", "/gone"]);
    run(&[
        "config",
        "--image",
        &image,
        "--config.cmd",
        "/bin/hello",
        "--config.workingdir",
        "/bin",
    ]);
    run(&["config", "--image", &image, "--config.env", "A=b", "--config.user", "1:2"]);
    let bench = Bench::new();
    let source = format!("oci:{image}").parse().unwrap();
    let image = bench.store.import(&source, &[name("hello")]).unwrap();
    assert_eq!(image.config.cmd, ["/bin/hello"]);
    assert_eq!((&image.config.working_dir[..], &image.config.user[..]), ("/bin", "1:2"));
    assert!(image.config.env.contains(&"A=b".to_string()));
    let Some(mounted) = Mounted::new(&image.rootfs) else { return };
    assert!(!mounted.path().join("gone").exists());
    let (inside, outside) = (look(mounted.path()), look(&root));
    let hello = Path::new("bin/hello");
    assert_eq!(inside[hello].mode, outside[hello].mode);
    assert!(inside[hello].content == outside[hello].content);
}

#[test]
fn a_corrupt_or_truncated_layer_is_no_image() {
    let layout = TestLayout::new();
    let image = layout.image(&[small()]);
    let layout = layout.tag(image, "x");
    let layer = layout.path().join("blobs/sha256").join(Digest::of(&small()).hex());
    let mut bytes = fs::read(&layer).unwrap();
    bytes[600] ^= 1;
    fs::write(&layer, &bytes).unwrap();
    let bench = Bench::new();
    let corrupt = bench.store.resolve(&oci(&layout)).unwrap_err();
    assert!(matches!(corrupt, ImageError::BlobDigest { .. }), "{corrupt}");
    fs::write(&layer, &bytes[..1000]).unwrap();
    let truncated = bench.store.resolve(&oci(&layout)).unwrap_err();
    assert!(matches!(truncated, ImageError::BlobSize { .. }), "{truncated}");
    fs::write(&layer, small()).unwrap();
    bench.store.resolve(&oci(&layout)).unwrap();
    assert_eq!((bench.count("rootfs"), bench.count("tmp"), bench.count("locks")), (1, 0, 0));
}

#[test]
fn the_store_belongs_to_its_user() {
    let bench = Bench::new();
    let mode = |part: &str| fs::metadata(bench.path("store").join(part)).unwrap().mode() & 0o777;
    assert_eq!(["images", "rootfs", "locks", "tmp"].map(mode), [0o700; 4]);
    let file = bench.path("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(Store::open(&file), Err(ImageError::Store { .. })));
}
