//! Trials of narrower blocks on a few tokens, for the widths and the choice of the neuron criterion.

use super::blocks::at_block;
use crate::calibrate::Windows;
use crate::forward::{BlockOutputs, CHUNK_TOKENS, Collect, Forward};
use crate::model::{BlockWeights, Matrix, Model};
use crate::numeric::Moments;
use crate::pipeline::sensitivity::curve_windows;
use crate::pipeline::stream::embedded;
use crate::pipeline::{PruneError, Settings, token_scales};
use crate::prune::Inverse;
use crate::spill::SpillVec;

/// Parts of a run on which blocks are tried, for several threads.
pub(super) struct Trials<'r> {
    pub(super) forward: &'r Forward,
    pub(super) model: &'r Model,
    pub(super) windows: &'r Windows,
    pub(super) settings: &'r Settings,
}

impl Trials<'_> {
    /// Residual stream, before the first block, of the windows that blocks are fitted to in trials.
    pub(super) fn stream(&self) -> Result<SpillVec<f32>, PruneError> {
        let n_ctx = self.windows.n_ctx;
        let n_windows = curve_windows(self.settings, n_ctx, self.windows.n_fit);
        let tokens = self.windows.sample(n_windows * n_ctx, n_ctx);
        embedded(self.forward, self.model, &tokens, &self.settings.spill)
    }

    /// Runs the algebra of a block beside the passes over the next one, where there is memory for both.
    pub(super) fn beside<A: Send, B: Send>(
        &self,
        algebra: impl FnOnce() -> A + Send,
        passes: impl FnOnce() -> B + Send,
    ) -> (A, B) {
        if is_beside(self.settings) { rayon::join(algebra, passes) } else { (algebra(), passes()) }
    }

    /// Moments at `ffn_down` of the block `w` over `stream`, which becomes the stream after the block.
    pub(super) fn moments(
        &self,
        w: &BlockWeights,
        stream: &mut SpillVec<f32>,
    ) -> Result<Moments, PruneError> {
        let f = self.forward;
        let block = f.upload(w)?;
        let mut moments = f.gathering(&block, w.shape.n_ff, 0)?;
        let n_windows = stream.len() / (f.n_ctx() * f.n_embd());
        for chunk in f.chunks(0..n_windows) {
            let x = &mut stream[f.span(&chunk)];
            let attn_out_input = f.attn_out_input(&block, x, None)?;
            let mut out = vec![0.0; x.len()];
            let scales = token_scales(x, f.n_embd(), self.settings.blocks.token_weight);
            let collect = Collect { target: None, scales: &scales, into: &mut moments };
            let wanted =
                BlockOutputs { out: Some(&mut out), moments: Some(collect), ..BlockOutputs::default() };
            f.from_attn_out_input(&block, x, &attn_out_input, wanted)?;
            x.copy_from_slice(&out);
        }
        let mut moments = moments.finish();
        if self.settings.blocks.biases {
            moments.centre();
        }
        Ok(moments)
    }

    /// Inverse by which the neurons of block `il` are chosen. Its ridge is that of the later fit, which sees all
    /// tokens.
    pub(super) fn inverse(&self, il: usize, moments: &Moments) -> Result<Inverse, PruneError> {
        let n_fitted = self.windows.n_fit * self.windows.n_ctx;
        let ridge = self.settings.ridge_of_neurons(moments.gram.n(), n_fitted);
        Inverse::new(&moments.gram, ridge).map_err(|e| at_block(il, "ffn_down")(e.into()))
    }

    /// Block `w` with only the neurons `kept` and the map `weights` on them.
    pub(super) fn narrowed(
        &self,
        mut w: BlockWeights,
        kept: Vec<usize>,
        weights: Matrix,
        m: &Moments,
    ) -> BlockWeights {
        let (maps, blocks) = ([&w.ffn_down, &weights], &self.settings.blocks);
        w.ffn_down_bias = blocks.adapted_bias(w.ffn_down_bias.clone(), maps, &kept, m, 0.0);
        w.keep_units(&[], &kept);
        w.ffn_down = weights;
        w
    }
}

/// Whether there is memory for the algebra of one block and the passes over another: it is short where fewer
/// tokens than usual pass through a block together.
pub(super) fn is_beside(s: &Settings) -> bool {
    s.chunk_tokens >= CHUNK_TOKENS
}
