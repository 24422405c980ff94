//! Mixtures of experts in the sequential pass: selection of the experts to keep, or of the neurons of each.

use super::blocks::at_block;
use crate::forward::{Block, BlockOutputs, Chosen, ExpertUse};
use crate::model::{BlockMatrix, BlockWeights, FfnUnit};
use crate::numeric::Moments;
use crate::pipeline::run::Run;
use crate::pipeline::stream::Streams;
use crate::pipeline::{PruneError, token_scales};
use crate::prune::{self, Inverse, NeuronCriterion};
use crate::requant::{Quantised, quantise, within_reason};
use crate::spill::SpillVec;

impl Run<'_> {
    /// Removes units from the experts of block `il` until `n_keep` are left, and moves the pruned stream over
    /// the block.
    pub(in crate::pipeline) fn expert_step(
        &mut self,
        il: usize,
        w: &mut BlockWeights,
        n_keep: usize,
        attn_out_input: SpillVec<f32>,
        streams: &mut Streams,
    ) -> Result<String, PruneError> {
        let ffn_unit = self.settings.ffn_unit(self.model);
        let block = self.forward.upload(w)?;
        let (n_embd, n_tokens) = (self.forward.n_embd(), self.fitted.tokens.len());
        let (row, n_expert, n_ff) = (attn_out_input.len() / n_tokens, w.shape.n_expert, w.shape.n_ff);
        let mut used = ExpertUse::new(n_expert);
        let mut chosen: Vec<Chosen> = vec![Vec::new(); n_expert];
        for (chunk, fit) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let first = span.start / n_embd;
            let a = &attn_out_input[first * row..span.end / n_embd * row];
            let (mut mid, mut out) = (vec![0.0; span.len()], vec![0.0; span.len()]);
            let wanted = BlockOutputs { mid: Some(&mut mid), ..BlockOutputs::default() };
            self.forward.from_attn_out_input(&block, &streams.pruned[span.clone()], a, wanted)?;
            match ffn_unit {
                FfnUnit::Expert if fit => self.forward.experts(&block, &mid, &mut out, Some(&mut used))?,
                FfnUnit::Neuron if fit && n_keep < n_ff => {
                    for (all, here) in chosen.iter_mut().zip(self.forward.choices(&block, &mid)?) {
                        all.extend(here.into_iter().map(|(t, weight)| (first + t, weight)));
                    }
                }
                _ => {}
            }
            streams.pruned[span].copy_from_slice(&mid);
        }
        drop(attn_out_input);
        match ffn_unit {
            FfnUnit::Expert => {
                drop(block);
                let keep = prune::top_by_router_weighted_norm(&used.energy, &used.n_tokens, n_keep);
                let neurons: Vec<usize> = keep.iter().flat_map(|e| e * n_ff..(e + 1) * n_ff).collect();
                w.keep_units(&keep, &neurons);
                (self.plan.blocks[il].experts, self.plan.blocks[il].neurons) = (keep, neurons);
            }
            FfnUnit::Neuron if n_keep < n_ff => {
                self.narrow_experts(il, block, w, n_keep, &chosen, streams)?;
            }
            FfnUnit::Neuron => drop(block),
        }

        let block = self.forward.upload(w)?;
        for (chunk, _) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let mut out = vec![0.0; span.len()];
            self.forward.ffn(&block, &streams.pruned[span.clone()], &mut out)?;
            streams.pruned[span].copy_from_slice(&out);
        }
        Ok(format!("{} groups, {n_keep} {}", w.shape.n_head_kv, ffn_unit.plural()))
    }

    /// Narrows every expert to `width` neurons and refits its `ffn_down` to its output before.
    /// The fit covers the tokens that choose the expert, weighted by the expert's router weight for each.
    fn narrow_experts(
        &mut self,
        il: usize,
        block: Block,
        w: &mut BlockWeights,
        width: usize,
        chosen: &[Chosen],
        streams: &Streams,
    ) -> Result<(), PruneError> {
        let (n_embd, n_ff, ty) = (self.forward.n_embd(), w.shape.n_ff, self.type_of_ffn_down(il));
        let failed = at_block(il, "ffn_down");
        let e = w.experts.as_ref().expect("a block with experts");
        let (mut neurons, mut bytes, mut n_idle) = (Vec::new(), Vec::new(), 0);
        let mut written = ty;
        for (i, tokens) in chosen.iter().enumerate() {
            self.check_interrupted()?;
            let down = &e.down[i];
            let (keep, q) = if tokens.is_empty() {
                n_idle += 1;
                let keep = prune::top_by_weight_norm(&e.gate[i], &e.up[i], down, width);
                let q = quantise(&down.select_cols(&keep), ty, &vec![1.0; width])?;
                (keep, q)
            } else {
                let moments = self.moments_of_expert(&block, i, tokens, n_ff, streams)?;
                let ridge = self.settings.ridge_of_neurons(n_ff, moments.n_tokens / self.settings.copies());
                let inverse = Inverse::new(&moments.gram, ridge);
                let chosen = inverse.and_then(|i| prune::greedy(down, None, i, width, NeuronCriterion::Obs));
                let (keep, refit) = chosen.map_err(|e| failed(e.into()))?;
                self.report_ridge(il, &format!("ffn_down of expert {i}"), refit.ridge, ridge);
                let q = self.requantise(&refit.weights, &moments, &keep, ridge, ty).map_err(&failed)?;
                (keep, q)
            };
            within_reason(&q, down).map_err(&failed)?;
            neurons.extend(keep.iter().map(|j| i * n_ff + j));
            bytes.extend_from_slice(&q.bytes);
            written = q.ty;
        }
        if n_idle > 0 {
            self.warnings.push(format!(
                "block {il}: no token of the calibration chose {n_idle} of {} experts, whose neurons went by the size of their weights",
                chosen.len()
            ));
        }
        // The uploaded block holds the old matrices.
        drop(block);
        let q = Quantised::new(written, width, chosen.len() * n_embd, bytes);
        let experts: Vec<usize> = (0..chosen.len()).collect();
        w.keep_units(&experts, &neurons);
        w.set_matrix(BlockMatrix::FfnDown, q.to_matrix()?);
        self.plan.blocks[il].neurons = neurons;
        let q = q.on(&self.settings.spill)?;
        self.plan.blocks[il].set_matrix(BlockMatrix::FfnDown, q);
        Ok(())
    }

    /// Moments at `ffn_down` of one expert over the tokens that chose it.
    /// Their streams before the FFN are the pruned ones. Errors count relative to the dense stream after the
    /// block.
    fn moments_of_expert(
        &mut self,
        block: &Block,
        expert: usize,
        tokens: &Chosen,
        n_ff: usize,
        streams: &Streams,
    ) -> Result<Moments, PruneError> {
        let n_embd = self.forward.n_embd();
        let mut moments = self.forward.gathering(block, n_ff, 0)?;
        for part in tokens.chunks(self.forward.chunk_tokens()) {
            let rows = |stream: &[f32]| -> Vec<f32> {
                part.iter().flat_map(|&(t, _)| &stream[t * n_embd..][..n_embd]).copied().collect()
            };
            let mut scales = token_scales(&rows(&streams.dense), n_embd, self.settings.blocks.token_weight);
            scales.iter_mut().zip(part).for_each(|(scale, (_, weight))| *scale *= weight);
            let mid = rows(&streams.pruned);
            self.forward.expert_moments(block, expert, &mid, &scales, &mut moments)?;
        }
        Ok(moments.finish())
    }
}
