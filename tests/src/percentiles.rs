//! What a table says of many measurements.

/// Least, median, 90th and 99th percentile, most, as the cells of a row.
pub fn row(values: &[f64], digits: usize) -> String {
    [0.0, 0.5, 0.9, 0.99, 1.0].map(|p| format!("{:.digits$}", of(values, p))).join(" | ")
}

/// The value below which this part of all lies, by nearest rank.
pub fn of(values: &[f64], part: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((part * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
}
