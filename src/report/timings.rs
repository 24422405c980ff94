//! Time of each stage.

use crate::ggml::{cpu_time, operations};
use crate::pipeline::{Forecast, Observer, PlannedStage};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Observer that measures the time of each stage and passes everything on to another observer.
pub struct Timings<'a> {
    inner: &'a mut dyn Observer,
    stages: Vec<Stage>,
    running: Option<Running>,
}

/// Stage that runs, with the clocks and the count of operations at its start.
struct Running {
    name: String,
    start: Instant,
    cpu: Option<Duration>,
    operations: u64,
}

/// Time and operations of one stage.
pub struct Stage {
    /// Name under which the stage was announced.
    pub name: String,
    /// Wall time.
    pub time: Duration,
    /// Processor time of all threads, if the system can tell.
    pub cpu: Option<Duration>,
    /// Floating-point operations of matrix products in graphs.
    pub operations: u64,
}

impl Timings<'_> {
    /// Creates an observer that passes everything on to `inner`.
    pub fn new(inner: &mut dyn Observer) -> Timings<'_> {
        Timings { inner, stages: Vec::new(), running: None }
    }

    fn end(&mut self) {
        if let Some(Running { name, start, cpu, operations: before }) = self.running.take() {
            let cpu = cpu_time().zip(cpu).map(|(now, before)| now - before);
            self.stages.push(Stage { name, time: start.elapsed(), cpu, operations: operations() - before });
        }
    }

    /// Times of all stages.
    pub fn finish(mut self) -> StageTimes {
        self.end();
        StageTimes(self.stages)
    }
}

/// Times of the stages of a run, in order.
pub struct StageTimes(pub Vec<Stage>);

impl StageTimes {
    /// Table with a line per stage: wall time, share of the processor time of `n_threads` threads in it,
    /// operations of its products, those of `forecast` and of the algebra, and the reached share of the rate.
    /// `rate` is the machine's rate in a plain product, in operations per second.
    pub fn table(&self, rate: f64, n_threads: usize, forecast: Option<&Forecast>) -> String {
        let mut out = format!(
            "{:<22} {:>9} {:>7} {:>9} {:>9} {:>9} {:>9} {:>8}\n",
            "", "seconds", "busy", "GFLOP", "expected", "f64", "GFLOP/s", "of peak"
        );
        let mut sums = (Duration::ZERO, Some(Duration::ZERO), 0.0, 0.0, 0.0);
        type Cpu = Option<Duration>;
        let mut line = |name: &str, time: Duration, cpu: Cpu, counted: f64, expected: f64, algebra: f64| {
            let seconds = time.as_secs_f64().max(1e-9);
            let busy =
                |cpu: Duration| format!("{:.0} %", cpu.as_secs_f64() / seconds / n_threads as f64 * 100.0);
            let busy = cpu.map_or("-".into(), busy);
            let _ = writeln!(
                out,
                "{name:<22} {seconds:>9.1} {busy:>7} {:>9.0} {:>9.0} {:>9.0} {:>9.1} {:>6.0} %",
                counted / 1e9,
                expected / 1e9,
                algebra / 1e9,
                (counted + algebra) / seconds / 1e9,
                // A register holds half as many numbers of 64 bits.
                (counted + 2.0 * algebra) / seconds / rate * 100.0
            );
        };
        for s in &self.0 {
            let expected = forecast.and_then(|f| f.stages.iter().find(|e| e.name == s.name));
            let [operations, algebra] = expected.map_or([0.0; 2], |e| [e.operations, e.algebra]);
            let counted = s.operations as f64;
            line(&s.name, s.time, s.cpu, counted, operations, algebra);
            let cpu = sums.1.zip(s.cpu).map(|(sum, cpu)| sum + cpu);
            sums = (sums.0 + s.time, cpu, sums.2 + counted, sums.3 + operations, sums.4 + algebra);
        }
        line("all stages", sums.0, sums.1, sums.2, sums.3, sums.4);
        let _ = writeln!(
            out,
            "\nbusy: processor time as a share of {n_threads} threads. GFLOP: products of forward and backward passes, counted and as expected from shapes. f64: the algebra, as\nexpected, two in 32 bits as one; of peak, each counts as two. Not counted: softmax, libllama. Peak is a plain product of\n2048 x 2048 floats on as many threads: {:.0} GFLOP/s.",
            rate / 1e9
        );
        out
    }
}

impl Observer for Timings<'_> {
    fn plan(&mut self, stages: &[PlannedStage], whole: bool) {
        self.inner.plan(stages, whole);
    }

    fn stage(&mut self, name: &str, steps: usize) {
        self.end();
        let (cpu, operations) = (cpu_time(), operations());
        self.running = Some(Running { name: name.into(), start: Instant::now(), cpu, operations });
        self.inner.stage(name, steps);
    }

    fn step(&mut self, done: usize, note: &str) {
        self.inner.step(done, note);
    }

    fn interrupted(&self) -> bool {
        self.inner.interrupted()
    }

    fn end_stage(&mut self) -> bool {
        self.inner.end_stage()
    }
}
