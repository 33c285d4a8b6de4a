//! Files of the host that a container gets copies of, on their way into it: its mounts bind them.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
};

use ampoule_agent_api::{agent::File, file_path, files_of};

use crate::plan::{StepError, at};

/// Names of files; dropping it removes them. A file that is bound somewhere needs none.
#[derive(Debug)]
pub struct Files(PathBuf);

impl Files {
    /// Writes all of a container's. The id is a plain name.
    pub fn write(container: &str, files: &[File]) -> Result<Option<Self>, StepError> {
        if files.is_empty() {
            return Ok(None);
        }
        let written = Self(files_of(container).into());
        fs::create_dir_all(&written.0).map_err(at("files", written.0.display()))?;
        for (n, file) in files.iter().enumerate() {
            let path = file_path(container, n);
            fs::write(&path, &file.content).map_err(at("files", &path))?;
            let mode = Permissions::from_mode(file.mode & 0o777);
            fs::set_permissions(&path, mode).map_err(at("files", &path))?;
        }
        Ok(Some(written))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
