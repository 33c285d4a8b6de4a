//! What [`super::fields`] says, carried out on JSON.

use std::mem;

use serde_json::{Value, json};

use super::{
    Result, SpecError,
    fields::{self, By, Field, NO_CGROUP},
};

/// What a decision depends on besides the table.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// What protects nobody is refused as well.
    pub strict: bool,
    /// There is a cgroup on the host for this container's sandbox alone.
    pub cgroup: bool,
}

/// Refuses what a caller asks for and nobody sees to. Unless strict, takes out what protects nobody instead, and
/// returns the names of that. `at` is the path of this JSON in a spec.
pub fn decide(json: &mut Value, at: &str, terms: Terms) -> Result<Vec<String>> {
    let mut walk = Walk { terms, for_guest: false, ignored: Vec::new() };
    walk.members(json, at, at)?;
    Ok(walk.ignored)
}

/// The same of the JSON of resources that a running container is to have.
pub fn decide_resources(resources: &[u8], terms: Terms) -> Result<(Vec<u8>, Vec<String>)> {
    let resources: Value = serde_json::from_slice(resources)?;
    let mut json = json!({ "linux": { "resources": resources } });
    let ignored = decide(&mut json, "", terms)?;
    Ok((serde_json::to_vec(&json["linux"]["resources"])?, ignored))
}

/// Leaves of a spec what the guest sees to. What a cgroup is there for has been taken out by whoever has one.
pub(super) fn keep_guests(json: &mut Value, at: &str) -> Result<()> {
    let terms = Terms { strict: true, cgroup: false };
    Walk { terms, for_guest: true, ignored: Vec::new() }.members(json, at, at)
}

struct Walk {
    terms: Terms,
    for_guest: bool,
    ignored: Vec<String>,
}

impl Walk {
    /// `path` is as in the table, `shown` has the numbers of entries.
    fn members(&mut self, json: &mut Value, path: &str, shown: &str) -> Result<()> {
        match json {
            Value::Object(members) => {
                for (name, mut value) in mem::take(members) {
                    if self.keeps(&mut value, &join(path, &name), &join(shown, &name))? {
                        members.insert(name, value);
                    }
                }
            }
            Value::Array(entries) => {
                for (n, entry) in entries.iter_mut().enumerate() {
                    self.members(entry, &format!("{path}[]"), &format!("{shown}[{n}]"))?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn keeps(&mut self, value: &mut Value, path: &str, shown: &str) -> Result<bool> {
        if let Some(Field { by, note, .. }) = fields::find(path) {
            return self.obeys(*by, note, value, shown);
        }
        if fields::has_below(path) {
            self.members(value, path, shown)?;
            let is_empty = value.as_object().is_some_and(|members| members.is_empty());
            return Ok(!(self.for_guest && is_empty));
        }
        match is_nothing(value) {
            true => Ok(false),
            false if self.terms.strict => Err(SpecError::Unknown { field: shown.into() }),
            false => Ok(self.ignores(shown)),
        }
    }

    fn obeys(&mut self, by: By, why: &'static str, value: &Value, shown: &str) -> Result<bool> {
        match by {
            By::Guest => Ok(true),
            By::Host | By::Vm => Ok(!self.for_guest),
            By::Cgroup if self.terms.cgroup => Ok(true),
            By::Cgroup | By::Refused | By::Strict if is_nothing(value) => Ok(false),
            By::Cgroup => self.strictly(NO_CGROUP, shown),
            By::Refused => Err(SpecError::Unsupported { field: shown.into(), why }),
            By::Strict => self.strictly(why, shown),
        }
    }

    fn strictly(&mut self, why: &'static str, shown: &str) -> Result<bool> {
        match self.terms.strict {
            true => Err(SpecError::Strict { field: shown.into(), why }),
            false => Ok(self.ignores(shown)),
        }
    }

    fn ignores(&mut self, shown: &str) -> bool {
        self.ignored.push(shown.escape_default().to_string());
        false
    }
}

fn join(above: &str, name: &str) -> String {
    if above.is_empty() { name.into() } else { format!("{above}.{name}") }
}

/// Null, zero, false or empty: a caller that spells out its defaults asks for nothing.
pub(super) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.values().all(is_nothing),
        Value::Bool(true) => false,
    }
}
