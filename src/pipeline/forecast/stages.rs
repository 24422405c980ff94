//! What each stage comes to, in the order in which they run.

use super::{Sizes, StageForecast, Work, inverse_ops, removal_ops};
use crate::forward::whole_windows;
use crate::model::BlockShape;
use crate::pipeline::heads::{ROUGH_CTX, ROUGH_TOKENS, STREAM_BYTES, window_of_heads};
use crate::pipeline::{Method, choice, curves, sensitivity};
use crate::prune::Choice;

/// Whole models that a step of the search for heads comes to: the streams behind the group that went are refreshed,
/// and a few candidates carried to the end (measured: 1.4 on SmolLM2).
const SWEEPS_PER_STEP: f64 = 1.4;

/// What the process takes besides arrays, and what the allocator does not give back between them.
const BASE_BYTES: f64 = 150e6;

impl Work<'_> {
    /// Samples of the curvature go back through all blocks; in mixtures, every candidate is carried through the blocks
    /// behind it once.
    pub(super) fn first_look(&self) -> StageForecast {
        let name = "heads, first look";
        if self.model.hparams.experts.is_none() {
            let n_ctx = window_of_heads(self.s, self.c.n_ctx);
            let n = self.sampled(self.s.head_tokens, n_ctx);
            let stage = self.carried_back(name, &self.whole(), 0, n, n_ctx);
            // attn_output once for all groups, and without each.
            let products = |(b, of): (&Sizes, &BlockShape)| b.q * (1.0 + of.n_head_kv as f64);
            let sum: f64 = self.whole().iter().zip(&self.model.hparams.blocks).map(products).sum();
            let operations = stage.operations + 2.0 * n * self.n_embd() * sum;
            // No groups go: there is no look at them.
            return StageForecast { operations: if self.kept < 1.0 { operations } else { 0.0 }, ..stage };
        }
        let n_ctx = ROUGH_CTX.min(window_of_heads(self.s, self.c.n_ctx));
        let n = self.sampled(ROUGH_TOKENS, n_ctx);
        let (mut behind, mut sum) = (0.0, 0.0);
        for (il, b) in self.whole().into_iter().enumerate().rev() {
            let here = self.model.hparams.blocks[il].n_head_kv as f64;
            sum += here * (self.rest_ops(b, n) + behind) + self.heads_ops(il, b, n, n_ctx);
            behind += self.block_ops(il, b, n, n_ctx);
        }
        self.search(name, n, n_ctx, sum, self.n_groups())
    }

    /// `n_groups` steps.
    pub(super) fn heads(&self, n_groups: usize) -> StageForecast {
        let n_ctx = window_of_heads(self.s, self.c.n_ctx);
        let n = self.sampled(self.s.head_tokens, n_ctx);
        let sweeps = n_groups as f64 * SWEEPS_PER_STEP * self.model_ops(&self.whole(), n, n_ctx);
        self.search("heads", n, n_ctx, sweeps, 4.0 * n_groups as f64)
    }

    /// A search over `n` tokens that takes so many operations for its candidates, and `n_scores` losses.
    fn search(
        &self,
        name: &'static str,
        n: f64,
        n_ctx: usize,
        candidates: f64,
        n_scores: f64,
    ) -> StageForecast {
        let whole = self.model_ops(&self.whole(), n, n_ctx);
        let width = n * self.n_embd() * 4.0;
        let streams = self.stream_bytes((self.n_layer() + 1.0) * n * self.n_embd());
        let together = (n_scores * width).min(STREAM_BYTES as f64);
        let searching = together + self.block_bytes() + self.graph_bytes(n_ctx, n) + 3.0 * width;
        let judging = 4.0 * self.n_embd() * self.known(n) + self.block_bytes() + self.graph_bytes(n_ctx, n);
        // No groups go: there is no search.
        let runs = self.kept < 1.0;
        StageForecast {
            name,
            operations: if runs { whole + candidates + self.judge_ops(n, 1.0 + n_scores) } else { 0.0 },
            algebra: 0.0,
            memory: BASE_BYTES + streams + searching.max(self.predicting_bytes()),
            on_devices: judging.max(self.predicting_bytes()),
        }
    }

    pub(super) fn widths(&self) -> StageForecast {
        let n_ctx = self.c.n_ctx;
        let (probe_ctx, n_probe) = self.probes();
        let n = (curves::n_windows(self.s, n_ctx, self.c.n_fit) * n_ctx) as f64;
        let (mut operations, mut algebra) = (0.0, 0.0);
        for (il, b) in self.headless().into_iter().enumerate() {
            let narrowed = Sizes { ff: b.ff * (1.0 - self.s.sparsity), ..b };
            operations += self.block_ops(il, b, n, n_ctx) + self.moment_ops(b.ff, 0.0, n);
            operations += self.block_ops(il, b, n_probe, probe_ctx);
            operations += self.block_ops(il, narrowed, n_probe, probe_ctx);
            algebra += inverse_ops(b.ff) + removal_ops(b.ff, 0.0, 2.0 * self.n_embd());
        }
        let streams = self.stream_bytes(n * self.n_embd()) + self.sensitivity_bytes();
        let probes = 3.0 * 4.0 * n_probe * self.n_embd();
        let sums = self.sums_bytes(self.max_ff(), 0.0);
        let moments = 4.0 * self.max_ff().powi(2);
        let collecting = self.block_bytes() + moments + self.moment_graph_bytes(n_ctx, n) + sums;
        let probing = self.block_bytes() + self.graph_bytes(probe_ctx, n_probe);
        // Of an inverse that is made beside its factor, half is never touched. Graphs keep what they needed.
        let graphs = self.moment_graph_bytes(n_ctx, n);
        let choosing = self.block_bytes() + self.choosing_bytes(0.0, false, 6.0) + graphs;
        StageForecast {
            name: "widths",
            operations: if self.s.per_block_widths { operations } else { 0.0 },
            algebra,
            memory: BASE_BYTES + streams + probes + collecting.max(choosing).max(moments + probing + sums),
            on_devices: self.kept_graph_bytes() + probing.max(self.block_bytes() + sums),
        }
    }

    /// As [`Work::widths`], but some blocks only, narrowed once for each way to choose, and compared at the end.
    pub(super) fn choice(&self) -> StageForecast {
        let n_ctx = self.c.n_ctx;
        let (trial_ctx, n_trial) = self.probes();
        let n = (curves::n_windows(self.s, n_ctx, self.c.n_fit) * n_ctx) as f64;
        let ways = Choice::ALL.len() as f64;
        let e = self.n_embd();
        let whole = self.whole();
        let compared = self.model_ops(&whole, n_trial, trial_ctx) + self.judge_ops(n_trial, ways);
        let (mut operations, mut algebra) = (compared, 0.0);
        for (il, (b, narrowed)) in self.headless().into_iter().zip(self.pruned()).enumerate() {
            operations += self.block_ops(il, b, n, n_ctx);
            if !choice::is_tried(il, whole.len()) {
                operations += ways * self.block_ops(il, b, n_trial, trial_ctx);
                continue;
            }
            operations += self.moment_ops(b.ff, 0.0, n);
            operations += ways * self.block_ops(il, narrowed, n_trial, trial_ctx);
            algebra += self.metric_ops(b.ff);
            algebra += inverse_ops(b.ff) + ways * removal_ops(b.ff, narrowed.ff, 3.0 * e);
        }
        let streams = self.stream_bytes(n * e) + self.sensitivity_bytes();
        let streams_tried = (2.0 + ways) * 4.0 * n_trial * e;
        let (sums, moments) = (self.sums_bytes(self.max_ff(), 0.0), 4.0 * self.max_ff().powi(2));
        let collecting = self.block_bytes() + moments + self.moment_graph_bytes(n_ctx, n) + sums;
        // With the inverse for the way that comes after.
        let trying = 2.0 * self.block_bytes() + 2.0 * moments + self.graph_bytes(trial_ctx, n_trial) + sums;
        let maps = 4.0 * self.max_ff() * e;
        let graphs = self.moment_graph_bytes(n_ctx, n);
        let choosing = self.block_bytes() + maps + self.choosing_bytes(0.0, true, 8.0) + graphs;
        let most =
            collecting.max(choosing).max(trying + maps).max(self.scratch_bytes() + self.predicting_bytes());
        StageForecast {
            name: "choice",
            // Without samples there is nothing to choose by.
            operations: if self.s.sensitivity_tokens > 0 && self.s.choice.is_none() {
                operations
            } else {
                0.0
            },
            algebra,
            memory: BASE_BYTES + streams + streams_tried + most,
            on_devices: self.kept_graph_bytes()
                + self.graph_bytes(trial_ctx, n_trial)
                + (self.block_bytes() + sums).max(self.predicting_bytes()),
        }
    }

    pub(super) fn sensitivity(&self) -> StageForecast {
        let (n_ctx, n) = self.probes();
        let stage = self.carried_back("sensitivity", &self.headless(), 1, n, n_ctx);
        StageForecast {
            operations: if self.s.sensitivity_tokens > 0 { stage.operations } else { 0.0 },
            memory: stage.memory + self.sensitivity_bytes(),
            ..stage
        }
    }

    /// Samples of the curvature, for `n` tokens in windows of `n_ctx`, on their way back through `blocks` from the last to
    /// block `first`.
    fn carried_back(
        &self,
        name: &'static str,
        blocks: &[Sizes],
        first: usize,
        n: f64,
        n_ctx: usize,
    ) -> StageForecast {
        let back: f64 = blocks[first..].iter().map(|b| self.gradient_ops(*b, n, n_ctx)).sum();
        let batch = n.min(sensitivity::BATCH_TOKENS as f64);
        let streams = self.stream_bytes(self.n_layer() * self.n_embd() * batch);
        StageForecast {
            name,
            operations: self.model_ops(blocks, n, n_ctx) + back + self.loss_ops(n, batch, 2.0),
            algebra: 0.0,
            memory: BASE_BYTES + streams + self.back_bytes(n_ctx, batch),
            on_devices: self.back_bytes(n_ctx, batch),
        }
    }

    pub(super) fn twins(&self) -> StageForecast {
        let (n_ctx, n) = (self.c.n_ctx, self.n_fit());
        let drawn = (self.s.copies() - 1) as f64 * self.s.twins_drawn * n;
        let operations = self.model_ops(&self.whole(), n, n_ctx) + self.logit_ops(self.n_vocab(), drawn);
        // Graphs keep the largest of what they needed.
        let passing = self.graph_bytes(n_ctx, n) + self.predicting_bytes().max(self.block_bytes());
        StageForecast {
            name: "twins",
            operations: if self.s.copies() > 1 { operations } else { 0.0 },
            algebra: 0.0,
            memory: BASE_BYTES + self.sensitivity_bytes() + self.stream_bytes(n * self.n_embd()) + passing,
            on_devices: passing,
        }
    }

    pub(super) fn blocks(&self) -> StageForecast {
        let (n_all, n_fit, n_ctx, e) = (self.n_all(), self.n_fitted(), self.c.n_ctx, self.n_embd());
        let ours = self.s.method == Method::Putri;
        let (mut operations, mut algebra) = (0.0, 0.0);
        let blocks = self.whole().into_iter().zip(self.headless()).zip(self.pruned());
        for (il, ((whole, headless), pruned)) in blocks.enumerate() {
            operations +=
                self.block_ops(il, whole, n_all, n_ctx) + self.heads_ops(il, headless, n_all, n_ctx);
            let ffn = 2.0 * self.ffn_matrices() * e;
            operations += 2.0 * e * headless.q * n_all + ffn * headless.ff * n_fit;
            operations += ffn * pruned.ff * n_all;
            if ours {
                operations += self.moment_ops(headless.q, e, n_fit) + 2.0 * e * headless.q * n_fit;
                algebra += 2.0 / 3.0 * headless.q.powi(3) + 3.0 * e * headless.q.powi(2);
            }
            if let Some([n_used, n_expert]) = self.experts() {
                operations += 2.0 * e * (headless.router * n_fit + pruned.router * n_all);
                let n = headless.refitted;
                if n > 0.0 {
                    // Of the chosen experts, gate and up only; the tokens of all of them.
                    operations -= ffn * headless.ff * n_fit;
                    operations += n_used * (4.0 * e * n * n_fit + self.moment_ops(n, 0.0, n_fit));
                    let width = pruned.refitted;
                    algebra +=
                        n_expert * (inverse_ops(n) + removal_ops(n, width, 2.0 * e) + width.powi(3) / 3.0);
                }
                continue;
            }
            operations += self.moment_ops(headless.ff, self.n_residuals(), n_fit);
            algebra += (headless.ff.powi(3) + pruned.ff.powi(3)) / 3.0 + e * pruned.ff.powi(2);
            if ours {
                algebra += 2.0 * e * headless.ff.powi(2) + self.metric_ops(headless.ff);
                algebra += inverse_ops(headless.ff) + removal_ops(headless.ff, pruned.ff, 3.0 * e);
            }
        }
        let streams = self.stream_bytes(n_all * (2.0 * e + self.max_q()));
        let n_out = self.n_residuals();
        let moments = 4.0 * self.max_ff().powi(2) + 8.0 * self.max_ff() * n_out;
        let sums = self.sums_bytes(self.max_ff(), n_out);
        // Of the pruned block, what is not the dense one's.
        let crossing = 2.0 * self.block_bytes() + self.graph_bytes(n_ctx, n_fit) + sums;
        let collecting = self.block_bytes() + moments + self.moment_graph_bytes(n_ctx, n_fit) + sums;
        let maps = 2.0 * 4.0 * self.max_ff() * e;
        // Fits and the paper's score are in 64 bits.
        let choosing =
            self.block_bytes() + maps + self.choosing_bytes(n_out, true, if ours { 8.0 } else { 12.0 });
        let width = self.pruned().iter().map(|b| b.refitted).fold(0.0, f64::max);
        let rounded = 8.0 * width.powi(2) + 16.0 * width * e;
        let rounding = self.block_bytes() + maps + moments + rounded + sums;
        StageForecast {
            name: "blocks",
            operations,
            algebra,
            memory: BASE_BYTES
                + streams
                + self.sensitivity_bytes()
                + self.new_bytes()
                + crossing.max(collecting).max(choosing).max(rounding),
            on_devices: self.kept_graph_bytes()
                + self.block_bytes()
                + sums.max(self.block_bytes() + self.sums_bytes(self.max_q(), n_out)),
        }
    }

    pub(super) fn prepare_tuning(&self) -> StageForecast {
        let operations = self.judge_ops(self.n_held_out(), 1.0);
        let streams = self.stream_bytes(self.n_embd() * 2.0 * self.n_all());
        StageForecast {
            name: "tune, preparing",
            operations: if self.s.tune > 0 { operations } else { 0.0 },
            algebra: 0.0,
            memory: BASE_BYTES + streams + self.new_bytes() + self.scratch_bytes() + self.predicting_bytes(),
            on_devices: self.kept_graph_bytes() + self.predicting_bytes(),
        }
    }

    pub(super) fn tune(&self) -> StageForecast {
        let (n_ctx, n) = self.lessons();
        let (pruned, n_held_out) = (self.pruned(), self.n_held_out());
        // Half of the windows are read again, with tokens drawn anew; all, where they are cut.
        let read = if n_ctx == self.c.n_ctx { n / 2.0 } else { n };
        let step = n.min(whole_windows(self.s.tune_tokens, n_ctx) as f64);
        let pass = self.model_ops(&self.whole(), read, n_ctx)
            + self.logit_ops(self.n_vocab(), self.s.tune_drawn * n / 2.0)
            + self.model_ops(&pruned, n, n_ctx)
            + pruned.iter().map(|b| self.gradient_ops(*b, n, n_ctx)).sum::<f64>()
            + self.loss_ops(n, step, 3.0);
        let held_out = self.model_ops(&pruned, n_held_out, self.c.n_ctx)
            + self.logit_ops(2.0 * self.n_vocab() + self.known(n_held_out), n_held_out);
        let streams = self.stream_bytes(self.n_embd() * (self.n_layer() * step + 2.0 * self.n_all()));
        StageForecast {
            name: "tune",
            operations: if self.s.tune > 0 { self.s.tune as f64 * pass + held_out } else { 0.0 },
            algebra: 0.0,
            memory: BASE_BYTES
                + streams
                + self.new_bytes()
                // At the end predictions before and after are compared.
                + self.back_bytes(n_ctx, step).max(self.predicting_bytes() + self.logits_bytes())
                + self.scratch_bytes().max(self.logits_bytes()),
            on_devices: self.back_bytes(n_ctx, step) + self.kept_graph_bytes(),
        }
    }
}
