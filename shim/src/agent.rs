//! The guest agent as the shim calls it: one ttrpc connection over the stream the agent dials at boot.
//!
//! Every call has a limit, which goes by the sandbox's [`Pace`]; only [`Agent::wait`] has none and ends with the
//! connection. The agent's answers are data of a guest: texts are escaped and shortened, numbers are bounded, and
//! nothing on the host is decided from them but the end of a process.

use std::{future::Future, time::Duration};

use ampoule_agent_api::{
    agent::{
        ConfigureNetworkRequest, ConnectRequest, ContainerRequest, CreateConsoleRequest,
        CreateContainerRequest, CreateExecRequest, Empty, FollowRequest, HelloRequest,
        HelloResponse, PidsResponse, ProcessRequest, ResizePtyRequest, SignalRequest,
        StartResponse, StatsResponse, UpdateRequest, ViewRequest, WaitOomRequest, WaitResponse,
        WriteOutRequest, WriteOutResponse,
    },
    agent_ttrpc::AgentClient,
};
use tokio::{net::UnixStream, time::Instant};
pub use ttrpc::Code;
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::{self, Context},
};

use crate::{pace::Pace, text::one_line};

/// For what takes the guest microseconds when it is well.
const QUICK: Duration = Duration::from_secs(10);
/// For what mounts file systems, also while many sandboxes start on few processors.
const SLOW: Duration = Duration::from_secs(60);
/// Most characters of an agent's error that are passed on.
const ERROR_LENGTH: usize = 1000;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{call}: {message}")]
    Refused { call: String, code: Code, message: String },
    #[error(
        "{call}: the agent did not answer within {} s; a slow host needs a longer sandbox.boot_timeout",
        limit.as_secs_f32()
    )]
    Timeout { call: String, limit: Duration },
    #[error("{call}: the connection to the agent broke")]
    Disconnected { call: String },
}

type Result<T> = std::result::Result<T, AgentError>;

/// A client; clones share the connection.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    pace: Pace,
}

impl Agent {
    /// On the stream that the VMM splices to the agent. May be called, and used, before the agent is there.
    pub fn new(stream: UnixStream, pace: Pace) -> Self {
        Self { client: AgentClient::new(Client::new(Socket::from(stream))), pace }
    }

    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// Says hello; the answer is the agent's readiness.
    ///
    /// The guest's clock is left alone: kvm-clock gave the kernel the time when it booted, and the time sent
    /// here would be old by as long as the boot takes.
    pub async fn hello(&self, hostname: &str, limit: Duration) -> Result<HelloResponse> {
        let request = HelloRequest {
            hostname: hostname.into(),
            pace: self.pace.times(),
            ..Default::default()
        };
        bounded("hello", limit, |ctx| self.client.hello(ctx, &request)).await
    }

    /// Gives the guest its interfaces, before it has a container, or a created container its own ones.
    pub async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<()> {
        self.bounded("configure network", QUICK, |ctx| self.client.configure_network(ctx, request))
            .await?;
        Ok(())
    }

    /// Connects a stream to a server in the guest's network namespace.
    pub async fn connect(&self, request: &ConnectRequest) -> Result<()> {
        self.bounded("connect", QUICK, |ctx| self.client.connect(ctx, request)).await?;
        Ok(())
    }

    /// Connects a stream to a file server of a container.
    pub async fn view(&self, request: &ViewRequest) -> Result<()> {
        self.bounded("view", SLOW, |ctx| self.client.view(ctx, request)).await?;
        Ok(())
    }

    /// Returns the process's PID in the guest.
    pub async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32> {
        let call = format!("create container {}", request.container_id);
        let wanted = request.realtime_ns != 0 || !request.seed.is_empty();
        let created = self
            .bounded(call.clone(), SLOW, |ctx| self.client.create_container(ctx, request))
            .await?;
        if wanted && !created.fixed {
            let message = "the agent of this guest image cannot be given a clock or a seed".into();
            return Err(AgentError::Refused { call, code: Code::UNIMPLEMENTED, message });
        }
        Ok(created.pid)
    }

    /// Returns the process's PID in the guest.
    pub async fn create_exec(&self, request: &CreateExecRequest) -> Result<u32> {
        let call = format!("create exec {}", request.exec_id);
        Ok(self.bounded(call, SLOW, |ctx| self.client.create_exec(ctx, request)).await?.pid)
    }

    /// Returns the process's PID in the guest.
    pub async fn create_console(&self, request: &CreateConsoleRequest) -> Result<u32> {
        let call = format!("create console {}", request.exec_id);
        Ok(self.bounded(call, SLOW, |ctx| self.client.create_console(ctx, request)).await?.pid)
    }

    pub async fn start(&self, process: &ProcessRequest) -> Result<StartResponse> {
        self.bounded(named("start", process), SLOW, |ctx| self.client.start(ctx, process)).await
    }

    pub async fn signal(&self, process: &ProcessRequest, signal: u32, all: bool) -> Result<()> {
        let request = SignalRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        self.bounded(named("signal", process), QUICK, |ctx| self.client.signal(ctx, &request))
            .await?;
        Ok(())
    }

    /// Answers when the process has ended. Without a limit: it ends with the VM at the latest.
    pub async fn wait(&self, process: &ProcessRequest) -> Result<WaitResponse> {
        let answer = self.client.wait(Context::default(), process).await;
        answer.map_err(|e| failed(named("wait", process), Duration::ZERO, e))
    }

    /// Answers when the kernel has killed more than `known` times for a container's memory limit. Without a limit,
    /// as [`Self::wait`].
    pub async fn wait_oom(&self, container: &str, known: u64) -> Result<u64> {
        let request = WaitOomRequest {
            container_id: container.into(),
            oom_kills: known,
            ..Default::default()
        };
        let answer = self.client.wait_oom(Context::default(), &request).await;
        let answer =
            answer.map_err(|e| failed(format!("wait oom {container}"), Duration::ZERO, e))?;
        Ok(answer.oom_kills)
    }

    pub async fn resize(&self, process: &ProcessRequest, width: u16, height: u16) -> Result<()> {
        let request = ResizePtyRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        self.bounded(named("resize", process), QUICK, |ctx| self.client.resize_pty(ctx, &request))
            .await?;
        Ok(())
    }

    pub async fn close_stdin(&self, process: &ProcessRequest) -> Result<()> {
        self.bounded(named("close stdin", process), QUICK, |ctx| {
            self.client.close_stdin(ctx, process)
        })
        .await?;
        Ok(())
    }

    pub async fn pids(&self, container: &str) -> Result<PidsResponse> {
        let request = container_request(container);
        self.bounded(format!("pids {container}"), QUICK, |ctx| self.client.pids(ctx, &request))
            .await
    }

    pub async fn stats(&self, container: &str) -> Result<StatsResponse> {
        let request = container_request(container);
        self.bounded(format!("stats {container}"), QUICK, |ctx| self.client.stats(ctx, &request))
            .await
    }

    pub async fn update(&self, container: &str, resources: Vec<u8>) -> Result<()> {
        let request =
            UpdateRequest { container_id: container.into(), resources, ..Default::default() };
        self.bounded(format!("update {container}"), QUICK, |ctx| self.client.update(ctx, &request))
            .await?;
        Ok(())
    }

    pub async fn pause(&self, container: &str) -> Result<()> {
        let request = container_request(container);
        self.bounded(format!("pause {container}"), QUICK, |ctx| self.client.pause(ctx, &request))
            .await?;
        Ok(())
    }

    pub async fn resume(&self, container: &str) -> Result<()> {
        let request = container_request(container);
        self.bounded(format!("resume {container}"), QUICK, |ctx| self.client.resume(ctx, &request))
            .await?;
        Ok(())
    }

    /// Has what a container has written written out, or counted.
    pub async fn write_out(
        &self,
        request: &WriteOutRequest,
        usual: Duration,
    ) -> Result<WriteOutResponse> {
        let call = format!("write out {}", request.container_id);
        self.bounded(call, usual, |ctx| self.client.write_out(ctx, request)).await
    }

    /// Has whoever watches told of what the host has changed; says whether anybody does.
    pub async fn follow(&self, changes: &FollowRequest) -> Result<bool> {
        Ok(self.bounded("follow", QUICK, |ctx| self.client.follow(ctx, changes)).await?.watched)
    }

    pub async fn delete(&self, process: &ProcessRequest) -> Result<()> {
        self.bounded(named("delete", process), SLOW, |ctx| self.client.delete(ctx, process))
            .await?;
        Ok(())
    }

    /// Has the guest switch itself off. It may do so before it answers.
    pub async fn shutdown(&self) -> Result<()> {
        let request = Empty::new();
        self.bounded("shutdown", QUICK, |ctx| self.client.shutdown(ctx, &request)).await?;
        Ok(())
    }

    /// A call that usually has this limit.
    async fn bounded<T, F>(
        &self,
        call: impl Into<String>,
        usual: Duration,
        make: impl FnOnce(Context) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        bounded(call, self.pace.limit(usual), make).await
    }
}

fn container_request(container: &str) -> ContainerRequest {
    ContainerRequest { container_id: container.into(), ..Default::default() }
}

fn named(call: &str, process: &ProcessRequest) -> String {
    let id = if process.exec_id.is_empty() { &process.container_id } else { &process.exec_id };
    format!("{call} {id}")
}

/// One call under a limit, which the agent is told too.
async fn bounded<T, F>(
    call: impl Into<String>,
    limit: Duration,
    make: impl FnOnce(Context) -> F,
) -> Result<T>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let began = Instant::now();
    match tokio::time::timeout(limit, make(context::with_duration(limit))).await {
        Ok(Ok(answer)) => Ok(answer),
        // ttrpc keeps the limit too, and its error for that has no type.
        Ok(Err(error))
            if matches!(error, ttrpc::Error::RpcStatus(_)) || began.elapsed() < limit =>
        {
            Err(failed(call.into(), limit, error))
        }
        _ => Err(AgentError::Timeout { call: call.into(), limit }),
    }
}

fn failed(call: String, limit: Duration, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => {
            AgentError::Timeout { call, limit }
        }
        ttrpc::Error::RpcStatus(status) => AgentError::Refused {
            call,
            code: status.code(),
            message: one_line(status.message(), ERROR_LENGTH),
        },
        _ => AgentError::Disconnected { call },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_agent_is_a_timeout_and_a_gone_one_a_broken_connection() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours, Pace::default());
        let error = agent.hello("x", Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(error, AgentError::Timeout { .. }), "{error}");
        let waiting = tokio::spawn({
            let agent = agent.clone();
            async move { agent.wait(&ProcessRequest::new()).await }
        });
        tokio::task::yield_now().await;
        drop(theirs);
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, AgentError::Disconnected { .. }), "{error}");
    }

    #[test]
    fn an_agents_error_is_one_escaped_line() {
        let status =
            ttrpc::get_status(Code::NOT_FOUND, "mount: /dev/vdb:\x1b[2J\nInvalid argument");
        let error = failed("create container x".into(), QUICK, ttrpc::Error::RpcStatus(status));
        assert_eq!(
            error.to_string(),
            "create container x: mount: /dev/vdb:\\u{1b}[2J; Invalid argument"
        );
    }
}
