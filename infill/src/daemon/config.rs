//! `--config FILE`: the daemon's command line as a TOML file.
//!
//! Keys are the options' names without dashes. What makes something is a table, or several (`[[blockdev]]`), with the members
//! that the same QMP command takes, or a string as the option has it. Those are carried out kind by kind, each kind in its order:
//! objects, character devices, monitors, nodes, the NBD server, exports. All that is in the file is known and of the right type, or
//! the daemon does not start.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::cmdline::{Kind, Opt};

/// Bytes of a file.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// The kinds in the order in which they are carried out.
const ORDER: [Kind; 6] =
    [Kind::Object, Kind::Chardev, Kind::Monitor, Kind::Blockdev, Kind::NbdServer, Kind::Export];

/// What a file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// What is made, in order.
    pub options: Vec<Opt>,
    /// The other options with their values.
    pub others: Vec<(&'static str, String)>,
    /// The switches that are on.
    pub switches: Vec<&'static str>,
}

/// Reads the file at `path`. `others` are the options that take a value and make nothing, `switches` those without one.
pub fn read(path: &Path, others: &[&'static str], switches: &[&'static str]) -> Result<Config> {
    let context = || format!("--config {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(context)?;
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).with_context(context)?;
    ensure!(
        text.len() as u64 <= CONFIG_BYTES_MAX,
        "{}: it has more than {CONFIG_BYTES_MAX} bytes, which is the most",
        context()
    );
    parse(&text, others, switches).with_context(context)
}

fn parse(text: &str, others: &[&'static str], switches: &[&'static str]) -> Result<Config> {
    let mut file: Map<String, Value> = toml::from_str(text).map_err(|error| wrong_toml(text, &error))?;
    let mut config = Config::default();
    for kind in ORDER {
        let name = bare(kind.as_str());
        let items = match file.remove(name) {
            None => continue,
            Some(Value::Array(items)) => items,
            Some(one) => vec![one],
        };
        for item in items {
            let text = match (item, kind) {
                (Value::String(text), _) => text,
                (Value::Object(table), Kind::Chardev) => chardev(table)?,
                (Value::Object(table), _) => Value::Object(table).to_string(),
                // An object may hold a secret.
                (_, Kind::Object) => bail!("'{name}' is a table or a string"),
                (other, _) => bail!("'{name}' is a table or a string, not {other}"),
            };
            config.options.push(Opt { kind, text });
        }
    }
    for option in others {
        let name = bare(option);
        let values = match file.remove(name) {
            None => continue,
            Some(Value::Array(values)) if name == "sandbox-path" => values,
            Some(one) => vec![one],
        };
        for value in values {
            let Value::String(text) = value else { bail!("'{name}' is a string, not {value}") };
            config.others.push((option, text));
        }
    }
    for option in switches {
        match file.remove(bare(option)) {
            None | Some(Value::Bool(false)) => {}
            Some(Value::Bool(true)) => config.switches.push(option),
            Some(other) => bail!("'{}' is true or false, not {other}", bare(option)),
        }
    }
    match file.keys().next() {
        None => Ok(config),
        Some(name) => bail!("'{name}' is no option of the daemon: `infill daemon --help` lists them"),
    }
}

/// What is wrong with a file, and where. The line itself, which the error would quote, may hold a secret.
fn wrong_toml(text: &str, error: &toml::de::Error) -> anyhow::Error {
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return anyhow::anyhow!("TOML parse error: {}", error.message());
    };
    let (line, last) = (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or_default());
    let column = last.chars().count() + 1;
    anyhow::anyhow!("TOML parse error at line {line}, column {column}: {}", error.message())
}

fn bare(option: &str) -> &str {
    option.trim_start_matches('-')
}

/// A character device as its option spells it.
fn chardev(mut table: Map<String, Value>) -> Result<String> {
    let Some(Value::String(backend)) = table.remove("backend") else {
        bail!("a 'chardev' has a 'backend', which is a string: socket, stdio, ringbuf, file or null");
    };
    let mut text = backend;
    // In an order of which nothing depends, but messages.
    let mut members: Vec<_> = table.into_iter().collect();
    members.sort_by(|one, other| one.0.cmp(&other.0));
    for (key, value) in members {
        let value = match value {
            Value::String(text) => text.replace(',', ",,"),
            Value::Bool(on) => if on { "on" } else { "off" }.to_owned(),
            Value::Number(number) => number.to_string(),
            other => bail!("'{key}' of a chardev is a string, a number or true or false, not {other}"),
        };
        text.push_str(&format!(",{key}={value}"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHERS: [&str; 2] = ["--state", "--sandbox-path"];
    const SWITCHES: [&str; 1] = ["--daemonize"];

    fn read(text: &str) -> Result<Config, String> {
        parse(text, &OTHERS, &SWITCHES).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_file_is_the_command_line_in_the_order_of_the_kinds() {
        let config = read(
            r#"
            state = "/s"
            sandbox-path = ["/a", "/b"]
            daemonize = true
            export = "nbd,id=e,node-name=n"
            [[blockdev]]
            driver = "raw"
            node-name = "n"
            file = { driver = "file", filename = "/f,1" }
            [[blockdev]]
            driver = "null-co"
            node-name = "o"
            size = 4096
            [[chardev]]
            backend = "socket"
            id = "m"
            path = "/s,1"
            server = true
            wait = false
            "#,
        )
        .unwrap();
        let told: Vec<_> = config.options.iter().map(|option| (option.kind, option.text.as_str())).collect();
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(told[0], (Kind::Chardev, "socket,id=m,path=/s,,1,server=on,wait=off"));
        assert_eq!((told[1].0, told[2].0), (Kind::Blockdev, Kind::Blockdev));
        let raw = r#"{"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "/f,1"}}"#;
        assert_eq!(json(told[1].1), json(raw));
        assert_eq!(json(told[2].1)["size"], 4096);
        assert_eq!(told[3], (Kind::Export, "nbd,id=e,node-name=n"));
        let path = |text: &str| ("--sandbox-path", text.to_owned());
        assert_eq!(config.others, [("--state", "/s".to_owned()), path("/a"), path("/b")]);
        assert_eq!(config.switches, ["--daemonize"]);
    }

    #[test]
    fn what_is_not_known_or_of_a_wrong_type_is_refused_by_name() {
        for (text, why) in [
            ("stat = 1", "'stat' is no option"),
            ("state = 1", "'state' is a string, not 1"),
            ("state = ['a']", "'state' is a string"),
            ("daemonize = 'yes'", "'daemonize' is true or false"),
            ("blockdev = 7", "'blockdev' is a table or a string"),
            ("[[chardev]]\nid = 'm'", "has a 'backend'"),
            ("[[chardev]]\nbackend = 'socket'\nx = []", "'x' of a chardev"),
            ("state = \"", "TOML parse error at line 1"),
            ("state = 'a'\nstate = 'b'", "duplicate key"),
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains(why), "{text}: {told}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_quotes_no_secret_of_it() {
        for line in [
            "data = 'hush",
            "data = \"hush",
            "data = \"hush\\q\"",
            "data = hush",
            "data = 'a' hush",
            "data = 'a'hush",
            "data = 'hush'\ndata = 'hush'",
            "data 'hush'",
            "data = 0xhush",
            "data = ['hush'",
            "data = {a = 'hush'",
            "'hush",
        ] {
            let told = read(&format!("[[object]]\nqom-type = 'secret'\n{line}")).unwrap_err();
            assert!(told.contains("TOML parse error at line ") && !told.contains("hush"), "{line}: {told}");
        }
        assert!(!read("object = [['secret,id=s,data=hush']]").unwrap_err().contains("hush"));
    }
}
