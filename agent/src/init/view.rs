//! The container's files for the host, as its first process sees them: a file server of FUSE on the stream that is its
//! standard input (`ampoule_fsd::stream`). It stays in the guest's namespaces and cgroup, where no process of the container
//! reaches it, nor its freezer.

use std::process::exit;

use ampoule_fsd::stream::Service;
use ampoule_vmm_api::Channel;
use rustix::fs::{Mode, OFlags, fcntl_setfl, open};

use super::{begin, inherit, lead};
use crate::plan::{Fault, Report, StepError, View, at};

/// What it holds is given up first when memory runs short: the container comes before who looks at it.
const OOM_SCORE: i32 = 1000;

/// Serves to the end, and does not come back but for an error.
pub fn serve(view: &View, channel: &Channel) -> StepError {
    let served = prepare(view).and_then(|service| {
        channel
            .send(&Report::Prepared, &[])
            .map_err(|e| at("runner", "report")(std::io::Error::other(e)))?;
        service.run().map_err(at("view", "threads"))
    });
    match served {
        Ok(()) => exit(0),
        Err(error) => error,
    }
}

fn prepare(view: &View) -> Result<Service, StepError> {
    begin(OOM_SCORE)?;
    lead()?;
    // SAFETY: the stream is this descriptor, and nobody reads standard input.
    let stream = unsafe { inherit(0) };
    fcntl_setfl(&stream, OFlags::empty()).map_err(at("view", "stream"))?;
    // This link leads to the root in the container's own mount namespace.
    let path = format!("/proc/{}/root", view.pid);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(&path, flags, Mode::empty()).map_err(at("view", &path))?;
    if view.first < 2 {
        return Err(StepError::new(Fault::Spec, "view", view.first, "is not a first number"));
    }
    Service::new(root, stream, view.first).map_err(|(object, e)| at("view", object)(e))
}
