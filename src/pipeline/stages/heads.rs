//! The search for attention groups to remove, over cached residual streams.

use super::judge::{Judge, Loss};
use super::stream::embedded;
use super::{Method, Plan, PruneError, Run, Settings, forward};
use crate::forward::{Block, Forward, MAX_GRADIENT_CTX, Wanted};
use crate::ggml::Token;
use crate::model::Family;
use crate::prune::{Budget, GroupId, LazyGreedy, rounds};
use crate::spill::Array;

/// Tokens of the one sequence that the paper's search judges by.
const PAPER_TOKENS: usize = 2048;

/// Tokens, and tokens per window, that put the candidates in a first order where no gradients go back.
pub(super) const ROUGH_TOKENS: usize = 256;
pub(super) const ROUGH_CTX: usize = 128;

/// Bytes that the candidates' residual streams may take at a time.
pub(super) const STREAM_BYTES: usize = 256 << 20;

impl Run<'_> {
    /// Takes `n_remove` groups out of the plan. Our search goes on from `begun`.
    pub(super) fn search_heads(
        &mut self,
        budgets: &[Budget],
        n_remove: usize,
        begun: Option<LazyGreedy>,
    ) -> Result<(), PruneError> {
        if n_remove == 0 {
            return Ok(());
        }
        let limits = group_limits(self.plan.carriers.of_heads(), budgets, n_remove);
        let may_remove = |removed: &[GroupId], c: GroupId| {
            removed.iter().filter(|r| r.block == c.block).count() < limits[c.block]
        };
        let groups =
            |b: usize| self.plan.blocks[b].groups.iter().map(move |&group| GroupId { block: b, group });
        let candidates: Vec<GroupId> = (0..self.plan.blocks.len()).flat_map(groups).collect();
        let removed = match self.settings.method {
            Method::Putri => self.least_divergent(candidates, n_remove, begun, may_remove)?,
            Method::Paper => {
                let n_kv = self.model.hparams.blocks[0].n_head_kv.max(1);
                let rescored = self.settings.rescored;
                self.observer.stage("heads", n_remove);
                let n_ctx = PAPER_TOKENS.min(self.windows.n_ctx);
                let tokens = self.windows.sample(PAPER_TOKENS, n_ctx);
                let mut search = Search::new(self, &tokens, n_ctx, Loss::Likelihood, Unit::Group)?;
                let score = |removed: &[GroupId], ask: &[GroupId]| search.score(removed, ask);
                rounds(&candidates, n_remove, n_kv, rescored, may_remove, score)?
            }
            Method::TwoStage => {
                let may_go_whole = |b: usize| limits[b] == budgets[b].n_groups;
                self.whole_attentions(&candidates, n_remove, may_go_whole)?
            }
        };
        removed.into_iter().for_each(|id| self.plan.remove_group(id));
        Ok(())
    }

    /// Our search: one group at a time, ordered by a first look that only estimates.
    fn least_divergent(
        &mut self,
        candidates: Vec<GroupId>,
        n_remove: usize,
        begun: Option<LazyGreedy>,
        may_remove: impl Fn(&[GroupId], GroupId) -> bool,
    ) -> Result<Vec<GroupId>, PruneError> {
        let n_ctx = window_of_heads(self.settings, self.windows.n_ctx);
        // Where nothing repeats itself, heads that copy from far back seem worth nothing.
        let tokens = self.windows.sample_twice(self.settings.head_tokens, n_ctx);
        let mut greedy = match begun {
            Some(begun) => begun,
            None => LazyGreedy::new(self.first_look(candidates, &tokens, n_ctx)?),
        };
        if greedy.removed.len() < n_remove {
            self.observer.stage("heads", n_remove);
            let mut search = Search::new(self, &tokens, n_ctx, self.settings.head_loss, Unit::Group)?;
            while greedy.removed.len() < n_remove
                && greedy.step(&may_remove, |removed, ask| search.score(removed, ask))?
            {
                search.run.journal.heads(&greedy)?;
            }
        }
        // Those that go at a lower sparsity are the first of those that go at a higher one.
        Ok(greedy.removed.into_iter().take(n_remove).collect())
    }

    /// About what it costs to go without each of the candidates, of which none has gone.
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
            let mut search = Search::new(self, &tokens, n_ctx, self.settings.head_loss, Unit::Group)?;
            let scores = search.score(&[], &candidates)?;
            self.observer.step(1, "");
            return Ok(candidates.into_iter().zip(scores).collect());
        }
        let worth = self.worth_of_groups(STAGE, tokens, n_ctx)?;
        Ok(candidates.into_iter().map(|c| (c, worth[c.block][c.group])).collect())
    }

    /// 2SSP's search: the whole attention of one block at a time, under the name of its first group.
    fn whole_attentions(
        &mut self,
        candidates: &[GroupId],
        n_remove: usize,
        may_go: impl Fn(usize) -> bool,
    ) -> Result<Vec<GroupId>, PruneError> {
        let first = |c: &&GroupId| self.plan.blocks[c.block].groups[0] == c.group && may_go(c.block);
        let whole: Vec<GroupId> = candidates.iter().filter(first).copied().collect();
        let n_blocks = n_remove / self.model.hparams.blocks[0].n_head_kv.max(1);
        let rescored = self.settings.rescored;
        self.observer.stage("heads", n_blocks);
        let n_ctx = PAPER_TOKENS.min(self.windows.n_ctx);
        let tokens = self.windows.sample(self.settings.head_tokens, n_ctx);
        let mut search = Search::new(self, &tokens, n_ctx, Loss::Likelihood, Unit::Attention)?;
        let score = |removed: &[GroupId], ask: &[GroupId]| search.score(removed, ask);
        let removed = rounds(&whole, n_blocks, 1, rescored, |_, _| true, score)?;
        Ok(candidates.iter().copied().filter(|c| removed.iter().any(|r| r.block == c.block)).collect())
    }
}

/// Tokens per window that our search compares candidates on, for calibration windows of `n_ctx`: an even number, that
/// gradients go back through.
pub(super) fn window_of_heads(s: &Settings, n_ctx: usize) -> usize {
    (s.head_ctx.min(n_ctx).min(MAX_GRADIENT_CTX) & !1).max(2)
}

/// How many of the groups may go from each block so that stock llama.cpp can run what is left, if `n_remove` go in all.
fn group_limits(uneven: Option<Family>, budgets: &[Budget], n_remove: usize) -> Vec<usize> {
    match uneven {
        None => vec![n_remove / budgets.len(); budgets.len()],
        Some(carrier) => removable_groups(carrier, budgets),
    }
}

/// How many groups may go from each block where blocks may differ.
pub(super) fn removable_groups(carrier: Family, budgets: &[Budget]) -> Vec<usize> {
    // deci reads head_dim only if the first block has heads.
    let keeps_one = |il: usize| il == 0 || !carrier.traits().attention_free;
    let limit = |(il, b): (usize, &Budget)| b.n_groups.saturating_sub(usize::from(keeps_one(il)));
    budgets.iter().enumerate().map(limit).collect()
}

/// What goes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// A group.
    Group,
    /// All groups of the block in which the group is.
    Attention,
}

/// Cached state of the search.
struct Search<'r, 'a> {
    run: &'r mut Run<'a>,
    forward: Forward,
    unit: Unit,
    /// Plan with the groups removed so far.
    plan: Plan,
    removed: usize,
    judge: Judge,
    n_windows: usize,
    /// Input of every block under the plan, and the last block's output.
    base: Vec<Array<f32>>,
    base_loss: f64,
}

impl<'r, 'a> Search<'r, 'a> {
    /// Caches the streams of `tokens` in windows of `n_ctx`.
    fn new(
        run: &'r mut Run<'a>,
        tokens: &[Token],
        n_ctx: usize,
        loss: Loss,
        unit: Unit,
    ) -> Result<Self, PruneError> {
        let n_windows = tokens.len() / n_ctx;
        let s = run.settings;
        let mut forward = forward(run.model, n_ctx, s)?;
        let plan = run.plan.clone();
        let mut base = vec![embedded(&forward, run.model, tokens, &s.shelf)?];
        for il in 0..run.model.hparams.n_layer() {
            let block = forward.upload(&plan.block(run.model, il)?)?;
            let x = &base[il];
            let mut y = s.shelf.zeros(x.len())?;
            forward.stream(&block, x, &mut y)?;
            base.push(y);
        }
        let last = &base[base.len() - 1];
        let judge = Judge::new(&mut forward, run.model, run.model, tokens, last, loss)?;
        let base_loss = judge.loss(&mut forward, last)?;
        Ok(Search { run, forward, unit, plan, removed: 0, judge, n_windows, base, base_loss })
    }

    /// What the loss grows by without each of `ask`, once `removed` are gone.
    fn score(&mut self, removed: &[GroupId], ask: &[GroupId]) -> Result<Vec<f64>, PruneError> {
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

    /// One sweep over the blocks from the first that matters: refreshes the cached streams from
    /// block `dirty` on, and carries a stream per candidate to its loss.
    fn sweep(&mut self, dirty: Option<usize>, ids: &[GroupId]) -> Result<Vec<f64>, PruneError> {
        let n_layer = self.run.model.hparams.n_layer();
        let start = ids.iter().map(|c| c.block).chain(dirty).min().unwrap_or(n_layer);
        let mut streams: Vec<Vec<f32>> = vec![Vec::new(); ids.len()];
        for il in start..n_layer {
            self.run.checkpoint()?;
            let block = self.forward.upload(&self.plan.block(self.run.model, il)?)?;
            let forward = &mut self.forward;
            for (_, stream) in ids.iter().zip(&mut streams).filter(|(id, _)| id.block < il) {
                let x = std::mem::take(stream);
                stream.resize(x.len(), 0.0);
                forward.stream(&block, &x, stream)?;
            }
            let here: Vec<usize> = (0..ids.len()).filter(|&i| ids[i].block == il).collect();
            if !here.is_empty() {
                let groups = &self.plan.blocks[il].groups;
                let column = |i: usize| {
                    groups.iter().position(|&g| g == ids[i].group).expect("a candidate is still there")
                };
                // Without its last group a block has no attention at all, and no bias of it.
                let left_out = |i: usize| (self.unit == Unit::Group && groups.len() > 1).then(|| column(i));
                let columns: Vec<_> = here.iter().map(|&i| left_out(i)).collect();
                let outs =
                    without_each(forward, &block, &self.base[il], groups.len(), &columns, self.n_windows)?;
                for (i, out) in here.into_iter().zip(outs) {
                    streams[i] = out;
                }
            }
            if dirty.is_some_and(|d| d <= il) {
                let (before, after) = self.base.split_at_mut(il + 1);
                forward.stream(&block, &before[il], &mut after[0])?;
            }
        }
        let forward = &mut self.forward;
        if dirty.is_some() {
            self.base_loss = self.judge.loss(forward, &self.base[n_layer])?;
        }
        streams.iter().map(|s| self.judge.loss(forward, s)).collect()
    }
}

/// Outputs of a block for `x` with the attention of one of its `n_groups` groups left out each time, or
/// with none at all.
fn without_each(
    f: &mut Forward,
    b: &Block,
    x: &[f32],
    n_groups: usize,
    columns: &[Option<usize>],
    n_windows: usize,
) -> Result<Vec<Vec<f32>>, PruneError> {
    let mut outs = vec![vec![0.0; x.len()]; columns.len()];
    for chunk in f.chunks(0..n_windows) {
        let span = f.span(&chunk);
        let heads = f.heads(b, &x[span.clone()], None)?;
        let row = heads.len() / (span.len() / f.n_embd());
        let width = row / n_groups;
        for (out, &c) in outs.iter_mut().zip(columns) {
            let mut without = if c.is_some() { heads.clone() } else { Vec::new() };
            if let Some(c) = c {
                without.chunks_exact_mut(row).for_each(|r| r[c * width..(c + 1) * width].fill(0.0));
            }
            let wanted = Wanted { out: Some(&mut out[span.clone()]), ..Wanted::default() };
            f.from_heads(b, &x[span.clone()], &without, wanted)?;
        }
    }
    Ok(outs)
}
