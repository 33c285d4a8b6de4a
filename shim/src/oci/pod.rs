//! Containers that share another one's VM, as those of a Podman pod do: their specifications name a namespace of it by
//! the process that stands for it, `/proc/PID/ns/...`.
//!
//! The VM's keeper makes such a container and serves its socket as well. The process that stands for it is a client of
//! that keeper: it has the container's streams, and with it the container ends.

use std::{
    error::Error,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::{
    Host, OciError, Result,
    containers::{Containers, Found},
    create::{self, Plan},
};
use crate::{
    control::{Container, Joined, Member, Members, Phase, Server},
    id::Id,
    registry::Ended,
    rootfs,
    sandbox::{Created, HostUpper, ProcessId, RootFs, Sandbox},
};

const OWN_NETWORK: &str = "/proc/thread-self/ns/net";

/// Whose namespaces a container joins.
#[derive(Clone, Debug)]
pub struct Joins {
    pub container: Found,
    /// In whose VM that is: itself, or the first one of its pod.
    pub sandbox: Found,
}

impl Joins {
    /// # Errors
    /// `Refused` if it joins several: they would have to be in one network, and might be in different VMs.
    pub fn find(spec: &Spec, containers: &Containers) -> Result<Option<Self>> {
        let namespaces = spec.linux().iter().filter_map(|linux| linux.namespaces().as_ref());
        let named: Vec<_> =
            namespaces.flatten().filter_map(|n| Some((n.typ(), n.path().as_deref()?))).collect();
        if named.is_empty() {
            return Ok(None);
        }
        let running = containers.list()?.into_iter().filter(|found| found.kept).collect::<Vec<_>>();
        let mut found: Option<&Found> = None;
        for (kind, path) in named {
            // Whoever joins a network is in it too.
            let owner =
                || running.iter().find(|c| c.record.sandbox.is_none() && is_in(kind, path, c));
            let named = running.iter().find(|c| path == namespace(kind, c.record.pid));
            let Some(here) = named.or_else(owner) else { continue };
            match found.replace(here) {
                Some(other) if other.id != here.id => {
                    let object = format!("linux.namespaces ({kind})");
                    let why = format!("it is of container {}, others of {}", here.id, other.id);
                    return Err(OciError::refused(object, why));
                }
                _ => {}
            }
        }
        let Some(container) = found.cloned() else { return Ok(None) };
        let sandbox = match &container.record.sandbox {
            Some(id) => containers.find(id)?,
            None => container.clone(),
        };
        Ok(Some(Self { container, sandbox }))
    }
}

fn namespace(kind: LinuxNamespaceType, pid: u32) -> PathBuf {
    let name = if kind == LinuxNamespaceType::Network { "net".into() } else { kind.to_string() };
    PathBuf::from(format!("/proc/{pid}/ns/{name}"))
}

/// Whether a path, as Docker has one of its own for it, is that of the network a container is in.
fn is_in(kind: LinuxNamespaceType, path: &Path, container: &Found) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let named = || identity(path).filter(|found| Some(*found) != identity(Path::new(OWN_NETWORK)));
    kind == LinuxNamespaceType::Network
        && named()
            .is_some_and(|found| Some(found) == identity(&namespace(kind, container.record.pid)))
}

/// Whether it is the first container of a Podman pod, to which others come: it does nothing but hold the namespaces, and
/// nothing else tells it from those that stay alone.
pub fn is_first(spec: &Spec) -> bool {
    let args = spec.process().as_ref().and_then(|process| process.args().as_deref());
    let Some([program, rest @ ..]) = args else { return false };
    match Path::new(program).file_name().and_then(|name| name.to_str()) {
        Some("catatonit") => rest == ["-P"],
        Some("pause") => rest.is_empty(),
        _ => false,
    }
}

/// Makes the other containers of a pod; it belongs to the keeper of the first.
pub struct Pod {
    pub sandbox: Sandbox,
    pub host: Arc<Host>,
}

#[async_trait]
impl Members for Pod {
    async fn join(
        &self,
        member: Member,
    ) -> std::result::Result<Joined, Box<dyn Error + Send + Sync>> {
        Ok(self.make(member).await?)
    }
}

impl Pod {
    async fn make(&self, member: Member) -> Result<Joined> {
        let joins = id(&member.joins)?;
        let host = self.host.clone();
        let Member { id: name, bundle, folder, .. } = member;
        let prepared = tokio::task::spawn_blocking(move || {
            let plan = create::plan(&name, create::read_bundle(&bundle)?, &host)?;
            let prepared = plan.prepare(&host)?;
            Ok::<_, OciError>((plan, prepared))
        });
        let prepared =
            prepared.await.map_err(|e| OciError::Host("prepare a container", e.into()))?;
        let (mut plan, mut prepared) = prepared?;
        let upper = prepared.upper.take();
        let rootfs = prepared.attach(&self.sandbox).await?;
        match self.serve(&mut plan, (rootfs.clone(), upper), joins, &folder).await {
            Err(error) => {
                self.forget(&ProcessId::init(plan.id), &rootfs).await;
                Err(error)
            }
            joined => joined,
        }
    }

    async fn serve(
        &self,
        plan: &mut Plan,
        (rootfs, upper): (RootFs, Option<HostUpper>),
        joins: Id,
        folder: &Path,
    ) -> Result<Joined> {
        let config = plan.container(rootfs.clone(), upper, Some(joins));
        let Created { streams, .. } = self.sandbox.create_container(config).await?;
        let container = Arc::new(container(plan, self.sandbox.clone(), &self.host)?);
        let server = Server::start(folder, container.clone())
            .map_err(|e| OciError::Host("open the control socket", e))?;
        let end = server.end();
        let pod = Self { sandbox: self.sandbox.clone(), host: self.host.clone() };
        tokio::spawn(pod.see_off(container.clone(), rootfs, server));
        Ok(Joined { container, streams, end })
    }

    /// Waits for a container's end, tells it, and gives back what it had.
    async fn see_off(self, container: Arc<Container>, rootfs: RootFs, server: Server) {
        let process = ProcessId::init(container.id.clone());
        let Ok(exit) = self.sandbox.wait(&process).await else { return };
        container.ended();
        tokio::join!(server.finish(Ended::from(exit)), self.forget(&process, &rootfs));
    }

    async fn forget(&self, process: &ProcessId, rootfs: &RootFs) {
        // One that was not made, or went with its VM, is not there to be forgotten.
        let _ = self.sandbox.delete(process).await;
        if !self.sandbox.has_ended() {
            rootfs::detach(rootfs, &self.sandbox).await;
        }
    }
}

/// What is served of a container that is there.
pub fn container(plan: &Plan, sandbox: Sandbox, host: &Arc<Host>) -> Result<Container> {
    let pod = || Arc::new(Pod { sandbox: sandbox.clone(), host: host.clone() }) as Arc<dyn Members>;
    let is_member = plan.joins.is_some();
    Ok(Container {
        members: (!is_member && is_first(&plan.bundle.spec)).then(pod),
        sandbox,
        id: plan.id.clone(),
        process: create::process(&plan.bundle)?.clone(),
        journal: None,
        hermetic: false,
        config: host.paths.config.clone(),
        is_member,
        phase: Phase::default(),
    })
}

fn id(text: &str) -> Result<Id> {
    text.parse().map_err(|source| OciError::Id { id: text.into(), source })
}
