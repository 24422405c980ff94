//! Back into the file's types: one sequential pass that requantises what moved.

use crate::forward::SUM_TOKENS;
use crate::ggml::count;
use crate::model::{BlockMatrix, Matrix, group_rows};
use crate::numeric::{Moments, products_per_token};
use crate::pipeline::PruneError;
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work};
use crate::pipeline::run::Run;
use crate::pipeline::stages::blocks::at_block;
use crate::pipeline::stream::embedded;
use crate::pipeline::training::BlockParams;
use crate::requant::{Quantised, quantise, quantise_with_feedback, select_rows};

/// Number of tokens whose inputs say which rounding errors matter.
const TOKENS: usize = 16384;

/// Ridge of the Gram matrices, as a share of their mean diagonal.
const RIDGE: f64 = 1e-2;

/// Matrices that read the same input.
const GROUPS: [&[BlockMatrix]; 4] = [
    &[BlockMatrix::AttnQ, BlockMatrix::AttnK, BlockMatrix::AttnV],
    &[BlockMatrix::AttnOutput],
    &[BlockMatrix::FfnGate, BlockMatrix::FfnUp],
    &[BlockMatrix::FfnDown],
];

pub(super) fn forecast(w: &Work) -> StageForecast {
    let n_ctx = w.c.n_ctx;
    let n = ((TOKENS / n_ctx).clamp(1, w.c.n_fit) * n_ctx) as f64;
    let (e, maps) = (w.n_embd(), w.ffn_matrices());
    let pruned = w.pruned();
    // Inputs are computed anew for each group of matrices behind rounded ones.
    let block = |il: usize, b: Sizes| {
        let inputs = 3.0 * w.heads_ops(il, b, n, n_ctx) + 2.0 * n * e * (2.0 * b.q + (maps - 1.0) * b.ff);
        let moments = 2.0 * w.moment_ops(e, 0.0, n) + w.moment_ops(b.q, 0.0, n) + w.moment_ops(b.ff, 0.0, n);
        inputs + moments + w.block_ops(il, b, n, n_ctx)
    };
    // A Cholesky factor, and a product of each rounding error with it.
    let algebra = |b: &Sizes| {
        let of = |n_in: f64, n_out: f64| n_in.powi(3) / 3.0 + n_in.powi(2) * n_out;
        of(e, b.q + 2.0 * b.kv) + of(b.q, e) + of(e, (maps - 1.0) * b.ff) + of(b.ff, e)
    };
    let widest = pruned.iter().map(|b| b.ff.max(b.q)).fold(e, f64::max);
    let rounded = if w.s.spill.is_memory() { pruned.iter().map(|b| w.matrix_params(*b)).sum() } else { 0.0 };
    let passing = w.graph_bytes(n_ctx, n) + 2.0 * w.block_bytes() + w.sums_bytes(widest, 0.0);
    let judged = w.n_held_out();
    let judging = w.model_ops(&pruned, judged, n_ctx) + w.logit_ops(w.known(judged), judged);
    StageForecast {
        name: "recover, rounding",
        operations: pruned.iter().enumerate().map(|(il, b)| block(il, *b)).sum::<f64>() + judging,
        algebra: pruned.iter().map(algebra).sum(),
        memory: BASE_BYTES
            + super::kept_bytes(w)
            + rounded
            + w.stream_bytes(e * (n + 2.0 * w.n_all()))
            + 12.0 * widest.powi(2)
            + 24.0 * widest * e.max(widest)
            + passing,
        on_devices: passing,
    }
}

impl Run<'_> {
    /// Writes what `params` holds to the plan, rounded to the types of the file, block by block behind
    /// rounded blocks.
    pub(super) fn round(&mut self, params: &[BlockParams]) -> Result<(), PruneError> {
        let n_ctx = self.forward.n_ctx();
        let windows = (TOKENS / n_ctx).clamp(1, self.windows.n_fit);
        let tokens = self.windows.sample(windows * n_ctx, n_ctx);
        let mut stream = embedded(&self.forward, self.model, &tokens, &self.settings.spill)?;
        self.observer.stage("recover, rounding", params.len());
        for (il, params) in params.iter().enumerate() {
            self.check_interrupted()?;
            // Matrices become those of the file one after another; those behind do not change what they read.
            let mut w = params.weights(self.model, &self.plan, il)?;
            params.write_vectors(&mut self.plan.blocks[il]);
            for group in GROUPS {
                let moved = group.iter().filter_map(|m| Some((*m, w.clone().take_matrix(*m)?)));
                let moved: Vec<(BlockMatrix, Matrix)> = moved.collect();
                let Some((first, _)) = moved.first() else { continue };
                let block = self.forward.upload(&w)?;
                let n_in = moved[0].1.n_in;
                let mut moments = Moments::new(n_in, 0);
                for chunk in self.forward.chunks(0..windows) {
                    let x = &stream[self.forward.span(&chunk)];
                    let inputs = self.forward.inputs(&block, x, *first)?;
                    let ones = vec![1.0; inputs.len() / n_in];
                    moments.add(&inputs, &[], &ones, SUM_TOKENS);
                    count(2 * (products_per_token(n_in, 0) * ones.len()) as u64);
                }
                let all: Vec<usize> = (0..n_in).collect();
                for (m, values) in &moved {
                    let old = self.written(il, *m)?;
                    let failed = at_block(il, m.name());
                    let q = if self.settings.blocks.error_feedback {
                        quantise_with_feedback(values, &moments.gram, &all, RIDGE, old.ty, Some(&old))
                            .map_err(failed)?
                    } else {
                        let weights: Vec<f32> = moments.gram.diagonal().iter().map(|d| *d as f32).collect();
                        quantise(values, old.ty, &weights)?
                    };
                    w.set_matrix(*m, q.to_matrix()?);
                    self.plan.blocks[il].set_matrix(*m, q.on(&self.settings.spill)?);
                }
            }
            let block = self.forward.upload(&w)?;
            self.forward.advance(&block, &mut stream)?;
            self.observer.step(il + 1, "");
        }
        Ok(())
    }

    /// Matrix `m` of block `il` as the file would hold it without recovery.
    fn written(&self, il: usize, m: BlockMatrix) -> Result<Quantised, PruneError> {
        let plan = &self.plan.blocks[il];
        if let Some(q) = plan.matrix(m) {
            return Ok(q.clone());
        }
        let t = &self.model.blocks[il];
        let segment = t.matrix(m).expect("what moves is there");
        let tensor = self.model.tensor(&segment);
        let n_in = tensor.ne[0];
        let shape = &self.model.hparams.blocks[il];
        let head_dim = self.model.hparams.head_dim;
        let rows: Vec<usize> = match m {
            BlockMatrix::AttnQ => group_rows(&plan.groups, shape.heads_per_group() * head_dim),
            BlockMatrix::AttnK | BlockMatrix::AttnV => group_rows(&plan.groups, head_dim),
            BlockMatrix::FfnGate | BlockMatrix::FfnUp => plan.neurons.clone(),
            // Without new values, it lost no columns.
            BlockMatrix::AttnOutput | BlockMatrix::FfnDown => (0..segment.n).collect(),
        };
        let rows: Vec<usize> = rows.into_iter().map(|r| segment.start + r).collect();
        let bytes = select_rows(self.model.file.data(tensor), tensor.ty, n_in, &rows);
        Ok(Quantised::new(tensor.ty, n_in, rows.len(), bytes))
    }
}
