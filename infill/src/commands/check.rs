//! `infill check`. Exit codes: 0 consistent, 1 not checked, 2 corrupt, 3 leaks, 63 nothing to check.

use std::process::ExitCode;

use anyhow::Result;
use infill_nbd::OnLost;
use infill_node::{CheckReport, Repair};
use serde_json::{Map, Value, json};

use crate::args::{CheckArgs, Output, RepairArg};
use crate::blockdev::{Access, Blockdevs, FormatKind, OpenPolicy};
use crate::commands::info::json_text;
use crate::commands::run;
use crate::out::print;

/// The image is corrupt.
const EXIT_CORRUPT: u8 = 2;
/// The image has leaks and is not corrupt.
const EXIT_LEAKS: u8 = 3;
/// The format has nothing to check.
const EXIT_NO_CHECKS: u8 = 63;

/// Checks an image, and repairs it where that is asked for.
pub fn main(args: CheckArgs) -> Result<ExitCode> {
    run(move || async move {
        let repair = match args.repair {
            None => Repair::Nothing,
            Some(RepairArg::Leaks) => Repair::Leaks,
            Some(RepairArg::All) => Repair::All,
        };
        let read_only = repair == Repair::Nothing;
        let blockdevs = Blockdevs::new(OpenPolicy { on_lost: OnLost::Fail, ..OpenPolicy::default() });
        let file = blockdevs.add_protocol(&args.filename, read_only, args.force_share).await?;
        let access = if read_only { Access::Stable } else { Access::Owner };
        blockdevs.claim(&file, "the check", access)?;
        let result = check(&blockdevs, &file, args.format, repair).await;
        blockdevs.release(&file, "the check");
        let closed = blockdevs.close_all().await;
        let (format, report) = result?;
        closed?;
        let Some(report) = report else {
            eprintln!("infill: {}: the format {} has nothing to check", args.filename, format.as_str());
            return Ok(ExitCode::from(EXIT_NO_CHECKS));
        };
        for message in &report.messages {
            eprintln!("{message}");
        }
        match args.output {
            Output::Json => print(&json_text(&report_json(&args.filename, format, &report))?)?,
            Output::Human if args.quiet => {}
            Output::Human => print(&report_text(&report))?,
        }
        Ok(exit_code(&report))
    })
}

async fn check(
    blockdevs: &Blockdevs,
    file: &str,
    format: Option<FormatKind>,
    repair: Repair,
) -> Result<(FormatKind, Option<CheckReport>)> {
    let Some(storage) = blockdevs.storage(file) else { anyhow::bail!("there is nothing to check") };
    let format = match format {
        Some(format) => format,
        None => crate::blockdev::probe_storage(&storage).await?.unwrap_or(FormatKind::Raw),
    };
    let Some(mut report) = format.check(&storage, repair).await? else { return Ok((format, None)) };
    if (report.corruptions_fixed, report.leaks_fixed) != (0, 0) {
        // What is true after the repair is found out anew.
        let Some(after) = format.check(&storage, Repair::Nothing).await? else { return Ok((format, None)) };
        let mut messages = report.messages;
        messages.extend(after.messages);
        report = CheckReport {
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            messages,
            ..after
        };
    }
    Ok((format, Some(report)))
}

fn exit_code(report: &CheckReport) -> ExitCode {
    if report.corruptions > 0 {
        ExitCode::from(EXIT_CORRUPT)
    } else if report.check_errors > 0 {
        ExitCode::FAILURE
    } else if report.leaks > 0 {
        ExitCode::from(EXIT_LEAKS)
    } else {
        ExitCode::SUCCESS
    }
}

/// QEMU's `ImageCheck`.
fn report_json(filename: &str, format: FormatKind, report: &CheckReport) -> Value {
    let mut out = Map::new();
    let mut count = |key: &str, value: u64| {
        if value > 0 {
            out.insert(key.into(), json!(value));
        }
    };
    count("image-end-offset", report.image_end_offset);
    count("total-clusters", report.total_clusters);
    count("allocated-clusters", report.allocated_clusters);
    count("fragmented-clusters", report.fragmented_clusters);
    count("compressed-clusters", report.compressed_clusters);
    count("corruptions", report.corruptions);
    count("corruptions-fixed", report.corruptions_fixed);
    count("leaks", report.leaks);
    count("leaks-fixed", report.leaks_fixed);
    out.insert("check-errors".into(), json!(report.check_errors));
    out.insert("filename".into(), json!(filename));
    out.insert("format".into(), json!(format.as_str()));
    Value::Object(out)
}

fn report_text(report: &CheckReport) -> String {
    let mut out = String::new();
    if (report.corruptions_fixed, report.leaks_fixed) != (0, 0) {
        out += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        );
    }
    if (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0) {
        out += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        out += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt \
             it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        out += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        out += &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        out += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        out += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    out
}
