//! Where the time went.

use crate::ggml::operations;
use crate::pipeline::Observer;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Passes everything on to another observer, and keeps what each stage took.
pub struct Timings<'a> {
    inner: &'a mut dyn Observer,
    stages: Vec<Stage>,
    running: Option<(String, Instant, u64)>,
}

/// What one stage took.
pub struct Stage {
    /// As it was announced.
    pub name: String,
    /// Wall time.
    pub time: Duration,
    /// Floating-point operations of matrix products in graphs.
    pub operations: u64,
}

impl Timings<'_> {
    /// Watches for `inner`.
    pub fn new(inner: &mut dyn Observer) -> Timings<'_> {
        Timings { inner, stages: Vec::new(), running: None }
    }

    fn end(&mut self) {
        if let Some((name, start, before)) = self.running.take() {
            let operations = operations() - before;
            self.stages.push(Stage { name, time: start.elapsed(), operations });
        }
    }

    /// What the stages took.
    pub fn finish(mut self) -> StageTimes {
        self.end();
        StageTimes(self.stages)
    }
}

/// What each stage of a run took, in order.
pub struct StageTimes(pub Vec<Stage>);

impl StageTimes {
    /// A line per stage, with what its matrix products reached in GFLOP/s over its whole time; `rate` is what the
    /// machine reaches in a plain product, in operations per second.
    pub fn table(&self, rate: f64) -> String {
        let mut out =
            format!("{:<22} {:>9} {:>10} {:>9} {:>7}\n", "", "seconds", "GFLOP", "GFLOP/s", "of peak");
        let mut line = |name: &str, time: Duration, operations: u64| {
            let (seconds, giga) = (time.as_secs_f64(), operations as f64 / 1e9);
            let reached = giga / seconds.max(1e-9);
            let share = reached * 1e9 / rate * 100.0;
            let _ = writeln!(out, "{name:<22} {seconds:>9.1} {giga:>10.0} {reached:>9.1} {share:>5.0} %");
        };
        for s in &self.0 {
            line(&s.name, s.time, s.operations);
        }
        let total = self.0.iter().fold((Duration::ZERO, 0), |t, s| (t.0 + s.time, t.1 + s.operations));
        line("all stages", total.0, total.1);
        let _ = writeln!(
            out,
            "\nOnly matrix products of forward and backward passes are counted, not attention's softmax, libllama, or the\nalgebra in f64. Peak is a plain product of 2048 x 2048 floats on as many threads: {:.0} GFLOP/s.",
            rate / 1e9
        );
        out
    }
}

impl Observer for Timings<'_> {
    fn stage(&mut self, name: &str, steps: usize) {
        self.end();
        self.running = Some((name.into(), Instant::now(), operations()));
        self.inner.stage(name, steps);
    }

    fn step(&mut self, done: usize, note: &str) {
        self.inner.step(done, note);
    }

    fn interrupted(&self) -> bool {
        self.inner.interrupted()
    }
}
