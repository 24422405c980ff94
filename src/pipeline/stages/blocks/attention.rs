//! The attention of a block in the sequential pass: the refit of `attn_output`.

use super::*;

impl Run<'_> {
    /// Moves the dense stream over the whole block, and refits `attn_output` of `w` on the kept groups'
    /// outputs for the pruned stream.
    /// Returns the inputs of `attn_output` for the FFN step. Afterwards, the dense stream is one block ahead
    /// of the pruned one.
    pub(super) fn attention_step(
        &mut self,
        stage: &Blocks,
        il: usize,
        dense_block: Block,
        w: &mut BlockWeights,
        streams: &mut Streams,
    ) -> Result<SpillVec<f32>, PruneError> {
        let block = self.forward.upload(w)?;
        let refits = stage.towards_dense && block.has_attention();
        let (n_in, n_out) = (w.attn_output.n_in, w.attn_output.n_out);
        let mut moments = refits.then(|| self.forward.gathering(&block, n_in, n_out)).transpose()?;
        let row = if block.has_attention() { w.attn_output.n_in } else { 0 };
        let n_embd = self.forward.n_embd();
        let mut attn_out_input = self.settings.spill.zeros(streams.pruned.len() / n_embd * row)?;
        for (chunk, fit) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let x = &mut streams.dense[span.clone()];
            let (mut mid, mut out) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            self.forward.block(&dense_block, x, Some(&mut mid), &mut out)?;
            x.copy_from_slice(&out);
            let scales = token_scales(&mid, self.forward.n_embd(), self.settings.blocks.token_weight);
            let into = moments.as_mut().filter(|_| fit);
            let collect = into.map(|into| Collect { target: Some(&mid), scales: &scales, into });
            let at = span.start / n_embd * row..span.end / n_embd * row;
            attn_out_input[at].copy_from_slice(&self.forward.attn_out_input(
                &block,
                &streams.pruned[span],
                collect,
            )?);
        }
        // Frees the memory for the algebra.
        drop((dense_block, block));
        if let Some(moments) = moments {
            let mut moments = moments.finish();
            if self.settings.blocks.biases {
                moments.centre();
            }
            let keep: Vec<usize> = (0..w.attn_output.n_in).collect();
            let s = self.settings;
            let failed = at_block(il, "attn_output");
            let refit = prune::refit(
                &w.attn_output,
                &moments,
                s.blocks.dense_target_weight,
                &keep,
                s.blocks.ridge_stream,
            );
            let refit = refit.map_err(|e| failed(e.into()))?;
            self.report_ridge(il, "attn_output", refit.ridge, s.blocks.ridge_stream);
            let segment =
                self.model.blocks[il].attn_output.as_ref().expect("a block with attention has attn_output");
            let ty = s.types.attn_output.unwrap_or(self.model.tensor(segment).ty);
            let q =
                self.requantise(&refit.weights, &moments, &keep, s.blocks.ridge_attn, ty).map_err(failed)?;
            let new = within_reason(&q, &w.attn_output).map_err(at_block(il, "attn_output"))?;
            let old = std::mem::replace(&mut w.attn_output, new);
            let maps = [&old, &w.attn_output];
            w.attn_output_bias = s.blocks.adapted_bias(
                w.attn_output_bias.take(),
                maps,
                &keep,
                &moments,
                s.blocks.dense_target_weight,
            );
            self.plan.blocks[il].set_vector(BlockVector::AttnOutputBias, w.attn_output_bias.clone());
            self.plan.blocks[il].set_matrix(BlockMatrix::AttnOutput, q.on(&s.spill)?);
        }
        Ok(attn_out_input)
    }
}
