//! Limits of a `throttle-group`, as `object-add` and `qom-set` give them and `qom-get` tells them.

use infill_base::{ThrottleKind, ThrottleLimits};
use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::members::Members;

/// Longest burst, in seconds.
const LENGTH_MAX: i64 = u32::MAX as i64;

/// Reads what a `throttle-group` takes: `limits`, and the same members by themselves behind `x-`. What is of the right type and
/// still makes no sense is refused in the inner result.
pub(crate) fn read_group(members: &mut Members) -> Result<Result<ThrottleLimits, QmpError>, QmpError> {
    let mut change = Change { limits: ThrottleLimits::default(), refused: None };
    if let Some(mut given) = members.opt_object("limits")? {
        change.read(&mut given, "")?;
        given.finish()?;
    }
    change.read(members, "x-")?;
    Ok(change.checked())
}

/// Reads `limits` alone (`qom-set`): what it does not name stays as it is in `now`.
pub fn read_limits(now: &ThrottleLimits, mut given: Members) -> Result<ThrottleLimits, QmpError> {
    let mut change = Change { limits: *now, refused: None };
    change.read(&mut given, "")?;
    given.finish()?;
    change.checked()
}

/// All limits, as `qom-get` tells them.
pub fn limits_value(limits: &ThrottleLimits) -> Value {
    let mut out = Map::new();
    for kind in ThrottleKind::ALL {
        let (name, rate) = (kind.as_str(), limits.rate(kind));
        out.insert(name.to_owned(), rate.average.into());
        out.insert(format!("{name}-max"), rate.max.into());
        out.insert(format!("{name}-max-length"), rate.max_length.into());
    }
    out.insert("iops-size".to_owned(), limits.iops_size.into());
    Value::Object(out)
}

/// Limits that are being changed.
struct Change {
    limits: ThrottleLimits,
    /// Why they make no sense.
    refused: Option<QmpError>,
}

impl Change {
    fn checked(self) -> Result<ThrottleLimits, QmpError> {
        match self.refused {
            Some(error) => Err(error),
            None => self.limits.check().map(|()| self.limits).map_err(QmpError::generic),
        }
    }

    fn read(&mut self, given: &mut Members, prefix: &str) -> Result<(), QmpError> {
        for kind in ThrottleKind::ALL {
            let name = kind.as_str();
            let average = self.number(given, format!("{prefix}{name}"), i64::MAX)?;
            let max = self.number(given, format!("{prefix}{name}-max"), i64::MAX)?;
            let length = self.number(given, format!("{prefix}{name}-max-length"), LENGTH_MAX)?;
            let rate = self.limits.rate_mut(kind);
            rate.average = average.unwrap_or(rate.average);
            rate.max = max.unwrap_or(rate.max);
            rate.max_length = length.unwrap_or(rate.max_length);
        }
        let size = self.number(given, format!("{prefix}iops-size"), i64::MAX)?;
        self.limits.iops_size = size.unwrap_or(self.limits.iops_size);
        Ok(())
    }

    fn number(&mut self, given: &mut Members, name: String, most: i64) -> Result<Option<u64>, QmpError> {
        let Some(value) = given.opt_int(&name)? else { return Ok(None) };
        // QEMU's words, with their slips; without the prefix a negative number is a very large one.
        let alone = name.starts_with("x-");
        let why = if alone && value < 0 {
            "Property values cannot be negative".to_owned()
        } else if value > most {
            let range = if alone { "therange" } else { "the range" };
            format!("{name} value must be in {range} [0, {most}]")
        } else {
            return Ok(Some(value.cast_unsigned()));
        };
        self.refused.get_or_insert(QmpError::generic(why));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(text: &str) -> Members {
        Members::of_argument(text, None).unwrap()
    }

    #[test]
    fn what_is_not_named_stays_as_it_is_and_all_is_told() {
        let now = read_group(&mut members(
            r#"{"limits": {"iops-total": 10, "bps-read": 7}, "x-iops-total-max": 20}"#,
        ))
        .unwrap()
        .unwrap();
        let set =
            read_limits(&now, members(r#"{"iops-total-max": 30, "iops-total-max-length": 2}"#)).unwrap();
        let told = limits_value(&set);
        for (name, value) in
            [("iops-total", 10), ("iops-total-max", 30), ("iops-total-max-length", 2), ("bps-read", 7)]
        {
            assert_eq!(told[name], value, "{name}");
        }
        assert_eq!(told["bps-write-max-length"], 1);
        assert_eq!(told.as_object().unwrap().len(), 19);
        let dotted = read_group(&mut members("limits.iops-total=10,limits.bps-read=7,x-iops-total-max=20"));
        assert_eq!(dotted.unwrap().unwrap(), now);
    }
}
