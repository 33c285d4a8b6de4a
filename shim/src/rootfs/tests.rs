use std::{fs, os::unix::fs::MetadataExt};

use super::*;
use crate::image::testing::{Bench, Mounted};

const SCRATCH_DISK: Option<Scratch> = Some(Scratch { size: 16 << 20, lasts: true });

impl Bench {
    fn place(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn folder(&self, name: &str, files: &[&str]) -> String {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        files.iter().for_each(|file| fs::write(path.join(file), name).unwrap());
        self.place(name)
    }

    fn overlay(&self, lowers: &str, upper: &str) -> Mount {
        let options = vec![format!("lowerdir={lowers}"), format!("upperdir={upper}")];
        Mount { kind: "overlay".into(), source: "overlay".into(), options, ..Mount::default() }
    }

    fn prepare(&self, mounts: &[Mount]) -> Prepared {
        prepare(&self.store, mounts, Path::new(""), SCRATCH_DISK).unwrap()
    }

    fn snapshots(&self) -> usize {
        fs::read_dir(self.store.root().join("snapshots")).unwrap().count()
    }
}

fn lower(slot: u8, kind: &str) -> Lower {
    Lower { slot, kind: kind.into(), devices: Vec::new(), mapped: false }
}

/// Names of the disks, and whether they are read-only.
fn disks(prepared: &Prepared) -> Vec<(&str, bool)> {
    prepared.disks.iter().map(|disk| (disk.id.as_str(), disk.read_only)).collect()
}

#[test]
fn an_overlay_is_one_disk_and_a_scratch_disk() {
    let bench = Bench::new();
    let lowers = [bench.folder("2", &["a"]), bench.folder("1", &["b"])].join(":");
    let mounts = [bench.overlay(&lowers, &bench.folder("3", &[]))];
    let prepared = bench.prepare(&mounts);
    assert_eq!(disks(&prepared), [("lower0", true), ("scratch1", false)]);
    let expected = |lower_slot, upper_slot| RootFs {
        lowers: vec![lower(lower_slot, "erofs")],
        upper: Upper::Disk(upper_slot),
        devices: Vec::new(),
        owners: None,
    };
    assert_eq!(prepared.rootfs(&[9, 4]), expected(9, 4));
    assert_eq!(prepared.rootfs(&[9, 4]).slots(), [9, 4]);
    assert_eq!(prepared.from_slot(3).1, expected(3, 4));
    bench.prepare(&mounts);
    assert_eq!(bench.snapshots(), 1);
}

#[test]
fn a_changed_upper_and_dockers_own_layer_are_disks_of_their_own() {
    let bench = Bench::new();
    let own = bench.folder("init", &[".dockerenv"]);
    let lowers = [own.clone(), bench.folder("2", &["a"]), bench.folder("1", &["b"])].join(":");
    let upper = bench.folder("3", &["written"]);
    let prepared = bench.prepare(&[bench.overlay(&lowers, &upper)]);
    let read_only = ["lower0", "lower1", "lower2"].map(|name| (name, true));
    assert_eq!(disks(&prepared)[..3], read_only);
    // Another container of the image has another such layer, and shares the rest.
    let other = lowers.replace(&own, &bench.folder("init-2", &[".dockerenv"]));
    bench.prepare(&[bench.overlay(&other, &bench.folder("4", &[]))]);
    assert_eq!(bench.snapshots(), 1);
}

#[test]
fn a_mounted_erofs_is_a_disk_itself_or_known_again_among_others() {
    let bench = Bench::new();
    let images = ["1", "2"].map(|name| {
        let folder = bench.folder(name, &["a"]);
        let image = bench.path(&format!("{name}.erofs"));
        let made = bench.store.changing(Path::new(&folder), Marks::None, Dialect::Trusted).unwrap();
        std::io::copy(&mut &made, &mut File::create(&image).unwrap()).unwrap();
        image
    });
    let mounted = images.each_ref().map(|image| Mounted::new(image));
    let [Some(one), Some(two)] = &mounted else { return };
    let [one, two] = [one, two].map(|mounted| mounted.path().display().to_string());
    let upper = bench.folder("upper", &[]);

    let alone = bench.prepare(&[bench.overlay(&one, &upper)]);
    let disk = File::from(alone.disks[0].file.try_clone().unwrap());
    assert_eq!(disk.metadata().unwrap().ino(), images[0].metadata().unwrap().ino());
    assert_eq!(bench.snapshots(), 0);
    let mut others = bench.overlay(&one, &upper);
    others.options.push("userxattr".into());
    bench.prepare(&[others]);
    assert_eq!(bench.snapshots(), 1, "whose marks the guest does not read");

    let both = [bench.overlay(&format!("{two}:{one}"), &upper)];
    for _ in 0..2 {
        assert_eq!(disks(&bench.prepare(&both)), [("lower0", true), ("scratch1", false)]);
        assert_eq!(bench.snapshots(), 2);
    }
    fs::remove_file(&images[0]).unwrap();
    assert_eq!(disks(&bench.prepare(&[bench.overlay(&one, &upper)])).len(), 2);
    assert_eq!(bench.snapshots(), 3, "the mount is still there");
}

#[test]
fn without_a_scratch_disk_writes_stay_in_memory_and_a_view_takes_none() {
    let bench = Bench::new();
    let path = bench.folder("1", &["a"]);
    let bind = |option: &str| Mount {
        kind: "bind".into(),
        source: path.clone(),
        options: vec!["rbind".into(), option.into()],
        ..Mount::default()
    };
    let upper = |mount: Mount, scratch| {
        let prepared = prepare(&bench.store, &[mount], Path::new(""), scratch).unwrap();
        prepared.rootfs(&[1, 2]).upper
    };
    assert_eq!(upper(bind("rw"), None), Upper::Tmpfs);
    assert_eq!(upper(bind("rw"), SCRATCH_DISK), Upper::Disk(2));
    assert_eq!(bench.snapshots(), 0, "what may change is kept by nobody");
    assert_eq!(upper(bind("ro"), SCRATCH_DISK), Upper::None);
    assert_eq!(bench.snapshots(), 1);
}

#[test]
fn a_directory_without_mounts_is_converted_as_it_is() {
    let bench = Bench::new();
    let root = bench.folder("rootfs", &["a"]);
    let prepared = prepare(&bench.store, &[], Path::new(&root), None).unwrap();
    assert_eq!(disks(&prepared), [("lower0", true)]);
    let error = prepare(&bench.store, &[], Path::new("/no/such/root"), None).unwrap_err();
    assert!(error.to_string().contains("/no/such/root"), "{error}");
}

#[test]
fn an_image_that_is_written_to_has_one_user() {
    let bench = Bench::new();
    let image = bench.place("disk");
    fs::write(&image, vec![0; 4096]).unwrap();
    let ext4 = |option: &str| Mount {
        kind: "ext4".into(),
        source: image.clone(),
        options: vec!["loop".into(), option.into()],
        ..Mount::default()
    };
    let first = bench.prepare(&[ext4("rw")]);
    assert_eq!(disks(&first), [("upper0", false)]);
    assert_eq!(
        first.rootfs(&[5]),
        RootFs { lowers: vec![], upper: Upper::Kept(5), devices: Vec::new(), owners: None }
    );
    let again = prepare(&bench.store, &[ext4("rw")], Path::new(""), None).unwrap_err();
    assert!(matches!(again, RootFsError::InUse { .. }), "{again}");
    drop(first);
    let read_only = bench.prepare(&[ext4("ro")]);
    let expected = RootFs {
        lowers: vec![lower(5, "ext4")],
        upper: Upper::None,
        devices: Vec::new(),
        owners: None,
    };
    assert_eq!((disks(&read_only), read_only.rootfs(&[5])), (vec![("lower0", true)], expected));
}

#[test]
fn what_is_written_above_a_snapshot_is_there_at_the_next_start() {
    let bench = Bench::new();
    let lowers = bench.folder("1", &["a"]);
    let mut mount = bench.overlay(&lowers, &bench.folder("2/fs", &[]));
    mount.options.push(format!("workdir={}", bench.place("2/work")));
    let start = || bench.prepare(&[mount.clone()]);
    let first = start();
    assert_eq!(disks(&first), [("lower0", true), ("scratch1", false)]);
    assert_eq!(first.rootfs(&[1, 2]).upper, Upper::Kept(2));
    assert!(first.upper.is_some(), "it is to be there in the end");
    let disk = fs::metadata(bench.path("2/ampoule.ext4")).unwrap();
    // Its VM has it as long as that is there.
    let ends = std::thread::spawn(move || {
        sleep(Duration::from_millis(200));
        drop(first);
    });
    let second = start();
    ends.join().unwrap();
    let again = File::from(second.disks[1].file.try_clone().unwrap()).metadata().unwrap();
    assert_eq!(disk.ino(), again.ino());
    let passing = Some(Scratch { size: 16 << 20, lasts: false });
    let passing = prepare(&bench.store, &[mount.clone()], Path::new(""), passing).unwrap();
    assert_eq!((passing.rootfs(&[1, 2]).upper, passing.upper.is_none()), (Upper::Disk(2), true));
}

#[test]
fn what_is_no_disk_is_refused_at_once() {
    let bench = Bench::new();
    let fifo = bench.place("fifo");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, 0o600.into(), 0).unwrap();
    for source in [fifo.as_str(), "/dev/null", &bench.folder("folder", &[])] {
        let mount = Mount::image(Path::new(source));
        let error = prepare(&bench.store, &[mount], Path::new(""), None).unwrap_err();
        assert!(error.to_string().contains(source), "{error}");
    }
}

#[test]
fn more_disks_than_a_vm_has_are_refused() {
    let bench = Bench::new();
    fs::write(bench.place("layer"), vec![0; 4096]).unwrap();
    let layer = Mount::image(Path::new(&bench.place("layer")));
    let stack = |count: usize| {
        let mut mounts = vec![layer.clone(); count];
        let lowers = format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1);
        mounts.push(Mount {
            kind: "format/overlay".into(),
            options: vec![lowers],
            ..layer.clone()
        });
        prepare(&bench.store, &mounts, Path::new(""), None)
    };
    assert_eq!(stack(15).unwrap().disks.len(), 15);
    let error = stack(16).unwrap_err().to_string();
    assert!(error.contains("16 disks") && error.contains("15"), "{error}");
}

#[test]
fn merged_metadata_comes_with_its_devices() {
    let bench = Bench::new();
    let paths = ["meta", "1", "2"].map(|name| {
        fs::write(bench.place(name), vec![0; 4096]).unwrap();
        bench.place(name)
    });
    let devices = paths[1..].iter().map(|path| format!("device={path}"));
    let options = ["ro".to_owned()].into_iter().chain(devices).collect();
    let mount = Mount { options, ..Mount::image(Path::new(&paths[0])) };
    let rootfs = bench.prepare(&[mount]).rootfs(&[7, 8, 9]);
    assert_eq!(rootfs.lowers, [Lower { devices: vec![8, 9], ..lower(7, "erofs") }]);
    assert_eq!((rootfs.slots(), rootfs.upper), (vec![7, 8, 9], Upper::None));
}
