//! Points at which a daemon under test ends itself, before and after each step of a driver.
//!
//! `INFILL_CRASH_AT` names one: the side, the step, and `before` or `after`, as in `source record handed_over after` or
//! `target send accepted before`, with `#2` behind it for the second time that it is reached. Only a build with debug
//! assertions has them: a released daemon does not look at the variable.

use infill_migrate::{Outgoing, Record, SourceAction, TargetAction};

/// A step that may be named.
pub(super) struct Point(Option<String>);

impl Point {
    pub(super) fn of_source(action: &SourceAction) -> Point {
        Point::named("source", || match action {
            SourceAction::Persist(pending) => record(pending.record()),
            SourceAction::Send(message) => send(message),
            SourceAction::Drain(_) => "drain".into(),
            SourceAction::SetFence => "fence".into(),
            SourceAction::Seal => "seal".into(),
            SourceAction::Thaw => "thaw".into(),
            SourceAction::Release => "release".into(),
            _ => "other".into(),
        })
    }

    pub(super) fn of_target(action: &TargetAction) -> Point {
        Point::named("target", || match action {
            TargetAction::Persist(pending) => record(pending.record()),
            TargetAction::Send(message) => send(message),
            TargetAction::Demote(_) => "demote".into(),
            TargetAction::Own => "own".into(),
            TargetAction::DropOverlay => "drop".into(),
            _ => "other".into(),
        })
    }

    fn named(side: &str, step: impl FnOnce() -> String) -> Point {
        Point(is_armed().then(|| format!("{side} {}", step())))
    }

    /// It is about to be carried out.
    pub(super) fn before(&self) {
        self.reach("before");
    }

    /// It was carried out.
    pub(super) fn after(&self) {
        self.reach("after");
    }

    fn reach(&self, when: &str) {
        if let Some(step) = &self.0 {
            reached(&format!("{step} {when}"));
        }
    }
}

fn record(record: &Record) -> String {
    format!("record {}", super::state_word(record.state()))
}

fn send(message: &Outgoing) -> String {
    let body = serde_json::to_value(&message.message().body).unwrap_or_default();
    let kind = body.as_str().map(str::to_owned);
    let kind = kind.or_else(|| body.as_object().and_then(|body| body.keys().next().cloned()));
    format!("send {}", kind.unwrap_or_default())
}

#[cfg(not(debug_assertions))]
fn is_armed() -> bool {
    false
}

#[cfg(not(debug_assertions))]
fn reached(_point: &str) {}

#[cfg(debug_assertions)]
use armed::{is_armed, reached};

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static ARMED: OnceLock<Option<(String, AtomicU32)>> = OnceLock::new();

    fn armed() -> Option<&'static (String, AtomicU32)> {
        let read = || {
            let asked = std::env::var("INFILL_CRASH_AT").ok()?;
            let (name, nth) = asked.split_once('#').unwrap_or((&asked, "1"));
            Some((name.to_owned(), AtomicU32::new(nth.parse().unwrap_or(1))))
        };
        ARMED.get_or_init(read).as_ref()
    }

    pub(super) fn is_armed() -> bool {
        armed().is_some()
    }

    pub(super) fn reached(point: &str) {
        if let Some((name, left)) = armed()
            && name == point
            && left.fetch_sub(1, Ordering::SeqCst) == 1
        {
            // As a kill does: nothing is tidied up.
            std::process::abort();
        }
    }
}
