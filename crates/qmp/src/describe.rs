//! What a reader of arguments takes, found out by letting it read.
//!
//! [`Members`] tells a [`Log`] what is taken from it, with its type, and what was missing. So a reader is run on an
//! empty object first, then again with what it missed, until it has read everything; once for every word of the members
//! that it cannot do without, since those decide what else it takes. What it took then is its [`Shape`], and cannot
//! differ from what it takes from a manager. Costs some hundred runs for the largest command.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};

use crate::error::QmpError;
use crate::members::Members;

/// Most runs of one reader.
const RUNS_MAX: usize = 20_000;

/// What strings hold, one after the other until everything is read: some are names, and some are numbers, which objects
/// within others refuse before those around them are read to the end.
const TEXTS: [&str; 2] = ["a", "1"];

/// Reads an object, all of it.
pub(crate) type Read = fn(Members) -> Result<(), QmpError>;

/// A member that is a name or an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Either {
    /// The type's name, of which there is one.
    pub kind: &'static str,
    /// Reads the object.
    pub read: Read,
    /// Whether it may be `null` as well.
    pub null: bool,
}

impl PartialEq for Either {
    fn eq(&self, other: &Either) -> bool {
        self.kind == other.kind
    }
}

/// As what a member was taken.
#[derive(Clone, Debug)]
pub(crate) enum Taken {
    /// A string.
    Str,
    /// A number without a fraction.
    Int,
    /// A switch.
    Bool,
    /// Whatever it is.
    Any,
    /// One word of these.
    Word(Vec<&'static str>),
    /// A list of words.
    Words(Vec<&'static str>),
    /// An object.
    Object,
    /// A list of objects.
    Objects,
    /// A name or an object.
    Either(Either),
    /// A list of names and objects.
    Eithers(Either),
}

impl Taken {
    /// The key of what is inside, behind the member's own.
    fn inside(&self) -> Option<&'static str> {
        match self {
            Taken::Object => Some("."),
            Taken::Objects => Some("[0]."),
            _ => None,
        }
    }

    fn sample(&self, text: &str, word: usize) -> Value {
        match self {
            Taken::Str | Taken::Either(_) => json!(text),
            Taken::Int => json!(1),
            Taken::Bool => json!(true),
            Taken::Any | Taken::Object => json!({}),
            Taken::Word(words) => json!(words.get(word)),
            Taken::Objects => json!([{}]),
            Taken::Words(_) | Taken::Eithers(_) => json!([]),
        }
    }
}

#[derive(Debug)]
enum Entry {
    Taken(String, Taken),
    Missing(String),
    Finished(String),
}

/// What was taken from an object and those in it, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Entry>>>);

impl Log {
    fn push(&self, entry: Entry) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
    }

    /// The member of that whole name was taken, or would have been.
    pub fn taken(&self, path: String, taken: Taken) {
        self.push(Entry::Taken(path, taken));
    }

    /// The member of that whole name cannot be done without.
    pub fn missing(&self, path: String) {
        self.push(Entry::Missing(path));
    }

    /// Nothing more is taken from the object whose members' names begin so.
    pub fn finished(&self, path: &str) {
        self.push(Entry::Finished(path.to_owned()));
    }
}

/// What an object holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Shape {
    pub members: Vec<Member>,
    /// Members that the word in one of them decides about.
    pub variants: Option<Variants>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Variants {
    pub tag: String,
    pub cases: Vec<(&'static str, Vec<Member>)>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Member {
    pub name: String,
    pub kind: Kind,
    pub optional: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    Str,
    Int,
    Bool,
    Any,
    Word(Vec<&'static str>),
    Words(Vec<&'static str>),
    Object(Shape),
    Objects(Shape),
    Either(Either),
    Eithers(Either),
}

/// One reading to the end.
struct Run {
    /// Which word was in each member that cannot be done without.
    words: BTreeMap<String, usize>,
    taken: Vec<(String, Taken)>,
    mandatory: BTreeSet<String>,
}

/// The shape of what `read` takes; else why it could not be found out.
pub(crate) fn describe(read: &dyn Fn(Members) -> Result<(), QmpError>) -> Result<Shape, String> {
    let (mut runs, mut waiting) = (Vec::new(), vec![BTreeMap::new()]);
    while let Some(fixed) = waiting.pop() {
        if runs.len() == RUNS_MAX {
            return Err(format!("more than {RUNS_MAX} combinations of words"));
        }
        let mut tried = TEXTS.iter().map(|text| run(read, &fixed, text));
        let first = tried.next().unwrap_or_else(|| Err("there is no text to try".into()));
        let run = first.or_else(|why| tried.find_map(Result::ok).ok_or(why))?;
        let mut fixed = fixed;
        for (path, taken) in &run.taken {
            let Taken::Word(words) = taken else { continue };
            if fixed.contains_key(path) || !run.mandatory.contains(path) {
                continue;
            }
            for at in 1..words.len() {
                let mut other = fixed.clone();
                other.insert(path.clone(), at);
                waiting.push(other);
            }
            fixed.insert(path.clone(), 0);
        }
        runs.push(run);
    }
    Ok(shape("", &runs.iter().collect::<Vec<_>>()))
}

/// Lets it read until it misses nothing and has seen the inside of every object.
fn run(
    read: &dyn Fn(Members) -> Result<(), QmpError>,
    fixed: &BTreeMap<String, usize>,
    text: &str,
) -> Result<Run, String> {
    let mut object = json!({});
    let (mut words, mut mandatory) = (fixed.clone(), BTreeSet::new());
    loop {
        let log = Log::default();
        let given = object.as_object().cloned().unwrap_or_default();
        let outcome = read(Members::logged(given, log.clone()));
        let entries = std::mem::take(&mut *log.0.lock().unwrap_or_else(PoisonError::into_inner));
        let (mut taken, mut missing, mut open) = (Vec::<(String, Taken)>::new(), None, vec![String::new()]);
        for entry in entries {
            match entry {
                Entry::Taken(path, what) => {
                    if taken.iter().all(|(known, _)| *known != path) {
                        open.extend(what.inside().map(|inside| format!("{path}{inside}")));
                        taken.push((path, what));
                    }
                }
                Entry::Missing(path) => missing = Some(path),
                Entry::Finished(path) => open.retain(|object| *object != path),
            }
        }
        let kind = |path: &str| taken.iter().find(|(known, _)| known == path).map(|(_, what)| what);
        if let Some(path) = missing {
            let what = kind(&path).ok_or_else(|| format!("'{path}' is missed and was not asked for"))?;
            let word = match what {
                Taken::Word(_) => *words.entry(path.clone()).or_insert(0),
                _ => 0,
            };
            put(&mut object, &path, what.sample(text, word));
            if !mandatory.insert(path.clone()) {
                return Err(format!("'{path}' is missed again and again"));
            }
            continue;
        }
        let unseen: Vec<_> = taken
            .iter()
            .filter(|(path, what)| what.inside().is_some() && object.pointer(&pointer(path)).is_none())
            .cloned()
            .collect();
        if unseen.is_empty() {
            return match (open.first(), outcome) {
                (Some(path), Err(error)) => Err(format!("refused before '{path}' was read whole: {error}")),
                (Some(path), Ok(())) => Err(format!("'{path}' is not read to its end")),
                (None, _) => Ok(Run { words, taken, mandatory }),
            };
        }
        for (path, what) in unseen {
            put(&mut object, &path, what.sample(text, 0));
        }
    }
}

/// Where a member is, by its whole name.
fn pointer(path: &str) -> String {
    format!("/{}", path.replace('[', "/").replace(']', "").replace('.', "/"))
}

fn put(object: &mut Value, path: &str, value: Value) {
    let pointer = pointer(path);
    let Some((around, name)) = pointer.rsplit_once('/') else { return };
    if let Some(around) = object.pointer_mut(around).and_then(Value::as_object_mut) {
        around.insert(name.to_owned(), value);
    }
}

/// The members of the object whose members' whole names begin with `prefix`.
fn direct<'a>(prefix: &str, runs: &[&'a Run]) -> Vec<(&'a str, &'a str, &'a Taken)> {
    let mut found: Vec<(&str, &str, &Taken)> = Vec::new();
    for (path, taken) in runs.iter().flat_map(|run| &run.taken) {
        let Some(name) = path.strip_prefix(prefix).filter(|name| !name.contains(['.', '['])) else {
            continue;
        };
        if found.iter().all(|(_, known, _)| *known != name) {
            found.push((path, name, taken));
        }
    }
    found
}

fn shape(prefix: &str, runs: &[&Run]) -> Shape {
    for (path, name, taken) in direct(prefix, runs) {
        let Taken::Word(words) = taken else { continue };
        if !runs.iter().all(|run| run.words.contains_key(path)) {
            continue;
        }
        let of = |at: usize| -> Vec<_> {
            runs.iter().copied().filter(|run| run.words.get(path) == Some(&at)).collect()
        };
        let mut cases: Vec<_> =
            words.iter().enumerate().map(|(at, word)| (*word, members(prefix, &of(at)))).collect();
        let Some((_, first)) = cases.first().cloned() else { continue };
        let common: Vec<_> = first
            .into_iter()
            .filter(|member| cases.iter().all(|(_, members)| members.contains(member)))
            .collect();
        for (_, members) in &mut cases {
            members.retain(|member| !common.contains(member));
        }
        if cases.iter().any(|(_, members)| !members.is_empty()) {
            let variants = Some(Variants { tag: name.to_owned(), cases });
            return Shape { members: common, variants };
        }
    }
    Shape { members: members(prefix, runs), variants: None }
}

fn members(prefix: &str, runs: &[&Run]) -> Vec<Member> {
    let one = |(path, name, taken): (&str, &str, &Taken)| {
        let inside = || {
            let taking: Vec<_> =
                runs.iter().copied().filter(|run| run.taken.iter().any(|(known, _)| known == path)).collect();
            shape(&format!("{path}{}", taken.inside().unwrap_or_default()), &taking)
        };
        let kind = match taken {
            Taken::Str => Kind::Str,
            Taken::Int => Kind::Int,
            Taken::Bool => Kind::Bool,
            Taken::Any => Kind::Any,
            Taken::Word(words) => Kind::Word(words.clone()),
            Taken::Words(words) => Kind::Words(words.clone()),
            Taken::Object => Kind::Object(inside()),
            Taken::Objects => Kind::Objects(inside()),
            Taken::Either(either) => Kind::Either(*either),
            Taken::Eithers(either) => Kind::Eithers(*either),
        };
        let optional = !runs.iter().all(|run| run.mandatory.contains(path));
        Member { name: name.to_owned(), kind, optional }
    };
    direct(prefix, runs).into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(members: &[Member]) -> Vec<String> {
        members
            .iter()
            .map(|member| format!("{}{}", member.name, if member.optional { "?" } else { "" }))
            .collect()
    }

    #[test]
    fn what_a_word_decides_about_is_found_in_objects_within_objects() {
        let shape = describe(&|members| crate::BlockdevOptions::read(members).map(drop)).unwrap();
        let variants = shape.variants.unwrap();
        assert_eq!(variants.tag, "driver");
        let case = |name: &str| {
            variants.cases.iter().find(|(word, _)| *word == name).map(|(_, members)| members.clone()).unwrap()
        };
        assert!(told(&shape.members).starts_with(&["driver".into(), "node-name?".into()]));
        assert_eq!(told(&case("snapshot-access")), ["file"]);
        let nbd = case("nbd");
        let Kind::Object(server) = &nbd[0].kind else { panic!("{:?}", nbd[0]) };
        let server = server.variants.clone().unwrap();
        assert_eq!(server.tag, "type");
        let unix = &server.cases.iter().find(|(word, _)| *word == "unix").unwrap().1;
        assert_eq!(told(unix), ["path", "tight?", "abstract?"]);
    }

    #[test]
    fn a_reader_that_refuses_before_it_has_read_everything_is_told_of() {
        let early = |mut members: Members| {
            let name = members.str("name")?;
            if name != "the one" {
                return Err(QmpError::generic("not this one"));
            }
            members.opt_bool("never seen")?;
            members.finish()
        };
        let why = describe(&early).unwrap_err();
        assert!(why.ends_with("not this one"), "{why}");
        let open = |mut members: Members| members.str("name").map(drop);
        assert_eq!(describe(&open).unwrap_err(), "'' is not read to its end");
    }

    #[test]
    fn a_member_that_only_some_readings_miss_is_optional() {
        let read = |mut members: Members| {
            let word: crate::copy::SyncMode = members.word("sync")?;
            let bitmap = members.opt_str("bitmap")?;
            if bitmap.is_none() && word == crate::copy::SyncMode::Bitmap {
                return Err(members.missing("bitmap"));
            }
            members.word::<crate::copy::CopyMode>("copy-mode")?;
            members.finish()
        };
        let shape = describe(&read).unwrap();
        assert_eq!(told(&shape.members), ["sync", "copy-mode"]);
        let cases = shape.variants.unwrap().cases;
        let of = |name: &str| told(&cases.iter().find(|(word, _)| *word == name).unwrap().1);
        assert_eq!((of("full"), of("bitmap")), (vec!["bitmap?".to_owned()], vec!["bitmap".to_owned()]));
    }
}
