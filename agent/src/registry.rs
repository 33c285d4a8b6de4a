//! Things by id, where an id can be held before its thing exists and while it is being taken apart: of
//! two requests for one id, one loses at once.

use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Longest id.
const MAX_ID: usize = 76;

pub struct Registry<T>(Mutex<HashMap<String, Option<Arc<T>>>>);

/// An id that is held, and given up when this is dropped.
pub struct Held<'a, T> {
    registry: &'a Registry<T>,
    id: String,
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Registry<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a new id; `None` if it is taken.
    pub fn hold(&self, id: &str) -> Option<Held<'_, T>> {
        let mut things = self.lock();
        if things.contains_key(id) {
            return None;
        }
        things.insert(id.to_owned(), None);
        Some(Held { registry: self, id: id.to_owned() })
    }

    pub fn get(&self, id: &str) -> Option<Arc<T>> {
        self.lock().get(id).cloned().flatten()
    }

    /// Takes a thing out but holds its id, until it is put back or the hold is dropped.
    pub fn take(&self, id: &str) -> Option<(Held<'_, T>, Arc<T>)> {
        let thing = self.lock().get_mut(id)?.take()?;
        Some((Held { registry: self, id: id.to_owned() }, thing))
    }

    pub fn all(&self) -> Vec<(String, Arc<T>)> {
        let things = self.lock();
        things.iter().filter_map(|(id, thing)| Some((id.clone(), thing.clone()?))).collect()
    }
}

impl<T> Held<'_, T> {
    pub fn put(self, thing: Arc<T>) {
        self.registry.lock().insert(self.id.clone(), Some(thing));
        mem::forget(self);
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
    }
}

/// Whether this is a plain name: `[A-Za-z0-9][A-Za-z0-9_.-]*`, not too long. Ids become file names.
pub fn is_valid_id(id: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    id.len() <= MAX_ID
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_holder() {
        let registry = Registry::<u32>::default();
        let held = registry.hold("a").unwrap();
        assert!(registry.hold("a").is_none() && registry.get("a").is_none());
        drop(held);
        registry.hold("a").unwrap().put(Arc::new(7));
        assert_eq!(*registry.get("a").unwrap(), 7);
        let (held, seven) = registry.take("a").unwrap();
        assert!(registry.take("a").is_none() && registry.hold("a").is_none());
        held.put(seven);
        assert_eq!(registry.all().len(), 1);
        drop(registry.take("a").unwrap());
        assert!(registry.hold("a").is_some());
    }

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "0", "web-1.x_y", &"a".repeat(76)] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "-rf", "a\0", "ä", "a b", &"a".repeat(77)] {
            assert!(!is_valid_id(bad), "{bad}");
        }
    }
}
