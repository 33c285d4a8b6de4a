//! Folders of a containerd on an ext4: Linux maps the owners of files on a tmpfs from 6.3 on only, and of 9p's never.

use super::Containerd;
use crate::program;

/// Temporary files, by which containerd finds out what can be mapped; what CRI has of its pods; their volumes; and small
/// layers, all in one folder, which is mapped as a whole.
const MOUNT: &str = r#"set -e; cd /run/test
truncate -s 256M image; mkfs.ext4 -q image; mkdir ext4; mount -o loop image ext4
layers=root/io.containerd.snapshotter.v1.overlayfs/snapshots
for folder in tmp root/io.containerd.grpc.v1.cri volumes $layers; do mkdir -p $folder ext4/$folder; done
for layer in $layers/*; do
    [ $(find $layer | head -n 2000 | wc -l) -eq 2000 ] || cp -a $layer ext4/$layers
done
for folder in tmp root/io.containerd.grpc.v1.cri volumes $layers; do mount --bind ext4/$folder $folder; done"#;
const UNMOUNT: &str = "cd /run/test; \
    umount $(awk -v disk=$(mountpoint -d ext4) '$3 == disk { print $5 }' /proc/self/mountinfo | tac)";

/// Until it is dropped.
pub struct Mappable<'a>(&'a Containerd);

impl Containerd {
    /// Starts it again on such folders.
    pub fn with_mappable_files(&self) -> Mappable<'_> {
        self.kill();
        self.sh(MOUNT);
        self.start_again();
        Mappable(self)
    }

    fn sh(&self, script: &str) {
        let mut command = self.inside.command("sh");
        command.args(["-c", script]);
        program(command).output().ended_with(0);
    }
}

impl Drop for Mappable<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.kill();
            self.0.sh(UNMOUNT);
            self.0.start_again();
        }
    }
}
