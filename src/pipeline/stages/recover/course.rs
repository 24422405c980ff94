//! The course of a training: steps, judgements, and what is kept of them.

use super::keep::{self, Place};
use super::{HeldOut, RecoverBudget, listed};
use crate::pipeline::PruneError;
use crate::pipeline::run::Run;
use crate::pipeline::training::{Batch, BlockParams, Heads, Lessons, Rates};
use crate::spill::SpillVec;
use crate::train::Schedule;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// The rate falls to a tenth.
const SCHEDULE: Schedule = Schedule { warm_up: 0.08, floor: 0.1 };

/// Number of times that held-out windows judge what moved, and of those in a row without a gain after which
/// training ends, in its second half. Before, the rate is too high for the gain to show.
pub(super) const JUDGEMENTS: usize = 10;
const PATIENCE: usize = 3;

/// Number of steps after which a limit of time becomes a number of steps.
const TIMED_STEPS: usize = 3;

/// Seed of the windows' order and of what is resampled.
const SEED: u64 = 3;

/// State that the held-out windows like best.
pub(super) struct Best {
    /// Mean ratio of the divergences to those before.
    pub(super) score: f64,
    pub(super) trained: Trained,
    /// Values of all that moves.
    pub(super) values: Vec<SpillVec<f32>>,
}

/// Result of a training.
pub(super) struct Trained {
    /// Number of tokens of all steps up to it.
    pub(super) tokens: usize,
    /// Divergence on each set of held-out windows.
    pub(super) divergences: Vec<f64>,
}

/// A training under way.
pub(super) struct Course<'c, 'w> {
    judge: &'c HeldOut<'c>,
    lessons: &'c Lessons<'w>,
    whole: Option<&'c Heads>,
    params: Vec<BlockParams>,
    order: Order,
    /// Number of windows of a step.
    per_step: usize,
    place: Place,
    best: Best,
}

impl<'c, 'w> Course<'c, 'w> {
    /// Begins a training of `params`.
    pub(super) fn new(
        run: &Run,
        judge: &'c HeldOut<'c>,
        lessons: &'c Lessons<'w>,
        whole: Option<&'c Heads>,
        params: Vec<BlockParams>,
    ) -> Result<Course<'c, 'w>, PruneError> {
        let (s, n_ctx) = (&run.settings.recover, lessons.forward.n_ctx());
        let per_step = (s.step_tokens(n_ctx) / n_ctx).min(lessons.n_windows());
        let n_steps = match s.budget {
            Some(RecoverBudget::Tokens(n)) => n.div_ceil(per_step * n_ctx),
            _ => usize::MAX,
        };
        let spill = &run.settings.spill;
        let values = params.iter().flat_map(BlockParams::each).map(|a| spill.put(a.values.to_vec()));
        let best = Best {
            score: 1.0,
            trained: Trained { tokens: 0, divergences: judge.before.clone() },
            values: values.collect::<Result<_, _>>()?,
        };
        let order = Order::new(lessons.n_windows());
        let place = Place { n: 0, n_steps, slower: 1.0, without_gain: 0 };
        Ok(Course { judge, lessons, whole, params, order, per_step, place, best })
    }

    /// Takes the steps. Returns what the held-out windows like best, and how it came about.
    pub(super) fn run(mut self, run: &mut Run) -> Result<(Vec<BlockParams>, Trained), PruneError> {
        let mut set = 0;
        if let Some((place, at)) = keep::load(run, &mut self.params, &mut self.best)? {
            (self.place, set) = (place, at);
            (0..self.place.n).for_each(|_| drop(self.order.next(self.per_step)));
        }
        let known = self.place.n_steps < usize::MAX;
        run.observer.stage("recover", if known { self.place.n_steps } else { TIMED_STEPS });
        let held_out = format!("held-out divergence {}", listed(&self.judge.before));
        run.observer.step(self.place.n, &held_out);
        let start = Instant::now();
        while self.goes_on() {
            let note = match self.step(run) {
                // The best state so far is worth a file.
                Err(PruneError::Interrupted) if run.observer.end_stage() => break,
                done => done?,
            };
            if let Some(RecoverBudget::Time(limit)) = run.settings.recover.budget
                && self.place.n == TIMED_STEPS
            {
                let each = start.elapsed().as_secs_f64() / TIMED_STEPS as f64;
                self.place.n_steps = ((limit.as_secs_f64() / each) as usize).max(TIMED_STEPS);
                run.observer.stage("recover", self.place.n_steps);
            }
            run.observer.step(self.place.n, &note);
            if self.is_due() && self.goes_on() {
                set = 1 - set;
                keep::save(run, &self.place, &mut self.params, &self.best, set)?;
            }
        }
        self.restore();
        Ok((self.params, self.best.trained))
    }

    fn goes_on(&self) -> bool {
        // Values that were halved twice are not numbers at any rate.
        let Place { n, n_steps, slower, without_gain } = self.place;
        let tired = without_gain >= PATIENCE && n > n_steps / 2;
        n < n_steps && !tired && slower > 0.25
    }

    /// Whether held-out windows judge after the last step.
    fn is_due(&self) -> bool {
        let Place { n, n_steps, .. } = self.place;
        let judged = |n: usize| (n as f64 * JUDGEMENTS as f64 / n_steps as f64) as usize;
        n == n_steps || judged(n) > judged(n - 1)
    }

    /// Takes the next step, and lets the held-out windows judge if it is time. Returns a note.
    fn step(&mut self, run: &mut Run) -> Result<String, PruneError> {
        let s = &run.settings.recover;
        let n = self.place.n + 1;
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        rng.set_stream(n as u64);
        let (windows, first_pass) = self.order.next(self.per_step);
        let resampled = if first_pass { s.first_resampled } else { 1.0 };
        let n_given = windows.len() - (windows.len() as f64 * resampled).floor() as usize;
        let [least, most] = s.resample_share;
        let drawn = least + (most - least) * rng.random::<f64>();
        let lesson = self.lessons.lesson(run, &Batch { windows: &windows, n_given, drawn }, &mut rng)?;
        let factor = self.place.slower * SCHEDULE.factor(n, self.place.n_steps);
        let rates = Rates { vectors: factor * s.vector_rate as f32, matrices: factor * s.rate as f32 };
        let sound = run.train_step(self.lessons, lesson, &mut self.params, self.whole, rates, n)?;
        self.place.n = n;
        let n_tokens = n * self.per_step * self.lessons.forward.n_ctx();
        let note = format!("{n_tokens} tokens, rate {:.1e}", rates.matrices);
        if !sound {
            self.restore();
            self.place.slower *= 0.5;
            return Ok(format!("{note}, not a number: back to the best so far, at half the rate"));
        }
        if !self.is_due() {
            return Ok(note);
        }
        let own = run.trained_stream(&run.forward, &self.params, self.judge.tokens, |_| Ok(()))?;
        let divergences = self.judge.divergences(run, &own)?;
        let note = format!("{note}, held-out divergence {}", listed(&divergences));
        let score = self.judge.score(&divergences);
        if score < self.best.score {
            self.best.score = score;
            self.best.trained = Trained { tokens: n_tokens, divergences };
            let all = self.params.iter().flat_map(BlockParams::each);
            all.zip(&mut self.best.values).for_each(|(adam, kept)| kept.copy_from_slice(&adam.values));
            self.place.without_gain = 0;
        } else {
            self.place.without_gain += 1;
        }
        Ok(note)
    }

    /// Goes back to what the held-out windows like best.
    fn restore(&mut self) {
        let all = self.params.iter_mut().flat_map(BlockParams::each_mut);
        all.zip(&self.best.values).for_each(|(adam, kept)| adam.values.copy_from_slice(kept));
    }
}

/// Order of training windows: pass after pass, each shuffled.
struct Order {
    n: usize,
    pass: u64,
    rest: Vec<usize>,
}

impl Order {
    fn new(n: usize) -> Order {
        Order { n, pass: 0, rest: Vec::new() }
    }

    /// Next `count` windows, and whether they belong to the first pass.
    fn next(&mut self, count: usize) -> (Vec<usize>, bool) {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            if self.rest.is_empty() {
                self.pass += 1;
                self.rest = (0..self.n).collect();
                self.rest.shuffle(&mut ChaCha8Rng::seed_from_u64(self.pass));
            }
            taken.extend(self.rest.pop());
        }
        (taken, self.pass == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_takes_every_window_once() {
        for (n, count) in [(1, 1), (7, 2), (10, 10), (5, 3)] {
            let mut order = Order::new(n);
            let taken: Vec<usize> = (0..3 * n).flat_map(|_| order.next(count).0).collect();
            for pass in taken.chunks_exact(n) {
                let mut sorted = pass.to_vec();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            }
        }
    }
}
