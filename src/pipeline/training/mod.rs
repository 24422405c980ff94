//! Training on the loss of the whole model: its text, what moves, and one step.
//!
//! Two stages train: tuning moves norms and biases, recovery all matrices as well.

mod lessons;
mod params;

pub(super) use lessons::{Batch, Lesson, Lessons};
pub(super) use params::BlockParams;
pub use params::Moves;

use super::prediction_loss::likely;
use super::run::Run;
use super::stream::{planned_stream, stream_through};
use super::{Plan, PruneError};
use crate::forward::{BlockGradient, Forward, Head, MatrixGradient, OnTheWay};
use crate::ggml::Token;

/// Tokens over which predictions are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// Those that are likely at some position of a step.
    Likely,
    /// The whole vocabulary.
    All,
}

/// Rates of one step, relative to the sizes of what moves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) vectors: f32,
    pub(super) matrices: f32,
}

/// Whole heads of both models, for a comparison among all tokens.
pub(super) struct Heads {
    /// The trained model's, if it is not that of the lessons.
    own: Option<Head>,
}

impl Heads {
    pub(super) fn new(run: &Run, lessons: &Lessons) -> Result<Heads, PruneError> {
        let same = std::ptr::eq(run.model, run.reference);
        Ok(Heads { own: if same { None } else { Some(lessons.forward.head(run.model)?) } })
    }
}

impl Run<'_> {
    /// Takes the `n`-th step, counted from 1, on `lesson`. Every block moves as soon as its gradient is known.
    /// `whole` are the heads of all tokens; without them, predictions are compared among the likely ones.
    /// Returns whether all derivatives were numbers; nothing moves if not.
    pub(super) fn train_step(
        &self,
        lessons: &Lessons,
        lesson: Lesson,
        params: &mut [BlockParams],
        whole: Option<&Heads>,
        rates: Rates,
        n: usize,
    ) -> Result<bool, PruneError> {
        let forward = &lessons.forward;
        let mut inputs = Vec::with_capacity(params.len());
        let keep = |x| {
            inputs.push(self.settings.spill.put(x)?);
            Ok(())
        };
        let last = self.trained_stream(forward, params, &lesson.tokens, keep)?;
        let mut grad = match whole {
            Some(Heads { own }) => {
                let (dense, target) = (&lessons.dense, &lesson.target);
                forward.divergence_gradient(own.as_ref().unwrap_or(dense), Some(dense), &last, target)?
            }
            None => {
                let (_, known) = likely(lessons.source(), &lessons.dense, &lesson.target)?;
                let (own, base) = self.output_heads(|model| forward.head_of(model, &known))?;
                forward.divergence_gradient(&own, base.as_ref(), &last, &lesson.target)?
            }
        };
        drop((last, lesson));
        if !grad.iter().all(|g| g.is_finite()) {
            return Ok(false);
        }
        for ((il, params), x) in params.iter_mut().enumerate().zip(inputs).rev() {
            self.check_interrupted()?;
            let block = forward.upload(&params.weights(self.model, &self.plan, il)?)?;
            let (mut vectors, mut matrices) = (BlockGradient::default(), MatrixGradient::default());
            let found = OnTheWay {
                vectors: Some(&mut vectors),
                matrices: params.moves_matrices().then_some(&mut matrices),
                groups: None,
            };
            forward.block_gradient(&block, &x, &mut grad, found)?;
            drop(block);
            params.step(&vectors, &matrices, rates, n as i32);
        }
        Ok(true)
    }

    /// Final residual stream of `tokens` with what moves as it is now. The streams before each block are
    /// passed to `before`.
    pub(super) fn trained_stream(
        &self,
        forward: &Forward,
        params: &[BlockParams],
        tokens: &[Token],
        before: impl FnMut(Vec<f32>) -> Result<(), PruneError>,
    ) -> Result<Vec<f32>, PruneError> {
        let weights = |il: usize| params[il].weights(self.model, &self.plan, il);
        stream_through(forward, self.model, params.len(), weights, tokens, &*self.observer, before)
    }

    /// Final residual stream of `tokens` in the reference.
    pub(super) fn reference_stream(
        &self,
        forward: &Forward,
        tokens: &[Token],
    ) -> Result<Vec<f32>, PruneError> {
        let (reference, whole) = (self.reference, Plan::whole(self.reference));
        planned_stream(forward, reference, &whole, tokens, &*self.observer, |_| Ok(()))
    }
}
