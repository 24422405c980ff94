//! Resampled copies of the windows that blocks are fitted to: the same text, with some tokens resampled from
//! the dense model's predictions for their positions.
//!
//! A fit to a few thousand tokens overfits them, and is worse on other text, most of all on text of another
//! kind. Resampled copies show it what else could stand there, and every kept token sees another past. They
//! cost time, but need no more text.

use super::Stage;
use crate::calibrate::Windows;
use crate::gguf::Value;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work};
use crate::pipeline::resampled::{places, resample};
use crate::pipeline::run::Run;
use crate::pipeline::stream::embedded;
use crate::pipeline::{PruneError, forward};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// Settings of the resampled copies.
#[derive(Clone, Debug, PartialEq)]
pub struct ResampleSettings {
    /// Number of resampled copies of every fitted window, to which blocks are fitted as well. A copy is the
    /// same text, with some tokens resampled from the dense model's predictions.
    pub copies: usize,
    /// Share of a copy's tokens that are resampled, from 0 to 1.
    pub share: f64,
}

impl Default for ResampleSettings {
    fn default() -> ResampleSettings {
        ResampleSettings { copies: 1, share: 0.5 }
    }
}

/// Stage that makes resampled copies of the windows that blocks are fitted to.
pub(in crate::pipeline) struct ResampleCopies;

impl Stage for ResampleCopies {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let (n_ctx, n) = (w.c.n_ctx, w.n_fit());
        let drawn = (w.s.copies() - 1) as f64 * w.s.resample.share * n;
        let operations = w.model_ops(&w.whole(), n, n_ctx) + w.logit_ops(w.n_vocab(), drawn);
        // Graphs keep the memory of their largest need.
        let passing = w.graph_bytes(n_ctx, n) + w.predicting_bytes().max(w.block_bytes());
        vec![StageForecast {
            name: "resample",
            operations: if w.s.copies() > 1 { operations } else { 0.0 },
            algebra: 0.0,
            memory: BASE_BYTES + w.sensitivity_bytes() + w.stream_bytes(n * w.n_embd()) + passing,
            on_devices: passing,
        }]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        if let Some(windows) = run.resampled()? {
            run.fitted = Arc::new(windows);
        }
        run.provenance.push(("resample_copies", Value::U32(run.settings.resample.copies as u32)));
        Ok(())
    }
}

impl Run<'_> {
    /// Windows with the resampled copies of each fitted window that the settings ask for; none if they ask
    /// for none.
    pub(in crate::pipeline) fn resampled(&mut self) -> Result<Option<Windows>, PruneError> {
        let (w, s, n_ctx) = (self.windows, self.settings, self.windows.n_ctx);
        if s.copies() == 1 {
            return Ok(None);
        }
        let n_layer = self.reference.hparams.n_layer();
        // The last step resamples the tokens.
        self.observer.stage("resample", n_layer + 1);
        let forward = forward(self.reference, n_ctx, s)?;
        let text = w.tokens_of(0..w.n_fit);
        let mut stream = embedded(&forward, self.reference, text, &s.spill)?;
        for il in 0..n_layer {
            self.check_interrupted()?;
            let block = forward.upload(&self.reference.block(il)?)?;
            forward.advance(&block, &mut stream)?;
            self.observer.step(il + 1, "");
        }
        let head = forward.head(self.reference)?;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut resample_copies = text.repeat(s.resample.copies);
        for (i, copy) in resample_copies.chunks_exact_mut(n_ctx).enumerate() {
            self.check_interrupted()?;
            let places = places(&[0], 0, n_ctx, s.resample.share, &mut rng);
            let window = i % w.n_fit;
            let span = forward.span(&(window..window + 1));
            resample(&forward, &head, copy, &places, &stream[span], &mut rng)?;
        }
        self.observer.step(n_layer + 1, "");
        Ok(Some(w.with_copies(&resample_copies)))
    }
}
