//! What commands answer and events tell, for the schema. Held to what is sent wherever debug assertions are on, so by
//! every test that has a daemon.

use serde_json::Value;

/// What a value looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Str,
    Int,
    Bool,
    /// Of no form that is promised.
    Any,
    Word(&'static [&'static str]),
    List(&'static Form),
    /// Its members; `*` stands before the name of those that may be absent.
    Object(&'static [(&'static str, Form)]),
}

use Form::{Any, Bool, Int, List, Object, Str, Word};

const JOB_TYPE: Form = Word(&["commit", "stream", "mirror", "backup", "create", "amend"]);

const JOB_STATUS: Form = Word(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);

/// How far a block job is.
const PROGRESS: Form =
    Object(&[("device", Str), ("len", Int), ("offset", Int), ("speed", Int), ("type", JOB_TYPE)]);

/// A property of an object.
const PROPERTY: Form = Object(&[("name", Str), ("type", Str)]);

/// A device that was opened; what else QEMU tells is of kinds that are not here.
const CHARDEV: Form = Object(&[("*pty", Str)]);

const PERMISSION: Form = Word(&["consistent-read", "write", "write-unchanged", "resize"]);

/// What events tell.
pub(crate) const EVENTS: &[(&str, Form)] = &[
    ("BLOCK_EXPORT_DELETED", Object(&[("id", Str)])),
    (
        "BLOCK_IMAGE_CORRUPTED",
        Object(&[
            ("device", Str),
            ("*node-name", Str),
            ("msg", Str),
            ("*offset", Int),
            ("*size", Int),
            ("fatal", Bool),
        ]),
    ),
    ("BLOCK_JOB_CANCELLED", PROGRESS),
    (
        "BLOCK_JOB_COMPLETED",
        Object(&[
            ("device", Str),
            ("len", Int),
            ("offset", Int),
            ("speed", Int),
            ("type", JOB_TYPE),
            ("*error", Str),
        ]),
    ),
    (
        "BLOCK_JOB_ERROR",
        Object(&[
            ("device", Str),
            ("operation", Word(&["read", "write"])),
            ("action", Word(&["ignore", "report", "stop"])),
        ]),
    ),
    ("BLOCK_JOB_PENDING", Object(&[("type", JOB_TYPE), ("id", Str)])),
    ("BLOCK_JOB_READY", PROGRESS),
    (
        "BLOCK_WRITE_THRESHOLD",
        Object(&[("node-name", Str), ("amount-exceeded", Int), ("write-threshold", Int)]),
    ),
    ("JOB_STATUS_CHANGE", Object(&[("id", Str), ("status", JOB_STATUS)])),
    ("__INFILL_HELD", Object(&[("kind", Str), ("name", Str), ("reason", Str)])),
    ("__INFILL_JOB", Object(&[("event", Str)])),
    ("__INFILL_JOB_DURABLE", Object(&[("id", Str), ("bytes", Int)])),
    (
        "__INFILL_JOB_PROGRESS",
        Object(&[
            ("device", Str),
            ("len", Int),
            ("offset", Int),
            ("speed", Int),
            ("type", JOB_TYPE),
            ("durable", Int),
            ("remaining", Int),
            ("at-risk", Int),
            ("*seconds-left", Int),
        ]),
    ),
    (
        "__INFILL_MIGRATION",
        Object(&[("migration", Str), ("side", Word(&["source", "target"])), ("state", Str), ("term", Int)]),
    ),
    ("__INFILL_READS_HELD", Object(&[("failing", Bool), ("name", Str), ("on-hold", Str)])),
    ("__INFILL_RESTORED", Object(&[("kind", Str), ("name", Str)])),
    ("__INFILL_SOURCE_BACK", Object(&[("*id", Str), ("*node-name", Str)])),
    ("__INFILL_SOURCE_LOST", Object(&[("*id", Str), ("*node-name", Str), ("reason", Str)])),
];

/// What commands answer; those that are not listed answer with an object without members.
pub(crate) const ANSWERS: &[(&str, Form)] = &[
    (
        "__infill_query-load",
        Object(&[
            ("bucket-micros", List(&Int)),
            (
                "nodes",
                List(&Object(&[
                    ("node-name", Str),
                    ("exported", Bool),
                    ("read-bytes", Int),
                    ("fill-bytes", Int),
                    ("written-bytes", Int),
                    ("populated-bytes", Int),
                    ("latencies", List(&Object(&[("kind", Str), ("micros", Int), ("counts", List(&Int))]))),
                ])),
            ),
        ]),
    ),
    ("__infill_query-state", Any),
    ("chardev-add", CHARDEV),
    ("chardev-change", CHARDEV),
    (
        "blockdev-snapshot-delete-internal-sync",
        Object(&[
            ("id", Str),
            ("name", Str),
            ("vm-state-size", Int),
            ("date-sec", Int),
            ("date-nsec", Int),
            ("vm-clock-sec", Int),
            ("vm-clock-nsec", Int),
            ("*icount", Int),
        ]),
    ),
    ("__infill_migrate", Object(&[("migration", Str)])),
    (
        "__infill_query-migrations",
        List(&Object(&[
            ("migration", Str),
            ("side", Word(&["source", "target"])),
            ("state", Str),
            ("term", Int),
            ("phase", Str),
            ("gate", Str),
            ("owner", Bool),
            ("peer", Str),
            ("peer-connected", Bool),
            ("rounds", Int),
            ("dirty-bytes", Int),
            ("missing-bytes", Int),
            (
                "disks",
                List(&Object(&[
                    ("name", Str),
                    ("epoch", Int),
                    ("bytes", Int),
                    ("filename", Str),
                    ("*residual-bytes", Int),
                ])),
            ),
            ("*error", Str),
        ])),
    ),
    ("qom-get", Any),
    ("qom-list", List(&PROPERTY)),
    ("qom-list-properties", List(&PROPERTY)),
    ("qom-list-types", List(&Object(&[("name", Str), ("*parent", Str)]))),
    ("query-block", List(&Any)),
    (
        "query-block-exports",
        List(&Object(&[
            ("id", Str),
            ("type", Word(&["nbd"])),
            ("node-name", Str),
            ("shutting-down", Bool),
            ("*__infill_held", Str),
        ])),
    ),
    (
        "query-block-jobs",
        List(&Object(&[
            ("device", Str),
            ("len", Int),
            ("offset", Int),
            ("speed", Int),
            ("type", JOB_TYPE),
            ("auto-finalize", Bool),
            ("auto-dismiss", Bool),
            ("busy", Bool),
            ("paused", Bool),
            ("ready", Bool),
            ("io-status", Word(&["ok", "failed", "nospace"])),
            ("status", JOB_STATUS),
            ("__infill_durable", Int),
            ("__infill_remaining", Int),
            ("__infill_at-risk", Int),
            ("*__infill_seconds-left", Int),
            ("*actively-synced", Bool),
            ("*error", Str),
            ("*__infill_waiting_for", Str),
        ])),
    ),
    ("query-blockstats", List(&Any)),
    ("query-chardev", List(&Object(&[("label", Str), ("filename", Str), ("frontend-open", Bool)]))),
    ("query-chardev-backends", List(&Object(&[("name", Str)]))),
    ("query-commands", List(&Object(&[("name", Str)]))),
    (
        "query-jobs",
        List(&Object(&[
            ("id", Str),
            ("type", JOB_TYPE),
            ("status", JOB_STATUS),
            ("current-progress", Int),
            ("total-progress", Int),
            ("*error", Str),
        ])),
    ),
    ("query-named-block-nodes", List(&Any)),
    ("query-qmp-schema", List(&Any)),
    (
        "query-version",
        Object(&[("qemu", Object(&[("major", Int), ("minor", Int), ("micro", Int)])), ("package", Str)]),
    ),
    ("ringbuf-read", Str),
    (
        "x-debug-query-block-graph",
        Object(&[
            (
                "nodes",
                List(&Object(&[
                    ("id", Int),
                    ("type", Word(&["block-backend", "block-job", "block-driver"])),
                    ("name", Str),
                ])),
            ),
            (
                "edges",
                List(&Object(&[
                    ("parent", Int),
                    ("child", Int),
                    ("name", Str),
                    ("perm", List(&PERMISSION)),
                    ("shared-perm", List(&PERMISSION)),
                ])),
            ),
        ]),
    ),
    ("x-debug-block-dirty-bitmap-sha256", Object(&[("sha256", Str)])),
];

/// The form of what a command answers.
pub(crate) fn answer_of(command: &str) -> Form {
    ANSWERS.iter().find(|(name, _)| *name == command).map_or(Object(&[]), |(_, form)| *form)
}

/// What of `value` is not of that form.
pub(crate) fn misfit(form: Form, value: &Value) -> Option<String> {
    match (form, value) {
        (Any, _) | (Str, Value::String(_)) | (Bool, Value::Bool(_)) => None,
        (Int, Value::Number(number)) if !number.is_f64() => None,
        (Word(words), Value::String(word)) if words.contains(&word.as_str()) => None,
        (List(form), Value::Array(items)) => items.iter().find_map(|item| misfit(*form, item)),
        (Object(members), Value::Object(object)) => {
            let known = |key: &str| members.iter().any(|(name, _)| name.trim_start_matches('*') == key);
            if let Some(key) = object.keys().find(|key| !known(key)) {
                return Some(format!("'{key}' is not in the schema"));
            }
            members.iter().find_map(|(name, form)| match object.get(name.trim_start_matches('*')) {
                Some(value) => misfit(*form, value).map(|why| format!("{name}: {why}")),
                None if name.starts_with('*') => None,
                None => Some(format!("'{name}' is absent")),
            })
        }
        (form, value) => Some(format!("{value} is not {form:?}")),
    }
}
