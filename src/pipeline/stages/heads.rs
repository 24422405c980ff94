//! Search for attention groups to remove, over cached residual streams.

use super::{HEADS, Stage, sensitivity};
use crate::forward::{Block, BlockOutputs, Forward, MAX_GRADIENT_CTX};
use crate::ggml::Token;
use crate::model::BlockShape;
use crate::pipeline::allocation::removable_groups;
use crate::pipeline::forecast::{BASE_BYTES, Sizes, StageForecast, Work};
use crate::pipeline::prediction_loss::{Loss, PredictionLoss};
use crate::pipeline::run::Run;
use crate::pipeline::stream::embedded;
use crate::pipeline::{Plan, PruneError, Record, Settings, forward};
use crate::prune::{Candidate, GroupId, LazyGreedy};
use crate::spill::SpillVec;

/// Number of tokens, and of tokens per window, for the first order of the candidates in models without
/// gradients.
pub(in crate::pipeline) const ROUGH_TOKENS: usize = 256;
pub(in crate::pipeline) const ROUGH_CTX: usize = 128;

/// Largest number of bytes of the candidates' residual streams at a time.
pub(in crate::pipeline) const STREAM_BYTES: usize = 256 << 20;

/// Settings of the search for heads.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadSettings {
    /// Number of attention groups to remove, instead of the method's formula.
    pub groups: Option<usize>,
    /// Number of tokens that the search for heads evaluates.
    pub tokens: usize,
    /// Length of the longest window on which putri-gguf's own search compares candidates, of which one half
    /// is repeated; at most 512 tokens are used.
    pub ctx: usize,
    /// Number of candidates that the paper's rounds score again after the first round, instead of all.
    pub rescored: Option<usize>,
    /// Loss by which the search for heads ranks candidates after the first look, which always uses
    /// divergence.
    pub loss: Loss,
}

impl Default for HeadSettings {
    fn default() -> HeadSettings {
        HeadSettings { groups: None, tokens: 1024, ctx: 256, rescored: None, loss: Loss::Divergence }
    }
}

/// Stage that removes attention groups one at a time, each time the one whose removal changes the predictions
/// least.
pub(in crate::pipeline) struct GreedyHeads;

impl Stage for GreedyHeads {
    fn forecast(&self, w: &Work) -> Vec<StageForecast> {
        vec![forecast_first_look(w), forecast_search(w)]
    }

    fn records(&self, _: usize) -> Vec<String> {
        vec![HEADS.into()]
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        if run.n_groups == 0 {
            return Ok(());
        }
        let limits = group_limits(run);
        let may_remove = |removed: &[GroupId], c: GroupId| {
            removed.iter().filter(|r| r.block == c.block).count() < limits[c.block]
        };
        let removed = run.least_divergent(candidates(run), run.n_groups, may_remove)?;
        removed.into_iter().for_each(|id| run.plan.remove_group(id));
        Ok(())
    }
}

/// All attention groups of the plan.
pub(super) fn candidates(run: &Run) -> Vec<GroupId> {
    let groups = |b: usize| run.plan.blocks[b].groups.iter().map(move |&group| GroupId { block: b, group });
    (0..run.plan.blocks.len()).flat_map(groups).collect()
}

/// Encodes the search as a record.
fn encode(search: &LazyGreedy) -> Record {
    let removed = search.removed.iter().flat_map(|g| [g.block, g.group]);
    let candidate = |c: &Candidate| {
        let scored_at = c.scored_at.map_or(0, |n| n + 1);
        [c.id.block, c.id.group, c.score.to_bits() as usize, scored_at]
    };
    let candidates = search.candidates.iter().flat_map(candidate);
    Record::default().with_numbers("removed", removed).with_numbers("candidates", candidates)
}

/// Decodes the search of a record, for a model with blocks of these shapes; none if the record holds no such
/// search.
fn decode(record: &Record, shapes: &[BlockShape]) -> Option<LazyGreedy> {
    let group = |n: &[usize]| {
        let [block, group] = n[..] else { return None };
        let there = shapes.get(block).is_some_and(|s| group < s.n_head_kv);
        there.then_some(GroupId { block, group })
    };
    let candidate = |n: &[usize]| {
        let [block, at, score, scored_at] = n[..] else { return None };
        let scored_at = scored_at.checked_sub(1);
        Some(Candidate { id: group(&[block, at])?, score: f64::from_bits(score as u64), scored_at })
    };
    let removed = record.numbers("removed")?.chunks(2).map(group).collect::<Option<_>>()?;
    let candidates = record.numbers("candidates")?.chunks(4).map(candidate).collect::<Option<_>>()?;
    Some(LazyGreedy { removed, candidates })
}

impl Run<'_> {
    /// Search of an earlier run.
    fn kept_search(&mut self) -> Result<Option<LazyGreedy>, PruneError> {
        let Some(record) = self.checkpoint.load(HEADS)? else { return Ok(None) };
        let search = decode(&record, &self.model.hparams.blocks);
        Ok(Some(search.ok_or_else(|| self.checkpoint.damaged(HEADS, "groups"))?))
    }

    /// Search of putri-gguf: one group at a time, in the order of a first look that only estimates.
    fn least_divergent(
        &mut self,
        candidates: Vec<GroupId>,
        n_remove: usize,
        may_remove: impl Fn(&[GroupId], GroupId) -> bool,
    ) -> Result<Vec<GroupId>, PruneError> {
        let n_ctx = window_of_heads(self.settings, self.windows.n_ctx);
        // In text without repetition, heads that copy from far back seem worthless.
        let tokens = self.windows.sample_twice(self.settings.head_search.tokens, n_ctx);
        let mut greedy = match self.kept_search()? {
            Some(kept) => kept,
            None => LazyGreedy::new(self.first_look(candidates, &tokens, n_ctx)?),
        };
        if greedy.removed.len() < n_remove {
            self.observer.stage("heads", n_remove);
            let mut search = Search::new(self, &tokens, n_ctx, self.settings.head_search.loss, Unit::Group)?;
            while greedy.removed.len() < n_remove
                && greedy.step(&may_remove, |removed, ask| search.score(removed, ask))?
            {
                search.run.checkpoint.save(HEADS, encode(&greedy))?;
            }
        }
        // The groups removed at a lower sparsity are the first of those removed at a higher one.
        Ok(greedy.removed.into_iter().take(n_remove).collect())
    }

    /// Estimated loss without each of the candidates, of which none is removed yet.
    fn first_look(
        &mut self,
        candidates: Vec<GroupId>,
        tokens: &[Token],
        n_ctx: usize,
    ) -> Result<Vec<(GroupId, f64)>, PruneError> {
        const STAGE: &str = "heads, first look";
        if self.model.hparams.experts.is_some() {
            self.observer.stage(STAGE, 1);
            let n_ctx = ROUGH_CTX.min(n_ctx);
            let tokens = self.windows.sample_twice(ROUGH_TOKENS, n_ctx);
            let mut search = Search::new(self, &tokens, n_ctx, self.settings.head_search.loss, Unit::Group)?;
            let scores = search.score(&[], &candidates)?;
            self.observer.step(1, "");
            return Ok(candidates.into_iter().zip(scores).collect());
        }
        let worth = self.worth_of_groups(STAGE, tokens, n_ctx)?;
        Ok(candidates.into_iter().map(|c| (c, worth[c.block][c.group])).collect())
    }
}

/// Number of tokens per window on which the search compares candidates, for calibration windows of `n_ctx`
/// tokens. It is even, and gradients can go back through it.
pub(in crate::pipeline) fn window_of_heads(s: &Settings, n_ctx: usize) -> usize {
    (s.head_search.ctx.min(n_ctx).min(MAX_GRADIENT_CTX) & !1).max(2)
}

/// Number of groups that each block may lose, so that stock llama.cpp runs the rest.
pub(super) fn group_limits(run: &Run) -> Vec<usize> {
    let budgets = &run.budgets;
    match run.plan.output_archs.of_heads() {
        None => vec![run.n_groups / budgets.len(); budgets.len()],
        Some(output_arch) => removable_groups(output_arch, budgets),
    }
}

/// Unit of removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// One attention group.
    Group,
    /// All groups of the block that contains the group.
    Attention,
}

/// State of the search, with cached residual streams.
pub(super) struct Search<'r, 'a> {
    run: &'r mut Run<'a>,
    forward: Forward,
    unit: Unit,
    /// Plan with the groups removed so far.
    plan: Plan,
    removed: usize,
    judge: PredictionLoss,
    /// Input `[n_tokens, n_embd]` of every block under the plan, and the last block's output.
    base: Vec<SpillVec<f32>>,
    base_loss: f64,
}

impl<'r, 'a> Search<'r, 'a> {
    /// Caches the residual streams of `tokens` in windows of `n_ctx`.
    pub(super) fn new(
        run: &'r mut Run<'a>,
        tokens: &[Token],
        n_ctx: usize,
        loss: Loss,
        unit: Unit,
    ) -> Result<Self, PruneError> {
        let s = run.settings;
        let forward = forward(run.model, n_ctx, s)?;
        let plan = run.plan.clone();
        let mut base = vec![embedded(&forward, run.model, tokens, &s.spill)?];
        for il in 0..run.model.hparams.n_layer() {
            let block = forward.upload(&plan.block(run.model, il)?)?;
            let x = &base[il];
            let mut y = s.spill.zeros(x.len())?;
            forward.stream(&block, x, &mut y)?;
            base.push(y);
        }
        let last = &base[base.len() - 1];
        let judge = PredictionLoss::new(&forward, run.model, run.model, tokens, last, loss)?;
        let base_loss = judge.loss(&forward, last)?;
        Ok(Search { run, forward, unit, plan, removed: 0, judge, base, base_loss })
    }

    /// Growth of the loss without each of `ask`, once `removed` are removed.
    pub(super) fn score(&mut self, removed: &[GroupId], ask: &[GroupId]) -> Result<Vec<f64>, PruneError> {
        let dirty = removed[self.removed..].iter().map(|r| r.block).min();
        for &id in &removed[self.removed..] {
            match self.unit {
                Unit::Group => self.plan.remove_group(id),
                Unit::Attention => self.plan.blocks[id.block].groups.clear(),
            }
        }
        self.removed = removed.len();
        if let Some(block) = dirty {
            self.sweep(Some(block), &[])?;
            self.run.observer.step(removed.len(), &format!("loss {:.4}", self.base_loss));
        }
        let per_sweep = (STREAM_BYTES / (self.base[0].len() * 4)).max(1);
        let mut by_block: Vec<usize> = (0..ask.len()).collect();
        by_block.sort_by_key(|&i| ask[i]);
        let mut losses = vec![0.0; ask.len()];
        for part in by_block.chunks(per_sweep) {
            let ids: Vec<GroupId> = part.iter().map(|&i| ask[i]).collect();
            for (&i, loss) in part.iter().zip(self.sweep(None, &ids)?) {
                losses[i] = loss - self.base_loss;
            }
        }
        Ok(losses)
    }

    /// Sweeps over the blocks from the first that matters: refreshes the cached streams from block `dirty`
    /// on, and carries a stream per candidate to its loss.
    fn sweep(&mut self, dirty: Option<usize>, ids: &[GroupId]) -> Result<Vec<f64>, PruneError> {
        let n_layer = self.run.model.hparams.n_layer();
        let start = ids.iter().map(|c| c.block).chain(dirty).min().unwrap_or(n_layer);
        let n = self.base[0].len();
        // Streams of the candidates side by side, in the order of their blocks.
        let mut streams: Vec<f32> = Vec::with_capacity(ids.len() * n);
        for il in start..n_layer {
            self.run.check_interrupted()?;
            let block = self.forward.upload(&self.plan.block(self.run.model, il)?)?;
            let forward = &self.forward;
            forward.advance(&block, &mut streams)?;
            let here = ids.iter().filter(|id| id.block == il);
            let groups = &self.plan.blocks[il].groups;
            let column = |id: &GroupId| {
                groups.iter().position(|&g| g == id.group).expect("a candidate is still there")
            };
            // Without its last group, a block has no attention and no attention bias.
            let left_out = |id| (self.unit == Unit::Group && groups.len() > 1).then(|| column(id));
            let columns: Vec<_> = here.map(left_out).collect();
            if !columns.is_empty() {
                without_each(forward, &block, &self.base[il], groups.len(), &columns, &mut streams)?;
            }
            if dirty.is_some_and(|d| d <= il) {
                let (before, after) = self.base.split_at_mut(il + 1);
                forward.stream(&block, &before[il], &mut after[0])?;
            }
        }
        let forward = &self.forward;
        if dirty.is_some() {
            self.base_loss = self.judge.loss(forward, &self.base[n_layer])?;
        }
        streams.chunks_exact(n).map(|s| self.judge.loss(forward, s)).collect()
    }
}

/// Appends the outputs `[n_tokens, n_embd]` of a block for `x` to `streams`, each with the attention of one of
/// its `n_groups` groups left out, or of all.
fn without_each(
    f: &Forward,
    b: &Block,
    x: &[f32],
    n_groups: usize,
    columns: &[Option<usize>],
    streams: &mut Vec<f32>,
) -> Result<(), PruneError> {
    let heads = f.attn_out_input(b, x, None)?;
    let row = heads.len() / (x.len() / f.n_embd());
    let width = row / n_groups;
    for c in columns {
        let mut without = if c.is_some() { heads.clone() } else { Vec::new() };
        if let Some(c) = c {
            without.chunks_exact_mut(row).for_each(|r| r[c * width..(c + 1) * width].fill(0.0));
        }
        let at = streams.len();
        streams.resize(at + x.len(), 0.0);
        let wanted = BlockOutputs { out: Some(&mut streams[at..]), ..BlockOutputs::default() };
        f.from_attn_out_input(b, x, &without, wanted)?;
    }
    Ok(())
}

/// Cost of a step of the search in passes through the whole model.
/// The streams after the removed group are refreshed, and a few candidates are carried to the end. SmolLM2
/// needs 1.4.
const SWEEPS_PER_STEP: f64 = 1.4;

/// Forecast of the first look. Curvature samples go back through all blocks. In mixtures, every candidate is
/// carried once through the blocks after it.
fn forecast_first_look(w: &Work) -> StageForecast {
    let name = "heads, first look";
    if w.model.hparams.experts.is_none() {
        let n_ctx = window_of_heads(w.s, w.c.n_ctx);
        let n = w.sampled(w.s.head_search.tokens, n_ctx);
        let stage = sensitivity::forecast_carried_back(w, name, &w.whole(), 0, n, n_ctx);
        // `attn_output` runs once for all groups, and once without each.
        let products = |(b, of): (&Sizes, &BlockShape)| b.q * (1.0 + of.n_head_kv as f64);
        let sum: f64 = w.whole().iter().zip(&w.model.hparams.blocks).map(products).sum();
        let operations = stage.operations + 2.0 * n * w.n_embd() * sum;
        // Without groups to remove, there is no first look.
        return StageForecast { operations: if w.kept < 1.0 { operations } else { 0.0 }, ..stage };
    }
    let n_ctx = ROUGH_CTX.min(window_of_heads(w.s, w.c.n_ctx));
    let n = w.sampled(ROUGH_TOKENS, n_ctx);
    let (mut behind, mut sum) = (0.0, 0.0);
    for (il, b) in w.whole().into_iter().enumerate().rev() {
        let here = w.model.hparams.blocks[il].n_head_kv as f64;
        sum += here * (w.rest_ops(b, n) + behind) + w.heads_ops(il, b, n, n_ctx);
        behind += w.block_ops(il, b, n, n_ctx);
    }
    forecast_of(w, name, n, n_ctx, sum, w.n_groups())
}

/// Forecast of the search: a step per removed group.
fn forecast_search(w: &Work) -> StageForecast {
    let n_ctx = window_of_heads(w.s, w.c.n_ctx);
    let n = w.sampled(w.s.head_search.tokens, n_ctx);
    let sweeps = w.n_groups_removed as f64 * SWEEPS_PER_STEP * w.model_ops(&w.whole(), n, n_ctx);
    forecast_of(w, "heads", n, n_ctx, sweeps, 4.0 * w.n_groups_removed as f64)
}

/// Forecast of a search over `n` tokens that needs `candidates` operations for its candidates, and `n_scores`
/// losses.
fn forecast_of(
    w: &Work,
    name: &'static str,
    n: f64,
    n_ctx: usize,
    candidates: f64,
    n_scores: f64,
) -> StageForecast {
    let whole = w.model_ops(&w.whole(), n, n_ctx);
    let width = n * w.n_embd() * 4.0;
    let streams = w.stream_bytes((w.n_layer() + 1.0) * n * w.n_embd());
    let together = (n_scores * width).min(STREAM_BYTES as f64);
    let searching = together + w.block_bytes() + w.graph_bytes(n_ctx, n) + 3.0 * width;
    let judging = 4.0 * w.n_embd() * w.known(n) + w.block_bytes() + w.graph_bytes(n_ctx, n);
    // Without groups to remove, there is no search.
    let runs = w.kept < 1.0;
    StageForecast {
        name,
        operations: if runs { whole + candidates + w.judge_ops(n, 1.0 + n_scores) } else { 0.0 },
        algebra: 0.0,
        memory: BASE_BYTES + streams + searching.max(w.predicting_bytes()),
        on_devices: judging.max(w.predicting_bytes()),
    }
}
