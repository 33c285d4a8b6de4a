//! containerd 2.1's EROFS snapshotter, with layers that its differ makes of archives.

use std::{env, fs, path::PathBuf, process::Command};

use super::{Containerd, entries};
use crate::program;

const SNAPSHOTS: [&str; 3] = ["snapshots", "--snapshotter", "erofs"];

/// Two images of Alpine for `ctr image import`: alone, and below a layer that adds a file and takes one away. Their
/// layers have no entry for `/`, of which mkfs.erofs 1.8 dies.
const ARCHIVE: &str = r#"set -e
umount /run/test/root/io.containerd.content.v1.content/blobs # which is only read
mkdir -p /run/test/erofs/top/etc; cd /run/test/erofs
cp "$1" base.tar; echo layer >top/who; touch top/etc/.wh.motd; tar -c -C top -f top.tar .
config() {
    image=$1; shift
    ids=$(sha256sum "$@" | sed 's/\([0-9a-f]*\) .*/"sha256:\1"/' | paste -sd ,)
    layers=$(printf '"%s"\n' "$@" | paste -sd ,)
    echo '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/usr/bin:/bin"]},' >$image.json
    echo '"rootfs":{"type":"layers","diff_ids":['$ids']}}' >>$image.json
    echo '{"Config":"'$image.json'","RepoTags":["docker.io/local/'$image':latest"],"Layers":['$layers']}'
}
echo "[$(config alone base.tar),$(config above base.tar top.tar)]" >manifest.json
tar -c -f images.tar manifest.json alone.json above.json base.tar top.tar"#;

/// The kernel's part, which the snapshotter looks for when containerd starts.
pub fn load() {
    let _ = Command::new("modprobe").args(["-a", "erofs", "loop"]).output();
}

/// Where there is a `mkfs.erofs` that reads archives.
pub fn utils() -> Option<PathBuf> {
    env::var_os("AMPOULE_EROFS_UTILS").map(PathBuf::from)
}

impl Containerd {
    /// Imports the images `alone` and `above`; says why where the snapshotter cannot be had.
    pub fn import_as_erofs(&self) -> Result<(), String> {
        if utils().is_none() {
            return Err(
                "AMPOULE_EROFS_UTILS is not set (see tests/containerd/erofs-utils.sh)".into()
            );
        }
        let kernel = fs::read_to_string("/proc/filesystems").expect("its file systems");
        if !kernel.contains("\terofs\n") {
            return Err("the host's kernel has no EROFS".into());
        }
        let tar = env::var_os("AMPOULE_ALPINE_TAR").ok_or("AMPOULE_ALPINE_TAR is not set")?;
        let mut script = self.inside.command("sh");
        script.args(["-c", ARCHIVE, "sh"]).arg(tar);
        program(script).output().ended_with(0);
        let import = ["image", "import", "--local", "--snapshotter", "erofs"];
        self.ctr(import.into_iter().chain(["/run/test/erofs/images.tar"])).output().ended_with(0);
        let log = fs::read_to_string(self.inside.path("/run/test/log")).unwrap_or_default();
        let made =
            log.lines().filter(|line| line.contains("mkfs.erofs") && line.contains("--tar=f"));
        assert_eq!(made.count(), 2, "the differ made no layers: {log}");
        Ok(())
    }

    /// How many root file systems ampoule has converted.
    pub fn converted(&self) -> usize {
        entries(&self.inside.path("/run/test/ampoule/snapshots")).len()
    }

    /// Removes the snapshotter's layers, which are mounted as long as they are there.
    pub fn forget_erofs(&self) {
        let ctr = |args: &[&str]| {
            self.ctr(SNAPSHOTS.iter().chain(args).copied()).output().ended_with(0).text()
        };
        loop {
            let all = ctr(&["ls"]);
            let rows: Vec<Vec<&str>> =
                all.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
            // Who has a parent has three columns.
            let is_parent = |key| rows.iter().any(|row| row.len() == 3 && row[1] == key);
            let Some(key) = rows.iter().map(|row| row[0]).find(|key| !is_parent(*key)) else {
                return;
            };
            ctr(&["rm", key]);
        }
    }
}
