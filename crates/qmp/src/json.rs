//! Reading JSON as monitors get it: a stream of values, without any need for line ends between them.
//!
//! It takes what QEMU takes: strings in single quotes, `\'`, several values on a line, a value over several lines.
//! Malformed input is told once, then skipped: up to the end of the value where its brackets match, up to the next
//! structural character where a character made no sense. [`Reader`] never fails for good, and holds at most
//! [`MESSAGE_BYTES_MAX`] bytes of one value.

use serde_json::{Map, Number, Value};

use crate::error::QmpError;

/// Longest value, in bytes of its tokens.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Most tokens of a value.
pub const TOKENS_MAX: usize = 256 << 10;
/// How deep arrays and objects nest.
pub const DEPTH_MAX: usize = 100;

#[derive(Clone, Debug)]
enum Token {
    /// One of `{}[]:,`.
    Punctuation(u8),
    /// As it stood, with its quotes.
    Text(Vec<u8>),
    Number(Vec<u8>),
    Word(Vec<u8>),
}

/// Where the lexer is. What a token consists of so far is in `Reader::held`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Start,
    /// After an error: skips to the next structural character or line end.
    Lost,
    Text {
        quote: u8,
        escaped: bool,
    },
    Word,
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// What a byte does to the token that was begun.
enum Turn {
    /// It belongs to it.
    Take(At),
    /// It ends the token, and belongs to it.
    Last,
    /// The token ended before it.
    Before,
    /// It makes no sense here.
    Stray,
}

/// Cuts a stream of bytes into values.
#[derive(Debug)]
pub struct Reader {
    at: At,
    held: Vec<u8>,
    tokens: Vec<Token>,
    token_bytes: usize,
    braces: i64,
    brackets: i64,
}

impl Default for Reader {
    fn default() -> Reader {
        let (held, tokens) = (Vec::new(), Vec::new());
        Reader { at: At::Start, held, tokens, token_bytes: 0, braces: 0, brackets: 0 }
    }
}

fn wrong(what: impl std::fmt::Display) -> QmpError {
    QmpError::generic(format!("JSON parse error, {what}"))
}

const STRUCTURAL: &[u8] = b"{}[]:,";

impl Reader {
    /// Takes `bytes`, and gives each value and each error that ends in them.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Result<Value, QmpError>> {
        let mut values = Vec::new();
        for byte in bytes {
            self.step(*byte, &mut values);
        }
        values
    }

    /// The input is over: what was begun is an error.
    fn finish(&mut self, values: &mut Vec<Result<Value, QmpError>>) {
        if self.at != At::Lost {
            self.step(b'\n', values);
        }
        if !self.tokens.is_empty() {
            values.push(Err(wrong("premature EOI")));
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.tokens.clear();
        self.held.clear();
        (self.token_bytes, self.braces, self.brackets) = (0, 0, 0);
    }

    fn step(&mut self, byte: u8, values: &mut Vec<Result<Value, QmpError>>) {
        match self.turn(byte) {
            Turn::Take(at) => {
                if !matches!(at, At::Start | At::Lost) {
                    self.held.push(byte);
                }
                self.at = at;
                if self.token_bytes + self.held.len() > MESSAGE_BYTES_MAX {
                    self.over("JSON token size limit exceeded", values);
                }
            }
            Turn::Last => {
                self.held.push(byte);
                self.token(values);
            }
            Turn::Before => {
                self.token(values);
                // From the start every byte is taken, ends its token or is stray: this recurses once.
                self.step(byte, values);
            }
            Turn::Stray => {
                self.held.push(byte);
                let text = String::from_utf8_lossy(&self.held).replace('\0', "");
                values.push(Err(wrong(format_args!("stray '{text}'"))));
                self.forget();
                self.at = At::Lost;
            }
        }
    }

    fn turn(&self, byte: u8) -> Turn {
        use Turn::{Before, Last, Stray, Take};
        match (self.at, byte) {
            (At::Start | At::Lost, b'{' | b'}' | b'[' | b']' | b':' | b',') => Last,
            (At::Lost, b'\n') => Take(At::Start),
            (At::Lost, b'\t' | b'\r' | 0x20..=0xfd) => Take(At::Lost),
            (At::Start, b' ' | b'\t' | b'\r' | b'\n') => Take(At::Start),
            (At::Start, b'"' | b'\'') => Take(At::Text { quote: byte, escaped: false }),
            (At::Start, b'a'..=b'z') => Take(At::Word),
            (At::Start, b'-') => Take(At::Minus),
            (At::Start | At::Minus, b'0') => Take(At::Zero),
            (At::Start | At::Minus, b'1'..=b'9') => Take(At::Digits),
            (At::Text { quote, escaped: false }, _) if byte == quote => Last,
            (At::Text { quote, escaped }, 0x20..=0xfd) => {
                Take(At::Text { quote, escaped: !escaped && byte == b'\\' })
            }
            (At::Word, b'a'..=b'z') => Take(At::Word),
            (At::Digits, b'0'..=b'9') => Take(At::Digits),
            (At::Zero | At::Digits, b'.') => Take(At::Point),
            (At::Zero | At::Digits | At::Fraction, b'e' | b'E') => Take(At::Exponent),
            (At::Zero, b'0'..=b'9') => Stray,
            (At::Point | At::Fraction, b'0'..=b'9') => Take(At::Fraction),
            (At::Exponent, b'+' | b'-') => Take(At::ExponentSign),
            (At::Exponent | At::ExponentSign | At::ExponentDigits, b'0'..=b'9') => Take(At::ExponentDigits),
            (At::Word | At::Zero | At::Digits | At::Fraction | At::ExponentDigits, _) => Before,
            _ => Stray,
        }
    }

    /// The held token is whole.
    fn token(&mut self, values: &mut Vec<Result<Value, QmpError>>) {
        let bytes = std::mem::take(&mut self.held);
        self.token_bytes += bytes.len();
        let token = match (self.at, bytes.as_slice()) {
            (At::Text { .. }, _) => Token::Text(bytes),
            (At::Word, _) => Token::Word(bytes),
            (_, [mark]) if STRUCTURAL.contains(mark) => {
                match mark {
                    b'{' => self.braces += 1,
                    b'}' => self.braces -= 1,
                    b'[' => self.brackets += 1,
                    b']' => self.brackets -= 1,
                    _ => {}
                }
                Token::Punctuation(*mark)
            }
            _ => Token::Number(bytes),
        };
        self.at = At::Start;
        self.tokens.push(token);
        if self.braces + self.brackets > DEPTH_MAX as i64 {
            return self.over("JSON nesting depth limit exceeded", values);
        }
        if self.tokens.len() > TOKENS_MAX {
            return self.over("JSON token count limit exceeded", values);
        }
        if self.braces > 0 && self.brackets >= 0 || self.brackets > 0 && self.braces >= 0 {
            return;
        }
        let tokens = std::mem::take(&mut self.tokens);
        self.forget();
        values.push(Parser { tokens: tokens.into_iter().peekable() }.whole());
    }

    fn over(&mut self, limit: &str, values: &mut Vec<Result<Value, QmpError>>) {
        values.push(Err(QmpError::generic(limit)));
        self.forget();
        self.at = At::Lost;
    }
}

/// Reads one value that is all of `bytes`.
pub fn parse_one(bytes: &[u8]) -> Result<Value, QmpError> {
    let mut reader = Reader::default();
    let mut values = reader.push(bytes);
    reader.finish(&mut values);
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (None, _) => Err(QmpError::generic("Expecting a JSON value")),
        (Some(Ok(_)), Some(_)) => Err(QmpError::generic("Expecting at most one JSON value")),
        (Some(value), _) => value,
    }
}

/// Makes a value of tokens whose brackets match. Recursion is bounded by [`DEPTH_MAX`].
struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
}

impl Parser {
    fn whole(mut self) -> Result<Value, QmpError> {
        self.value()
    }

    fn ends_with(&mut self, mark: u8) -> bool {
        let found = matches!(self.tokens.peek(), Some(Token::Punctuation(next)) if *next == mark);
        if found {
            self.tokens.next();
        }
        found
    }

    fn value(&mut self) -> Result<Value, QmpError> {
        match self.tokens.next() {
            None => Err(wrong("premature EOI")),
            Some(Token::Punctuation(b'{')) => self.object(),
            Some(Token::Punctuation(b'[')) => self.array(),
            Some(Token::Punctuation(_)) => Err(wrong("expecting value")),
            Some(Token::Text(bytes)) => Ok(Value::String(text(&bytes)?)),
            Some(Token::Number(bytes)) => Ok(Value::Number(number(&bytes)?)),
            Some(Token::Word(bytes)) => match bytes.as_slice() {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                _ => {
                    let word = String::from_utf8_lossy(&bytes);
                    Err(wrong(format_args!("invalid keyword '{word}'")))
                }
            },
        }
    }

    fn object(&mut self) -> Result<Value, QmpError> {
        let mut object = Map::new();
        if self.ends_with(b'}') {
            return Ok(Value::Object(object));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(wrong("key is not a string in object"));
            };
            if !self.ends_with(b':') {
                return Err(wrong("missing : in object pair"));
            }
            let value = self.value()?;
            if object.insert(key, value).is_some() {
                return Err(wrong("duplicate key"));
            }
            if self.ends_with(b'}') {
                return Ok(Value::Object(object));
            }
            if !self.ends_with(b',') {
                return Err(wrong("expected separator in dict"));
            }
        }
    }

    fn array(&mut self) -> Result<Value, QmpError> {
        let mut items = Vec::new();
        if self.ends_with(b']') {
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            if self.ends_with(b']') {
                return Ok(Value::Array(items));
            }
            if !self.ends_with(b',') {
                return Err(wrong("expected separator in list"));
            }
        }
    }
}

/// A whole number as one of 64 bits where it fits, everything else as a float.
fn number(bytes: &[u8]) -> Result<Number, QmpError> {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(number) = text.parse::<i64>() {
        return Ok(number.into());
    }
    if let Ok(number) = text.parse::<u64>() {
        return Ok(number.into());
    }
    let number = text.parse().ok().and_then(Number::from_f64);
    number.ok_or_else(|| wrong(format_args!("number out of range '{text}'")))
}

/// The content of a string token, escapes resolved.
fn text(token: &[u8]) -> Result<String, QmpError> {
    let inside = token.len().saturating_sub(1);
    let mut out = Vec::with_capacity(inside);
    let mut at = 1;
    while at < inside {
        if token[at] != b'\\' {
            out.push(token[at]);
            at += 1;
            continue;
        }
        let escape = token.get(at + 1).copied().unwrap_or_default();
        at += 2;
        out.push(match escape {
            b'"' | b'\'' | b'\\' | b'/' => escape,
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let (character, length) = unicode(&token[at..])?;
                out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                at += length;
                continue;
            }
            _ => return Err(wrong("invalid escape sequence in string")),
        });
    }
    String::from_utf8(out).map_err(|_| wrong("invalid UTF-8 sequence in string"))
}

/// The character that `\u` stands for, and how many bytes follow the `u`: 4, or 10 for a pair of surrogates.
fn unicode(digits: &[u8]) -> Result<(char, usize), QmpError> {
    let hex = |from: usize| {
        let four = digits.get(from..from + 4).filter(|four| four.iter().all(u8::is_ascii_hexdigit))?;
        u32::from_str_radix(std::str::from_utf8(four).ok()?, 16).ok()
    };
    let refused = || {
        let shown = String::from_utf8_lossy(&digits[..digits.len().min(4)]);
        wrong(format_args!("\\u{shown} is not a valid Unicode character"))
    };
    let first = hex(0).ok_or_else(refused)?;
    let (point, length) = match first {
        0xd800..=0xdbff => {
            let second = hex(6).filter(|_| digits[4..].starts_with(b"\\u"));
            let second = second.filter(|low| (0xdc00..=0xdfff).contains(low)).ok_or_else(refused)?;
            (0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00), 10)
        }
        point => (point, 4),
    };
    // Code points that never are characters are refused as well, as QEMU does.
    let noncharacter = point & 0xfffe == 0xfffe || (0xfdd0..=0xfdef).contains(&point);
    let character = char::from_u32(point).filter(|_| !noncharacter).ok_or_else(refused)?;
    Ok((character, length))
}

#[cfg(test)]
mod tests;
