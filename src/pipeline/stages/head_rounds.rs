//! Searches of the baseline methods for attention to remove: rounds in which perplexity scores all
//! candidates.

use super::Stage;
use super::heads::{Search, Unit, candidates, group_limits};
use crate::pipeline::PruneError;
use crate::pipeline::forecast::{StageForecast, Work};
use crate::pipeline::prediction_loss::Loss;
use crate::pipeline::run::Run;
use crate::prune::{GroupId, rounds};

/// Number of tokens of the single sequence that the paper's search evaluates.
const PAPER_TOKENS: usize = 2048;

/// Stage that removes attention in rounds.
pub(in crate::pipeline) struct HeadRounds {
    unit: Unit,
}

impl HeadRounds {
    /// Search of the paper: single groups.
    pub(in crate::pipeline) const GROUPS: HeadRounds = HeadRounds { unit: Unit::Group };
    /// Search of 2SSP: the whole attention of a block at a time.
    pub(in crate::pipeline) const WHOLE_ATTENTION: HeadRounds = HeadRounds { unit: Unit::Attention };
}

impl Stage for HeadRounds {
    fn forecast(&self, _: &Work) -> Vec<StageForecast> {
        Vec::new()
    }

    fn run(&self, run: &mut Run) -> Result<(), PruneError> {
        if run.n_groups == 0 {
            return Ok(());
        }
        let (limits, candidates, n_remove) = (group_limits(run), candidates(run), run.n_groups);
        let removed = match self.unit {
            Unit::Group => {
                let n_kv = run.model.hparams.blocks[0].n_head_kv.max(1);
                let rescored = run.settings.head_search.rescored;
                run.observer.stage("heads", n_remove);
                let n_ctx = PAPER_TOKENS.min(run.windows.n_ctx);
                let tokens = run.windows.sample(PAPER_TOKENS, n_ctx);
                let mut search = Search::new(run, &tokens, n_ctx, Loss::Likelihood, Unit::Group)?;
                let score = |removed: &[GroupId], ask: &[GroupId]| search.score(removed, ask);
                let may_remove = |removed: &[GroupId], c: GroupId| {
                    removed.iter().filter(|r| r.block == c.block).count() < limits[c.block]
                };
                rounds(&candidates, n_remove, n_kv, rescored, may_remove, score)?
            }
            Unit::Attention => {
                let whole: Vec<bool> =
                    limits.iter().zip(&run.budgets).map(|(l, b)| *l == b.n_groups).collect();
                run.whole_attentions(&candidates, n_remove, |b| whole[b])?
            }
        };
        removed.into_iter().for_each(|id| run.plan.remove_group(id));
        Ok(())
    }
}

impl Run<'_> {
    /// Search of 2SSP: removes the whole attention of one block at a time, identified by its first group.
    fn whole_attentions(
        &mut self,
        candidates: &[GroupId],
        n_remove: usize,
        may_go: impl Fn(usize) -> bool,
    ) -> Result<Vec<GroupId>, PruneError> {
        let first = |c: &&GroupId| self.plan.blocks[c.block].groups[0] == c.group && may_go(c.block);
        let whole: Vec<GroupId> = candidates.iter().filter(first).copied().collect();
        let n_blocks = n_remove / self.model.hparams.blocks[0].n_head_kv.max(1);
        let rescored = self.settings.head_search.rescored;
        self.observer.stage("heads", n_blocks);
        let n_ctx = PAPER_TOKENS.min(self.windows.n_ctx);
        let tokens = self.windows.sample(self.settings.head_search.tokens, n_ctx);
        let mut search = Search::new(self, &tokens, n_ctx, Loss::Likelihood, Unit::Attention)?;
        let score = |removed: &[GroupId], ask: &[GroupId]| search.score(removed, ask);
        let removed = rounds(&whole, n_blocks, 1, rescored, |_, _| true, score)?;
        Ok(candidates.iter().copied().filter(|c| removed.iter().any(|r| r.block == c.block)).collect())
    }
}
