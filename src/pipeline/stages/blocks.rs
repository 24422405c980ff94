//! Sequential pass over the blocks that refits, selects and requantises.

mod attention;
mod record;
mod settings;

use super::{Stage, block_record};
use crate::forward::{Block, BlockOutputs, Collect};
use crate::ggml::Type;
use crate::gguf::Value;
use crate::model::{BlockMatrix, BlockShape, BlockVector, BlockWeights, Matrix};
use crate::numeric::Moments;
use crate::pipeline::forecast::{BASE_BYTES, StageForecast, Work, inverse_ops, removal_ops};
use crate::pipeline::run::Run;
use crate::pipeline::stream::{Streams, embedded};
use crate::pipeline::{BlockPlan, KeptTensor, PruneError, Record, token_scales};
use crate::prune::{self, Singular};
use crate::requant::{FeedbackError, Quantised, quantise, quantise_with_feedback, within_reason};
use crate::spill::SpillVec;
use record::{decode, encode};
pub use settings::BlockSettings;
use std::ops::Range;
use std::sync::Arc;

/// Stage that narrows every block to its width, one after another.
///
/// For each block it refits `attn_output`, chooses neurons or experts, refits `ffn_down`, and requantises
/// both. Each block sees the pruned and requantised blocks before it.
pub(in crate::pipeline) struct Blocks {
    /// Whether both maps are refitted towards the dense model's residual stream. Otherwise only `ffn_down` is
    /// refitted, to its output before.
    towards_dense: bool,
    selection: Selection,
}

/// Selection of the neurons to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Selection {
    /// Greedy selection by the run's criterion.
    Greedy,
    /// Selection by the paper's score.
    PaperScore,
    /// Selection by the norm of the activations, without a refit.
    ActivationNorm,
}

impl Blocks {
    pub(in crate::pipeline) const TOWARDS_DENSE: Blocks =
        Blocks { towards_dense: true, selection: Selection::Greedy };
    pub(in crate::pipeline) const PAPER: Blocks =
        Blocks { towards_dense: false, selection: Selection::PaperScore };
    /// First stage of 2SSP.
    pub(in crate::pipeline) const TWO_STAGE: Blocks =
        Blocks { towards_dense: false, selection: Selection::ActivationNorm };
}

impl Stage for Blocks {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        let (n_all, n_fit, n_ctx, e) = (w.n_all(), w.n_fitted(), w.c.n_ctx, w.n_embd());
        let ours = self.towards_dense;
        let (mut operations, mut algebra) = (0.0, 0.0);
        let blocks = w.whole().into_iter().zip(w.headless()).zip(w.pruned());
        for (il, ((whole, headless), pruned)) in blocks.enumerate() {
            operations += w.block_ops(il, whole, n_all, n_ctx) + w.heads_ops(il, headless, n_all, n_ctx);
            let ffn = 2.0 * w.ffn_matrices() * e;
            operations += 2.0 * e * headless.q * n_all + ffn * headless.ff * n_fit;
            operations += ffn * pruned.ff * n_all;
            if ours {
                operations += w.moment_ops(headless.q, e, n_fit);
                algebra += 2.0 / 3.0 * headless.q.powi(3) + 3.0 * e * headless.q.powi(2);
            }
            // Outputs of both maps, for the residuals: of each token, or of the sums.
            if w.maps_every_token() {
                operations += if ours { 2.0 * e * headless.q * n_fit } else { 0.0 };
            } else {
                operations -= if w.experts().is_none() { 2.0 * e * headless.ff * n_fit } else { 0.0 };
                algebra += if ours { e * (headless.q.powi(2) + headless.refitted.powi(2)) } else { 0.0 };
            }
            if let Some([n_used, n_expert]) = w.experts() {
                operations += 2.0 * e * (headless.router * n_fit + pruned.router * n_all);
                let n = headless.refitted;
                if n > 0.0 {
                    // Only gate and up of the chosen experts, for the tokens of all of them.
                    operations -= ffn * headless.ff * n_fit;
                    operations += n_used * (4.0 * e * n * n_fit + w.moment_ops(n, 0.0, n_fit));
                    let width = pruned.refitted;
                    algebra +=
                        n_expert * (inverse_ops(n) + removal_ops(n, width, 2.0 * e) + width.powi(3) / 3.0);
                }
                continue;
            }
            operations += w.moment_ops(headless.ff, w.n_residuals(), n_fit);
            algebra += (headless.ff.powi(3) + pruned.ff.powi(3)) / 3.0 + e * pruned.ff.powi(2);
            if ours {
                algebra += 2.0 * e * headless.ff.powi(2) + w.metric_ops(headless.ff);
                algebra += inverse_ops(headless.ff) + removal_ops(headless.ff, pruned.ff, 3.0 * e);
            }
        }
        let streams = w.stream_bytes(n_all * (2.0 * e + w.max_q()));
        let n_out = w.n_residuals();
        let moments = 4.0 * w.max_ff().powi(2) + 8.0 * w.max_ff() * n_out;
        let sums = w.sums_bytes(w.max_ff(), n_out);
        // The part of the pruned block that it does not share with the dense one.
        let crossing = 2.0 * w.block_bytes() + w.graph_bytes(n_ctx, n_fit) + sums;
        let collecting = w.block_bytes() + moments + w.moment_graph_bytes(n_ctx, n_fit) + sums;
        let maps = 2.0 * 4.0 * w.max_ff() * e;
        // Fits and the paper's score are in 64 bits.
        let choosing = w.block_bytes() + maps + w.choosing_bytes(n_out, true, if ours { 8.0 } else { 12.0 });
        let width = w.pruned().iter().map(|b| b.refitted).fold(0.0, f64::max);
        let rounded = 8.0 * width.powi(2) + 16.0 * width * e;
        let rounding = w.block_bytes() + maps + moments + rounded + sums;
        vec![StageForecast {
            name: "blocks",
            operations,
            algebra,
            memory: BASE_BYTES
                + streams
                + w.sensitivity_bytes()
                + w.new_bytes()
                + crossing.max(collecting).max(choosing).max(rounding),
            on_devices: w.kept_graph_bytes()
                + w.block_bytes()
                + sums.max(w.block_bytes() + w.sums_bytes(w.max_q(), n_out)),
        }]
    }

    fn records(&self, n_layer: usize) -> Vec<String> {
        (0..n_layer).map(block_record).collect()
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        let (fitted, spill) = (Arc::clone(&run.fitted), &run.settings.spill);
        let mut streams = Streams {
            dense: embedded(&run.forward, run.reference, &fitted.tokens, spill)?,
            pruned: embedded(&run.forward, run.model, &fitted.tokens, spill)?,
        };
        let n_layer = run.widths.len();
        run.observer.stage("blocks", n_layer);
        for il in 0..n_layer {
            run.check_interrupted()?;
            let note = if run.take_over(il, &mut streams)? {
                "from before".into()
            } else {
                // The records of later blocks belong to another input.
                run.blocks_resume = false;
                self.narrow(run, il, &mut streams)?
            };
            run.observer.step(il + 1, &note);
        }
        run.sensitivity = None;
        run.streams = Some(streams);
        Ok(())
    }
}

impl Blocks {
    /// Prunes block `il` and returns a note on the result.
    fn narrow(&self, run: &mut Run, il: usize, streams: &mut Streams) -> Result<String, PruneError> {
        let (n_warnings, width) = (run.warnings.len(), run.widths[il]);
        let whole = run.reference.block(il)?;
        let dense_block = run.forward.upload(&whole)?;
        let mut w = if std::ptr::eq(run.model, run.reference) {
            whole
        } else {
            let mut w = run.model.block(il)?;
            // Matrices that get new values start from the source's. The rest of the source is not needed.
            let of_source = |source: BlockWeights| (source.attn_output, source.ffn_down);
            let (attn_output, ffn_down) = of_source(whole);
            w.ffn_down = ffn_down;
            if self.towards_dense {
                w.attn_output = attn_output;
            }
            w
        };
        let groups = &run.plan.blocks[il].groups;
        if groups.len() < w.shape.n_head_kv {
            w.keep_groups(groups, run.model.hparams.head_dim);
        }
        let attn_out_input = run.attention_step(self, il, dense_block, &mut w, streams)?;
        let note = match w.experts {
            None => run.ffn_step(self, il, &mut w, width, attn_out_input, streams)?,
            Some(_) => run.expert_step(il, &mut w, width, attn_out_input, streams)?,
        };
        run.checkpoint.save(&block_record(il), encode(&run.plan.blocks[il], &run.warnings[n_warnings..]))?;
        let held_out = run.forward.span(&(run.fitted.n_fit..run.fitted.n_windows()));
        let [dense, pruned] = [&streams.dense, &streams.pruned].map(|s| &s[held_out.clone()]);
        let off = mean_distance(dense, pruned, run.forward.n_embd());
        Ok(format!("{note}, stream {:.1} % off", off * 100.0))
    }
}

impl Run<'_> {
    /// Loads block `il` of an earlier run, if there is one, and moves both streams over it. Returns whether
    /// there is one.
    fn take_over(&mut self, il: usize, streams: &mut Streams) -> Result<bool, PruneError> {
        let name = block_record(il);
        let Some(record) = self.blocks_resume.then(|| self.checkpoint.load(&name)).transpose()?.flatten()
        else {
            return Ok(false);
        };
        let kept = decode(&record, &self.model.hparams.blocks[il]);
        let (plan, warnings) = kept.map_err(|part| self.checkpoint.damaged(&name, part))?;
        self.plan.blocks[il] = plan;
        for kept in self.plan.blocks[il].matrices.iter_mut().flatten() {
            *kept = kept.clone().on(&self.settings.spill)?;
        }
        self.warnings.extend(warnings);
        self.carry_over(il, streams)?;
        Ok(true)
    }

    /// Moves both streams over block `il` of the plan.
    /// It takes the same steps as the pruning of a block, so that the streams are identical to the last bit.
    fn carry_over(&mut self, il: usize, streams: &mut Streams) -> Result<(), PruneError> {
        let dense_block = self.forward.upload(&self.reference.block(il)?)?;
        let block = self.forward.upload(&self.plan.block(self.model, il)?)?;
        for (chunk, _) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let (mut mid, mut out) = (vec![0.0; span.len()], vec![0.0; span.len()]);
            self.forward.block(&dense_block, &streams.dense[span.clone()], Some(&mut mid), &mut out)?;
            streams.dense[span.clone()].copy_from_slice(&out);
            let x = &mut streams.pruned[span];
            let attn_out_input = self.forward.attn_out_input(&block, x, None)?;
            if block.is_parallel() {
                let wanted = BlockOutputs { out: Some(&mut out), ..BlockOutputs::default() };
                self.forward.from_attn_out_input(&block, x, &attn_out_input, wanted)?;
                x.copy_from_slice(&out);
                continue;
            }
            let wanted = BlockOutputs { mid: Some(&mut mid), ..BlockOutputs::default() };
            self.forward.from_attn_out_input(&block, x, &attn_out_input, wanted)?;
            self.forward.ffn(&block, &mid, x)?;
        }
        Ok(())
    }

    /// Chooses the neurons of block `il`, refits `ffn_down`, and moves the pruned stream over the block.
    fn ffn_step(
        &mut self,
        stage: &Blocks,
        il: usize,
        w: &mut BlockWeights,
        width: usize,
        attn_out_input: SpillVec<f32>,
        streams: &mut Streams,
    ) -> Result<String, PruneError> {
        let block = self.forward.upload(w)?;
        let n_out = if stage.towards_dense { w.ffn_down.n_out } else { 0 };
        let mut moments = self.forward.gathering(&block, w.ffn_down.n_in, n_out)?;
        let (n_embd, n_tokens) = (self.forward.n_embd(), self.fitted.tokens.len());
        let row = attn_out_input.len() / n_tokens;
        let of = |span: &Range<usize>| span.start / n_embd * row..span.end / n_embd * row;
        for (chunk, fit) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let a = &attn_out_input[of(&span)];
            let mut mid = vec![0.0; span.len()];
            let dense = &streams.dense[span.clone()];
            let target = (n_out > 0).then_some(dense);
            let scales = token_scales(dense, self.forward.n_embd(), self.settings.blocks.token_weight);
            let collect = fit.then_some(Collect { target, scales: &scales, into: &mut moments });
            let wanted = BlockOutputs { mid: Some(&mut mid), out: None, moments: collect };
            self.forward.from_attn_out_input(&block, &streams.pruned[span.clone()], a, wanted)?;
            if !block.is_parallel() {
                streams.pruned[span].copy_from_slice(&mid);
            }
        }
        // Frees the memory for the algebra. An FFN parallel to attention is computed again from the input of
        // both.
        let attn_out_input = block.is_parallel().then_some(attn_out_input);
        drop(block);
        let mut moments = moments.finish();
        if self.settings.blocks.biases {
            moments.centre();
        }
        let failed = at_block(il, "ffn_down");
        let ridge = self.settings.ridge_of_neurons(w.shape.n_ff, moments.n_tokens / self.settings.copies());
        let chosen = self.choose_neurons(stage.selection, il, w, &moments, ridge, width);
        let (keep, refit) = chosen.map_err(|e| failed(e.into()))?;
        let wanted_ridge = if stage.towards_dense { ridge } else { 0.0 };
        self.report_ridge(il, "ffn_down", refit.ridge, wanted_ridge);
        let ty = self.type_of_ffn_down(il);
        let q = self.requantise(&refit.weights, &moments, &keep, ridge, ty).map_err(failed)?;
        let new = within_reason(&q, &w.ffn_down).map_err(at_block(il, "ffn_down"))?;
        let (maps, dense_target_weight) = ([&w.ffn_down, &new], self.settings.blocks.dense_target_weight);
        w.ffn_down_bias = self.settings.blocks.adapted_bias(
            w.ffn_down_bias.take(),
            maps,
            &keep,
            &moments,
            dense_target_weight,
        );
        self.plan.blocks[il].set_vector(BlockVector::FfnDownBias, w.ffn_down_bias.clone());
        w.keep_units(&[], &keep);
        w.ffn_down = new;
        self.plan.blocks[il].neurons = keep;
        let q = q.on(&self.settings.spill)?;
        self.plan.blocks[il].set_matrix(BlockMatrix::FfnDown, q);

        let block = self.forward.upload(w)?;
        for (chunk, _) in self.all_chunks() {
            let span = self.forward.span(&chunk);
            let mut out = vec![0.0; span.len()];
            let x = &mut streams.pruned[span.clone()];
            match &attn_out_input {
                Some(attn_out_input) => {
                    let wanted = BlockOutputs { out: Some(&mut out), ..BlockOutputs::default() };
                    self.forward.from_attn_out_input(&block, x, &attn_out_input[of(&span)], wanted)?;
                }
                None => self.forward.ffn(&block, x, &mut out)?,
            }
            x.copy_from_slice(&out);
        }
        Ok(format!("{} groups, {width} neurons", w.shape.n_head_kv))
    }

    fn choose_neurons(
        &self,
        selection: Selection,
        il: usize,
        w: &BlockWeights,
        moments: &Moments,
        ridge: f64,
        width: usize,
    ) -> Result<(Vec<usize>, prune::Refit), Singular> {
        let (s, ffn_down) = (self.settings, &w.ffn_down);
        if selection == Selection::PaperScore {
            let keep = prune::paper_keep(ffn_down, &moments.gram, moments.n_tokens, width)?;
            let refit = prune::refit(ffn_down, moments, 0.0, &keep, 0.0)?;
            return Ok((keep, refit));
        }
        if selection == Selection::ActivationNorm {
            let keep = prune::top_by_activation_norm(&moments.gram, width);
            return Ok((keep.clone(), prune::Refit { weights: ffn_down.select_cols(&keep), ridge: 0.0 }));
        }
        let all: Vec<usize> = (0..ffn_down.n_in).collect();
        // The error of the removed neurons depends mostly on the kept ones. The error of earlier blocks
        // mostly does not, and a close fit to it overfits the calibration text.
        let corrected =
            prune::refit(ffn_down, moments, s.blocks.dense_target_weight, &all, s.blocks.ridge_stream)?;
        let costs = self.sensitivity.as_ref().map(|s| s.costs(il, w, &corrected.weights)).transpose()?;
        let inverse = prune::Inverse::new(&moments.gram, ridge)?;
        let (keep, mut refit) =
            prune::greedy(&corrected.weights, costs.as_ref(), inverse, width, self.criterion)?;
        if corrected.ridge > s.blocks.ridge_stream {
            refit.ridge = refit.ridge.max(corrected.ridge);
        }
        Ok((keep, refit))
    }

    /// All windows in chunks, each with whether blocks are fitted to it.
    pub(in crate::pipeline) fn all_chunks(&self) -> Vec<(Range<usize>, bool)> {
        let w = &self.fitted;
        let fit = self.forward.chunks(0..w.n_fit).into_iter().map(|c| (c, true));
        let held_out = self.forward.chunks(w.n_fit..w.n_windows()).into_iter().map(|c| (c, false));
        fit.chain(held_out).collect()
    }

    /// Requested type of `ffn_down` of block `il`.
    pub(in crate::pipeline) fn type_of_ffn_down(&self, il: usize) -> Type {
        let source = self.model.tensor(&self.model.blocks[il].down()).ty;
        self.settings.types.ffn_down.unwrap_or(source)
    }

    /// Quantises refitted weights on the inputs `keep`.
    pub(in crate::pipeline) fn requantise(
        &self,
        weights: &Matrix,
        moments: &Moments,
        keep: &[usize],
        ridge: f64,
        ty: Type,
    ) -> Result<Quantised, FeedbackError> {
        if self.settings.blocks.error_feedback {
            return quantise_with_feedback(weights, &moments.gram, keep, ridge, ty, None);
        }
        Ok(quantise(weights, ty, &importance(moments, keep))?)
    }

    pub(in crate::pipeline) fn report_ridge(&mut self, il: usize, part: &str, used: f64, wanted: f64) {
        if used.is_infinite() {
            self.warnings.push(format!("block {il}, {part}: its inputs do not vary, so nothing was fitted"));
        } else if used > wanted {
            self.warnings
                .push(format!("block {il}, {part}: needed a ridge of {used:.0e} (asked for {wanted:.0e})"));
        }
    }
}

/// Mean distance of the tokens of `stream` `[n_tokens, n_embd]` from those of `dense`, relative to the length
/// of the latter.
fn mean_distance(dense: &[f32], stream: &[f32], n_embd: usize) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let tokens = dense.chunks_exact(n_embd).zip(stream.chunks_exact(n_embd));
    let distances = tokens.map(|(d, s)| {
        let apart = square(&mut d.iter().zip(s).map(|(d, s)| d - s));
        (apart / square(&mut d.iter().copied()).max(f64::MIN_POSITIVE)).sqrt()
    });
    distances.sum::<f64>() / (dense.len() / n_embd) as f64
}

/// Adds block and tensor to an error.
pub(in crate::pipeline) fn at_block(
    block: usize,
    part: &'static str,
) -> impl Fn(FeedbackError) -> PruneError {
    move |e| match e {
        FeedbackError::Singular(source) => PruneError::Singular { block, part, source },
        FeedbackError::Ggml(source) => PruneError::Ggml(source),
        FeedbackError::Grown(times) => PruneError::Grown { block, part, times },
    }
}

/// Mean of x_j² for the inputs `keep`, as in llama.cpp's importance matrix.
fn importance(moments: &Moments, keep: &[usize]) -> Vec<f32> {
    let diagonal = moments.gram.diagonal();
    keep.iter().map(|&j| (diagonal[j] / moments.n_tokens.max(1) as f64) as f32).collect()
}
