//! Network devices that come and go: windows of virtio-mmio which have a device or none. The kernel looks into one when it
//! boots, and when a driver is bound to it (Documentation/driver-api/driver-model/binding.rst).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ampoule_agent_api::agent::Interface;

use super::{Guest, STEP};
use crate::plan::{StepError, at};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const WINDOWS: &str = "/sys/bus/platform/devices";
const WINDOW: &str = "virtio-mmio.";

/// Has the kernel look for devices, if one of these has none yet.
pub fn find(interfaces: &[&Interface]) -> Result<(), StepError> {
    let devices = Guest::new()?.devices()?;
    let is_there = |interface: &&Interface| devices.iter().any(|d| d.mac == interface.mac);
    if interfaces.iter().all(is_there) {
        return Ok(());
    }
    for window in entries(Path::new(WINDOWS)).map_err(at(STEP, WINDOWS))? {
        let name = name(&window);
        if name.starts_with(WINDOW) && !window.join("driver").exists() {
            // Most have no device still.
            let _ = fs::write(Path::new(DRIVER).join("bind"), name);
        }
    }
    Ok(())
}

/// Takes the device of this address from its driver, and the interface goes with it.
pub fn release(mac: &[u8]) -> io::Result<()> {
    for window in entries(Path::new(DRIVER))? {
        if name(&window).starts_with(WINDOW) && has_interface(&window, mac)? {
            return fs::write(Path::new(DRIVER).join("unbind"), name(&window));
        }
    }
    Ok(())
}

/// Its `virtioN/net/NAME/address`.
fn has_interface(window: &Path, mac: &[u8]) -> io::Result<bool> {
    for device in entries(window)?.iter().filter(|device| name(device).starts_with("virtio")) {
        for interface in entries(&device.join("net")).unwrap_or_default() {
            if fs::read_to_string(interface.join("address"))?.trim() == super::text(mac) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
