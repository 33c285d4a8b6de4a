//! What a sandbox tells becomes the status of processes, and containerd's events.
//!
//! The sandbox tells everything in the order that containerd counts on, and here one task passes it on, so
//! that the order stays. Of an exec containerd hears between its request and its start nothing; of one that
//! could not be started nothing more.

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    topics,
};
use protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp};

use super::{
    container::Container,
    process::{Process, Status},
};
use crate::{
    publisher::Publisher,
    sandbox::{Event, Exit, ProcessId},
};

/// The process an event is about.
pub fn subject(event: &Event) -> Option<ProcessId> {
    match event {
        Event::Created { process, .. }
        | Event::Started { process, .. }
        | Event::Exited { process, .. }
        | Event::Deleted { process } => Some(process.clone()),
        Event::Paused { container } | Event::Resumed { container } | Event::Oom { container } => {
            Some(ProcessId::init(container.clone()))
        }
        Event::Stopped { .. } => None,
    }
}

/// Passes on an event of `process`, and then has it take effect.
pub fn pass_on(event: &Event, container: &Container, process: &Process, publisher: &Publisher) {
    let container_id = container.id.to_string();
    let exec_id = process.id.exec.as_ref().map(ToString::to_string);
    let pid = container.pid();
    match event {
        Event::Created { .. } => {
            if exec_id.is_none() {
                publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, created(container));
                process.set(Status::Created);
            }
        }
        Event::Started { .. } => {
            match exec_id {
                None => {
                    let event = TaskStart { container_id, pid, ..Default::default() };
                    publisher.publish(topics::TASK_START_EVENT_TOPIC, event);
                }
                Some(exec_id) => {
                    let event =
                        TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
                    publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, event);
                }
            }
            process.set(Status::Running);
        }
        Event::Paused { .. } => {
            let event = TaskPaused { container_id, ..Default::default() };
            publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, event);
            process.set(Status::Paused);
        }
        Event::Resumed { .. } => {
            let event = TaskResumed { container_id, ..Default::default() };
            publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, event);
            process.set(Status::Running);
        }
        Event::Oom { .. } => {
            let event = TaskOOM { container_id, ..Default::default() };
            publisher.publish(topics::TASK_OOM_EVENT_TOPIC, event);
        }
        Event::Exited { exit, .. } => {
            if exec_id.is_none() || process.status() != Status::Created {
                let event = TaskExit {
                    id: exec_id.unwrap_or_else(|| container_id.clone()),
                    container_id,
                    pid,
                    exit_status: exit.status.into(),
                    exited_at: exited_at(Some(exit)),
                    ..Default::default()
                };
                publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, event);
            }
            process.set(Status::Stopped(exit.clone()));
        }
        Event::Deleted { .. } => {
            let exit = process.status().exit().cloned();
            if exec_id.is_none() {
                let event = TaskDelete {
                    container_id,
                    pid,
                    exit_status: exit.as_ref().map_or(0, |exit| exit.status.into()),
                    exited_at: exited_at(exit.as_ref()),
                    ..Default::default()
                };
                publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, event);
            }
            process.set(Status::Deleted(exit));
        }
        Event::Stopped { .. } => {}
    }
}

pub fn exited_at(exit: Option<&Exit>) -> MessageField<Timestamp> {
    exit.map(|exit| Timestamp::from(exit.at)).into()
}

fn created(container: &Container) -> TaskCreate {
    let wanted = container.init.wanted.clone();
    let io = TaskIO {
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        terminal: wanted.terminal,
        ..Default::default()
    };
    // The same message, in another module of the generated code.
    let mounts = container.mounts.iter();
    let rootfs = mounts.filter_map(|mount| {
        let bytes = mount.write_to_bytes().ok()?;
        Message::parse_from_bytes(&bytes).ok()
    });
    TaskCreate {
        container_id: container.id.to_string(),
        bundle: container.bundle.to_string_lossy().into_owned(),
        rootfs: rootfs.collect(),
        io: Some(io).into(),
        pid: container.pid(),
        ..Default::default()
    }
}
