//! Stage, step and time left, on stderr: a bar on a terminal, a line per step elsewhere.
//!
//! A failed write (the reader is gone, the disk is full) never ends a run.

use super::remaining::{Left, Remaining};
use crate::pipeline::{Observer, PlannedStage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest time between two lines without a note in one stage.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Note of a block that was loaded from an earlier run (`pipeline::stages::blocks`).
const RESUMED: &str = "from before";

/// Writes a line to stderr. A failed write is ignored.
pub fn tell(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes one event as a line to stdout. A failed write is ignored.
pub fn event(e: &Value) {
    let _ = std::io::stdout().write_all(format!("{e}\n").as_bytes());
}

/// Observer that shows progress and passes on the user's request to stop.
pub struct Progress {
    mode: Mode,
    stop: Arc<AtomicBool>,
    start: Instant,
    remaining: Remaining,
    /// Name of the stage as announced.
    stage: String,
    steps: usize,
}

enum Mode {
    Quiet,
    Bar {
        bar: Option<ProgressBar>,
        countdown: Countdown,
    },
    /// JSON objects on stdout, one per line.
    Events,
    /// Lines on stderr, with the time of the last line of this stage.
    Lines(Option<Instant>),
}

impl Progress {
    /// Progress on stderr, or none if `quiet`. Once `stop` is true, the work ends as soon as possible.
    pub fn new(quiet: bool, stop: Arc<AtomicBool>) -> Progress {
        let mode = if quiet {
            Mode::Quiet
        } else if !ProgressDrawTarget::stderr().is_hidden() {
            // A bar is not drawn off a terminal, or on one that cannot move its cursor.
            Mode::Bar { bar: None, countdown: Countdown::new() }
        } else {
            Mode::Lines(None)
        };
        Progress::of(mode, stop)
    }

    /// Events on stdout for other programs, one object per line: `{"event":"stage","stage":…,"steps":…}` and
    /// `{"event":"step","stage":…,"done":…,"steps":…,"note":…}`.
    /// A step also holds the time left if it is known: `seconds_left` for the stage, and `run_seconds_left`
    /// for the run, or `result_seconds_left` for the present result if the number of results is not known.
    pub fn events(stop: Arc<AtomicBool>) -> Progress {
        Progress::of(Mode::Events, stop)
    }

    fn of(mode: Mode, stop: Arc<AtomicBool>) -> Progress {
        let (start, remaining) = (Instant::now(), Remaining::default());
        Progress { mode, stop, start, remaining, stage: String::new(), steps: 0 }
    }

    /// Removes the bar from the terminal.
    pub fn finish(&mut self) {
        if let Mode::Bar { bar, .. } = &mut self.mode
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn plan(&mut self, stages: &[PlannedStage], whole: bool) {
        self.remaining.plan(self.start.elapsed(), stages, whole);
    }

    fn stage(&mut self, name: &str, steps: usize) {
        self.finish();
        let now = self.start.elapsed();
        self.remaining.stage(now, name, steps);
        (self.stage, self.steps) = (name.to_string(), steps);
        match &mut self.mode {
            Mode::Quiet => {}
            Mode::Bar { bar, countdown } => {
                countdown.set(self.remaining.left(now));
                *bar = Some(new_bar(name, steps, countdown.clone()));
            }
            Mode::Events => event(&json!({ "event": "stage", "stage": name, "steps": steps })),
            Mode::Lines(last) => {
                *last = None;
                tell(name);
            }
        }
    }

    fn step(&mut self, done: usize, note: &str) {
        let now = self.start.elapsed();
        self.remaining.step(now, done, note == RESUMED);
        match &mut self.mode {
            Mode::Quiet => {}
            Mode::Bar { bar, countdown } => {
                countdown.set(self.remaining.left(now));
                if let Some(bar) = bar {
                    bar.set_position(done as u64);
                    bar.set_message(note.to_string());
                }
            }
            Mode::Events => event(&step_event(&self.stage, done, self.steps, note, self.remaining.left(now))),
            Mode::Lines(last) => {
                // Steps of tokens come by the thousand without a note; blocks and heads have a note each
                // time.
                if note.is_empty() && last.is_some_and(|t| t.elapsed() < LINE_EVERY) && done < self.steps {
                    return;
                }
                *last = Some(Instant::now());
                tell(&step_line(&self.stage, done, self.steps, note, self.remaining.left(now)));
            }
        }
    }

    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn end_stage(&mut self) -> bool {
        tell(&format!("{} ends here; Ctrl-C again ends the run", self.stage));
        self.stop.store(false, Ordering::Relaxed);
        true
    }
}

/// One line of progress.
fn step_line(stage: &str, done: usize, steps: usize, note: &str, left: Left) -> String {
    let left = left.text("whole run", "this result");
    let note = if note.is_empty() { String::new() } else { format!(", {note}") };
    format!("{stage} {done}/{steps}{left}{note}")
}

/// Step as an event. Times are in seconds, with one decimal.
fn step_event(stage: &str, done: usize, steps: usize, note: &str, left: Left) -> Value {
    let mut e = json!({ "event": "step", "stage": stage, "done": done, "steps": steps, "note": note });
    let run = if left.whole { "run_seconds_left" } else { "result_seconds_left" };
    for (key, left) in [("seconds_left", left.stage), (run, left.run)] {
        if let Some(left) = left {
            e[key] = json!((left.as_secs_f64() * 10.0).round() / 10.0);
        }
    }
    e
}

/// Bar for one stage. indicatif ignores errors when it draws.
fn new_bar(name: &str, steps: usize, countdown: Countdown) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
    let template = "{prefix:18} {bar:14} {pos}/{len}  {elapsed}{left}  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        // Between reports, the time counts down.
        let style = style.with_key("left", move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&countdown.left().text("run", "result"));
        });
        bar.set_style(style);
    }
    bar.set_prefix(name.to_string());
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// Last estimate and its time, shared with the thread that draws the bar between steps.
#[derive(Clone)]
struct Countdown(Arc<Mutex<(Instant, Left)>>);

impl Countdown {
    fn new() -> Countdown {
        Countdown(Arc::new(Mutex::new((Instant::now(), Left::default()))))
    }

    fn set(&self, left: Left) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), left);
    }

    fn left(&self) -> Left {
        let (at, left) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.after(at.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(whole: bool) -> Left {
        Left { stage: Some(Duration::from_secs(100)), run: Some(Duration::from_millis(360_040)), whole }
    }

    #[test]
    fn lines_hold_the_time_left_of_stage_and_run() {
        assert_eq!(
            step_line("blocks", 3, 30, "2 of 4 heads", left(true)),
            "blocks 3/30, about 1 min 40 s left (whole run about 6 min), 2 of 4 heads"
        );
        assert_eq!(step_line("blocks", 0, 30, "", Left::default()), "blocks 0/30");
    }

    #[test]
    fn events_hold_the_times_that_are_known() {
        let known = step_event("blocks", 3, 30, "", left(true));
        assert_eq!(
            known,
            json!({
                "event": "step", "stage": "blocks", "done": 3, "steps": 30, "note": "",
                "seconds_left": 100.0, "run_seconds_left": 360.0
            })
        );
        let part = step_event("blocks", 3, 30, "", left(false));
        assert_eq!((&part["result_seconds_left"], part.get("run_seconds_left")), (&json!(360.0), None));
        let unknown = step_event("blocks", 3, 30, "", Left::default());
        assert_eq!(unknown.as_object().map(serde_json::Map::len), Some(5));
    }

    #[test]
    fn a_bar_counts_down_between_steps() {
        let at = Left { run: None, ..left(true) };
        assert_eq!(at.after(Duration::from_secs(60)).text("run", "result"), ", about 40 s left");
        assert_eq!(at.after(Duration::from_secs(600)).text("run", "result"), "");
    }
}
