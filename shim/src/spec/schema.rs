//! The fields of a type, by deserializing it from nothing: what derived code asks for is written down.

use std::{cell::RefCell, collections::BTreeSet};

use serde::{
    Deserialize, Deserializer,
    de::{
        IntoDeserializer, Visitor,
        value::{Error, MapDeserializer, SeqDeserializer, StrDeserializer},
    },
    forward_to_deserialize_any,
};

/// The paths of all fields of `T`, `[]` standing for the entries of a list.
pub fn fields_of<'de, T: Deserialize<'de>>() -> BTreeSet<String> {
    let found = RefCell::default();
    T::deserialize(Tracer { path: String::new(), found: &found }).unwrap();
    found.into_inner()
}

#[derive(Clone)]
struct Tracer<'a> {
    path: String,
    found: &'a RefCell<BTreeSet<String>>,
}

impl Tracer<'_> {
    fn below(&self, name: &str) -> Self {
        let path = match self.path.as_str() {
            "" => name.into(),
            above => format!("{above}.{name}"),
        };
        self.found.borrow_mut().insert(path.clone());
        Self { path, found: self.found }
    }
}

impl<'de> IntoDeserializer<'de, Error> for Tracer<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Error;

    /// Something that is a name, a number and a list of CPUs.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(if self.path.contains("capabilities") { "CAP_CHOWN" } else { "0" })
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(true)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(1)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let entry = Self { path: format!("{}[]", self.path), found: self.found };
        visitor.visit_seq(SeqDeserializer::new([entry].into_iter()))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let entry = Self { path: format!("{}{{}}", self.path), found: self.found };
        visitor.visit_map(MapDeserializer::new([("x", entry)].into_iter()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(MapDeserializer::new(fields.iter().map(|name| (*name, self.below(name)))))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let first: StrDeserializer<'_, Error> = variants[0].into_deserializer();
        visitor.visit_enum(first)
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier
        ignored_any
    }
}
