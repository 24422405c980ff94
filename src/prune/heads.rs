//! Search for the attention groups to remove.

/// Attention group: a KV head with its query heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// Block index.
    pub block: usize,
    /// KV head index in the source block.
    pub group: usize,
}

/// Largest number of candidates that a step scores again before it removes the best of them.
const MAX_FRESH: usize = 6;

/// Candidates that are scored together: the block sweep that scores one scores two cheaply.
const BATCH: usize = 2;

/// Lazy greedy search (Minoux) that removes one group at a time, the one whose removal costs least.
/// Old scores only order the list. Each step scores the top of the list again until its score is fresh.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LazyGreedy {
    /// Removed groups, in the order of removal.
    pub removed: Vec<GroupId>,
    /// Groups that are not removed.
    pub candidates: Vec<Candidate>,
}

/// Group that may be removed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Group.
    pub id: GroupId,
    /// Increase of the loss if the group is removed.
    pub score: f64,
    /// Number of groups that were removed when it was scored; `None` if the score is only a rough one.
    pub scored_at: Option<usize>,
}

impl LazyGreedy {
    /// Starts a search with no group removed. `rough` holds a first score of every candidate, which only
    /// orders the list.
    pub fn new(rough: impl IntoIterator<Item = (GroupId, f64)>) -> LazyGreedy {
        let candidate = |(id, score)| Candidate { id, score, scored_at: None };
        LazyGreedy { removed: Vec::new(), candidates: rough.into_iter().map(candidate).collect() }
    }

    /// Removes one more group. Returns whether there was one to remove.
    ///
    /// `may_remove` says whether a group may be removed, given the removed groups. `score` returns the
    /// increase of the loss for each of the candidates, given the removed groups.
    ///
    /// # Errors
    /// Returns the error of `score`.
    pub fn step<E>(
        &mut self,
        may_remove: impl Fn(&[GroupId], GroupId) -> bool,
        mut score: impl FnMut(&[GroupId], &[GroupId]) -> Result<Vec<f64>, E>,
    ) -> Result<bool, E> {
        let list = &mut self.candidates;
        let sort = |list: &mut Vec<Candidate>| {
            list.sort_by(|a, b| a.score.total_cmp(&b.score).then(a.id.cmp(&b.id)));
        };
        list.retain(|c| may_remove(&self.removed, c.id));
        sort(list);
        let now = Some(self.removed.len());
        let mut fresh = list.iter().filter(|c| c.scored_at == now).count();
        while list.first().is_some_and(|top| top.scored_at != now) && fresh < MAX_FRESH {
            let stale: Vec<usize> = (0..list.len())
                .filter(|&i| list[i].scored_at != now)
                .take(BATCH.min(MAX_FRESH - fresh))
                .collect();
            let ids: Vec<GroupId> = stale.iter().map(|&i| list[i].id).collect();
            for (i, s) in stale.iter().zip(score(&self.removed, &ids)?) {
                (list[*i].score, list[*i].scored_at) = (s, now);
            }
            fresh += ids.len();
            sort(list);
        }
        // At the limit of scored candidates, old scores remain in the list. They are not comparable with
        // fresh ones.
        let best = list.iter().position(|c| c.scored_at == now);
        self.removed.extend(best.map(|i| list.remove(i).id));
        Ok(best.is_some())
    }
}

/// Search of the paper: every round scores all candidates and removes the `per_round` best of that one
/// list.
///
/// With `rescored`, later rounds score only that many candidates: the best of the round before. This finds
/// nearly always the same groups at a fraction of the cost.
///
/// # Errors
/// Returns the error of `score`.
pub fn rounds<E>(
    candidates: &[GroupId],
    n_remove: usize,
    per_round: usize,
    rescored: Option<usize>,
    may_remove: impl Fn(&[GroupId], GroupId) -> bool,
    mut score: impl FnMut(&[GroupId], &[GroupId]) -> Result<Vec<f64>, E>,
) -> Result<Vec<GroupId>, E> {
    let mut removed: Vec<GroupId> = Vec::new();
    let mut left: Vec<GroupId> = candidates.to_vec();
    while removed.len() < n_remove {
        left.retain(|c| !removed.contains(c) && may_remove(&removed, *c));
        let ask = match rescored {
            Some(n) if !removed.is_empty() => &left[..n.max(per_round).min(left.len())],
            _ => &left[..],
        };
        let mut scored: Vec<(f64, GroupId)> =
            score(&removed, ask)?.into_iter().zip(ask.iter().copied()).collect();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let before = removed.len();
        for &(_, id) in &scored {
            if removed.len() < n_remove.min(before + per_round) && may_remove(&removed, id) {
                removed.push(id);
            }
        }
        if removed.len() == before {
            break;
        }
        // The best candidates come first; candidates without a score keep their places behind them.
        left.splice(..scored.len(), scored.into_iter().map(|s| s.1));
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn ids(n: usize) -> Vec<GroupId> {
        (0..n).map(|i| GroupId { block: i / 3, group: i % 3 }).collect()
    }

    /// Cost that grows with the groups already removed in the same block: submodular, so lazy greedy is
    /// exact.
    fn cost(removed: &[GroupId], c: GroupId) -> f64 {
        let base = ((c.block * 3 + c.group) * 7919 % 101) as f64;
        base * (1.0 + removed.iter().filter(|r| r.block == c.block).count() as f64)
    }

    #[test]
    fn lazy_greedy_is_greedy_on_growing_costs() {
        let all = ids(30);
        let mut calls = 0;
        let mut lazy = LazyGreedy::new(all.iter().map(|&c| (c, cost(&[], c))));
        for _ in 0..12 {
            let score = |removed: &[GroupId], ask: &[GroupId]| {
                calls += ask.len();
                Ok::<_, Infallible>(ask.iter().map(|&c| cost(removed, c)).collect())
            };
            assert_eq!(lazy.step(|_, _| true, score), Ok(true));
        }
        let mut exact: Vec<GroupId> = Vec::new();
        for _ in 0..12 {
            let best = all
                .iter()
                .filter(|c| !exact.contains(c))
                .min_by(|a, b| cost(&exact, **a).total_cmp(&cost(&exact, **b)));
            exact.push(*best.unwrap());
        }
        assert_eq!(lazy.removed, exact);
        assert!(calls < 12 * MAX_FRESH, "{calls} evaluations");
    }

    #[test]
    fn rounds_score_fewer_where_they_may() {
        let all = ids(30);
        let run = |rescored| {
            let mut calls = 0;
            let removed = rounds(
                &all,
                12,
                3,
                rescored,
                |_, _| true,
                |removed, ask| {
                    calls += ask.len();
                    Ok::<_, Infallible>(ask.iter().map(|&c| cost(removed, c)).collect())
                },
            );
            (removed.unwrap(), calls)
        };
        assert_eq!(run(None).1, 30 + 27 + 24 + 21);
        assert_eq!(run(Some(10)).1, 30 + 3 * 10);
        assert_eq!(run(None).0, run(Some(10)).0);
    }

    #[test]
    fn what_may_not_go_stays() {
        let all = ids(9);
        // Block 0 keeps one group.
        let may = |removed: &[GroupId], c: GroupId| {
            c.block != 0 || removed.iter().filter(|r| r.block == 0).count() < 2
        };
        let score = |_: &[GroupId], ask: &[GroupId]| {
            Ok::<_, Infallible>(ask.iter().map(|c| c.block as f64).collect())
        };
        let mut lazy = LazyGreedy::new(all.iter().map(|&c| (c, 0.0)));
        while lazy.step(may, score).unwrap() {}
        for removed in [lazy.removed, rounds(&all, 9, 3, None, may, score).unwrap()] {
            assert_eq!(removed.len(), 8);
            assert_eq!(removed.iter().filter(|r| r.block == 0).count(), 2);
        }
    }
}
