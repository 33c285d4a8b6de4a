use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use crate::program;

/// A loop device of 16 MiB with an ext4 on it, in which there is the file `host`.
pub struct Disk {
    folder: TempDir,
    pub device: String,
}

impl Disk {
    #[expect(clippy::new_without_default, reason = "it takes a machine")]
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let script = "mkdir files && echo from the host > files/host && truncate -s 16M disk && \
            mkfs.ext4 -q -d files disk && losetup --find --show disk";
        let device = sh(folder.path(), script);
        Self { folder, device }
    }

    /// What a file of its file system contains.
    pub fn read(&self, name: &str) -> String {
        let device = &self.device;
        sh(
            self.folder.path(),
            &format!("mkdir m; mount -o ro {device} m; cat m/{name}; umount m; rmdir m"),
        )
    }

    /// Does something while it is mounted on the host.
    pub fn while_mounted(&self, work: impl FnOnce()) {
        let folder = self.folder.path();
        sh(folder, &format!("mkdir m && mount {} m", self.device));
        work();
        sh(folder, "umount m && rmdir m");
    }

    /// What lies at its very beginning, which no file system uses.
    pub fn start(&self) -> Vec<u8> {
        let mut bytes = fs::read(&self.device).expect("a device");
        bytes.truncate(16);
        bytes
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[track_caller]
fn sh(folder: &Path, script: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-c", script]).current_dir(folder);
    program(command).output().ended_with(0).text()
}
