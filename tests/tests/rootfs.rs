//! Root file systems of every kind that containerd hands over, one after the other in one VM.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use ampoule_shim::{
    image::{Reference, Store},
    paths::{Environment, Paths},
    rootfs::{Mount, prepare},
};
use ampoule_tests::{
    root,
    sandbox::{Pod, init},
};
use tempfile::TempDir;

/// Alpine as a folder, and room to make others of it.
struct Host {
    folder: TempDir,
    store: Store,
    alpine: PathBuf,
}

fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().expect("sh");
    assert!(status.success(), "{script}: {status}");
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|&o| o.into()).collect();
    Mount { kind: kind.into(), source: source.into(), target: String::new(), options }
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let paths =
            Paths::new(&Environment { root: Some(root().into()), ..Environment::default() });
        let images = Store::open(&paths.store).unwrap();
        let alpine = images.resolve(&"alpine".parse::<Reference>().unwrap()).unwrap().rootfs;
        let store = Store::open(&folder.path().join("store")).unwrap();
        let host = Self { folder, store, alpine };
        sh(&format!(
            "cd {}; mkdir alpine; mount -t erofs -o loop,ro {} alpine",
            host.path(""),
            host.alpine.display()
        ));
        host
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Runs a script in the folder.
    fn sh(&self, script: &str) {
        sh(&format!("cd {}; {script}", self.path("")));
    }

    /// What a shell script says in a container on this root file system. Its disks come and go.
    async fn says(&self, pod: &Pod, name: &str, mounts: &[Mount], script: &str) -> String {
        let folder = self.path("merged");
        let prepared = prepare(&self.store, mounts, Path::new(&folder), None).unwrap();
        let rootfs = prepared.attach(&pod.sandbox).await.unwrap();
        let streams = pod.create_on(name, script, rootfs.clone()).await;
        pod.sandbox.start(&init(name)).await.unwrap();
        let ended = pod.end(&init(name), streams).await;
        assert_eq!(ended.exit.status, 0, "{name}: {ended:?}");
        pod.sandbox.delete(&init(name)).await.unwrap();
        for slot in rootfs.slots() {
            pod.sandbox.detach_disk(slot).await.unwrap();
        }
        ended.text()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Ok(device) = fs::read_to_string(self.path("loop")) {
            let _ = Command::new("dmsetup").args(["remove", VOLUME]).status();
            let _ = Command::new("losetup").args(["--detach", device.trim()]).status();
        }
        let _ = Command::new("umount").arg("-l").arg(self.path("merged")).status();
        let _ = Command::new("umount").arg("-l").arg(self.path("alpine")).status();
    }
}

const VOLUME: &str = "ampoule-test-volume";

const LOOK: &str = "cat /who; cat /out 2>/dev/null; echo w > /written; \
                    for f in /etc/alpine-release /etc/motd /opt/new /written; do [ ! -e $f ] || echo $f; done";

#[tokio::test]
async fn every_kind_of_mount_becomes_a_root() {
    let host = Host::new();
    let pod = Pod::boot("rootfs", 0).await;
    host.sh(
        "mkdir -p 2/fs/etc 2/fs/opt 3/fs 4/fs/etc; echo layer > 2/fs/who; mknod 2/fs/etc/motd c 0 0; \
         echo secret > secret; echo changed > 4/fs/who; mknod 4/fs/etc/alpine-release c 0 0; \
         mkdir 4/fs/opt; touch 4/fs/opt/new",
    );
    symlink(host.path("secret"), host.path("2/fs/out")).unwrap();
    let lowers = format!("lowerdir={}:{}", host.path("2/fs"), host.path("alpine"));
    let overlay = |upper: &str| {
        let (upper, work) = (host.path(&format!("{upper}/fs")), host.path("work"));
        let options = [&lowers, &format!("upperdir={upper}"), &format!("workdir={work}")];
        mount("overlay", "overlay", &options.map(String::as_str))
    };

    let (layer_alone, changed) =
        ("layer\n/etc/alpine-release\n/written", "changed\n/opt/new\n/written");
    let seen = host.says(&pod, "overlay", &[overlay("3")], LOOK).await;
    assert_eq!(seen, layer_alone);
    assert!(!Path::new(&host.path("3/fs/written")).exists(), "writes stay in the sandbox");

    let seen = host.says(&pod, "changed", &[overlay("4")], LOOK).await;
    assert_eq!(seen, changed);

    let view = [mount("bind", &host.path("alpine"), &["ro", "rbind"])];
    let seen = host.says(&pod, "view", &view, "touch /x 2>&1; cat /etc/alpine-release").await;
    assert!(seen.contains("Read-only file system") && seen.contains("\n3."), "{seen}");

    host.sh("mkdir merged work; modprobe -a overlay 2>/dev/null || true");
    host.sh("mount -t overlay overlay -o lowerdir=$PWD/2/fs:$PWD/alpine,upperdir=$PWD/4/fs,workdir=$PWD/work merged");
    let files = || fs::read_dir(host.path("store/snapshots")).unwrap().count();
    let before = files();
    let seen = host.says(&pod, "docker", &[], LOOK).await;
    assert_eq!(seen, changed);
    assert_eq!(files(), before, "its layers are known already");

    host.sh("truncate -s 64M disk writable; mkfs.ext4 -q -d alpine disk; mkfs.ext4 -q writable; mkfs.erofs -x1 layer.erofs 2/fs >/dev/null");
    let disk = [mount("ext4", &host.path("disk"), &["loop", "rw"])];
    assert_eq!(host.says(&pod, "blockfile", &disk, "echo w > /kept && cat /kept").await, "w");
    assert_eq!(
        host.says(&pod, "again", &disk, "cat /kept; grep -c ' / ext4' /proc/mounts").await,
        "w\n1"
    );
    let view = [mount("ext4", &host.path("disk"), &["loop", "ro"])];
    let seen = host.says(&pod, "disk-view", &view, "cat /kept; touch /x 2>&1; true").await;
    assert!(seen.starts_with("w\n") && seen.contains("Read-only"), "{seen}");
    // A block device, as that of the devmapper snapshotter.
    host.sh(&format!(
        "modprobe dm-mod; losetup --find --show disk >loop; loop=$(cat loop); \
         echo 0 $(blockdev --getsz $loop) linear $loop 0 | dmsetup create --noudevrules --noudevsync {VOLUME}; dmsetup mknodes {VOLUME}",
    ));
    let volume = [mount("ext4", &format!("/dev/mapper/{VOLUME}"), &["rw"])];
    let script = "cat /kept; echo v > /kept; cat /kept";
    assert_eq!(host.says(&pod, "devmapper", &volume, script).await, "w\nv");
    host.sh(&format!("dmsetup remove {VOLUME}; losetup --detach $(cat loop); rm loop"));
    assert_eq!(host.says(&pod, "after", &disk, "cat /kept").await, "v");
    host.sh("e2fsck -fn disk >/dev/null 2>&1");

    let layer = mount("erofs", &host.path("layer.erofs"), &["ro", "loop"]);
    let base = mount("erofs", &host.alpine.display().to_string(), &["ro", "loop"]);
    let upper = format!("upperdir={}", host.path("3/fs"));
    let top = ["lowerdir={{ overlay 0 1 }}", &upper];
    let layers = [layer.clone(), base.clone(), mount("format/mkdir/overlay", "overlay", &top)];
    let seen = host.says(&pod, "erofs", &layers, LOOK).await;
    assert_eq!(seen, layer_alone);

    let top = [
        "upperdir={{ mount 0 }}/upper",
        "workdir={{ mount 0 }}/work",
        "lowerdir={{ overlay 1 2 }}",
    ];
    let writable = mount("ext4", &host.path("writable"), &["rw", "loop"]);
    let kept = [writable, layer, base, mount("format/mkdir/overlay", "overlay", &top)];
    let seen =
        host.says(&pod, "kept", &kept, "cat /who; echo w > /who; rm /etc/alpine-release").await;
    assert_eq!(seen, "layer");
    let seen =
        host.says(&pod, "kept-again", &kept, "cat /who; ls /etc/alpine-release 2>&1; true").await;
    assert!(seen.starts_with("w\n") && seen.ends_with("No such file or directory"), "{seen}");

    // The parts of one EROFS on two disks.
    host.sh("mkfs.erofs --chunksize=4096 --blobdev=blob meta.erofs alpine >/dev/null");
    let device = format!("device={}", host.path("blob"));
    let parts = [mount("erofs", &host.path("meta.erofs"), &["ro", "loop", &device])];
    let seen = host.says(&pod, "parts", &parts, "cat /etc/alpine-release").await;
    assert!(seen.starts_with("3."), "{seen}");
    pod.sandbox.shutdown().await;
}
