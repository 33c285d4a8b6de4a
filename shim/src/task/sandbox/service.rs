//! The calls of containerd's Sandbox service.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox, create_sandbox},
    types::platform::Platform,
};
use ttrpc::r#async::{Service, TtrpcContext};

use super::{Phase, STOP, State, Tasks};
use crate::task::{error::TaskError, stats};

/// As CRI's PodSandboxState has them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service by its name, for [`ttrpc::r#async::Server::register_service`].
pub fn services(tasks: Arc<Tasks>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService(tasks)))
}

struct SandboxService(Arc<Tasks>);

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.0.create_sandbox(request).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let state = self.0.start_sandbox(&request.sandbox_id).await?;
        Ok(StartSandboxResponse {
            pid: pid(&state),
            created_at: timestamp(state.since),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.0.sandbox.get(&request.sandbox_id)?;
        let platform =
            Platform { os: "linux".into(), architecture: "amd64".into(), ..Default::default() };
        Ok(PlatformResponse { platform: Some(platform).into(), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let limit = match request.timeout_secs {
            0 => STOP,
            seconds => Duration::from_secs(seconds.into()),
        };
        self.0.stop_sandbox(&request.sandbox_id, limit).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.0.sandbox.get(&request.sandbox_id)?;
        let end = self.0.sandbox.ended().await;
        Ok(WaitSandboxResponse {
            exit_status: end.status,
            exited_at: timestamp(Some(end.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let state = self.0.sandbox.get(&request.sandbox_id)?;
        let info = if request.verbose { self.0.info(&state).await } else { HashMap::new() };
        let ready = matches!(state.phase, Phase::Ready(_));
        Ok(SandboxStatusResponse {
            sandbox_id: state.id.to_string(),
            pid: pid(&state),
            state: if ready { READY } else { NOT_READY }.into(),
            info,
            created_at: timestamp(state.since),
            exited_at: timestamp(state.end().map(|end| end.at)),
            ..Default::default()
        })
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        let state = self.0.sandbox.get(&request.sandbox_id)?;
        let pod = state.pod()?;
        // Alive is a guest that answers.
        pod.sandbox.pids(&pod.first).await.map_err(TaskError::from)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.0.shutdown_sandbox(&request.sandbox_id).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let state = self.0.sandbox.get(&request.sandbox_id)?;
        let data = stats::of_sandbox(state.pod()?)?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = timestamp(Some(SystemTime::now()));
        metrics.id = state.id.to_string();
        metrics.data = Some(data).into();
        Ok(response)
    }
}

/// 0: it has no process on this host.
fn pid(state: &State) -> u32 {
    state.pod().map_or(0, |pod| pod.pid())
}

fn timestamp(
    time: Option<SystemTime>,
) -> protobuf::MessageField<protobuf::well_known_types::timestamp::Timestamp> {
    time.map(Into::into).into()
}

impl Tasks {
    /// What a person may want to know; the key "info" is containerd's own.
    async fn info(&self, state: &State) -> HashMap<String, String> {
        let mut info = HashMap::new();
        if let Phase::Created(plan) = &state.phase {
            info.insert("vcpus".into(), plan.pod.size.vcpus.to_string());
            info.insert("memory".into(), plan.pod.size.memory.to_string());
        }
        if let Some(record) = self.boot_record(state).await {
            info.insert("agent".into(), record.agent_version);
            info.insert("kernel".into(), record.kernel_release);
        }
        info
    }
}
