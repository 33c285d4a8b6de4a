use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, XattrFlags, mknodat, setxattr};
use tempfile::TempDir;

use super::*;
use crate::image::testing::{Bench, Mounted, fsck, killed_at_any_moment, look};

impl Bench {
    /// A layer with these files, each holding its layer's name.
    fn layer(&self, name: &str, files: &[&str]) -> PathBuf {
        let layer = self.path(name);
        fs::create_dir_all(&layer).unwrap();
        for file in files {
            let path = layer.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        layer
    }

    fn files(&self) -> Vec<PathBuf> {
        self.store.files("snapshots").unwrap()
    }

    fn committed(&self, layers: &[PathBuf]) -> File {
        self.store.committed(layers, Dialect::Trusted).unwrap()
    }
}

/// A path by which other programs open a file without a name.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: whiteouts and overlay's attributes are root's to make");
    }
    is_root
}

fn whiteout(path: PathBuf) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    mknodat(CWD, path, FileType::CharacterDevice, 0o000.into(), 0).unwrap();
}

fn opaque(path: PathBuf, attribute: &str) {
    fs::create_dir_all(&path).unwrap();
    setxattr(&path, attribute, b"y", XattrFlags::empty()).unwrap();
}

/// The kernel's own overlay, read-only, for as long as this lives.
struct Overlay(TempDir);

impl Overlay {
    fn new(layers: &[PathBuf], options: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let layers: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
        let options = format!("lowerdir={}{options}", layers.join(":"));
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(directory.path());
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(directory)),
            _ => {
                eprintln!("SKIPPED: an overlay cannot be mounted here");
                None
            }
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Layers with all that overlayfs knows, top first.
fn layers_of_all_kinds(bench: &Bench, opaque_attribute: &str) -> Vec<PathBuf> {
    let bottom = bench.layer(
        "bottom",
        &["etc/a", "etc/b", "gone/x", "gone/y/z", "opaque/old", "was-file", "was-dir/x", "kept/1"],
    );
    fs::hard_link(bottom.join("etc/a"), bottom.join("etc/a2")).unwrap();
    fs::set_permissions(bottom.join("kept"), fs::Permissions::from_mode(0o1777)).unwrap();
    let middle = bench.layer("middle", &["was-file/now/dir", "was-dir", "opaque/new", "back"]);
    whiteout(middle.join("gone"));
    whiteout(middle.join("etc/b"));
    whiteout(middle.join("etc/nothing"));
    opaque(middle.join("opaque"), opaque_attribute);
    let top = bench.layer("top", &["gone/again", "kept/2", "etc/a"]);
    whiteout(top.join("back"));
    fs::set_permissions(top.join("kept"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(top.join("kept"), Some(7), Some(8)).unwrap();
    symlink("/etc/../../../../etc/shadow", top.join("out")).unwrap();
    symlink("etc", top.join("was-link")).unwrap();
    fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
    vec![top, middle, bottom]
}

#[test]
fn layers_are_what_the_kernel_makes_of_them() {
    if !is_root() {
        return;
    }
    for (dialect, attribute, options) in [
        (Dialect::Trusted, "trusted.overlay.opaque", ""),
        (Dialect::User, "user.overlay.opaque", ",userxattr"),
    ] {
        let bench = Bench::new();
        let layers = layers_of_all_kinds(&bench, attribute);
        // Not overlayfs's, but the file's own in the trusted dialect.
        setxattr(layers[0].join("kept/2"), "user.note", b"n", XattrFlags::empty()).unwrap();
        let file = bench.store.committed(&layers, dialect).unwrap();
        fsck(&path_of(&file));
        let Some(ours) = Mounted::new(&bench.files()[0]) else { return };
        let Some(kernels) = Overlay::new(&layers, options) else { return };
        let (mut ours, mut kernels) = (look(ours.path()), look(kernels.0.path()));
        // By the kernel a name copied up is no link any more, here neither; but it counts names by layer.
        for seen in [&mut ours, &mut kernels] {
            assert!(seen.len() > 15, "{:?}", seen.keys());
            seen.values_mut().for_each(|seen| seen.forget_links());
        }
        assert_eq!(ours.keys().collect::<Vec<_>>(), kernels.keys().collect::<Vec<_>>());
        for (path, seen) in &ours {
            assert!(seen == &kernels[path], "{path:?}: {seen:?} but {:?}", kernels[path]);
        }
    }
}

#[test]
fn marks_that_are_kept_act_in_the_guest() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let layers = layers_of_all_kinds(&bench, "trusted.overlay.opaque");
    let below = bench.committed(&layers[2..]);
    let kept = |path| bench.store.changing(path, Marks::Kept, Dialect::Trusted).unwrap();
    let above: Vec<File> = layers[..2].iter().map(|path| kept(path)).collect();
    above.iter().for_each(|file| fsck(&path_of(file)));
    let mounted: Option<Vec<_>> =
        above.iter().chain([&below]).map(|file| Mounted::new(&path_of(file))).collect();
    let Some(mounted) = mounted else { return };
    let mounted: Vec<PathBuf> = mounted.iter().map(|mounted| mounted.path().into()).collect();
    let Some(stacked) = Overlay::new(&mounted, "") else { return };
    let Some(kernels) = Overlay::new(&layers, "") else { return };
    let (stacked, kernels) = (look(stacked.0.path()), look(kernels.0.path()));
    assert_eq!(stacked.keys().collect::<Vec<_>>(), kernels.keys().collect::<Vec<_>>());
    assert_eq!(stacked[Path::new("kept")].mode, kernels[Path::new("kept")].mode);
}

#[test]
fn what_looks_like_a_mark_is_a_files_own_where_there_are_no_layers() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let root = bench.layer("root", &["a"]);
    whiteout(root.join("null"));
    opaque(root.join("d"), "user.overlay.opaque");
    let file = bench.store.changing(&root, Marks::None, Dialect::Trusted).unwrap();
    let Some(mounted) = Mounted::new(&path_of(&file)) else { return };
    assert!(mounted.path().join("null").symlink_metadata().is_ok());
    let mut value = [0; 1];
    rustix::fs::getxattr(mounted.path().join("d"), "user.overlay.opaque", &mut value).unwrap();
    assert!(bench.files().is_empty() && file.metadata().unwrap().nlink() == 0);
    let mut file = file;
    assert!(io::Write::write(&mut file, b"x").is_err(), "it is for reading alone");
}

#[test]
fn layers_whose_content_lies_elsewhere_are_refused() {
    if !is_root() {
        return;
    }
    for attribute in ["trusted.overlay.redirect", "trusted.overlay.metacopy"] {
        let bench = Bench::new();
        let layer = bench.layer("layer", &["dir/a"]);
        setxattr(layer.join("dir"), attribute, b"/etc", XattrFlags::empty()).unwrap();
        let error = bench.store.committed(&[layer], Dialect::Trusted).unwrap_err().to_string();
        assert!(error.contains("`dir`") && error.contains(attribute), "{error}");
        assert!(bench.files().is_empty());
        assert!(bench.store.files("tmp").unwrap().is_empty());
    }
}

#[test]
fn hostile_content_stays_inside() {
    let bench = Bench::new();
    let outside = bench.layer("outside", &["secret"]);
    let layer = bench.layer("layer", &["plain"]);
    symlink(&outside, layer.join("link")).unwrap();
    symlink("x".repeat(4000), layer.join("long")).unwrap();
    fs::write(layer.join("n\\:\n,\u{7f}"), "name").unwrap();
    mknodat(CWD, layer.join("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
    std::os::unix::net::UnixListener::bind(layer.join("socket")).unwrap();
    File::create(layer.join("sparse")).unwrap().set_len(1 << 40).unwrap();
    let start = Instant::now();
    let file = bench.committed(&[layer]);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
    let Some(mounted) = Mounted::new(&bench.files()[0]) else { return };
    let inside = |name: &str| mounted.path().join(name);
    assert_eq!(fs::read_link(inside("link")).unwrap(), outside);
    assert_eq!(fs::read(inside("n\\:\n,\u{7f}")).unwrap(), b"name");
    assert_eq!(inside("sparse").metadata().unwrap().len(), 1 << 40);
}

#[test]
fn thirty_layers_are_one_file() {
    let bench = Bench::new();
    let layers: Vec<PathBuf> = (0..30)
        .rev()
        .map(|n| bench.layer(&format!("l{n}"), &[&format!("own/{n}"), "shared"]))
        .collect();
    bench.committed(&layers);
    let Some(mounted) = Mounted::new(&bench.files()[0]) else { return };
    assert_eq!(fs::read_dir(mounted.path().join("own")).unwrap().count(), 30);
    assert_eq!(fs::read(mounted.path().join("shared")).unwrap(), b"l29");
    assert_eq!(bench.files().len(), 1);
}

#[test]
fn layers_are_converted_once_and_again_when_made_anew() {
    let bench = Bench::new();
    let layers = [bench.layer("top", &["a"]), bench.layer("bottom", &["b"])];
    let inode = |file: &File| file.metadata().unwrap().ino();
    let first = bench.committed(&layers);
    assert_eq!(inode(&bench.committed(&layers)), inode(&first));
    // Another order is another file system.
    bench.committed(&[layers[1].clone(), layers[0].clone()]);
    assert_eq!(bench.files().len(), 2);
    fs::remove_dir_all(&layers[0]).unwrap();
    std::thread::sleep(Duration::from_millis(11));
    bench.layer("top", &["c"]);
    let anew = bench.committed(&layers);
    assert_ne!(inode(&anew), inode(&first));
    let Some(mounted) = Mounted::new(&path_of(&anew)) else { return };
    assert!(mounted.path().join("c").exists() && !mounted.path().join("a").exists());
}

static CHANGING: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Between the look at the key and that at the files.
fn make_anew(_: &str) {
    if let Some(path) = CHANGING.lock().unwrap().take() {
        fs::remove_dir_all(&path).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("other"), "").unwrap();
    }
}

#[test]
fn what_was_made_anew_during_a_conversion_is_not_kept_for_what_was_there() {
    let bench = Bench::new();
    let layer = [bench.layer("layer", &["a"])];
    std::thread::sleep(Duration::from_millis(11));
    *CHANGING.lock().unwrap() = Some(layer[0].clone());
    let store = Store::open(&bench.path("store")).unwrap().with_progress(make_anew);
    let error = store.committed(&layer, Dialect::Trusted).unwrap_err();
    assert!(matches!(error, ImageError::Changed { .. }), "{error}");
    assert!(bench.files().is_empty() && bench.store.files("tmp").unwrap().is_empty());
    store.committed(&layer, Dialect::Trusted).unwrap();
}

static CONVERSIONS: AtomicUsize = AtomicUsize::new(0);

fn count(line: &str) {
    if line.starts_with("converting") {
        CONVERSIONS.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn twenty_at_once_convert_once() {
    let bench = Bench::new();
    let layer = bench.layer("layer", &[]);
    for n in 0..200 {
        fs::write(layer.join(format!("f{n}")), vec![1; 20_000]).unwrap();
    }
    let start = || {
        let store = Store::open(&bench.path("store")).unwrap().with_progress(count);
        let file = store.committed(std::slice::from_ref(&layer), Dialect::Trusted).unwrap();
        file.metadata().unwrap().ino()
    };
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]));
    assert_eq!(CONVERSIONS.load(Ordering::SeqCst), 1);
    assert_eq!((bench.files().len(), bench.store.files("tmp").unwrap().len()), (1, 0));
    assert_eq!(bench.store.files("locks").unwrap().len(), 0);
}

#[test]
fn the_oldest_unused_go_when_room_is_short() {
    let bench = Bench::new();
    let layers: Vec<PathBuf> = (0..4).map(|n| bench.layer(&format!("l{n}"), &["a", "b"])).collect();
    let names: Vec<u64> = layers
        .iter()
        .map(|layer| bench.committed(std::slice::from_ref(layer)).metadata().unwrap().ino())
        .collect();
    for path in bench.files() {
        let place = names.iter().position(|ino| *ino == path.metadata().unwrap().ino()).unwrap();
        let when = SystemTime::now() - Duration::from_secs(1000 - 100 * place as u64);
        File::open(&path).unwrap().set_modified(when).unwrap();
    }
    let one = bench.files()[0].metadata().unwrap().blocks() * 512;
    // The first is in use, through a descriptor as a VM has it: only the lock says so.
    let used = bench.committed(&layers[..1]).try_clone().unwrap();
    let used_path = bench.files().into_iter().find(|p| p.metadata().unwrap().ino() == names[0]);
    let old = SystemTime::now() - Duration::from_secs(2000);
    File::open(used_path.unwrap()).unwrap().set_modified(old).unwrap();
    assert_eq!(bench.store.shrink_snapshots(2 * one).unwrap(), 2 * one);
    let left = || -> Vec<u64> {
        let mut left: Vec<u64> =
            bench.files().iter().map(|path| path.metadata().unwrap().ino()).collect();
        left.sort_by_key(|ino| names.iter().position(|name| name == ino));
        left
    };
    assert_eq!(left(), [names[0], names[3]], "the used and the youngest");
    drop(used);
    let store = Store::open(&bench.path("store")).unwrap().with_snapshots(one);
    store.committed(&layers[1..2], Dialect::Trusted).unwrap();
    assert_eq!(bench.files().len(), 1, "a conversion makes room");
}

#[test]
fn a_damaged_file_is_made_anew() {
    let bench = Bench::new();
    let layer = [bench.layer("layer", &["a"])];
    drop(bench.committed(&layer));
    let path = bench.files().remove(0);
    let length = path.metadata().unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    let file = bench.committed(&layer);
    assert_eq!(file.metadata().unwrap().len(), length);
    fsck(&path);
}

const STORE: &str = "AMPOULE_TEST_SNAPSHOT_STORE";
const LAYER: &str = "AMPOULE_TEST_SNAPSHOT_LAYER";

#[test]
fn conversion_in_a_process_of_its_own() {
    let (Some(root), Some(layer)) = (std::env::var_os(STORE), std::env::var_os(LAYER)) else {
        return;
    };
    let store = Store::open(Path::new(&root)).unwrap();
    store.committed(&[layer.into()], Dialect::Trusted).unwrap();
}

fn spawn(root: &Path, layer: &Path) -> Child {
    let module = module_path!().split_once("::").unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::conversion_in_a_process_of_its_own")])
        .env(STORE, root)
        .env(LAYER, layer)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_conversion_killed_at_any_moment_leaves_nothing() {
    let bench = Bench::new();
    let layer = bench.layer("layer", &[]);
    for n in 0..40 {
        fs::write(layer.join(format!("f{n}")), vec![n; 1 << 20]).unwrap();
    }
    let root = bench.path("killed");
    killed_at_any_moment(&root.join("snapshots"), || spawn(&root, &layer), fsck);
    let store = Store::open(&root).unwrap();
    assert_eq!(store.files("tmp").unwrap().len(), 0);
    store.committed(&[layer], Dialect::Trusted).unwrap();
    assert_eq!(store.files("snapshots").unwrap().len(), 1);
}

/// `AMPOULE_TREE=/path/to/root cargo test measure -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_a_conversion() {
    let Some(tree) = std::env::var_os("AMPOULE_TREE") else { return };
    let bench = Bench::new();
    let layers = [PathBuf::from(tree)];
    let time = |what: &str, work: &dyn Fn() -> File| {
        let start = Instant::now();
        let size = work().metadata().unwrap().len();
        println!("{what}: {:?}, {:.1} MB", start.elapsed(), size as f64 / 1e6);
    };
    time("first", &|| bench.committed(&layers));
    for _ in 0..5 {
        time("cached", &|| bench.committed(&layers));
    }
    let changing = || bench.store.changing(&layers[0], Marks::None, Dialect::Trusted).unwrap();
    time("each time", &changing);
    time("each time", &changing);
}
