//! Who may come in, by the distinguished name of their certificate: `authz-simple` and `authz-list`.

use infill_qmp::{AuthzFormat, AuthzList, AuthzRule};
use serde_json::{Value, json};

/// An object that decides it.
#[derive(Debug)]
pub enum Authz {
    /// That one alone.
    Simple(String),
    /// The first rule that matches decides.
    List(AuthzList),
}

impl Authz {
    /// Whether that one may come in.
    pub fn allows(&self, identity: &str) -> bool {
        match self {
            Authz::Simple(wanted) => wanted == identity,
            Authz::List(list) => {
                let rule = list.rules.iter().find(|rule| matches(rule, identity));
                rule.map_or(list.allows, |rule| rule.allows)
            }
        }
    }

    /// A property of the object, if it has one of that name.
    pub fn property(&self, name: &str) -> Option<Value> {
        match (self, name) {
            (Authz::Simple(identity), "identity") => Some(json!(identity)),
            (Authz::List(list), "policy") => Some(json!(policy(list.allows))),
            (Authz::List(list), "rules") => Some(list.rules.iter().map(told).collect()),
            _ => None,
        }
    }
}

const fn policy(allows: bool) -> &'static str {
    if allows { "allow" } else { "deny" }
}

fn told(rule: &AuthzRule) -> Value {
    let mut out = json!({ "match": rule.matches, "policy": policy(rule.allows) });
    match rule.format {
        Some(AuthzFormat::Exact) => out["format"] = json!("exact"),
        Some(AuthzFormat::Glob) => out["format"] = json!("glob"),
        None => {}
    }
    out
}

fn matches(rule: &AuthzRule, identity: &str) -> bool {
    match rule.format {
        Some(AuthzFormat::Glob) => is_like(&rule.matches, identity),
        Some(AuthzFormat::Exact) | None => rule.matches == identity,
    }
}

/// Whether a pattern, in which `*` stands for anything and `?` for one character, fits all of `text`.
fn is_like(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.chars().collect::<Vec<_>>(), text.chars().collect::<Vec<_>>());
    let (mut at, mut next) = (0, 0);
    // Behind the last star, and where what it stands for ends so far.
    let mut star = None;
    while next < text.len() {
        match pattern.get(at) {
            Some('*') => {
                at += 1;
                star = Some((at, next));
            }
            Some(char) if *char == '?' || *char == text[next] => (at, next) = (at + 1, next + 1),
            _ => {
                let Some((behind, end)) = star else { return false };
                star = Some((behind, end + 1));
                (at, next) = (behind, end + 1);
            }
        }
    }
    pattern[at..].iter().all(|char| *char == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_the_whole_name() {
        for (pattern, text, fits) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "anything", true),
            ("CN=*", "CN=a,O=b", true),
            ("CN=*,O=b", "CN=a,O=b,O=b", true),
            ("CN=*,O=b", "CN=a,O=c", false),
            ("CN=*", "O=b,CN=a", false),
            ("CN=?", "CN=ü", true),
            ("CN=?", "CN=", false),
            ("CN=?", "CN=ab", false),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbxcx", false),
            ("[a]", "a", false),
            ("\\*", "\\x", true),
        ] {
            assert_eq!(is_like(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rule = |matches: &str, allows, format| AuthzRule { matches: matches.into(), allows, format };
        let rules = vec![
            rule("CN=a", false, None),
            rule("CN=*", true, Some(AuthzFormat::Glob)),
            rule("O=*", true, Some(AuthzFormat::Exact)),
        ];
        let list = Authz::List(AuthzList { allows: false, rules });
        let allowed = ["CN=a", "CN=b", "O=b", "O=*", ""].map(|identity| list.allows(identity));
        assert_eq!(allowed, [false, true, false, true, false]);
        assert!(Authz::List(AuthzList { allows: true, rules: Vec::new() }).allows("x"));
        let simple = Authz::Simple("CN=a".into());
        assert_eq!(
            ["CN=a", "CN=A", "CN=a,O=b", ""].map(|name| simple.allows(name)),
            [true, false, false, false]
        );
    }
}
