//! How far a pull is: a bar for each layer on a terminal, a line for each elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::oci::Blob;

const STYLE: &str = "{prefix:12} [{bar:30}] {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>12} {msg}";

pub struct Progress {
    bars: MultiProgress,
    line: fn(&str),
}

/// One layer; a config has none.
pub struct LayerBar {
    bar: Option<ProgressBar>,
    line: fn(&str),
    name: String,
    size: u64,
}

impl Progress {
    /// `line` is called with what is worth a line.
    pub fn new(line: fn(&str)) -> Self {
        // Draws on standard error, and only if that is a terminal.
        Self { bars: MultiProgress::new(), line }
    }

    pub fn line(&self, text: &str) {
        self.bars.suspend(|| (self.line)(text));
    }

    pub fn layer(&self, blob: Blob) -> LayerBar {
        let name: String = blob.digest.hex().chars().take(12).collect();
        let bar = (!self.bars.is_hidden()).then(|| {
            let bar = self.bars.add(ProgressBar::new(blob.size).with_prefix(name.clone()));
            let style = ProgressStyle::with_template(STYLE);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        LayerBar { bar, line: self.line, name, size: blob.size }
    }
}

impl LayerBar {
    pub fn none() -> Self {
        Self { bar: None, line: |_| {}, name: String::new(), size: 0 }
    }

    /// So many bytes are there.
    pub fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    pub fn done(&self, how: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.size);
                bar.finish_with_message(how.to_string());
            }
            None => (self.line)(&format!(
                "layer {} {how} ({:.1} MB)",
                self.name,
                self.size as f64 / 1e6
            )),
        }
    }
}
