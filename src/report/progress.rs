//! Stage, step and time left, on stderr: a bar on a terminal, a line per step elsewhere.

use crate::pipeline::Observer;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Lines of one stage that are not printed closer together than this, off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Writes one event. That nobody reads it stops no work.
pub fn event(e: &Value) {
    let _ = writeln!(std::io::stdout(), "{e}");
}

/// Shows progress and passes on the user's wish to stop.
pub struct Progress {
    mode: Mode,
    stop: Arc<AtomicBool>,
}

enum Mode {
    Quiet,
    Bar(Option<ProgressBar>),
    /// Events as JSON objects, a line each, on stdout.
    Events {
        stage: String,
        steps: usize,
    },
    Lines {
        stage: String,
        steps: usize,
        start: Instant,
        last: Option<Instant>,
    },
}

impl Progress {
    /// Progress on stderr, or none if `quiet`. Once `stop` is true the work ends as soon as it can.
    pub fn new(quiet: bool, stop: Arc<AtomicBool>) -> Progress {
        let mode = if quiet {
            Mode::Quiet
        } else if std::io::stderr().is_terminal() {
            Mode::Bar(None)
        } else {
            Mode::Lines { stage: String::new(), steps: 0, start: Instant::now(), last: None }
        };
        Progress { mode, stop }
    }

    /// Events on stdout for a machine to read: an object per line, `{"event":"stage","stage":…,"steps":…}` and
    /// `{"event":"step","stage":…,"done":…,"steps":…,"note":…}`.
    pub fn events(stop: Arc<AtomicBool>) -> Progress {
        Progress { mode: Mode::Events { stage: String::new(), steps: 0 }, stop }
    }

    /// Takes the bar off the terminal.
    pub fn finish(&mut self) {
        if let Mode::Bar(bar) = &mut self.mode
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn stage(&mut self, name: &str, steps: usize) {
        self.finish();
        match &mut self.mode {
            Mode::Quiet => {}
            Mode::Bar(bar) => {
                let new = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
                let template = "{prefix:18} {bar:28} {pos}/{len}  {elapsed} (about {eta} left)  {msg}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    new.set_style(style);
                }
                new.set_prefix(name.to_string());
                new.enable_steady_tick(Duration::from_millis(250));
                *bar = Some(new);
            }
            Mode::Events { stage, steps: n } => {
                (*stage, *n) = (name.to_string(), steps);
                event(&json!({ "event": "stage", "stage": name, "steps": steps }));
            }
            Mode::Lines { stage, steps: n, start, last } => {
                (*stage, *n, *start, *last) = (name.to_string(), steps, Instant::now(), None);
                eprintln!("{name}");
            }
        }
    }

    fn step(&mut self, done: usize, note: &str) {
        match &mut self.mode {
            Mode::Quiet => {}
            Mode::Bar(bar) => {
                if let Some(bar) = bar {
                    bar.set_position(done as u64);
                    bar.set_message(note.to_string());
                }
            }
            Mode::Events { stage, steps } => {
                event(
                    &json!({ "event": "step", "stage": stage, "done": done, "steps": steps, "note": note }),
                );
            }
            Mode::Lines { stage, steps, start, last } => {
                // Tokens tick by the thousand; blocks and heads have something to say each time.
                if note.is_empty() && last.is_some_and(|t| t.elapsed() < LINE_EVERY) && done < *steps {
                    return;
                }
                *last = Some(Instant::now());
                let left =
                    start.elapsed().as_secs_f64() * (steps.saturating_sub(done)) as f64 / done.max(1) as f64;
                let note = if note.is_empty() { String::new() } else { format!(", {note}") };
                eprintln!("{stage} {done}/{steps}, about {left:.0} s left{note}");
            }
        }
    }

    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
