//! Taking the members of an object one by one, by type, with the protocol's words for what is wrong.
//!
//! What is taken is gone; [`Members::finish`] refuses what is left over. Objects that came from dotted keys hold strings
//! only, out of which switches and numbers are read here. Costs no copies: values are moved out.

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::json;
use crate::keyval;

/// The members of an object that were not taken yet.
#[derive(Clone, Debug)]
pub struct Members {
    object: Map<String, Value>,
    /// Names of the objects around it, each with its dot.
    path: String,
    /// Whether scalars are strings because they came from dotted keys.
    strings: bool,
}

/// What a member that names a node or defines one holds.
#[derive(Debug)]
pub enum Alternate {
    /// A name.
    Name(String),
    /// An object.
    Object(Members),
    /// `null`.
    Null,
}

/// A named set of words: what an enumeration accepts.
pub trait Words: Sized + 'static {
    /// The words and what they mean.
    const WORDS: &'static [(&'static str, Self)];

    /// What `word` means.
    fn of(word: &str) -> Option<&'static Self> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, meaning)| meaning)
    }
}

impl Members {
    /// Members of an object that came as JSON.
    pub fn of_json(object: Map<String, Value>) -> Members {
        Members { object, path: String::new(), strings: false }
    }

    /// The members of a command-line argument: JSON if it begins with `{`, dotted keys else. `implied` is the key of
    /// a first value without one.
    pub fn of_argument(text: &str, implied: Option<&str>) -> Result<Members, QmpError> {
        if text.starts_with('{') {
            return match json::parse_one(text.as_bytes())? {
                Value::Object(object) => Ok(Members::of_json(object)),
                _ => Err(QmpError::generic("QMP input must be a JSON object")),
            };
        }
        let object = keyval::parse(text, implied)?;
        Ok(Members { object, path: String::new(), strings: true })
    }

    /// The members as they came, and whether scalars are strings because they came from dotted keys.
    pub fn into_parts(self) -> (Map<String, Value>, bool) {
        (self.object, self.strings)
    }

    /// What [`Members::into_parts`] gave, once more.
    pub fn of_parts(object: Map<String, Value>, strings: bool) -> Members {
        Members { object, path: String::new(), strings }
    }

    /// The name of a member as messages tell it.
    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    fn mistyped(&self, name: &str, expected: &str) -> QmpError {
        QmpError::generic(format!("Invalid parameter type for '{}', expected: {expected}", self.full(name)))
    }

    fn unreadable(&self, name: &str, expected: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' expects {expected}", self.full(name)))
    }

    /// The refusal of an object that lacks a member.
    pub fn missing(&self, name: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' is missing", self.full(name)))
    }

    fn need<T>(&self, name: &str, value: Option<T>) -> Result<T, QmpError> {
        value.ok_or_else(|| self.missing(name))
    }

    /// An optional string.
    pub fn opt_str(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.mistyped(name, "string")),
        }
    }

    /// A string.
    pub fn str(&mut self, name: &str) -> Result<String, QmpError> {
        let value = self.opt_str(name)?;
        self.need(name, value)
    }

    /// An optional switch.
    pub fn opt_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(Value::String(text)) if self.strings => match switch(&text) {
                Some(on) => Ok(Some(on)),
                None => Err(self.unreadable(name, "'on' or 'off'")),
            },
            Some(_) => Err(self.mistyped(name, "boolean")),
        }
    }

    /// An optional signed number.
    pub fn opt_int(&mut self, name: &str) -> Result<Option<i64>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) if self.strings => match integer(&text) {
                Some(number) => Ok(Some(number)),
                None => Err(self.unreadable(name, "integer")),
            },
            Some(value) => match value.as_i64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.mistyped(name, "integer")),
            },
        }
    }

    /// A signed number.
    pub fn int(&mut self, name: &str) -> Result<i64, QmpError> {
        let value = self.opt_int(name)?;
        self.need(name, value)
    }

    /// An optional number that is not negative.
    pub fn opt_unsigned(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.opt_int(name)? {
            None => Ok(None),
            Some(number) => match u64::try_from(number) {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(self.unreadable(name, "a non-negative value")),
            },
        }
    }

    /// An optional number of 32 bits.
    pub fn opt_u32(&mut self, name: &str) -> Result<Option<u32>, QmpError> {
        match self.opt_int(name)? {
            None => Ok(None),
            Some(number) => match u32::try_from(number) {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(QmpError::generic(format!("Parameter '{name}' expects uint32_t"))),
            },
        }
    }

    /// A number of 64 bits.
    pub fn u64(&mut self, name: &str) -> Result<u64, QmpError> {
        let value = self.object.remove(name);
        let value = self.need(name, value)?;
        let number = match &value {
            Value::String(text) if self.strings => text.parse().ok(),
            value => crate::alter::unsigned(value),
        };
        number.ok_or_else(|| self.unreadable(name, "uint64"))
    }

    /// An optional word out of a set.
    pub fn opt_word<W: Words + Copy>(&mut self, name: &str) -> Result<Option<W>, QmpError> {
        let Some(word) = self.opt_str(name)? else { return Ok(None) };
        match W::of(&word) {
            Some(meaning) => Ok(Some(*meaning)),
            None => Err(QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"))),
        }
    }

    /// A word out of a set.
    pub fn word<W: Words + Copy>(&mut self, name: &str) -> Result<W, QmpError> {
        let value = self.opt_word(name)?;
        self.need(name, value)
    }

    fn inside(&self, name: &str, object: Map<String, Value>) -> Members {
        Members { object, path: format!("{}.", self.full(name)), strings: self.strings }
    }

    /// An optional object.
    pub fn opt_object(&mut self, name: &str) -> Result<Option<Members>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(self.inside(name, object))),
            Some(_) => Err(self.mistyped(name, "object")),
        }
    }

    /// An object.
    pub fn object(&mut self, name: &str) -> Result<Members, QmpError> {
        let value = self.opt_object(name)?;
        self.need(name, value)
    }

    /// An optional member that is a name, an object, or `null` where `kind` (the type's name in messages) ends in
    /// `OrNull`.
    pub fn opt_alternate(&mut self, name: &str, kind: &str) -> Result<Option<Alternate>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(Alternate::Name(text))),
            Some(Value::Object(object)) => Ok(Some(Alternate::Object(self.inside(name, object)))),
            Some(Value::Null) if kind.ends_with("OrNull") => Ok(Some(Alternate::Null)),
            Some(_) => Err(self.mistyped(name, kind)),
        }
    }

    /// An optional list, its items as they are.
    pub fn opt_list(&mut self, name: &str) -> Result<Option<Vec<Value>>, QmpError> {
        match self.object.remove(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(self.mistyped(name, "array")),
        }
    }

    /// An optional list of objects.
    pub fn opt_objects(&mut self, name: &str) -> Result<Option<Vec<Members>>, QmpError> {
        let Some(items) = self.opt_list(name)? else { return Ok(None) };
        let one = |(at, item)| {
            let name = format!("{name}[{at}]");
            match item {
                Value::Object(object) => Ok(self.inside(&name, object)),
                _ => Err(self.mistyped(&name, "object")),
            }
        };
        items.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(Some)
    }

    /// An optional list of members that are names or objects each.
    pub fn opt_alternates(&mut self, name: &str, kind: &str) -> Result<Option<Vec<Alternate>>, QmpError> {
        let Some(items) = self.opt_list(name)? else { return Ok(None) };
        let one = |(at, item)| match item {
            Value::String(text) => Ok(Alternate::Name(text)),
            Value::Object(object) => Ok(Alternate::Object(self.inside(&format!("{name}[{at}]"), object))),
            // The protocol's words for what has no name of its own.
            _ => Err(QmpError::generic(format!("Invalid parameter type for 'null', expected: {kind}"))),
        };
        items.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(Some)
    }

    /// Whether the member is there and was not taken.
    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// Takes a member whatever it is: for those that are accepted and change nothing.
    pub fn ignore(&mut self, name: &str) {
        self.object.remove(name);
    }

    /// Refuses what is left over.
    pub fn finish(self) -> Result<(), QmpError> {
        match self.object.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", self.full(name)))),
        }
    }
}

/// A switch as dotted keys spell it.
pub(crate) fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A number as dotted keys spell it: decimal, `0x` hexadecimal or `0` octal.
fn integer(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|first: char| first.is_ascii_digit()) {
        return None;
    }
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if hex.starts_with(|first: char| first.is_ascii_hexdigit()) => (16, hex),
        Some(_) => return None,
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    i64::from_str_radix(&format!("{sign}{digits}"), radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(text: &str) -> Members {
        Members::of_argument(text, None).unwrap()
    }

    #[test]
    fn numbers_and_switches_are_read_out_of_strings_only_where_keys_were_dotted() {
        let mut dotted = argument("a=0x10,b=010,c=-3,d=yes,e=off,f=1k,g=maybe");
        assert_eq!(dotted.int("a").unwrap(), 16);
        assert_eq!(dotted.int("b").unwrap(), 8);
        assert_eq!(dotted.int("c").unwrap(), -3);
        assert_eq!(dotted.opt_bool("d").unwrap(), Some(true));
        assert_eq!(dotted.opt_bool("e").unwrap(), Some(false));
        assert_eq!(dotted.int("f").unwrap_err().desc, "Parameter 'f' expects integer");
        assert_eq!(dotted.opt_bool("g").unwrap_err().desc, "Parameter 'g' expects 'on' or 'off'");
        dotted.finish().unwrap();

        let mut json = argument(r#"{"a": "1", "b": "on", "c": 1.5, "d": {"e": {}}}"#);
        let (a, b, c) = (json.int("a"), json.opt_bool("b"), json.int("c"));
        assert_eq!(a.unwrap_err().desc, "Invalid parameter type for 'a', expected: integer");
        assert_eq!(b.unwrap_err().desc, "Invalid parameter type for 'b', expected: boolean");
        assert_eq!(c.unwrap_err().desc, "Invalid parameter type for 'c', expected: integer");
        let mut inner = json.object("d").unwrap().object("e").unwrap();
        assert_eq!(inner.str("f").unwrap_err().desc, "Parameter 'd.e.f' is missing");
    }

    #[test]
    fn a_member_that_nobody_takes_is_refused_by_its_whole_name() {
        let mut json = argument(r#"{"a": {"b": 1}, "c": 2}"#);
        let inner = json.object("a").unwrap();
        assert_eq!(inner.finish().unwrap_err().desc, "Parameter 'a.b' is unexpected");
        assert_eq!(json.finish().unwrap_err().desc, "Parameter 'c' is unexpected");
    }

    #[test]
    fn a_number_that_does_not_fit_is_not_wrapped() {
        let mut json = argument(r#"{"a": 9223372036854775808, "b": -1, "c": 4294967296}"#);
        assert_eq!(json.int("a").unwrap_err().desc, "Invalid parameter type for 'a', expected: integer");
        assert_eq!(json.opt_unsigned("b").unwrap_err().desc, "Parameter 'b' expects a non-negative value");
        assert_eq!(json.opt_u32("c").unwrap_err().desc, "Parameter 'c' expects uint32_t");
        let mut dotted = argument("a=99999999999999999999,b=--1,c=0x");
        for name in ["a", "b", "c"] {
            assert!(dotted.int(name).is_err(), "{name}");
        }
    }
}
