//! Which attention groups go.

/// An attention group: a KV head with its query heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// Block.
    pub block: usize,
    /// KV head of the source block.
    pub group: usize,
}

/// Candidates that are scored again before the best of them is believed.
const MAX_FRESH: usize = 6;

/// Candidates that are scored again together: the block sweep that scores one scores two cheaply.
const BATCH: usize = 2;

/// Removes `n_remove` groups one after another, each time the one whose removal costs least.
///
/// `rough` holds a first score of every candidate, which only orders the list: at each step the top
/// of the list is scored again until its top is fresh (Minoux's lazy greedy). `may_remove` says whether a group may go, given those that
/// went; `score` returns what the loss grows by without each of the candidates, given those that
/// went.
///
/// # Errors
/// What `score` returns. If no candidate is left, fewer groups are removed.
pub fn lazy_greedy<E>(
    rough: Vec<(GroupId, f64)>,
    n_remove: usize,
    may_remove: impl Fn(&[GroupId], GroupId) -> bool,
    mut score: impl FnMut(&[GroupId], &[GroupId]) -> Result<Vec<f64>, E>,
) -> Result<Vec<GroupId>, E> {
    let mut removed: Vec<GroupId> = Vec::new();
    // Candidate, score, and how many groups had gone when it was scored.
    let mut list: Vec<(GroupId, f64, usize)> = rough.into_iter().map(|(c, s)| (c, s, usize::MAX)).collect();
    while removed.len() < n_remove {
        list.retain(|(c, ..)| may_remove(&removed, *c));
        list.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        let now = removed.len();
        let mut fresh = list.iter().filter(|c| c.2 == now).count();
        while list.first().is_some_and(|top| top.2 != now) && fresh < MAX_FRESH {
            let stale: Vec<usize> =
                (0..list.len()).filter(|&i| list[i].2 != now).take(BATCH.min(MAX_FRESH - fresh)).collect();
            let ids: Vec<GroupId> = stale.iter().map(|&i| list[i].0).collect();
            for (i, s) in stale.iter().zip(score(&removed, &ids)?) {
                (list[*i].1, list[*i].2) = (s, now);
            }
            fresh += ids.len();
            list.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        }
        // Scores from before are not comparable with fresh ones when the limit was hit.
        let best = list.iter().position(|c| c.2 == now);
        let Some(best) = best else { break };
        removed.push(list.remove(best).0);
    }
    Ok(removed)
}

/// The paper's search: in every round all candidates are scored, and the `per_round` best of that
/// same list go at once. With `rescored`, rounds after the first score only so many of the candidates, those
/// that were best the round before: nearly always the same outcome at a fraction of the cost.
///
/// # Errors
/// What `score` returns.
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
        // The best first; those that were not scored keep their places behind.
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

    /// Costs that grow with what went before in the same block: submodular, so lazy is exact.
    fn cost(removed: &[GroupId], c: GroupId) -> f64 {
        let base = ((c.block * 3 + c.group) * 7919 % 101) as f64;
        base * (1.0 + removed.iter().filter(|r| r.block == c.block).count() as f64)
    }

    #[test]
    fn lazy_greedy_is_greedy_on_growing_costs() {
        let all = ids(30);
        let mut calls = 0;
        let rough = all.iter().map(|&c| (c, cost(&[], c))).collect();
        let lazy = lazy_greedy(
            rough,
            12,
            |_, _| true,
            |removed, ask| {
                calls += ask.len();
                Ok::<_, Infallible>(ask.iter().map(|&c| cost(removed, c)).collect())
            },
        )
        .unwrap();
        let mut exact: Vec<GroupId> = Vec::new();
        for _ in 0..12 {
            let best = all
                .iter()
                .filter(|c| !exact.contains(c))
                .min_by(|a, b| cost(&exact, **a).total_cmp(&cost(&exact, **b)));
            exact.push(*best.unwrap());
        }
        assert_eq!(lazy, exact);
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
        let rough = all.iter().map(|&c| (c, 0.0)).collect();
        for removed in
            [lazy_greedy(rough, 9, may, score).unwrap(), rounds(&all, 9, 3, None, may, score).unwrap()]
        {
            assert_eq!(removed.len(), 8);
            assert_eq!(removed.iter().filter(|r| r.block == 0).count(), 2);
        }
    }
}
