//! The part of a sandbox's owner that makes processes: each has its id, and its streams, before the agent hears of it.

use std::mem;

use ampoule_agent_api::{
    agent::{self, CreateConsoleRequest, CreateContainerRequest, CreateExecRequest},
    file_path,
};

use super::{Done, Owner};
use crate::{
    id::Id,
    sandbox::{
        ConsoleConfig, ContainerConfig, Created, ExecConfig, ProcessId, Refused, Reply,
        SandboxError, Stdio, Streams, answer,
        shares::Batch,
        wire::{file, realtime_ns, rootfs, streams},
    },
    spec::{Counterparts, guest_process, guest_spec, left_out},
};

impl Owner {
    pub(super) fn create_container(&mut self, mut config: ContainerConfig, reply: Reply<Created>) {
        let process = ProcessId::init(config.id.clone());
        let shares = self.shares.lender().number(mem::take(&mut config.shares));
        let shares = shares.map_err(SandboxError::from);
        let prepared = shares.and_then(|shares| {
            let counterparts = self.counterparts(&config, &shares)?;
            let devices = left_out(&config.spec, &counterparts.disks)?;
            if !devices.is_empty() {
                tracing::info!(container = %config.id, ?devices, "not in the VM, left out");
            }
            let spec = serde_json::to_vec(&guest_spec(&config.spec, &counterparts)?)?;
            Ok((spec, shares, self.admit(&process, config.stdio)?))
        });
        let (spec, shares, (stdio, streams)) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return answer(reply, Err(error)),
        };
        self.shares.belong(&config.id, &shares);
        self.kept.create(&mut config);
        let request = CreateContainerRequest {
            container_id: process.container.to_string(),
            spec,
            rootfs: Some(rootfs(&config.rootfs)).into(),
            stdio: Some(stdio).into(),
            init: config.init,
            realtime_ns: config.fixed.clock.map_or(0, realtime_ns),
            seed: config.fixed.seed.map(Vec::from).unwrap_or_default(),
            files: config.files.into_iter().map(file).collect(),
            ..Default::default()
        };
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let created = match shares.add(&agent).await {
                Ok(()) => agent.create_container(&request).await.map_err(SandboxError::from),
                Err(error) => Err(error.into()),
            };
            Done::Created(process, created, streams, reply)
        });
    }

    /// What the guest has in the place of what the spec names of the host.
    fn counterparts(
        &self,
        config: &ContainerConfig,
        shares: &Batch,
    ) -> Result<Counterparts, SandboxError> {
        let copies = config.files.iter().enumerate();
        let copies =
            copies.map(|(n, file)| (file.source.clone(), file_path(config.id.as_str(), n)));
        let namespaces_of = match &config.joins {
            Some(container) => Some(self.table.pid(&ProcessId::init(container.clone()))?),
            None => None,
        };
        Ok(Counterparts {
            binds: copies.chain(config.binds.clone()).collect(),
            shares: shares.by_mount(),
            disks: config.rootfs.device_slots(),
            namespaces_of,
            network: self.network.is_guests(),
        })
    }

    pub(super) fn create_exec(&mut self, config: ExecConfig, reply: Reply<Created>) {
        let process = ProcessId::exec(config.container, config.id);
        let prepared = guest_process(&config.process)
            .map_err(SandboxError::from)
            .and_then(|spec| Ok(serde_json::to_vec(&spec)?))
            .and_then(|spec| Ok((spec, self.admit(&process, config.stdio)?)));
        let (spec, (stdio, streams)) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return answer(reply, Err(error)),
        };
        let request = CreateExecRequest {
            container_id: process.container.to_string(),
            exec_id: process.exec.as_ref().map(Id::to_string).unwrap_or_default(),
            process: spec,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let created = agent.create_exec(&request).await.map_err(SandboxError::from);
            Done::Created(process, created, streams, reply)
        });
    }

    pub(super) fn create_console(&mut self, config: &ConsoleConfig, reply: Reply<Created>) {
        let process = ProcessId::exec(config.container.clone(), config.id.clone());
        let terminal = config.size.is_some();
        let wanted = Stdio { stdin: true, stdout: true, stderr: !terminal };
        let (stdio, streams) = match self.admit(&process, wanted) {
            Ok(admitted) => admitted,
            Err(error) => return answer(reply, Err(error)),
        };
        let (width, height) = config.size.unwrap_or_default();
        let request = CreateConsoleRequest {
            container_id: config.container.to_string(),
            exec_id: config.id.to_string(),
            stdio: Some(stdio).into(),
            terminal,
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let agent = self.agent.clone();
        self.calls.spawn(async move {
            let created = agent.create_console(&request).await.map_err(SandboxError::from);
            Done::Created(process, created, streams, reply)
        });
    }

    /// Reserves the id and asks for the streams.
    fn admit(
        &mut self,
        process: &ProcessId,
        wanted: Stdio,
    ) -> Result<(agent::Stdio, Streams), SandboxError> {
        let vm = self.alive()?;
        let streams = streams(vm, wanted).map_err(SandboxError::Vm)?;
        self.table.create(process)?;
        Ok(streams)
    }

    pub(super) fn created(
        &mut self,
        process: ProcessId,
        result: Result<u32, SandboxError>,
        streams: Streams,
        reply: Reply<Created>,
    ) {
        match result {
            Ok(pid) => {
                let events = self.table.created(&process, pid);
                if events.is_empty() {
                    // Its container, or its VM, has ended meanwhile.
                    return answer(reply, Err(Refused::NotFound(process).into()));
                }
                self.publish(events);
                answer(reply, Ok(Created { pid, streams }));
                let agent = self.agent.clone();
                self.calls.spawn(async move {
                    let exit = agent.wait(&process.request()).await;
                    Done::Exited(process, exit)
                });
            }
            Err(error) => {
                let events = self.table.create_failed(&process);
                self.publish(events);
                self.gone_with(&process);
                self.pass_on(reply, Err(error));
            }
        }
    }
}
