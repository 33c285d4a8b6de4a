//! The ttrpc service: each call finds its container and its process and says what is to be done.
//!
//! What changes something runs as a task of its own, so that a caller that loses patience does not leave
//! it half done.

use std::{future::Future, sync::Arc};

use ampoule_agent_api::{
    agent::{
        ConfigureNetworkRequest, ConnectRequest, ContainerRequest, CreateConsoleRequest,
        CreateContainerRequest, CreateExecRequest, CreateResponse, Empty, FollowRequest,
        FollowResponse, HelloRequest, HelloResponse, PidsResponse, ProcessRequest,
        ResizePtyRequest, SignalRequest, StartResponse, StatsResponse, UpdateRequest, ViewRequest,
        WaitOomRequest, WaitOomResponse, WaitResponse, WriteOutRequest, WriteOutResponse,
    },
    agent_ttrpc::Agent,
};
use async_trait::async_trait;
use rustix::system::{sethostname, uname};
use tokio::sync::Notify;
use ttrpc::r#async::TtrpcContext;

use crate::{
    clock,
    container::Container,
    error::Error,
    follow, network, pace,
    plan::{at, refuse},
    process::Process,
    reaper::Reaper,
    registry::{Registry, is_valid_id},
    stdio,
};

/// Signals of Linux; 0 asks whether the process is there.
const SIGNALS: std::ops::RangeInclusive<u32> = 0..=64;

/// Everything the agent has.
pub struct Sandbox {
    pub reaper: Reaper,
    pub containers: Registry<Container>,
    pub networks: network::Told,
    /// Somebody asked to switch the VM off.
    pub shutdown: Notify,
}

/// The service, on a sandbox.
pub struct Service(pub Arc<Sandbox>);

impl Service {
    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.0.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, Error> {
        self.container(container)?.process(exec)
    }

    /// Who is in a container's network namespace; nobody, if it is the guest's own.
    fn network_of(&self, container: &str) -> Result<Option<u32>, Error> {
        (!container.is_empty()).then(|| Ok(self.container(container)?.pid())).transpose()
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, req: HelloRequest) -> ttrpc::Result<HelloResponse> {
        hello(&req)?;
        Ok(HelloResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: uname().release().to_string_lossy().into_owned(),
            ..Default::default()
        })
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        req: ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.network_of(&req.container_id)?;
        let sockets = self.0.networks.configure(&req, process).map_err(Error::from)?;
        if let Some(sockets) = sockets {
            let stream = stdio::dial(req.resolver_port).await.map_err(Error::from)?;
            let served = stream.map_or(Ok(()), |stream| sockets.serve(stream));
            served.map_err(at("network", "127.0.0.11 port 53")).map_err(Error::from)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<Empty> {
        // Before the server is looked for: the host awaits it.
        let stream = stdio::dial(req.stream_port).await.map_err(Error::from)?;
        let stream =
            stream.ok_or_else(|| refuse("connect", "stream", "no port")).map_err(Error::from)?;
        let process = self.network_of(&req.container_id)?;
        network::connect(&req, process, stream).await.map_err(Error::from)?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        req: CreateContainerRequest,
    ) -> ttrpc::Result<CreateResponse> {
        let sandbox = self.0.clone();
        detached(async move {
            let id = req.container_id.clone();
            if !is_valid_id(&id) {
                return Err(Error::Id(id));
            }
            let held = sandbox.containers.hold(&id).ok_or(Error::Exists(id))?;
            let container = Container::create(&sandbox.reaper, req).await?;
            let pid = container.pid();
            held.put(Arc::new(container));
            Ok(CreateResponse { pid, fixed: true, ..Default::default() })
        })
        .await
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        req: CreateExecRequest,
    ) -> ttrpc::Result<CreateResponse> {
        let sandbox = self.0.clone();
        let container = self.container(&req.container_id)?;
        detached(async move {
            let process = container.create_exec(&sandbox.reaper, req).await?;
            let pid = process.pid.as_raw_pid() as u32;
            Ok(CreateResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn create_console(
        &self,
        _: &TtrpcContext,
        req: CreateConsoleRequest,
    ) -> ttrpc::Result<CreateResponse> {
        let sandbox = self.0.clone();
        let container = self.container(&req.container_id)?;
        detached(async move {
            let process = container.create_console(&sandbox.reaper, req).await?;
            let pid = process.pid.as_raw_pid() as u32;
            Ok(CreateResponse { pid, ..Default::default() })
        })
        .await
    }

    async fn view(&self, _: &TtrpcContext, req: ViewRequest) -> ttrpc::Result<Empty> {
        let sandbox = self.0.clone();
        let container = self.container(&req.container_id)?;
        detached(async move {
            container.view(&sandbox.reaper, &req).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, req: ProcessRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&req.container_id)?;
        detached(async move { container.start(&req.exec_id).await }).await
    }

    async fn signal(&self, _: &TtrpcContext, req: SignalRequest) -> ttrpc::Result<Empty> {
        if !SIGNALS.contains(&req.signal) {
            return Err(Error::from(refuse("signal", req.signal, "there is none")).into());
        }
        let container = self.container(&req.container_id)?;
        match req.all {
            true => container.signal_all(req.signal as i32)?,
            false => container.process(&req.exec_id)?.signal(req.signal as i32)?,
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.process(&req.container_id, &req.exec_id)?.wait().await?;
        Ok(WaitResponse {
            status: exit.status,
            oom_kills: exit.oom_kills,
            exited_at_ns: exit.at_ns,
            ..Default::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        req: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let oom_kills = self.container(&req.container_id)?.wait_oom(req.oom_kills).await?;
        Ok(WaitOomResponse { oom_kills, ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let characters = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        self.process(&req.container_id, &req.exec_id)?
            .resize(characters(req.width), characters(req.height))?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, req: ProcessRequest) -> ttrpc::Result<Empty> {
        self.process(&req.container_id, &req.exec_id)?.close_stdin();
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, req: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        Ok(self.container(&req.container_id)?.pids()?)
    }

    async fn stats(&self, _: &TtrpcContext, req: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.container(&req.container_id)?.stats()?)
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateRequest) -> ttrpc::Result<Empty> {
        self.container(&req.container_id)?.update(&req.resources)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, req: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&req.container_id)?;
        detached(async move { container.pause().await.map(|()| Empty::new()) }).await
    }

    async fn resume(&self, _: &TtrpcContext, req: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&req.container_id)?;
        detached(async move { container.resume().await.map(|()| Empty::new()) }).await
    }

    async fn write_out(
        &self,
        _: &TtrpcContext,
        req: WriteOutRequest,
    ) -> ttrpc::Result<WriteOutResponse> {
        let container = self.container(&req.container_id)?;
        detached(async move { container.write_out(req).await }).await
    }

    async fn follow(&self, _: &TtrpcContext, req: FollowRequest) -> ttrpc::Result<FollowResponse> {
        let told = tokio::task::spawn_blocking(move || follow::tell(&req)).await;
        let told = told.map_err(at("follow", "task")).map_err(Error::from)?;
        let watched = told.map_err(Error::from)?;
        Ok(FollowResponse { watched, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, req: ProcessRequest) -> ttrpc::Result<Empty> {
        let sandbox = self.0.clone();
        detached(async move {
            let id = req.container_id;
            let none = || Error::NoContainer(id.clone());
            if !req.exec_id.is_empty() {
                let container = sandbox.containers.get(&id).ok_or_else(none)?;
                return container.delete_exec(&req.exec_id).await.map(|()| Empty::new());
            }
            let (held, container) = sandbox.containers.take(&id).ok_or_else(none)?;
            match container.delete().await {
                Ok(()) => {
                    sandbox.networks.forget(&id);
                    Ok(Empty::new())
                }
                Err(error) => {
                    held.put(container);
                    Err(error)
                }
            }
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.shutdown.notify_one();
        Ok(Empty::new())
    }
}

/// Sets the guest's clock and name, and how long things may take.
fn hello(req: &HelloRequest) -> Result<(), Error> {
    pace::set(req.pace);
    if req.realtime_ns != 0 {
        clock::set(req.realtime_ns).map_err(at("hello", "clock"))?;
    }
    if !req.hostname.is_empty() {
        sethostname(req.hostname.as_bytes()).map_err(at("hello", &req.hostname))?;
    }
    Ok(())
}

/// Runs to its end, whether somebody waits for it or not.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(e) => Err(Error::from(at("agent", "task")(std::io::Error::from(e))).into()),
    }
}
