//! The files of a container for the host: a process of the agent's own serves them ([`crate::init`]), until the host closes the
//! stream or the container ends.

use std::{os::fd::AsFd, sync::Arc};

use ampoule_agent_api::agent::ViewRequest;

use crate::{
    cgroup, dial, pace,
    plan::{Plan, StepError, View, at},
    process::{self, Process},
    reaper::Reaper,
    spawn::{Launch, Namespaces, launch},
    stdio::{CONNECT, null},
};

pub async fn serve(
    reaper: &Reaper,
    init: Arc<Process>,
    request: &ViewRequest,
) -> Result<(), StepError> {
    let port = request.stream_port;
    let stream = dial::connect_socket(port, pace::limit(CONNECT)).await;
    let stream = stream.map_err(at("view", format_args!("host port {port}")))?;
    let null = || null().map_err(at("view", "/dev/null"));
    let directory = cgroup::of_agent().map_err(at("view", "cgroup"))?;
    let plan = Plan::View(View { pid: init.pid.as_raw_pid() as u32, first: request.first });
    let launched = launch(Launch {
        plan: &plan,
        stdio: [stream, null()?, null()?],
        cgroup: directory.as_fd(),
        namespaces: Namespaces::Guest,
        random: None,
    })?;
    let end = reaper.expect(launched.pid);
    let prepared = process::prepared(&launched.channel).await.map(drop);
    let is_prepared = prepared.is_ok();
    tokio::spawn(async move {
        let of_container = async {
            if is_prepared {
                let _ = init.wait().await;
            }
            let _ = process::send_signal(&launched.pidfd, libc::SIGKILL);
            // It is reaped, now or later.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = end => {}
            () = of_container => {}
        }
    });
    prepared
}
