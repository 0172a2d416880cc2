use serde_json::json;

use super::*;

fn read(bytes: &[u8]) -> Vec<Result<Value, String>> {
    let values = Reader::default().push(bytes);
    values.into_iter().map(|value| value.map_err(|error| error.desc)).collect()
}

#[test]
fn values_need_no_line_ends_and_may_span_lines() {
    let values = read(b"{'a':1}[2] \"x\"\n{\n\"b\" :\r\n\t[true,false,null]}3 ");
    let expected = [json!({"a": 1}), json!([2]), json!("x"), json!({"b": [true, false, null]}), json!(3)];
    assert_eq!(values, expected.map(Ok));
}

#[test]
fn a_value_cut_anywhere_is_the_same_value() {
    let text = br#"{"execute": 'x', "id": [1.5e3, -7, "\ud83d\ude00\u00e9 \' \/ \\"]} "#;
    let whole = read(text);
    assert_eq!(whole, [Ok(json!({"execute": "x", "id": [1500.0, -7, "😀é ' / \\"]}))]);
    for cut in 0..text.len() {
        let mut reader = Reader::default();
        let mut values = reader.push(&text[..cut]);
        values.extend(reader.push(&text[cut..]));
        assert_eq!(
            values,
            whole.iter().cloned().map(|value| value.map_err(QmpError::generic)).collect::<Vec<_>>()
        );
    }
}

#[test]
fn numbers_keep_64_bits() {
    for (text, value) in [
        ("-9223372036854775808", json!(i64::MIN)),
        ("18446744073709551615", json!(u64::MAX)),
        ("18446744073709551616", json!(18446744073709551616.0)),
        ("-0", json!(0)),
        ("1E+2", json!(100.0)),
    ] {
        assert_eq!(parse_one(text.as_bytes()), Ok(value), "{text}");
    }
    assert!(parse_one(b"1e400").is_err());
}

/// Each row as qemu-storage-daemon 10.0.2 answers it.
#[test]
fn what_is_malformed_is_told_with_the_words_that_clients_know() {
    let expecting = "expecting value";
    for (text, errors) in [
        (&b"{\"execute\":\"x\" \"y\"}"[..], &["expected separator in dict"][..]),
        (b"{\"execute\":}", &[expecting]),
        (b"\x01", &["stray '\u{1}'"]),
        (b"{\"a\":\"q-\xff\xfe\"}", &["stray '\"q-\u{fffd}'", "stray '\u{fffd}'", expecting]),
        (b"[01]", &["stray '01'", expecting]),
        (b"[%a 12]", &["stray '%'", expecting]),
        (b"[True]", &["stray 'T'", expecting]),
        (b"[nUll]", &["stray 'U'", expecting]),
        (b"[-x]", &["stray '-x'", expecting]),
        (b"[1.x]", &["stray '1.x'", expecting]),
        (b"[1ex]", &["stray '1ex'", expecting]),
        (b"{\"a\":nul}", &["invalid keyword 'nul'"]),
        (b"{\"a\":1,\"a\":2}", &["duplicate key"]),
        (b"{\"a\":1,}", &[expecting]),
        (b"}", &[expecting]),
        (b"]", &[expecting]),
        (b"{]", &[expecting]),
        (b"[}", &[expecting]),
        (b"{1:2}", &["key is not a string in object"]),
        (b"{\"a\"}", &["missing : in object pair"]),
        (b"[1 2]", &["expected separator in list"]),
        (b"[1,]", &[expecting]),
        (b"[1,,2]", &[expecting]),
        (b"['a\\qb']", &["invalid escape sequence in string"]),
        (b"['\\u12']", &["\\u12' is not a valid Unicode character"]),
        (b"['\\ud800\\u0041']", &["\\ud800 is not a valid Unicode character"]),
        (b"['\\udc00']", &["\\udc00 is not a valid Unicode character"]),
        (b"['\\uffff']", &["\\uffff is not a valid Unicode character"]),
        (b"'a\n", &["stray ''a\n'"]),
        (b"+1\n", &["stray '+'"]),
    ] {
        let expected: Vec<_> = errors.iter().map(|what| Err(format!("JSON parse error, {what}"))).collect();
        assert_eq!(read(text), expected, "{}", String::from_utf8_lossy(text));
    }
}

#[test]
fn a_reader_that_met_an_error_reads_the_next_value() {
    for junk in [&b"\xef\xbb\xbf"[..], b"\xff", b"\x01", b"{\"a\" \"b\"}", b"'half\n", b"%%%\n", b"{[(\n"] {
        let mut reader = Reader::default();
        assert!(reader.push(junk).iter().all(Result::is_err));
        let values = reader.push(b"{\"execute\":\"x\"}");
        assert_eq!(values.last(), Some(&Ok(json!({"execute": "x"}))), "{junk:?}");
    }
}

#[test]
fn depth_tokens_and_bytes_are_bounded() {
    let deep = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
    assert!(parse_one(&deep(DEPTH_MAX)).is_ok());
    assert_eq!(parse_one(&deep(DEPTH_MAX + 1)).unwrap_err().desc, "JSON nesting depth limit exceeded");

    let mut reader = Reader::default();
    let values = reader.push(&[b"[".to_vec(), b"1,".repeat(TOKENS_MAX)].concat());
    assert_eq!(values[0], Err(QmpError::generic("JSON token count limit exceeded")));

    let mut reader = Reader::default();
    reader.push(b"'");
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.extend(reader.push(&vec![b'a'; MESSAGE_BYTES_MAX / 2]));
    }
    assert_eq!(seen, [Err(QmpError::generic("JSON token size limit exceeded"))]);
    assert!(reader.held.capacity() <= 2 * MESSAGE_BYTES_MAX, "what was skipped is not kept");
}

#[test]
fn an_argument_is_exactly_one_value() {
    for (text, why) in [
        ("{\"driver\":\"x\"", "JSON parse error, premature EOI"),
        ("{} x", "Expecting at most one JSON value"),
        ("{}{}", "Expecting at most one JSON value"),
        ("", "Expecting a JSON value"),
    ] {
        assert_eq!(parse_one(text.as_bytes()).unwrap_err().desc, why, "{text}");
    }
    assert_eq!(parse_one(b" {\"a\": tru"), Err(wrong("premature EOI")));
}
