//! Serde over a [`Tree`] that coerces nothing and names the field and line of each refusal.

use std::fmt;

use serde::de::value::{BorrowedStrDeserializer, StrDeserializer};
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess};
use serde::de::{Error as _, Unexpected, VariantAccess, Visitor};
use serde::forward_to_deserialize_any;

use crate::problem::{Code, FieldPath, Seg, printable};
use crate::tree::{Key, Tree, Value};

/// A refusal.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub code: Code,
    pub message: String,
    /// Where; absent until the deserializer that knows it has seen the error.
    pub place: Option<(FieldPath, u32)>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    fn new(code: Code, message: String) -> Self {
        Self { code, message, place: None }
    }
}

impl serde::de::Error for Refusal {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Self::new(Code::Invalid, msg.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn serde::de::Expected) -> Self {
        Self::new(Code::Invalid, format!("must be {expected}, not {unexpected}"))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Code::Missing, format!("`{field}` is required"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::new(Code::UnknownField, format!("unknown field; {}", known(field, expected, "fields")))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(
            Code::Invalid,
            format!("`{}` is not a value of this field; {}", printable(variant), known(variant, expected, "values")),
        )
    }
}

fn known(text: &str, expected: &[&str], what: &str) -> String {
    match expected.iter().find(|e| close(text, e)) {
        Some(e) => format!("did you mean `{e}`?"),
        None if expected.is_empty() => format!("there are no {what} here"),
        None => {
            let list: Vec<String> = expected.iter().map(|e| format!("`{e}`")).collect();
            format!("the {what} are {}", list.join(", "))
        }
    }
}

/// Whether one is a typing slip of the other: equal but for case, or one edit apart.
fn close(a: &str, b: &str) -> bool {
    if a.eq_ignore_ascii_case(b) {
        return true;
    }
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len().min(b.len()) < 3 || a.len().abs_diff(b.len()) > 1 {
        return false;
    }
    let front = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let back = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
    front + back + 1 >= a.len().max(b.len())
}

/// Reads a value of a type out of a tree that stands at `path`. With `lenient`, a null is an absent field.
pub(crate) fn read<T: DeserializeOwned>(tree: &Tree, path: &[Seg], lenient: bool) -> Result<T, Refusal> {
    T::deserialize(De { tree, at: At::Root(path), lenient })
}

/// The way from the root, as a list on the stack.
#[derive(Clone, Copy)]
enum At<'t> {
    Root(&'t [Seg]),
    Field(&'t At<'t>, &'t str),
    Index(&'t At<'t>, usize, Option<&'t str>),
}

impl At<'_> {
    fn path(&self) -> FieldPath {
        let mut out = Vec::new();
        let mut at = self;
        loop {
            match at {
                At::Root(p) => {
                    let mut path = p.to_vec();
                    out.reverse();
                    path.append(&mut out);
                    return FieldPath(path);
                }
                At::Field(up, f) => {
                    out.push(Seg::Field((*f).to_owned()));
                    at = up;
                }
                At::Index(up, i, n) => {
                    out.push(Seg::Index(*i, n.map(str::to_owned)));
                    at = up;
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
struct De<'t, 'de> {
    tree: &'de Tree,
    at: At<'t>,
    lenient: bool,
}

impl De<'_, '_> {
    fn place(&self, mut e: Refusal) -> Refusal {
        if e.place.is_none() {
            e.place = Some((self.at.path(), self.tree.line));
        }
        e
    }

    fn must_be(&self, what: &str) -> Refusal {
        let hint = match (&self.tree.value, what) {
            (Value::Null, _) => "; write a value, or leave the field out",
            (Value::Bool(_) | Value::Int(_) | Value::Float, "a string") => "; put it in quotes",
            (Value::Str(_), "an integer" | "a boolean") => "; write it without quotes",
            _ => "",
        };
        self.place(Refusal::new(Code::Invalid, format!("must be {what}, not {}{hint}", self.tree.value.what())))
    }

    fn int<'de, V: Visitor<'de>>(&self, visitor: V) -> Result<V::Value, Refusal> {
        let Value::Int(n) = self.tree.value else {
            return Err(self.must_be("an integer"));
        };
        match i64::try_from(n) {
            Ok(n) => visitor.visit_i64(n),
            Err(_) => Err(Refusal::custom("the number is out of range")),
        }
        .map_err(|e| self.place(e))
    }

    fn str<'de, V: Visitor<'de>>(&self, visitor: V) -> Result<V::Value, Refusal> {
        match self.tree.text() {
            Some(s) => visitor.visit_str(s).map_err(|e| self.place(e)),
            None => Err(self.must_be("a string")),
        }
    }
}

impl<'de> Deserializer<'de> for De<'_, 'de> {
    type Error = Refusal;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match &self.tree.value {
            Value::Null => visitor.visit_unit().map_err(|e| self.place(e)),
            Value::Bool(b) => visitor.visit_bool(*b).map_err(|e| self.place(e)),
            Value::Int(_) => self.int(visitor),
            Value::Float => Err(self.must_be("an integer")),
            Value::Str(_) => self.str(visitor),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.tree.value {
            Value::Bool(b) => visitor.visit_bool(b).map_err(|e| self.place(e)),
            _ => Err(self.must_be("a boolean")),
        }
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        self.int(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        self.str(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        self.str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.tree.value {
            Value::Null if self.lenient => visitor.visit_none(),
            Value::Null => Err(self.must_be("a value")),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Refusal> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        let Value::List(items) = &self.tree.value else {
            return Err(self.must_be("a list"));
        };
        visitor.visit_seq(Items { de: self, items, next: 0 }).map_err(|e| self.place(e))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        let Value::Map(entries) = &self.tree.value else {
            return Err(self.must_be("a map"));
        };
        visitor.visit_map(Entries { de: self, entries, next: 0 }).map_err(|e| self.place(e))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        let Some(text) = self.tree.text() else {
            return Err(self.must_be("a string"));
        };
        visitor.visit_enum(Variant(text)).map_err(|e| self.place(e))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        visitor.visit_unit()
    }

    // No type of this crate asks for these.
    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

struct Items<'t, 'de> {
    de: De<'t, 'de>,
    items: &'de [Tree],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'_, 'de> {
    type Error = Refusal;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refusal> {
        let Some(tree) = self.items.get(self.next) else {
            return Ok(None);
        };
        let at = At::Index(&self.de.at, self.next, tree.item_name());
        self.next += 1;
        seed.deserialize(De { tree, at, lenient: self.de.lenient }).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len().saturating_sub(self.next))
    }
}

struct Entries<'t, 'de> {
    de: De<'t, 'de>,
    entries: &'de [(Key, Tree)],
    next: usize,
}

impl<'de> MapAccess<'de> for Entries<'_, 'de> {
    type Error = Refusal;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refusal> {
        let Some((key, _)) = self.entries.get(self.next) else {
            return Ok(None);
        };
        seed.deserialize(BorrowedStrDeserializer::new(&key.text)).map(Some).map_err(|mut e: Refusal| {
            e.place.get_or_insert_with(|| (At::Field(&self.de.at, &key.text).path(), key.line));
            e
        })
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Refusal> {
        let (key, tree) = self.entries.get(self.next).ok_or_else(|| Refusal::custom("a value without a key"))?;
        self.next += 1;
        seed.deserialize(De { tree, at: At::Field(&self.de.at, &key.text), lenient: self.de.lenient })
    }
}

struct Variant<'a>(&'a str);

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Refusal;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Refusal> {
        let text: StrDeserializer<'_, Refusal> = self.0.into_deserializer();
        Ok((seed.deserialize(text)?, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Refusal;

    fn unit_variant(self) -> Result<(), Refusal> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Refusal> {
        Err(Refusal::custom("takes no value"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Refusal> {
        Err(Refusal::custom("takes no values"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Refusal> {
        Err(Refusal::custom("takes no fields"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised() {
        assert!(close("toFqdns", "toFQDNs"));
        assert!(close("toPort", "toPorts"));
        assert!(close("toPrts", "toPorts"));
        assert!(close("toPxrts", "toPorts"));
        assert!(!close("toPorts", "toCIDRs"));
        assert!(!close("a", "b"));
    }
}
