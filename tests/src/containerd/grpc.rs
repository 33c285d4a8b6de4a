//! Calls on containerd's socket. Messages are written out where they are used: only the fields that a test needs.

use std::{path::PathBuf, thread};

use futures_util::future::join_all;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::{net::UnixStream, runtime::Builder};
use tonic::{
    Request, Status,
    client::Grpc as Client,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::LIMIT;

/// The socket; each call connects anew.
pub struct Grpc {
    socket: PathBuf,
}

/// `google.protobuf.Any`
#[derive(Clone, PartialEq, Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes, tag = "2")]
    pub value: Vec<u8>,
}

/// Answers of calls that were made at once.
pub type Answers<A> = thread::JoinHandle<Vec<Result<A, Status>>>;

impl Grpc {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Whether containerd serves.
    pub fn answers(&self) -> bool {
        let version = "/containerd.services.version.v1.Version/Version";
        self.call::<_, ()>("default", version, ()).is_ok()
    }

    /// One call of a method (`/package.Service/Method`) in a namespace of containerd.
    pub fn call<Q, A>(&self, namespace: &str, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.spawn(1, namespace, method, request).join().expect("a call").remove(0)
    }

    /// The same call many times over at once.
    pub fn spawn<Q, A>(
        &self,
        times: usize,
        namespace: &str,
        method: &'static str,
        request: Q,
    ) -> Answers<A>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let (socket, namespace) = (self.socket.clone(), namespace.to_owned());
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let channel = channel(socket);
                let calls = (0..times).map(|_| {
                    let mut request = Request::new(request.clone());
                    let namespace = namespace.parse().expect("a word");
                    request.metadata_mut().insert("containerd-namespace", namespace);
                    call(channel.clone(), method, request)
                });
                join_all(calls).await
            })
        })
    }
}

fn channel(socket: PathBuf) -> Channel {
    let connect = move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    let endpoint = Endpoint::from_static("http://containerd").timeout(LIMIT);
    endpoint.connect_with_connector_lazy(service_fn(connect))
}

async fn call<Q, A>(
    channel: Channel,
    method: &'static str,
    request: Request<Q>,
) -> Result<A, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let mut client = Client::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<Q, A>::default();
    let answer = client.unary(request, PathAndQuery::from_static(method), codec).await?;
    Ok(answer.into_inner())
}
