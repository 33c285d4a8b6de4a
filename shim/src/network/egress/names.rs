//! The guest's server of names: it knows those of the list, by what the host's own resolver says of them. An address may be
//! connected to before the guest is told of it.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::{net::lookup_host, sync::Mutex};

use super::{
    Allowed,
    dns::{Code, Kind, MAX_ANSWERS, Question},
};
use crate::cli::{Egress, Host, is_elsewhere};

/// How many addresses of a name may be connected to: the latest.
pub const KEPT: usize = 64;
/// How long the host is not asked again, and for how long an answer is valid.
const VALID: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Names {
    pub(super) allowed: Allowed,
    names: BTreeMap<String, Name>,
}

#[derive(Debug, Default)]
struct Name {
    ports: Vec<Option<u16>>,
    /// Locked while the host is asked: once for all who want to know.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Those that may be connected to, the latest last.
    open: VecDeque<IpAddr>,
    answer: Vec<IpAddr>,
    asked: Option<Instant>,
}

impl Names {
    pub(super) fn new(list: &Egress, allowed: Allowed) -> Self {
        let mut names: BTreeMap<String, Name> = BTreeMap::new();
        for destination in &list.0 {
            if let Host::Name(name) = &destination.host {
                names.entry(name.clone()).or_default().ports.push(destination.port);
            }
        }
        Self { allowed, names }
    }

    /// `None` if it was no question.
    pub async fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let question = Question::parse(query)?;
        let (code, addresses) = match self.names.get(&question.name) {
            None => (Code::NoSuchName, Vec::new()),
            Some(_) if question.kind == Kind::Other => (Code::Fine, Vec::new()),
            Some(name) => match self.look_up(&question.name, name).await {
                Ok(addresses) => (Code::Fine, addresses),
                Err(error) => {
                    tracing::debug!(name = question.name, %error, "--egress: a name was not found");
                    (Code::Failed, Vec::new())
                }
            },
        };
        Some(question.answer(code, &addresses, VALID.as_secs() as u32))
    }

    async fn look_up(&self, text: &str, name: &Name) -> io::Result<Vec<IpAddr>> {
        let mut known = name.known.lock().await;
        if known.asked.is_some_and(|asked| asked.elapsed() < VALID) {
            return Ok(known.answer.clone());
        }
        let found = lookup_host((text, 0)).await?.map(|found| found.ip().to_canonical());
        self.learn(name, &mut known, found)?;
        Ok(known.answer.clone())
    }

    fn learn(
        &self,
        name: &Name,
        known: &mut Known,
        found: impl Iterator<Item = IpAddr>,
    ) -> io::Result<()> {
        let (four, six): (Vec<_>, Vec<_>) =
            found.filter(|address| may_be_named(*address)).partition(IpAddr::is_ipv4);
        let first = |addresses: Vec<IpAddr>| addresses.into_iter().take(MAX_ANSWERS);
        let answer: Vec<_> = first(four).chain(first(six)).collect();
        for address in &answer {
            match known.open.iter().position(|open| open == address) {
                Some(at) => drop(known.open.remove(at)),
                None => self.each(name, |port| self.allowed.open(*address, port))?,
            }
            known.open.push_back(*address);
        }
        while known.open.len() > KEPT {
            if let Some(oldest) = known.open.pop_front() {
                self.each(name, |port| self.allowed.close(oldest, port))?;
            }
        }
        (known.answer, known.asked) = (answer, Some(Instant::now()));
        Ok(())
    }

    fn each(&self, name: &Name, change: impl Fn(Option<u16>) -> io::Result<()>) -> io::Result<()> {
        name.ports.iter().try_for_each(|port| change(*port))
    }
}

/// Whoever has a name does not choose something of the host's own with it, such as a cloud's description of the host.
fn may_be_named(address: IpAddr) -> bool {
    let near = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    is_elsewhere(address) && !near
}
