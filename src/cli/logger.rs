//! Messages of the engine on stderr (`--verbose`).

use log::{LevelFilter, Log, Metadata, Record};
use putri_gguf::report::{plain, tell};

/// Targets of the engine's messages.
const ENGINE: [&str; 2] = ["ggml", "llama"];

/// Logger that writes the engine's messages to stderr, one per line.
struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        ENGINE.contains(&metadata.target())
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            tell(&format!("{}: {}", record.target(), plain(&record.args().to_string())));
        }
    }

    fn flush(&self) {}
}

/// Shows the engine's messages from now on, except its debugging output, as llama.cpp's programs do.
pub fn show_logs() {
    static STDERR: Stderr = Stderr;
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
