//! Containers whose specification is changed before they start: fields that no option of `ctr` sets.

use prost::Message;
use serde_json::{Value, json};

use super::{Containerd, grpc::Any};

#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, tag = "5")]
    spec: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Found {
    #[prost(message, tag = "1")]
    container: Option<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct Update {
    #[prost(message, tag = "1")]
    container: Option<Container>,
    #[prost(message, tag = "2")]
    mask: Option<Mask>,
}

#[derive(Clone, PartialEq, Message)]
struct Mask {
    #[prost(string, repeated, tag = "1")]
    paths: Vec<String>,
}

const GET: &str = "/containerd.services.containers.v1.Containers/Get";
const UPDATE: &str = "/containerd.services.containers.v1.Containers/Update";

impl Containerd {
    /// `ctr containers create IMAGE ID`, with this command and this change.
    pub fn create(
        &self,
        image: &str,
        container: &str,
        command: &[&str],
        change: impl FnOnce(&mut Value),
    ) {
        let runtime = format!("io.containerd.{}.v2", self.runtime.name());
        let (image, id) = (format!("docker.io/local/{image}:latest"), self.id(container));
        self.ctr(["containers", "create", "--runtime", &runtime, &image, &id])
            .output()
            .ended_with(0);
        let found: Found = self.grpc.call("default", GET, Named { id }).expect("the container");
        let mut container = found.container.expect("the container");
        let any = container.spec.as_mut().expect("a specification");
        let mut spec: Value = serde_json::from_slice(&any.value).expect("JSON");
        // ctr would take the command's options for its own.
        spec["process"]["args"] = json!(command);
        change(&mut spec);
        any.value = serde_json::to_vec(&spec).expect("JSON");
        let mask = Some(Mask { paths: vec!["spec".into()] });
        let update = Update { container: Some(container), mask };
        self.grpc.call::<_, Found>("default", UPDATE, update).expect("the change");
    }
}
