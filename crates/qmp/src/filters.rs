//! What the filters `blkdebug` and `preallocate` take.

use infill_base::{FaultEvent, FaultyRequest, InjectError, SetState};

use crate::blockdev::{BlockdevRef, Driver, read_ref};
use crate::error::QmpError;
use crate::members::{Members, Words};

/// Rules of one `blkdebug` node at most.
const RULES_MAX: usize = 1024;
/// Largest alignment that `blkdebug` may want, in bytes.
const ALIGN_MAX: i64 = i32::MAX as i64;
/// Unit of `prealloc-align`, in bytes.
const SECTOR_BYTES: u64 = 512;

/// Options of a `blkdebug` node.
#[derive(Clone, Debug, PartialEq)]
pub struct BlkdebugOptions {
    /// Below.
    pub image: BlockdevRef,
    /// What requests are multiples of, in bytes, where that is not what the node below wants.
    pub align: Option<u32>,
    /// The largest request, in bytes, where that is not what the node below takes.
    pub max_transfer: Option<u64>,
    /// Which errors begin when.
    pub inject_error: Vec<InjectError>,
    /// Which events lead to which state.
    pub set_state: Vec<SetState>,
}

/// An event that QEMU knows.
#[derive(Clone, Copy, Debug)]
enum Event {
    Raised(FaultEvent),
    Never(&'static str),
}

macro_rules! never {
    ($($name:literal),* $(,)?) => { [$(($name, Event::Never($name))),*] };
}

/// Events that only QEMU's own format drivers and request splitting raise.
const NEVER: [(&str, Event); 40] = never![
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_backing_aio",
    "read_compressed",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
];

impl Words for Event {
    const WORDS: &'static [(&'static str, Event)] = &[
        ("none", Event::Raised(FaultEvent::None)),
        ("read_aio", Event::Raised(FaultEvent::ReadAio)),
        ("write_aio", Event::Raised(FaultEvent::WriteAio)),
        ("pwritev", Event::Raised(FaultEvent::Pwritev)),
        ("pwritev_zero", Event::Raised(FaultEvent::PwritevZero)),
        ("pwritev_done", Event::Raised(FaultEvent::PwritevDone)),
        ("flush_to_os", Event::Raised(FaultEvent::FlushToOs)),
        ("flush_to_disk", Event::Raised(FaultEvent::FlushToDisk)),
    ];

    fn of(word: &str) -> Option<&'static Event> {
        Self::WORDS.iter().chain(&NEVER).find(|(name, _)| *name == word).map(|(_, event)| event)
    }
}

impl Event {
    fn raised(self) -> Result<FaultEvent, QmpError> {
        match self {
            Event::Raised(event) => Ok(event),
            Event::Never(name) => Err(QmpError::generic(format!(
                "the event '{name}' is never raised here: a blkdebug node knows of what it does itself alone (none, read_aio, \
                 write_aio, pwritev, pwritev_zero, pwritev_done, flush_to_os, flush_to_disk); name a sector to meet \
                 metadata"
            ))),
        }
    }
}

/// A kind of request that QEMU knows.
#[derive(Clone, Copy, Debug)]
enum IoType {
    Fails(FaultyRequest),
    BlockStatus,
}

impl Words for IoType {
    const WORDS: &'static [(&'static str, IoType)] = &[
        ("read", IoType::Fails(FaultyRequest::Read)),
        ("write", IoType::Fails(FaultyRequest::Write)),
        ("write-zeroes", IoType::Fails(FaultyRequest::WriteZeroes)),
        ("discard", IoType::Fails(FaultyRequest::Discard)),
        ("flush", IoType::Fails(FaultyRequest::Flush)),
    ];

    fn of(word: &str) -> Option<&'static IoType> {
        const REFUSED: (&str, IoType) = ("block-status", IoType::BlockStatus);
        Self::WORDS.iter().chain([&REFUSED]).find(|(name, _)| *name == word).map(|(_, kind)| kind)
    }
}

/// Reads what `blkdebug` alone takes.
pub(crate) fn read_blkdebug(members: &mut Members) -> Result<Driver, QmpError> {
    let image = read_ref(members, "image")?;
    let align = members.opt_int("align")?;
    let max_transfer = members.opt_int("max-transfer")?;
    let mut refused = None;
    for name in ["opt-write-zero", "max-write-zero", "opt-discard", "max-discard"] {
        if members.opt_int(name)?.is_some_and(|value| value != 0) {
            refused.get_or_insert(unbuilt(name));
        }
    }
    for name in ["config", "take-child-perms", "unshare-child-perms"] {
        if members.has(name) {
            refused.get_or_insert(unbuilt(name));
            members.ignore(name);
        }
    }
    let errors = members.opt_objects("inject-error")?.unwrap_or_default();
    let states = members.opt_objects("set-state")?.unwrap_or_default();
    if errors.len() + states.len() > RULES_MAX {
        return Err(QmpError::generic(format!("at most {RULES_MAX} rules are taken")));
    }
    let inject_error = errors.into_iter().map(read_error).collect::<Result<_, _>>()?;
    let set_state = states.into_iter().map(read_state).collect::<Result<_, _>>()?;
    if let Some(error) = refused {
        return Err(error);
    }
    let align = match align.unwrap_or(0) {
        0 => None,
        value if !(1..=ALIGN_MAX).contains(&value) => return Err(out_of_range("align", value)),
        value => match u32::try_from(value).ok().filter(|value| value.is_power_of_two()) {
            None => return Err(QmpError::generic(format!("Cannot meet constraints with align {value}"))),
            align => align,
        },
    };
    let unit = i64::from(align.unwrap_or(1));
    let max_transfer = match max_transfer.unwrap_or(0) {
        0 => None,
        value if !(1..=ALIGN_MAX).contains(&value) => return Err(out_of_range("max-transfer", value)),
        value if value % unit != 0 => {
            return Err(QmpError::generic(format!("Cannot meet constraints with max-transfer {value}")));
        }
        value => Some(value.unsigned_abs()),
    };
    Ok(Driver::Blkdebug(Box::new(BlkdebugOptions { image, align, max_transfer, inject_error, set_state })))
}

fn unbuilt(name: &str) -> QmpError {
    QmpError::generic(format!("'{name}' of blkdebug is not supported: leave it out"))
}

fn out_of_range(name: &str, value: i64) -> QmpError {
    QmpError::generic(format!("Value '{value}' is out of range for parameter '{name}'"))
}

fn read_error(mut members: Members) -> Result<InjectError, QmpError> {
    let event: Event = members.word("event")?;
    let state = members.opt_int("state")?.unwrap_or(0);
    let kind: Option<IoType> = members.opt_word("iotype")?;
    let errno = members.opt_int("errno")?.unwrap_or(5);
    let sector = members.opt_int("sector")?;
    let once = members.opt_bool("once")?.unwrap_or(false);
    // Whether it takes a turn of a loop until the error is told.
    members.opt_bool("immediately")?;
    members.finish()?;
    let event = event.raised()?;
    let request = match kind {
        None => None,
        Some(IoType::Fails(request)) => Some(request),
        Some(IoType::BlockStatus) => {
            return Err(QmpError::generic(
                "errors of 'block-status' cannot be injected: what a filter holds is asked of the node below it",
            ));
        }
    };
    let told = i32::try_from(errno)
        .ok()
        .filter(|errno| *errno == 0 || infill_base::ErrorKind::from_errno(*errno).errno() == *errno);
    let errno = told.ok_or_else(|| {
        QmpError::generic(format!(
            "an error {errno} cannot be told to clients: use 5 (EIO), 28 (ENOSPC) or 1 (EPERM)"
        ))
    })?;
    let sector = match sector {
        // Any.
        None | Some(-1) => None,
        Some(sector) => Some(u64::try_from(sector).map_err(|_| out_of_range("sector", sector))?),
    };
    Ok(InjectError { event, state, request, errno, sector, once })
}

fn read_state(mut members: Members) -> Result<SetState, QmpError> {
    let event: Event = members.word("event")?;
    let state = members.opt_int("state")?.unwrap_or(0);
    let new_state = members.int("new_state")?;
    members.finish()?;
    Ok(SetState { event: event.raised()?, state, new_state })
}

/// Reads what `preallocate` alone takes.
pub(crate) fn read_preallocate(members: &mut Members) -> Result<Driver, QmpError> {
    let file = read_ref(members, "file")?;
    let align = members.opt_int("prealloc-align")?.unwrap_or(1 << 20);
    let size = members.opt_int("prealloc-size")?.unwrap_or(128 << 20);
    let positive = |name: &str, value: i64| u64::try_from(value).map_err(|_| out_of_range(name, value));
    let (align, size) = (positive("prealloc-align", align)?, positive("prealloc-size", size)?);
    if align == 0 || !align.is_multiple_of(SECTOR_BYTES) {
        return Err(QmpError::generic(
            "prealloc-align parameter of preallocate filter is not aligned to 512",
        ));
    }
    Ok(Driver::Preallocate { file, align, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockdevOptions;

    fn read(extra: &str) -> Result<BlkdebugOptions, String> {
        let text = format!(r#"{{"driver": "blkdebug", "image": "i"{extra}}}"#);
        match BlockdevOptions::of_argument(&text).map_err(|error| error.desc)?.driver {
            Driver::Blkdebug(options) => Ok(*options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_can_never_happen_here_is_refused_by_name() {
        for (extra, why) in [
            (r#", "inject-error": [{"event": "l2_load"}]"#, "'l2_load' is never raised"),
            (r#", "set-state": [{"event": "cor_write", "new_state": 2}]"#, "'cor_write' is never raised"),
            (r#", "inject-error": [{"event": "zz"}]"#, "does not accept value 'zz'"),
            (r#", "inject-error": [{"event": "none", "iotype": "block-status"}]"#, "'block-status'"),
            (r#", "inject-error": [{"event": "none", "errno": 71}]"#, "error 71 cannot be told"),
            (r#", "inject-error": [{"event": "none", "foo": 1}]"#, "foo' is unexpected"),
            (r#", "config": "x""#, "'config' of blkdebug"),
            (r#", "max-discard": 4096"#, "'max-discard' of blkdebug"),
            (r#", "align": 3"#, "Cannot meet constraints with align 3"),
            (r#", "align": 4096, "max-transfer": 1000"#, "Cannot meet constraints with max-transfer 1000"),
        ] {
            let error = read(extra).unwrap_err();
            assert!(error.contains(why), "{extra}: {error}");
        }
    }

    #[test]
    fn rules_are_read_with_their_defaults() {
        let options = read(r#", "align": 512, "inject-error": [{"event": "none"}]"#).unwrap();
        let rule = InjectError {
            event: FaultEvent::None,
            state: 0,
            request: None,
            errno: 5,
            sector: None,
            once: false,
        };
        assert_eq!((options.align, options.inject_error), (Some(512), vec![rule]));
    }
}
