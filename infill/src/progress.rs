//! Progress of a job, on standard error where that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use infill_job::Job;
use infill_storage::rt;

/// How often a bar is drawn anew.
const REDRAW: Duration = Duration::from_millis(200);

/// A bar for bytes.
pub fn bytes_bar(name: &str) -> ProgressBar {
    // Drawn only on a terminal.
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template(
        "{prefix} [{bar:30}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left {msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(name.to_owned());
    bar
}

/// Draws the job's progress until it is over, and gives its outcome. What it waits for is told even where there is no
/// terminal, once.
pub async fn follow(job: &Job, quiet: bool) -> Result<(), String> {
    let bar = if quiet { ProgressBar::hidden() } else { bytes_bar(job.id()) };
    let mut told = None;
    let outcome = loop {
        let info = job.info();
        bar.set_length(info.total_progress);
        bar.set_position(info.current_progress);
        let waiting = job.block_info().and_then(|info| info.waiting_for);
        bar.set_message(waiting.as_ref().map_or_else(String::new, |why| format!("waiting: {why}")));
        if waiting != told && !quiet && bar.is_hidden() {
            match &waiting {
                Some(why) => eprintln!("infill: the {} waits: {why}", job.id()),
                None => eprintln!("infill: the {} goes on", job.id()),
            }
        }
        told = waiting;
        if let Some(outcome) = rt::timeout(REDRAW, job.wait()).await {
            break outcome;
        }
    };
    if outcome.is_ok() {
        bar.finish_and_clear();
    } else {
        bar.abandon();
    }
    outcome
}
