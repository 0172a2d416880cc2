//! The table that is printed, and medians.

use std::fmt;

/// One figure beside the competitor's.
pub struct Row {
    pub number: &'static str,
    pub workload: String,
    pub ours: String,
    pub theirs: String,
    pub ratio: String,
    pub target: &'static str,
    pub met: bool,
}

#[derive(Default)]
pub struct Table {
    rows: Vec<Row>,
    failures: Vec<String>,
}

impl Table {
    pub fn push(&mut self, row: Row) {
        eprintln!(
            "{} | {} | {} | {} | {} | {}",
            row.number, row.workload, row.ours, row.theirs, row.ratio, row.target
        );
        self.rows.push(row);
    }

    pub fn failed(&mut self, number: &str, error: &anyhow::Error) {
        self.failures.push(format!("Row {number} gave no figure: {error:#}"));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| # | workload | Infill | competitor | ratio | target | met |")?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for row in &self.rows {
            let met = if row.met { "yes" } else { "**no**" };
            let Row { number, workload, ours, theirs, ratio, target, .. } = row;
            writeln!(f, "| {number} | {workload} | {ours} | {theirs} | {ratio} | {target} | {met} |")?;
        }
        self.failures.iter().try_for_each(|failure| writeln!(f, "\n{failure}"))
    }
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value below which `percent` of them lie.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 - 1.0) * percent / 100.0).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}
