//! One pass over the blocks that refits, selects and requantises.

use super::stream::embedded;
use super::{BlockPlan, Method, PruneError, Run, token_scales};
use crate::forward::{Block, Collect, Wanted};
use crate::ggml::Type;
use crate::model::{BlockVector, BlockWeights, Matrix};
use crate::numeric::Moments;
use crate::prune::{self, Singular};
use crate::requant::{FeedbackError, Quantised, quantise, quantise_with_feedback, within_reason};
use crate::spill::Array;
use std::ops::Range;

/// The two residual streams `[n_tokens, n_embd]` of all windows, at the input of the same block.
pub(super) struct Streams {
    pub(super) dense: Array<f32>,
    pub(super) pruned: Array<f32>,
}

impl Run<'_> {
    /// Narrows every block to its width, but for the first, which are `done`. Returns the streams behind the last
    /// block.
    pub(super) fn sequential_pass(
        &mut self,
        widths: &[usize],
        done: Vec<(BlockPlan, Vec<String>)>,
    ) -> Result<Streams, PruneError> {
        let (tokens, shelf) = (&self.fitted.tokens, &self.settings.shelf);
        let mut streams = Streams {
            dense: embedded(&self.forward, self.reference, tokens, shelf)?,
            pruned: embedded(&self.forward, self.model, tokens, shelf)?,
        };
        self.observer.stage("blocks", widths.len());
        let n_done = done.len();
        for (il, (plan, warnings)) in done.into_iter().enumerate() {
            self.checkpoint()?;
            let shelved = |q: Option<Quantised>| q.map(|q| q.on(&self.settings.shelf)).transpose();
            self.plan.blocks[il] = BlockPlan {
                attn_output: shelved(plan.attn_output)?,
                ffn_down: shelved(plan.ffn_down)?,
                ..plan
            };
            self.warnings.extend(warnings);
            self.carry_over(il, &mut streams)?;
            self.observer.step(il + 1, "from before");
        }
        for (il, &width) in widths.iter().enumerate().skip(n_done) {
            self.checkpoint()?;
            let n_warnings = self.warnings.len();
            let whole = self.reference.block(il)?;
            let dense_block = self.forward.upload(&whole)?;
            let mut w = if std::ptr::eq(self.model, self.reference) {
                whole
            } else {
                let mut w = self.model.block(il)?;
                // What gets new values starts from the source's. The rest of that has no use any more.
                let of_source = |source: BlockWeights| (source.attn_output, source.ffn_down);
                let (attn_output, ffn_down) = of_source(whole);
                w.ffn_down = ffn_down;
                if self.settings.method == Method::Putri {
                    w.attn_output = attn_output;
                }
                w
            };
            let groups = &self.plan.blocks[il].groups;
            if groups.len() < w.shape.n_head_kv {
                w.keep_groups(groups, self.model.hparams.head_dim);
            }
            let heads = self.attention_step(il, dense_block, &mut w, &mut streams)?;
            let note = match w.experts {
                None => self.ffn_step(il, &mut w, width, heads, &mut streams)?,
                Some(_) => self.expert_step(il, &mut w, width, heads, &mut streams)?,
            };
            self.journal.block(il, &self.plan.blocks[il], &self.warnings[n_warnings..])?;
            let held_out = self.forward.span(&(self.fitted.n_fit..self.fitted.n_windows()));
            let [dense, pruned] = [&streams.dense, &streams.pruned].map(|s| &s[held_out.clone()]);
            let off = mean_distance(dense, pruned, self.forward.n_embd());
            self.observer.step(il + 1, &format!("{note}, stream {:.1} % off", off * 100.0));
        }
        Ok(streams)
    }

    /// Moves both streams over block `il`, which the plan holds, in the steps in which a block that is being pruned
    /// moves them, so that they are the same to the last bit.
    fn carry_over(&mut self, il: usize, streams: &mut Streams) -> Result<(), PruneError> {
        let dense_block = self.forward.upload(&self.reference.block(il)?)?;
        let block = self.forward.upload(&self.plan.block(self.model, il)?)?;
        for (chunk, _) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let (mut mid, mut out) = (vec![0.0; span.len()], vec![0.0; span.len()]);
            self.forward.block(&dense_block, &streams.dense[span.clone()], Some(&mut mid), &mut out)?;
            streams.dense[span.clone()].copy_from_slice(&out);
            let x = &mut streams.pruned[span];
            let heads = self.forward.heads(&block, x, None)?;
            if block.is_parallel() {
                let wanted = Wanted { out: Some(&mut out), ..Wanted::default() };
                self.forward.from_heads(&block, x, &heads, wanted)?;
                x.copy_from_slice(&out);
                continue;
            }
            let wanted = Wanted { mid: Some(&mut mid), ..Wanted::default() };
            self.forward.from_heads(&block, x, &heads, wanted)?;
            self.forward.ffn(&block, &mid, x)?;
        }
        Ok(())
    }

    /// Moves the dense stream over the whole block, and refits attn_output of `w` on what the pruned
    /// stream makes of the groups that are left. Returns attn_output's inputs for the FFN step. The
    /// dense stream is one block ahead of the pruned one afterwards.
    fn attention_step(
        &mut self,
        il: usize,
        dense_block: Block,
        w: &mut BlockWeights,
        streams: &mut Streams,
    ) -> Result<Array<f32>, PruneError> {
        let block = self.forward.upload(w)?;
        let refits = self.settings.method == Method::Putri && block.has_attention();
        let (n_in, n_out) = (w.attn_output.n_in, w.attn_output.n_out);
        let mut moments = refits.then(|| self.forward.gathering(&block, n_in, n_out)).transpose()?;
        let row = if block.has_attention() { w.attn_output.n_in } else { 0 };
        let n_embd = self.forward.n_embd();
        let mut heads = self.settings.shelf.zeros(streams.pruned.len() / n_embd * row)?;
        for (chunk, fit) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let x = &mut streams.dense[span.clone()];
            let (mut mid, mut out) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            self.forward.block(&dense_block, x, Some(&mut mid), &mut out)?;
            x.copy_from_slice(&out);
            let scales = token_scales(&mid, self.forward.n_embd(), self.settings.token_weight);
            let into = moments.as_mut().filter(|_| fit);
            let collect = into.map(|into| Collect { target: Some(&mid), scales: &scales, into });
            let at = span.start / n_embd * row..span.end / n_embd * row;
            heads[at].copy_from_slice(&self.forward.heads(&block, &streams.pruned[span], collect)?);
        }
        // The algebra needs the room.
        drop((dense_block, block));
        if let Some(moments) = moments {
            let mut moments = moments.finish();
            if self.settings.biases {
                moments.centre();
            }
            let keep: Vec<usize> = (0..w.attn_output.n_in).collect();
            let s = self.settings;
            let failed = at_block(il, "attn_output");
            let refit = prune::refit(&w.attn_output, &moments, s.mixture, &keep, s.ridge_stream);
            let refit = refit.map_err(|e| failed(e.into()))?;
            self.report_ridge(il, "attn_output", refit.ridge, s.ridge_stream);
            let segment =
                self.model.blocks[il].attn_output.as_ref().expect("a block with attention has attn_output");
            let ty = s.types.attn_output.unwrap_or(self.model.tensor(segment).ty);
            let q = self.requantise(&refit.weights, &moments, &keep, s.ridge_attn, ty).map_err(failed)?;
            let new = within_reason(&q, &w.attn_output).map_err(at_block(il, "attn_output"))?;
            let old = std::mem::replace(&mut w.attn_output, new);
            let maps = [&old, &w.attn_output];
            w.attn_output_bias =
                self.adapted_bias(w.attn_output_bias.take(), maps, &keep, &moments, s.mixture);
            self.plan.blocks[il].set_vector(BlockVector::AttnOutputBias, w.attn_output_bias.clone());
            self.plan.blocks[il].attn_output = Some(q.on(&s.shelf)?);
        }
        Ok(heads)
    }

    /// Chooses the neurons of block `il`, refits ffn_down, and moves the pruned stream over the block.
    fn ffn_step(
        &mut self,
        il: usize,
        w: &mut BlockWeights,
        width: usize,
        heads: Array<f32>,
        streams: &mut Streams,
    ) -> Result<String, PruneError> {
        let block = self.forward.upload(w)?;
        let n_out = if self.settings.method == Method::Putri { w.ffn_down.n_out } else { 0 };
        let mut moments = self.forward.gathering(&block, w.ffn_down.n_in, n_out)?;
        let (n_embd, n_tokens) = (self.forward.n_embd(), self.fitted.tokens.len());
        let row = heads.len() / n_tokens;
        let of = |span: &Range<usize>| span.start / n_embd * row..span.end / n_embd * row;
        for (chunk, fit) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let a = &heads[of(&span)];
            let mut mid = vec![0.0; span.len()];
            let dense = &streams.dense[span.clone()];
            let target = (n_out > 0).then_some(dense);
            let scales = token_scales(dense, self.forward.n_embd(), self.settings.token_weight);
            let collect = fit.then_some(Collect { target, scales: &scales, into: &mut moments });
            let wanted = Wanted { mid: Some(&mut mid), out: None, moments: collect };
            self.forward.from_heads(&block, &streams.pruned[span.clone()], a, wanted)?;
            if !block.is_parallel() {
                streams.pruned[span].copy_from_slice(&mid);
            }
        }
        // The algebra needs the room. A feed-forward beside attention has to begin before both again.
        let heads = block.is_parallel().then_some(heads);
        drop(block);
        let mut moments = moments.finish();
        if self.settings.biases {
            moments.centre();
        }
        let failed = at_block(il, "ffn_down");
        let ridge = self.settings.ridge_of_neurons(w.shape.n_ff, moments.n_tokens / self.settings.copies());
        let chosen = self.choose_neurons(il, w, &moments, ridge, width);
        let (keep, refit) = chosen.map_err(|e| failed(e.into()))?;
        let wanted_ridge = if self.settings.method == Method::Putri { ridge } else { 0.0 };
        self.report_ridge(il, "ffn_down", refit.ridge, wanted_ridge);
        let ty = self.type_of_ffn_down(il);
        let q = self.requantise(&refit.weights, &moments, &keep, ridge, ty).map_err(failed)?;
        let new = within_reason(&q, &w.ffn_down).map_err(at_block(il, "ffn_down"))?;
        let (maps, mixture) = ([&w.ffn_down, &new], self.settings.mixture);
        w.ffn_down_bias = self.adapted_bias(w.ffn_down_bias.take(), maps, &keep, &moments, mixture);
        self.plan.blocks[il].set_vector(BlockVector::FfnDownBias, w.ffn_down_bias.clone());
        w.keep_pieces(&[], &keep);
        w.ffn_down = new;
        self.plan.blocks[il].neurons = keep;
        self.plan.blocks[il].ffn_down = Some(q.on(&self.settings.shelf)?);

        let block = self.forward.upload(w)?;
        for (chunk, _) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let mut out = vec![0.0; span.len()];
            let x = &mut streams.pruned[span.clone()];
            match &heads {
                Some(heads) => {
                    let wanted = Wanted { out: Some(&mut out), ..Wanted::default() };
                    self.forward.from_heads(&block, x, &heads[of(&span)], wanted)?;
                }
                None => self.forward.ffn(&block, x, &mut out)?,
            }
            x.copy_from_slice(&out);
        }
        Ok(format!("{} groups, {width} neurons", w.shape.n_head_kv))
    }

    /// What becomes of the bias of a map that changes from `old` to `new` on the inputs `keep`, fitted with
    /// `mixture`: nothing if biases are to stay as they are.
    pub(super) fn adapted_bias(
        &self,
        bias: Option<Vec<f32>>,
        [old, new]: [&Matrix; 2],
        keep: &[usize],
        moments: &Moments,
        mixture: f64,
    ) -> Option<Vec<f32>> {
        if !self.settings.biases {
            return bias;
        }
        let change = prune::bias_change(old, new, keep, moments, mixture);
        Some(match bias {
            Some(bias) => bias.iter().zip(change).map(|(b, c)| b + c).collect(),
            None => change,
        })
    }

    fn choose_neurons(
        &self,
        il: usize,
        w: &BlockWeights,
        moments: &Moments,
        ridge: f64,
        width: usize,
    ) -> Result<(Vec<usize>, prune::Refit), Singular> {
        let (s, ffn_down) = (self.settings, &w.ffn_down);
        if s.method == Method::Paper {
            let keep = prune::paper_keep(ffn_down, &moments.gram, moments.n_tokens, width)?;
            let refit = prune::refit(ffn_down, moments, 0.0, &keep, 0.0)?;
            return Ok((keep, refit));
        }
        if s.method == Method::TwoStage {
            let keep = prune::loudest(&moments.gram, width);
            return Ok((keep.clone(), prune::Refit { weights: ffn_down.select_cols(&keep), ridge: 0.0 }));
        }
        let all: Vec<usize> = (0..ffn_down.n_in).collect();
        // What neurons that go leave undone is mostly a matter of those that stay; what other blocks did
        // wrong is mostly not, and fitting it closely fits this text alone.
        let corrected = prune::refit(ffn_down, moments, s.mixture, &all, s.ridge_stream)?;
        let costs = self.sensitivity.as_ref().map(|s| s.costs(il, w, &corrected.weights)).transpose()?;
        let inverse = prune::Inverse::new(&moments.gram, ridge)?;
        let (keep, mut refit) =
            prune::greedy(&corrected.weights, costs.as_ref(), inverse, width, self.choice)?;
        if corrected.ridge > s.ridge_stream {
            refit.ridge = refit.ridge.max(corrected.ridge);
        }
        Ok((keep, refit))
    }

    /// All windows in chunks, with whether they are fitted on.
    pub(super) fn all_chunks(&self) -> Vec<(Range<usize>, bool)> {
        let w = self.fitted;
        let fit = self.forward.chunks(0..w.n_fit).into_iter().map(|c| (c, true));
        let held_out = self.forward.chunks(w.n_fit..w.n_windows()).into_iter().map(|c| (c, false));
        fit.chain(held_out).collect()
    }

    /// The type that ffn_down of block `il` shall have.
    pub(super) fn type_of_ffn_down(&self, il: usize) -> Type {
        let source = self.model.tensor(&self.model.blocks[il].down()).ty;
        self.settings.types.ffn_down.unwrap_or(source)
    }

    /// Encodes refitted weights on the inputs `keep`.
    pub(super) fn requantise(
        &self,
        weights: &Matrix,
        moments: &Moments,
        keep: &[usize],
        ridge: f64,
        ty: Type,
    ) -> Result<Quantised, FeedbackError> {
        if self.settings.error_feedback {
            return quantise_with_feedback(weights, &moments.gram, keep, ridge, ty);
        }
        Ok(quantise(weights, ty, &importance(moments, keep))?)
    }

    pub(super) fn report_ridge(&mut self, il: usize, part: &str, used: f64, wanted: f64) {
        if used.is_infinite() {
            self.warnings.push(format!("block {il}, {part}: its inputs do not vary, so nothing was fitted"));
        } else if used > wanted {
            self.warnings
                .push(format!("block {il}, {part}: needed a ridge of {used:.0e} (asked for {wanted:.0e})"));
        }
    }
}

/// How far the tokens of `stream` `[n_tokens, n_embd]` are from those of `dense` on average, relative to the length of
/// the latter.
fn mean_distance(dense: &[f32], stream: &[f32], n_embd: usize) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let tokens = dense.chunks_exact(n_embd).zip(stream.chunks_exact(n_embd));
    let distances = tokens.map(|(d, s)| {
        let apart = square(&mut d.iter().zip(s).map(|(d, s)| d - s));
        (apart / square(&mut d.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
    });
    distances.sum::<f64>() / (dense.len() / n_embd) as f64
}

/// Puts block and tensor to what went wrong there.
pub(super) fn at_block(block: usize, part: &'static str) -> impl Fn(FeedbackError) -> PruneError {
    move |e| match e {
        FeedbackError::Singular(source) => PruneError::Singular { block, part, source },
        FeedbackError::Ggml(source) => PruneError::Ggml(source),
        FeedbackError::Grown(times) => PruneError::Grown { block, part, times },
    }
}

/// Mean of x_j² for the inputs `keep`: llama.cpp's importance matrix.
fn importance(moments: &Moments, keep: &[usize]) -> Vec<f32> {
    let diagonal = moments.gram.diagonal();
    keep.iter().map(|&j| (diagonal[j] / moments.n_tokens.max(1) as f64) as f32).collect()
}
