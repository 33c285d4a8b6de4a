//! Acting as the guest's process for as long as a guard lives, so that the host's kernel gives what is created
//! its owner, its group and the mode it would have there. All of it is the calling thread's only.
//!
//! Whether the process may do what it asks is decided by the guest's kernel, from the attributes and access
//! control lists it is given: a guest's root may do as it likes on its shares anyway.

use rustix::{
    fs::Gid,
    io::Errno,
    process::{getegid, geteuid},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups},
};

use crate::request::Header;

/// What the process keeps: to own, open and change files as their owners and root may, and to act as others.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// What acting as another user leaves of the capabilities.
const AS_CALLER: CapabilitySet = CapabilitySet::SETUID.union(CapabilitySet::SETGID);

/// Who the process is, which each thread starts as and comes back to.
#[derive(Clone, Copy, Debug)]
pub struct Privileges {
    capabilities: CapabilitySets,
    uid: u32,
    gid: u32,
}

/// How far the host is to check what the caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The guest's kernel has checked.
    Guest,
    /// It has not, because the file has appeared since it looked.
    Host,
}

impl Privileges {
    /// Those the process will have when it is confined.
    pub fn kept() -> Result<Self, Errno> {
        let permitted = capabilities(None)?.permitted & KEPT;
        let inheritable = CapabilitySet::empty();
        let capabilities = CapabilitySets { effective: permitted, permitted, inheritable };
        Ok(Self { capabilities, uid: geteuid().as_raw(), gid: getegid().as_raw() })
    }

    /// Acts as the process that has sent the request, with `group` for a supplementary group.
    ///
    /// # Errors
    /// EOVERFLOW for ids that the user namespace does not have, as the kernel says of them.
    pub fn act_as(
        &self,
        caller: &Header,
        group: Option<u32>,
        check: Check,
    ) -> Result<Acting<'_>, Errno> {
        let acting = Acting { privileges: self, ids: true };
        // u32::MAX is no group. Where groups cannot be set there are none to be taken on.
        if let Some(group) = group.filter(|group| *group != u32::MAX) {
            let _ = set_thread_groups(&[Gid::from_raw(group)]);
        }
        take_on(libc::setfsgid, caller.gid)?;
        take_on(libc::setfsuid, caller.uid)?;
        if caller.uid != self.uid {
            let kept = match check {
                Check::Guest => AS_CALLER | CapabilitySet::DAC_OVERRIDE,
                Check::Host => AS_CALLER,
            };
            acting.set_effective(self.capabilities.permitted & kept)?;
        }
        Ok(acting)
    }

    /// Does without CAP_FSETID, if so asked: then set-id bits are cleared as for an ordinary user.
    pub fn kill_set_id(&self, kill: bool) -> Result<Option<Acting<'_>>, Errno> {
        if !kill {
            return Ok(None);
        }
        let acting = Acting { privileges: self, ids: false };
        acting.set_effective(self.capabilities.permitted - CapabilitySet::FSETID)?;
        Ok(Some(acting))
    }
}

/// setfsuid(2) and setfsgid(2) fail in silence and return what was before.
fn take_on(set: unsafe extern "C" fn(u32) -> i32, id: u32) -> Result<(), Errno> {
    // SAFETY: takes a number; u32::MAX changes nothing.
    let now = unsafe {
        set(id);
        set(u32::MAX)
    };
    if now as u32 == id { Ok(()) } else { Err(Errno::OVERFLOW) }
}

/// While this lives the thread acts as somebody else.
#[derive(Debug)]
pub struct Acting<'a> {
    privileges: &'a Privileges,
    ids: bool,
}

impl Acting<'_> {
    fn set_effective(&self, effective: CapabilitySet) -> Result<(), Errno> {
        set_capabilities(None, CapabilitySets { effective, ..self.privileges.capabilities })
    }

    fn restore(&self) -> Result<(), Errno> {
        if self.ids {
            let _ = set_thread_groups(&[]);
            take_on(libc::setfsuid, self.privileges.uid)?;
            take_on(libc::setfsgid, self.privileges.gid)?;
        }
        self.set_effective(self.privileges.capabilities.permitted)
    }
}

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        if self.restore().is_err() {
            // A thread with the wrong identity must not answer another request.
            std::process::abort();
        }
    }
}
