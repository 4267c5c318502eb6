//! Medians, ratios, and the table.

use std::time::Duration;

/// One line: what was measured, the yardstick's samples and Dyad's.
pub struct Row {
    /// What.
    pub what: String,
    /// Its unit.
    pub unit: &'static str,
    /// What Dyad is measured against.
    pub against: &'static str,
    /// The yardstick's samples.
    pub yardstick: Vec<f64>,
    /// Dyad's samples.
    pub dyad: Vec<f64>,
}

/// A duration as a sample, in milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The middle sample (the mean of the two middle ones); NaN of none.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
    }
}

impl Row {
    /// How many samples the line stands on; an aim is no sample.
    fn count(&self) -> usize {
        match self.yardstick.len() {
            0 | 1 => self.dyad.len(),
            length => self.dyad.len().min(length),
        }
    }
}

/// Small figures keep what they say.
fn figure(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

/// A Markdown table.
pub fn render(rows: &[Row]) -> String {
    let mut out = String::from(
        "| measured | against | median | Dyad, median | ratio | n |\n|---|---|---:|---:|---:|---:|\n",
    );
    for row in rows {
        let (yardstick, dyad) = (median(&row.yardstick), median(&row.dyad));
        out.push_str(&format!(
            "| {} | {} | {} {unit} | {} {unit} | {:.2} | {} |\n",
            row.what,
            row.against,
            figure(yardstick),
            figure(dyad),
            dyad / yardstick,
            row.count(),
            unit = row.unit,
        ));
    }
    out
}
