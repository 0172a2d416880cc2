//! Taking the members of an object one by one, by type, with the protocol's words for what is wrong.
//!
//! What is taken is gone; [`Members::finish`] refuses what is left over. Objects that came from dotted keys hold strings
//! only, out of which switches and numbers are read here. Costs no copies: values are moved out.
//!
//! What is taken is also how the commands' schema is found out: read every member before refusing a value, and refuse
//! what is known and not built by [`Members::refuse`] or in [`Words::of`], so that the schema leaves it out.

use serde_json::{Map, Value};

use crate::describe::{Either, Log, Taken};
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
    /// Who is told what is taken.
    log: Option<Log>,
}

/// What a member that names something or defines it holds.
#[derive(Debug)]
pub enum Alternate<T> {
    /// A name.
    Name(String),
    /// An object.
    Object(T),
    /// `null`.
    Null,
}

/// What is read out of an object.
pub trait Object: Sized + 'static {
    /// Reads all of `members`.
    fn read(members: Members) -> Result<Self, QmpError>;
}

/// A named set of words: what an enumeration accepts.
pub trait Words: Sized + 'static {
    /// The words that are accepted, and what they mean. What is known and refused belongs into [`Words::of`] alone.
    const WORDS: &'static [(&'static str, Self)];

    /// What `word` means; also of words that are known only to be refused with a sentence of their own.
    fn of(word: &str) -> Option<&'static Self> {
        Self::WORDS.iter().find(|(name, _)| *name == word).map(|(_, meaning)| meaning)
    }
}

impl Members {
    /// Members of an object that came as JSON.
    pub fn of_json(object: Map<String, Value>) -> Members {
        Members { object, path: String::new(), strings: false, log: None }
    }

    /// Members that tell `log` what is taken of them.
    pub(crate) fn logged(object: Map<String, Value>, log: Log) -> Members {
        Members { object, path: String::new(), strings: false, log: Some(log) }
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
        Ok(Members { object, path: String::new(), strings: true, log: None })
    }

    /// The members as they came, and whether scalars are strings because they came from dotted keys.
    pub fn into_parts(self) -> (Map<String, Value>, bool) {
        (self.object, self.strings)
    }

    /// What [`Members::into_parts`] gave, once more.
    pub fn of_parts(object: Map<String, Value>, strings: bool) -> Members {
        Members { object, path: String::new(), strings, log: None }
    }

    /// The name of a member as messages tell it.
    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// Takes a member, and tells as what.
    fn take(&mut self, name: &str, taken: impl FnOnce() -> Taken) -> Option<Value> {
        if let Some(log) = &self.log {
            log.taken(self.full(name), taken());
        }
        self.object.remove(name)
    }

    fn mistyped(&self, name: &str, expected: &str) -> QmpError {
        QmpError::generic(format!("Invalid parameter type for '{}', expected: {expected}", self.full(name)))
    }

    fn unreadable(&self, name: &str, expected: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' expects {expected}", self.full(name)))
    }

    /// The refusal of an object that lacks a member.
    pub fn missing(&self, name: &str) -> QmpError {
        if let Some(log) = &self.log {
            log.missing(self.full(name));
        }
        QmpError::generic(format!("Parameter '{}' is missing", self.full(name)))
    }

    fn need<T>(&self, name: &str, value: Option<T>) -> Result<T, QmpError> {
        value.ok_or_else(|| self.missing(name))
    }

    /// An optional string.
    pub fn opt_str(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        self.opt_text(name, || Taken::Str)
    }

    fn opt_text(&mut self, name: &str, taken: impl FnOnce() -> Taken) -> Result<Option<String>, QmpError> {
        match self.take(name, taken) {
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
        match self.take(name, || Taken::Bool) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(Value::String(text)) if self.strings => match switch(&text) {
                Some(on) => Ok(Some(on)),
                None => Err(self.unreadable(name, "'on' or 'off'")),
            },
            Some(_) => Err(self.mistyped(name, "boolean")),
        }
    }

    /// A switch.
    pub fn bool(&mut self, name: &str) -> Result<bool, QmpError> {
        let value = self.opt_bool(name)?;
        self.need(name, value)
    }

    /// A member of any type.
    pub fn any(&mut self, name: &str) -> Result<Value, QmpError> {
        let value = self.take(name, || Taken::Any);
        self.need(name, value)
    }

    /// An optional signed number.
    pub fn opt_int(&mut self, name: &str) -> Result<Option<i64>, QmpError> {
        match self.take(name, || Taken::Int) {
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

    /// An optional number of 64 bits.
    pub fn opt_u64(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        let Some(value) = self.take(name, || Taken::Int) else { return Ok(None) };
        let number = match &value {
            Value::String(text) if self.strings => text.parse().ok(),
            value => crate::alter::unsigned(value),
        };
        number.ok_or_else(|| self.unreadable(name, "uint64")).map(Some)
    }

    /// A number of 64 bits.
    pub fn u64(&mut self, name: &str) -> Result<u64, QmpError> {
        let value = self.opt_u64(name)?;
        self.need(name, value)
    }

    /// An optional word out of a set.
    pub fn opt_word<W: Words + Copy>(&mut self, name: &str) -> Result<Option<W>, QmpError> {
        let taken = || Taken::Word(W::WORDS.iter().map(|(name, _)| *name).collect());
        let Some(word) = self.opt_text(name, taken)? else { return Ok(None) };
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
        let path = format!("{}.", self.full(name));
        Members { object, path, strings: self.strings, log: self.log.clone() }
    }

    /// An optional object.
    pub fn opt_object(&mut self, name: &str) -> Result<Option<Members>, QmpError> {
        match self.take(name, || Taken::Object) {
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

    /// An optional member that is a name, an object, or `null` where `kind` (the type's name) ends in `OrNull`.
    pub fn opt_alternate<T: Object>(
        &mut self,
        name: &str,
        kind: &'static str,
    ) -> Result<Option<Alternate<T>>, QmpError> {
        match self.take(name, || Taken::Either(either::<T>(kind))) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(Alternate::Name(text))),
            Some(Value::Object(object)) => {
                T::read(self.inside(name, object)).map(Alternate::Object).map(Some)
            }
            Some(Value::Null) if takes_null(kind) => Ok(Some(Alternate::Null)),
            // Without the objects around it, as others tell it.
            Some(_) => {
                Err(QmpError::generic(format!("Invalid parameter type for '{name}', expected: {kind}")))
            }
        }
    }

    fn opt_items(
        &mut self,
        name: &str,
        taken: impl FnOnce() -> Taken,
    ) -> Result<Option<Vec<Value>>, QmpError> {
        match self.take(name, taken) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(self.mistyped(name, "array")),
        }
    }

    /// An optional list of words out of a set.
    pub fn opt_words<W: Words + Copy>(&mut self, name: &str) -> Result<Option<Vec<W>>, QmpError> {
        let taken = || Taken::Words(W::WORDS.iter().map(|(name, _)| *name).collect());
        let Some(items) = self.opt_items(name, taken)? else { return Ok(None) };
        let one = |(at, item)| match item {
            Value::String(word) => W::of(&word).copied().ok_or_else(|| {
                QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"))
            }),
            _ => Err(self.mistyped(&format!("{name}[{at}]"), "string")),
        };
        items.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(Some)
    }

    /// An optional list of objects.
    pub fn opt_objects(&mut self, name: &str) -> Result<Option<Vec<Members>>, QmpError> {
        let Some(items) = self.opt_items(name, || Taken::Objects)? else { return Ok(None) };
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
    pub fn opt_alternates<T: Object>(
        &mut self,
        name: &str,
        kind: &'static str,
    ) -> Result<Option<Vec<Alternate<T>>>, QmpError> {
        let Some(items) = self.opt_items(name, || Taken::Eithers(either::<T>(kind)))? else {
            return Ok(None);
        };
        let one = |(at, item)| match item {
            Value::String(text) => Ok(Alternate::Name(text)),
            Value::Object(object) => {
                T::read(self.inside(&format!("{name}[{at}]"), object)).map(Alternate::Object)
            }
            // The protocol's words for what has no name of its own.
            _ => Err(QmpError::generic(format!("Invalid parameter type for 'null', expected: {kind}"))),
        };
        items.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(Some)
    }

    /// Refuses a member that is known and not supported, by name; `advice` says what to do instead.
    pub fn refuse(&self, name: &str, advice: &str) -> Result<(), QmpError> {
        if !self.has(name) {
            return Ok(());
        }
        Err(QmpError::generic(format!("'{}' is not supported yet: {advice}", self.full(name))))
    }

    /// Whether the member is there and was not taken.
    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    /// Takes a member whatever it is: for those that are accepted and change nothing.
    pub fn ignore(&mut self, name: &str) {
        self.take(name, || Taken::Any);
    }

    /// Refuses what is left over.
    pub fn finish(self) -> Result<(), QmpError> {
        if let Some(log) = &self.log {
            log.finished(&self.path);
        }
        match self.object.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", self.full(name)))),
        }
    }
}

/// Whether a type takes `null`, by its name.
fn takes_null(kind: &str) -> bool {
    kind.ends_with("OrNull")
}

fn either<T: Object>(kind: &'static str) -> Either {
    Either { kind, read: |members| T::read(members).map(drop), null: takes_null(kind) }
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
