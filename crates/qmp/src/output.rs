//! What a monitor is sent: one object a line, in ASCII, ended by CR LF.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use serde_json::{Map, Value, json};

use crate::error::QmpError;

/// Spaces as QEMU sets them, and nothing but ASCII.
struct Ascii;

impl Formatter for Ascii {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        for character in text.chars() {
            if matches!(character, ' '..='~') {
                out.write_all(&[character as u8])?;
                continue;
            }
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04X}")?;
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::AsciiControl(byte) => write!(out, "\\u{byte:04X}"),
            CharEscape::Quote => out.write_all(b"\\\""),
            CharEscape::ReverseSolidus => out.write_all(b"\\\\"),
            CharEscape::Solidus => out.write_all(b"/"),
            CharEscape::Backspace => out.write_all(b"\\b"),
            CharEscape::FormFeed => out.write_all(b"\\f"),
            CharEscape::LineFeed => out.write_all(b"\\n"),
            CharEscape::CarriageReturn => out.write_all(b"\\r"),
            CharEscape::Tab => out.write_all(b"\\t"),
        }
    }
}

/// A message as it is sent.
pub fn encode(message: &Value) -> Vec<u8> {
    let mut line = Vec::with_capacity(128);
    // A JSON value into memory: nothing of it can fail.
    let _infallible = message.serialize(&mut Serializer::with_formatter(&mut line, Ascii));
    line.extend_from_slice(b"\r\n");
    line
}

/// The answer to a command, with the id that it came with.
pub fn answer(outcome: Result<Value, QmpError>, id: Option<Value>) -> Value {
    let mut message = Map::new();
    match outcome {
        Ok(value) => message.insert("return".into(), value),
        Err(error) => {
            let error = json!({ "class": error.class.as_str(), "desc": error.desc });
            message.insert("error".into(), error)
        }
    };
    if let Some(id) = id {
        message.insert("id".into(), id);
    }
    Value::Object(message)
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// What is told about it.
    pub data: Value,
}

impl Event {
    /// An event of that name.
    pub fn new(name: &'static str, data: Value) -> Event {
        debug_assert_eq!(
            crate::schema::event_misfit(name, &data),
            None,
            "{name} tells what its schema does not say"
        );
        Event { name, data }
    }

    /// As a message, with the time of day.
    pub fn message(self, now: std::time::SystemTime) -> Value {
        let time = now.duration_since(std::time::UNIX_EPOCH);
        let (seconds, microseconds) = match time {
            Ok(time) => (json!(time.as_secs()), json!(time.subsec_micros())),
            Err(_) => (json!(-1), json!(-1)),
        };
        let timestamp = json!({ "seconds": seconds, "microseconds": microseconds });
        json!({ "timestamp": timestamp, "event": self.name, "data": self.data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_of_ascii() {
        let message =
            json!({"id": "\u{7f}\u{80}\u{1f}\"\\/\u{8}\u{c}\n\r\t<>é😀", "n": [1, 2.5, null, -3], "o": {}});
        let line = encode(&message);
        let expected = concat!(
            r#"{"id": "\u007F\u0080\u001F\"\\/\b\f\n\r\t<>\u00E9\uD83D\uDE00", "#,
            r#""n": [1, 2.5, null, -3], "o": {}}"#,
            "\r\n"
        );
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }

    #[test]
    fn what_is_sent_reads_back_as_the_same_value() {
        let message = json!({"desc": "a\u{0}b\u{10ffff}", "id": {"deep": [[[u64::MAX, i64::MIN]]]}});
        let line = encode(&message);
        let text = String::from_utf8(line).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), message);
    }
}
