//! Training text, and the reference's residual streams for it.

use crate::calibrate::Windows;
use crate::forward::{Forward, Head, MAX_GRADIENT_CTX};
use crate::ggml::Token;
use crate::pipeline::resampled::{places, resample};
use crate::pipeline::run::Run;
use crate::pipeline::{PruneError, forward};
use rand_chacha::ChaCha8Rng;

/// Training text.
pub(in crate::pipeline) struct Lessons<'a> {
    /// Forward pass of the model that is trained.
    pub(in crate::pipeline) forward: Forward,
    /// Forward pass of the reference, if it computes otherwise.
    source: Option<Forward>,
    /// Output head of the reference.
    pub(in crate::pipeline) dense: Head,
    windows: &'a Windows,
    /// Final residual stream of the reference, `[n_tokens, n_embd]`. It begins with that of the windows to
    /// fit to.
    stream: &'a [f32],
    /// Indices in the windows' tokens at which the training windows begin. These are whole windows, or parts
    /// of a length that gradients can go through.
    starts: Vec<usize>,
}

/// Text of one step, and the reference's final residual stream for it.
pub(in crate::pipeline) struct Lesson {
    pub(in crate::pipeline) tokens: Vec<Token>,
    pub(in crate::pipeline) target: Vec<f32>,
}

/// Which windows a step reads, and how much of them it resamples.
pub(in crate::pipeline) struct Batch<'b> {
    /// Numbers of training windows.
    pub(in crate::pipeline) windows: &'b [usize],
    /// Number of the first ones that stay as they are.
    pub(in crate::pipeline) n_given: usize,
    /// Share of the others' tokens that is resampled.
    pub(in crate::pipeline) drawn: f64,
}

impl Lessons<'_> {
    /// Training text of up to `limit` tokens from the fitted ones of `windows`, spread evenly. The final
    /// residual stream `stream` of the reference begins with these windows.
    pub(in crate::pipeline) fn new<'w>(
        run: &Run,
        windows: &'w Windows,
        stream: &'w [f32],
        limit: usize,
    ) -> Result<Lessons<'w>, PruneError> {
        let parts = windows.n_ctx.div_ceil(MAX_GRADIENT_CTX);
        let n_ctx = windows.n_ctx / parts;
        let own = forward(run.model, n_ctx, run.settings)?;
        let source =
            if run.computes_alike() { None } else { Some(forward(run.reference, n_ctx, run.settings)?) };
        let n_all = windows.n_fit * parts;
        let n = (limit / n_ctx).clamp(1, n_all);
        let chosen = (0..n).map(|i| (2 * i + 1) * n_all / (2 * n));
        let starts = chosen.map(|i| i / parts * windows.n_ctx + i % parts * n_ctx).collect();
        let dense = source.as_ref().unwrap_or(&own).head(run.reference)?;
        Ok(Lessons { forward: own, source, dense, windows, stream, starts })
    }

    /// Number of training windows.
    pub(in crate::pipeline) fn n_windows(&self) -> usize {
        self.starts.len()
    }

    /// Forward pass of the reference.
    pub(in crate::pipeline) fn source(&self) -> &Forward {
        self.source.as_ref().unwrap_or(&self.forward)
    }

    /// Text of a step.
    pub(in crate::pipeline) fn lesson(
        &self,
        run: &Run,
        batch: &Batch,
        rng: &mut ChaCha8Rng,
    ) -> Result<Lesson, PruneError> {
        let (n_ctx, n_embd) = (self.forward.n_ctx(), self.forward.n_embd());
        let starts: Vec<usize> = batch.windows.iter().map(|&i| self.starts[i]).collect();
        let mut tokens: Vec<Token> =
            starts.iter().flat_map(|&at| &self.windows.tokens[at..][..n_ctx]).copied().collect();
        let places = places(&starts, batch.n_given, n_ctx, batch.drawn, rng);
        resample(self.source(), &self.dense, &mut tokens, &places, self.stream, rng)?;
        // In a part of a window, the reference sees less context than in the whole one.
        let known = starts[..if n_ctx < self.windows.n_ctx { 0 } else { batch.n_given }].iter();
        let mut target: Vec<f32> =
            known.flat_map(|at| &self.stream[at * n_embd..][..n_ctx * n_embd]).copied().collect();
        let unknown = &tokens[target.len() / n_embd..];
        if !unknown.is_empty() {
            target.extend(run.reference_stream(self.source(), unknown)?);
        }
        Ok(Lesson { tokens, target })
    }
}
