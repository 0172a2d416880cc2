//! Dotted keys: `driver=qcow2,file.driver=file,file.filename=x` as a JSON object.
//!
//! Every value becomes a string; [`Members`](crate::Members) reads numbers and switches out of it later. Consecutive
//! numbers as keys make a list. `,,` stands for one comma in a value. Of a key that is given twice the last one counts.
//! Costs one object as large as the text.

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::json::DEPTH_MAX;

/// Longest part between two dots of a key, in bytes.
pub const KEY_PART_BYTES_MAX: usize = 127;

/// Reads dotted keys. With `implied`, text without `=` up to the first comma is the value of that key.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Map<String, Value>, QmpError> {
    let mut root = Map::new();
    let mut rest = text;
    let mut implied = implied;
    while !rest.is_empty() {
        let stop = rest.find(['=', ',']).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(stop);
        if let Some(value) = tail.strip_prefix('=') {
            let (value, after) = take_value(value);
            put(&mut root, word, value)?;
            rest = after;
        } else if matches!(word, "help" | "?") {
            return Err(QmpError::generic("Help is not available for this option"));
        } else if let Some(key) = implied.filter(|_| !word.is_empty()) {
            put(&mut root, key, word.into())?;
            rest = tail.strip_prefix(',').unwrap_or(tail);
        } else {
            key_parts(word)?;
            return Err(QmpError::generic(format!("Expected '=' after parameter '{word}'")));
        }
        implied = None;
    }
    lists(&mut root, "")?;
    Ok(root)
}

/// The value up to the next single comma, and what follows that comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

/// The parts of a key between its dots.
fn key_parts(key: &str) -> Result<Vec<&str>, QmpError> {
    let parts: Vec<&str> = key.split('.').collect();
    for part in &parts {
        if part.len() > KEY_PART_BYTES_MAX {
            return Err(QmpError::generic(format!("Parameter '{part}' is too long")));
        }
        if part.is_empty() || !(part.bytes().all(|byte| byte.is_ascii_digit()) || is_name(part)) {
            return Err(QmpError::generic(format!("Invalid parameter '{key}'")));
        }
    }
    if parts.len() > DEPTH_MAX {
        return Err(QmpError::generic(format!("Parameter '{key}' is nested more than {DEPTH_MAX} deep")));
    }
    Ok(parts)
}

/// A member's name: letters, digits, `-` and `_`, beginning with a letter, or with `_` for names of others.
fn is_name(part: &str) -> bool {
    part.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// Stores one value under its dotted key.
fn put(root: &mut Map<String, Value>, key: &str, value: String) -> Result<(), QmpError> {
    let parts = key_parts(key)?;
    let mixed = |upto: usize| {
        QmpError::generic(format!("Parameters '{}.*' used inconsistently", parts[..=upto].join(".")))
    };
    let Some((last, path)) = parts.split_last() else { return Ok(()) };
    let mut object = root;
    for (nth, part) in path.iter().enumerate() {
        let inner = object.entry(*part).or_insert_with(|| Value::Object(Map::new()));
        object = inner.as_object_mut().ok_or_else(|| mixed(nth))?;
    }
    if object.get(*last).is_some_and(Value::is_object) {
        return Err(mixed(path.len()));
    }
    object.insert((*last).into(), Value::String(value));
    Ok(())
}

/// Turns objects whose keys are all numbers into lists.
fn lists(object: &mut Map<String, Value>, prefix: &str) -> Result<(), QmpError> {
    for (key, value) in object.iter_mut() {
        let Value::Object(inner) = value else { continue };
        let name = format!("{prefix}{key}");
        lists(inner, &format!("{name}."))?;
        let numbers =
            inner.keys().filter(|key| key.starts_with(|first: char| first.is_ascii_digit())).count();
        if numbers == 0 {
            continue;
        }
        if numbers != inner.len() {
            return Err(QmpError::generic(format!("Parameters '{name}.*' used inconsistently")));
        }
        let mut list = Vec::with_capacity(numbers);
        for nth in 0..numbers {
            let item = inner.remove(&nth.to_string());
            list.push(item.ok_or_else(|| QmpError::generic(format!("Parameter '{name}.{nth}' missing")))?);
        }
        *value = Value::Array(list);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Value {
        Value::Object(parse(text, Some("driver")).unwrap())
    }

    fn refused(text: &str) -> String {
        parse(text, Some("driver")).unwrap_err().desc
    }

    #[test]
    fn dotted_keys_make_objects_and_numbers_make_lists() {
        assert_eq!(
            read("qcow2,node-name=n,file.driver=file,file.filename=a,,b=c,x.0=p,x.1.y=q,__org.a=1,"),
            json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "a,b=c"},
                "x": ["p", {"y": "q"}], "__org": {"a": "1"}})
        );
        assert_eq!(read(""), json!({}));
        assert_eq!(read("a=1,a=2,b="), json!({"a": "2", "b": ""}));
        assert_eq!(read("driver=x,a=,,,,"), json!({"driver": "x", "a": ",,"}));
    }

    /// The wording is what qemu-storage-daemon 10.0.2 answers.
    #[test]
    fn a_key_that_is_wrong_is_refused_with_the_words_that_managers_know() {
        for (text, why) in [
            ("driver=x,node-name", "Expected '=' after parameter 'node-name'"),
            ("null-co,,node-name=a", "Invalid parameter ''"),
            ("=a", "Invalid parameter ''"),
            ("driver=null-co,=a", "Invalid parameter ''"),
            ("driver=x,a..b=a", "Invalid parameter 'a..b'"),
            ("driver=x,.b=a", "Invalid parameter '.b'"),
            ("driver=x,b.=a", "Invalid parameter 'b.'"),
            ("driver=x,1a=on", "Invalid parameter '1a'"),
            ("a b=c", "Invalid parameter 'a b'"),
            ("driver=x,cache=b,cache.direct=on", "Parameters 'cache.*' used inconsistently"),
            ("driver=x,cache.direct=on,cache=b", "Parameters 'cache.*' used inconsistently"),
            ("driver=x,f.g=1,f.g.x=3", "Parameters 'f.g.*' used inconsistently"),
            ("driver=x,a.0=on,a.2=on", "Parameter 'a.1' missing"),
            ("driver=x,a.0=on,a.b=on", "Parameters 'a.*' used inconsistently"),
            ("help", "Help is not available for this option"),
            ("null-co,help", "Help is not available for this option"),
        ] {
            assert_eq!(refused(text), why, "{text}");
        }
        let long = "a".repeat(KEY_PART_BYTES_MAX + 1);
        assert_eq!(refused(&format!("{long}=b")), format!("Parameter '{long}' is too long"));
    }

    #[test]
    fn a_key_nested_without_end_is_refused() {
        let deep = "a.".repeat(DEPTH_MAX) + "a=1";
        assert!(refused(&deep).contains("nested more than"));
    }
}
