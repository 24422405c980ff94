//! Estimate of the time left, for the running stage and for the whole run. No clock is read here: callers
//! pass the time since the start.

use crate::pipeline::PlannedStage;
use std::time::Duration;

/// Estimator of the time left, from the planned work of each stage and the time of finished work.
#[derive(Default)]
pub(super) struct Remaining {
    /// Planned stages that have not begun.
    ahead: Vec<PlannedStage>,
    /// Whether a plan was announced, and whether it covers the whole run.
    planned: bool,
    whole: bool,
    running: Option<Running>,
    /// Finished work of compute-bound stages and of bandwidth-bound ones.
    measured: [Measured; 2],
}

/// Work, and the seconds that it took.
#[derive(Clone, Copy, Default)]
struct Measured {
    work: f64,
    seconds: f64,
}

impl Measured {
    fn rate(self) -> Option<f64> {
        (self.work > 0.0 && self.seconds > 0.0).then(|| self.work / self.seconds)
    }
}

/// Running stage. Times are in seconds since the start of the run.
struct Running {
    planned: Option<PlannedStage>,
    steps: usize,
    /// Number of steps that are done, and the time of the last report.
    done: usize,
    at: f64,
    /// Steps and time from which the pace is measured. Steps loaded from an earlier run took no time.
    from: (usize, f64),
}

impl Running {
    fn share(&self, steps: usize) -> f64 {
        (steps as f64 / self.steps.max(1) as f64).min(1.0)
    }

    /// Seconds left at the stage's own pace, if a step was measured.
    fn left(&self, now: f64) -> Option<f64> {
        let n = self.done.checked_sub(self.from.0).filter(|n| *n > 0)?;
        let per_step = (self.at - self.from.1) / n as f64;
        Some((per_step * self.steps.saturating_sub(self.done) as f64 - (now - self.at)).max(0.0))
    }

    /// Measurement of a planned stage of which `share` was done until `until`.
    fn measured(&self, share: f64, until: f64) -> Option<(bool, Measured)> {
        let stage = self.planned.filter(|_| share > 0.0)?;
        let seconds = (until - self.from.1).max(0.0);
        Some((stage.bandwidth_bound, Measured { work: stage.work * share, seconds }))
    }

    fn measured_share(&self) -> f64 {
        self.share(self.done) - self.share(self.from.0)
    }
}

impl Remaining {
    /// Replaces the planned stages, and keeps the measurements. `whole` says whether nothing follows them.
    pub(super) fn plan(&mut self, now: Duration, stages: &[PlannedStage], whole: bool) {
        self.end(now.as_secs_f64());
        let counts = |s: &&PlannedStage| s.work.is_finite() && s.work > 0.0;
        self.ahead = stages.iter().filter(counts).copied().collect();
        (self.planned, self.whole) = (!self.ahead.is_empty(), whole);
    }

    /// Starts a stage.
    /// Planned stages before it are skipped without effect on the rates. A stage that is not planned counts
    /// only while it runs.
    pub(super) fn stage(&mut self, now: Duration, name: &str, steps: usize) {
        let now = now.as_secs_f64();
        self.end(now);
        let found = self.ahead.iter().position(|s| s.name == name);
        let planned = found.and_then(|i| self.ahead.drain(..=i).next_back());
        self.running = Some(Running { planned, steps, done: 0, at: now, from: (0, now) });
    }

    /// Records that `done` steps are done. `resumed` says that they were loaded from an earlier run.
    pub(super) fn step(&mut self, now: Duration, done: usize, resumed: bool) {
        let now = now.as_secs_f64();
        let Some(r) = &mut self.running else { return };
        // The first report of a resumed stage counts the steps of the earlier run. That of generated text
        // comes together with the stage.
        if resumed || (r.done == 0 && done > 1) {
            r.from = (done, now);
        }
        (r.done, r.at) = (done, now);
    }

    /// Time left, if it is known.
    pub(super) fn left(&self, now: Duration) -> Left {
        let now = now.as_secs_f64();
        let stage = self.running.as_ref().and_then(|r| r.left(now));
        let duration = |seconds: Option<f64>| Duration::try_from_secs_f64(seconds?).ok();
        Left { stage: duration(stage), run: duration(self.run_left(now)), whole: self.whole }
    }

    fn run_left(&self, now: f64) -> Option<f64> {
        if !self.planned {
            return None;
        }
        let planned = |r: &Running| {
            let stage = r.planned?;
            let seconds = stage.work * (1.0 - r.share(r.done)) / self.rate(stage.bandwidth_bound)?;
            Some((seconds - (now - r.at)).max(0.0))
        };
        let own = match &self.running {
            None => 0.0,
            Some(r) => match r.left(now).or_else(|| planned(r)) {
                Some(seconds) => seconds,
                None if r.planned.is_some() || self.ahead.is_empty() => return None,
                None => 0.0,
            },
        };
        let seconds = |s: &PlannedStage| Some(s.work / self.rate(s.bandwidth_bound)?);
        let ahead: Option<f64> = self.ahead.iter().map(seconds).sum();
        Some(own + ahead?)
    }

    /// Work per second of compute-bound or of bandwidth-bound stages. Without a measurement of one kind, it
    /// is the rate of the other.
    fn rate(&self, bandwidth_bound: bool) -> Option<f64> {
        let running = self.running.as_ref().and_then(|r| r.measured(r.measured_share(), r.at));
        let of = |bound: bool| {
            let mut all = self.measured[usize::from(bound)];
            if let Some((_, m)) = running.filter(|(b, _)| *b == bound) {
                all = Measured { work: all.work + m.work, seconds: all.seconds + m.seconds };
            }
            all.rate()
        };
        of(bandwidth_bound).or_else(|| of(!bandwidth_bound))
    }

    fn end(&mut self, now: f64) {
        let Some(r) = self.running.take() else { return };
        // Stages of one step may end without a report.
        let share = if r.steps <= 1 && r.done == 0 { 1.0 } else { r.measured_share() };
        let until = if r.done >= r.steps { r.at } else { now };
        if let Some((bound, m)) = r.measured(share, until) {
            let all = &mut self.measured[usize::from(bound)];
            *all = Measured { work: all.work + m.work, seconds: all.seconds + m.seconds };
        }
    }
}

/// Time left at one moment; `None` if it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Left {
    /// Time left for the running stage.
    pub(super) stage: Option<Duration>,
    /// Time left for the run, or for the present result if the plan does not cover the whole run.
    pub(super) run: Option<Duration>,
    pub(super) whole: bool,
}

impl Left {
    /// Time left after `passed` has passed.
    pub(super) fn after(self, passed: Duration) -> Left {
        let less = |left: Option<Duration>| left.map(|d| d.saturating_sub(passed));
        Left { stage: less(self.stage), run: less(self.run), ..self }
    }

    /// Text after the steps, such as `, about 1 min 40 s left (whole run about 6 min)`; empty if no time is
    /// known or left.
    /// `run` and `result` are the words for the whole run and for the present result.
    pub(super) fn text(self, run: &str, result: &str) -> String {
        let shown = |left: Option<Duration>| left.filter(|d| d.as_secs_f64() >= 0.5).map(spelled);
        let what = if self.whole { run } else { result };
        match (shown(self.stage), shown(self.run)) {
            (Some(stage), Some(run)) => format!(", about {stage} left ({what} about {run})"),
            (Some(stage), None) => format!(", about {stage} left"),
            (None, Some(run)) => format!(", {what} about {run} left"),
            (None, None) => String::new(),
        }
    }
}

/// Rounded duration for people: `45 s`, `3 min 20 s`, `12 min`, `2 h 05 min`.
pub(super) fn spelled(d: Duration) -> String {
    let seconds = d.as_secs_f64();
    let rounded = |unit: f64| (seconds / unit).round() as u64;
    if rounded(1.0) < 60 {
        return format!("{} s", rounded(1.0));
    }
    let tens = rounded(10.0);
    if tens < 60 {
        let (minutes, rest) = (tens / 6, tens % 6 * 10);
        return if rest == 0 { format!("{minutes} min") } else { format!("{minutes} min {rest} s") };
    }
    let minutes = rounded(60.0);
    if minutes < 60 {
        format!("{minutes} min")
    } else {
        format!("{} h {:02} min", minutes / 60, minutes % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &'static str, work: f64) -> PlannedStage {
        PlannedStage { name, work, bandwidth_bound: false }
    }

    fn secs(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    /// Seconds left of the stage and of the run at `now`.
    fn left(r: &Remaining, now: f64) -> [Option<f64>; 2] {
        let left = r.left(secs(now));
        [left.stage, left.run].map(|d| d.map(|d| (d.as_secs_f64() * 1e6).round() / 1e6))
    }

    fn planned(stages: &[PlannedStage]) -> Remaining {
        let mut r = Remaining::default();
        r.plan(secs(0.0), stages, true);
        r
    }

    #[test]
    fn nothing_is_said_before_anything_is_measured() {
        assert_eq!(left(&Remaining::default(), 5.0), [None, None]);
        let mut r = planned(&[stage("heads", 10.0), stage("blocks", 20.0)]);
        assert_eq!(left(&r, 0.0), [None, None]);
        r.stage(secs(1.0), "heads", 4);
        assert_eq!(left(&r, 9.0), [None, None]);
        // Without a plan, the stage's own time is still known.
        let mut r = Remaining::default();
        r.stage(secs(0.0), "text", 4);
        r.step(secs(2.0), 1, false);
        assert_eq!(left(&r, 2.0), [Some(6.0), None]);
    }

    #[test]
    fn what_was_measured_sets_the_rate_of_what_is_ahead() {
        let mut r = planned(&[stage("heads", 10.0), stage("blocks", 20.0), stage("tune", 30.0)]);
        r.stage(secs(0.0), "heads", 5);
        // Two units of work in one second.
        r.step(secs(1.0), 1, false);
        assert_eq!(left(&r, 1.0), [Some(4.0), Some(4.0 + 25.0)]);
        // Time passes between reports.
        assert_eq!(left(&r, 1.5), [Some(3.5), Some(3.5 + 25.0)]);
        r.step(secs(5.0), 5, false);
        r.stage(secs(5.0), "blocks", 10);
        assert_eq!(left(&r, 5.0), [None, Some(10.0 + 15.0)]);
        assert_eq!(left(&r, 8.0), [None, Some(7.0 + 15.0)]);
        // Ten times slower than planned: the stage's remainder follows its own pace, the rest the rate of
        // all.
        r.step(secs(15.0), 1, false);
        let rate = 12.0 / 15.0;
        assert_eq!(left(&r, 15.0), [Some(90.0), Some(90.0 + 30.0 / rate)]);
    }

    #[test]
    fn skipped_stages_and_resumed_steps_leave_the_rate_as_it_is() {
        let mut r = planned(&[stage("heads", 1000.0), stage("widths", 500.0), stage("blocks", 30.0)]);
        r.stage(secs(0.0), "blocks", 30);
        for il in 1..=20 {
            r.step(secs(0.1 * il as f64), il, true);
        }
        assert_eq!(left(&r, 2.0), [None, None]);
        r.step(secs(5.0), 21, false);
        assert_eq!(left(&r, 5.0), [Some(27.0), Some(27.0)]);
        // A first report of many steps belongs to an earlier run.
        let mut r = planned(&[stage("heads", 60.0), stage("blocks", 30.0)]);
        r.stage(secs(0.0), "heads", 60);
        r.step(secs(0.5), 40, false);
        assert_eq!(left(&r, 0.5), [None, None]);
        r.step(secs(2.5), 41, false);
        assert_eq!(left(&r, 2.5), [Some(38.0), Some(38.0 + 60.0)]);
        // All steps are from an earlier run, so nothing was measured.
        let mut r = planned(&[stage("heads", 60.0), stage("blocks", 30.0)]);
        r.stage(secs(0.0), "heads", 60);
        r.step(secs(0.5), 60, false);
        r.stage(secs(0.5), "blocks", 30);
        assert_eq!(left(&r, 1.0), [None, None]);
    }

    #[test]
    fn bandwidth_bound_work_has_a_rate_of_its_own() {
        let text = PlannedStage { bandwidth_bound: true, ..stage("calibration text", 100.0) };
        let mut r = planned(&[text, stage("blocks", 50.0), stage("tune", 50.0)]);
        r.stage(secs(0.0), "calibration text", 100);
        r.step(secs(0.0), 2, false);
        r.step(secs(1.0), 12, false);
        // No other stage is measured yet.
        assert_eq!(left(&r, 1.0), [Some(8.8), Some(8.8 + 10.0)]);
        r.step(secs(10.0), 100, false);
        r.stage(secs(10.0), "blocks", 5);
        r.step(secs(30.0), 1, false);
        assert_eq!(left(&r, 30.0), [Some(80.0), Some(80.0 + 100.0)]);
    }

    #[test]
    fn stages_that_are_not_planned_count_only_while_they_run() {
        let mut r = planned(&[stage("heads", 10.0), stage("blocks", 10.0)]);
        r.stage(secs(0.0), "heads", 10);
        r.step(secs(10.0), 1, false);
        r.stage(secs(10.0), "importance matrix", 4);
        let ahead = Some(100.0);
        assert_eq!(left(&r, 11.0), [None, ahead]);
        r.step(secs(12.0), 1, false);
        assert_eq!(left(&r, 12.0), [Some(6.0), Some(106.0)]);
        r.stage(secs(20.0), "blocks", 1);
        r.stage(secs(21.0), "compare with quants", 4);
        // No planned stage is left, and this stage has no report yet.
        assert_eq!(left(&r, 22.0), [None, None]);
        r.step(secs(23.0), 1, false);
        assert_eq!(left(&r, 23.0), [Some(6.0), Some(6.0)]);
    }

    #[test]
    fn early_ends_repetitions_and_odd_reports_do_no_harm() {
        let mut r = planned(&[stage("heads", 60.0), stage("blocks", 30.0)]);
        r.stage(secs(0.0), "heads", 60);
        r.step(secs(1.0), 1, false);
        r.step(secs(30.0), 30, false);
        // The search ends early.
        r.stage(secs(30.0), "blocks", 30);
        assert_eq!(left(&r, 30.0), [None, Some(30.0)]);
        assert_eq!(left(&r, 100.0), [None, Some(0.0)]);
        r.step(secs(130.0), 40, false);
        r.step(secs(131.0), 41, false);
        assert_eq!(left(&r, 131.0), [Some(0.0), Some(0.0)]);
        // The step count goes backwards, and the stage is announced again.
        r.step(secs(132.0), 3, false);
        left(&r, 132.0);
        r.stage(secs(133.0), "blocks", 0);
        r.step(secs(134.0), 0, false);
        assert_eq!(left(&r, 134.0), [None, None]);
        r.stage(secs(135.0), "heads", 3);
        r.step(secs(136.0), 1, false);
        assert_eq!(left(&r, 136.0), [Some(2.0), Some(2.0)]);
        // Work that is NaN or infinite counts as none.
        let mut r = planned(&[stage("heads", f64::NAN), stage("blocks", f64::INFINITY), stage("tune", -1.0)]);
        r.stage(secs(0.0), "blocks", 2);
        r.step(secs(1.0), 1, false);
        assert_eq!(left(&r, 1.0), [Some(1.0), None]);
    }

    #[test]
    fn a_new_plan_keeps_what_was_measured() {
        let mut r = planned(&[stage("blocks", 10.0)]);
        r.stage(secs(0.0), "blocks", 10);
        r.step(secs(1.0), 1, false);
        r.step(secs(10.0), 10, false);
        // Time after the last step is no work of the stage.
        r.plan(secs(99.0), &[stage("blocks", 20.0), stage("", 70.0)], false);
        assert_eq!(left(&r, 99.0), [None, Some(90.0)]);
        assert!(!r.left(secs(99.0)).whole);
    }

    #[test]
    fn durations_read_like_those_of_people() {
        let expected = [
            (0.0, "0 s"),
            (44.6, "45 s"),
            (59.6, "1 min"),
            (100.0, "1 min 40 s"),
            (200.0, "3 min 20 s"),
            (360.0, "6 min"),
            (596.0, "10 min"),
            (754.0, "13 min"),
            (3580.0, "1 h 00 min"),
            (7500.0, "2 h 05 min"),
            (360_000.0, "100 h 00 min"),
        ];
        for (seconds, text) in expected {
            assert_eq!(spelled(secs(seconds)), text, "{seconds}");
        }
    }

    #[test]
    fn texts_say_what_is_known() {
        let text = |stage: Option<f64>, run: Option<f64>, whole| {
            Left { stage: stage.map(secs), run: run.map(secs), whole }.text("whole run", "this result")
        };
        assert_eq!(text(Some(100.0), Some(360.0), true), ", about 1 min 40 s left (whole run about 6 min)");
        assert_eq!(
            text(Some(100.0), Some(360.0), false),
            ", about 1 min 40 s left (this result about 6 min)"
        );
        assert_eq!(text(Some(100.0), None, true), ", about 1 min 40 s left");
        assert_eq!(text(Some(0.0), Some(360.0), true), ", whole run about 6 min left");
        assert_eq!(text(None, Some(0.2), true), "");
    }
}
