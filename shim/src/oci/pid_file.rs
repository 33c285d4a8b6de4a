//! The file that tells a caller which process stands for a container.

use std::{ffi::OsString, fs, path::Path};

use super::{OciError, Result};

/// Writes our own process id, whole from the first moment on the file is seen.
pub fn write(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let failed = |source| OciError::File { what: "pid file", path: path.into(), source };
    let name = path.file_name().ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
    let mut aside = OsString::from(".");
    aside.push(name);
    let aside = path.with_file_name(aside);
    fs::write(&aside, std::process::id().to_string())
        .and_then(|()| fs::rename(&aside, path))
        .map_err(failed)
}
