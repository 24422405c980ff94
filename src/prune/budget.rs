//! How many groups and neurons a sparsity costs (section 3.3 of the paper, and our own).

/// Parameters of one block that can be removed, and in what pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Attention groups.
    pub n_groups: usize,
    /// Parameters per group.
    pub group_params: usize,
    /// Pieces of the feed-forward: neurons, or experts.
    pub n_pieces: usize,
    /// Parameters per piece.
    pub piece_params: usize,
    /// Parameters that are counted and do not go: the router of experts that all stay.
    pub fixed: usize,
    /// The step in which their number may change.
    pub step: usize,
    /// The fewest that the block may keep.
    pub fewest: usize,
}

/// The sparsity is out of reach.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("sparsity {asked} cannot be reached: at most {reachable:.3} of this model's blocks can be removed")]
pub struct BudgetError {
    /// What was asked for.
    pub asked: f64,
    /// What can be had.
    pub reachable: f64,
}

impl Budget {
    fn attention(&self) -> usize {
        self.n_groups * self.group_params
    }

    fn ffn(&self) -> usize {
        self.n_pieces * self.piece_params + self.fixed
    }

    /// All parameters of the block that are counted.
    pub fn params(&self) -> usize {
        self.attention() + self.ffn()
    }
}

/// Groups that attention gives up at `sparsity` in our method: the share `s^(|F|/|A|)` of them. As large as attention,
/// feed-forwards lose the same share; the larger they are, the longer heads stay.
pub fn head_groups(blocks: &[Budget], sparsity: f64) -> usize {
    (n_groups(blocks) as f64 * group_share(blocks, sparsity, 1.0)).round() as usize
}

/// The fewest groups that attention has to give up at `sparsity`, for feed-forwards cannot give more than they have; all
/// that there are where that is not enough either.
pub fn fewest_head_groups(blocks: &[Budget], sparsity: f64) -> usize {
    let short = wanted(blocks, sparsity).saturating_sub(spare(blocks));
    short.div_ceil(smallest_group(blocks).max(1)).min(n_groups(blocks))
}

/// Groups that attention gives up in the paper: the share `s^((|F|/|A|)/1.5)`, rounded to whole blocks' worth as the authors' code
/// does. Blocks of different shapes are taken by their totals.
pub fn head_groups_paper(blocks: &[Budget], sparsity: f64) -> usize {
    let n_blocks = blocks.len() as f64;
    let whole_blocks = (n_blocks * group_share(blocks, sparsity, 1.5)).round();
    (whole_blocks * n_groups(blocks) as f64 / n_blocks).round() as usize
}

fn n_groups(blocks: &[Budget]) -> usize {
    blocks.iter().map(|b| b.n_groups).sum()
}

/// `s^((|F|/|A|)/d)`.
fn group_share(blocks: &[Budget], sparsity: f64, d: f64) -> f64 {
    let attention: usize = blocks.iter().map(Budget::attention).sum();
    let ffn: usize = blocks.iter().map(Budget::ffn).sum();
    if attention == 0 { 0.0 } else { sparsity.powf(ffn as f64 / attention as f64 / d) }
}

/// Parameters of feed-forwards left to remove at `sparsity` once attention gave up `attention_removed`.
///
/// # Errors
/// [`BudgetError`] if the feed-forwards cannot give that much.
pub fn ffn_params_to_remove(
    blocks: &[Budget],
    sparsity: f64,
    attention_removed: usize,
) -> Result<usize, BudgetError> {
    let from_ffn = wanted(blocks, sparsity).saturating_sub(attention_removed);
    let spare = spare(blocks);
    if from_ffn > spare {
        let total: usize = blocks.iter().map(Budget::params).sum();
        let reachable = (attention_removed + spare) as f64 / total as f64;
        return Err(BudgetError { asked: sparsity, reachable });
    }
    Ok(from_ffn)
}

/// Parameters of the smallest group: what one is assumed to give before it is known which.
pub fn smallest_group(blocks: &[Budget]) -> usize {
    blocks.iter().filter(|b| b.n_groups > 0).map(|b| b.group_params).min().unwrap_or(0)
}

/// Parameters to remove at `sparsity`.
fn wanted(blocks: &[Budget], sparsity: f64) -> usize {
    (blocks.iter().map(Budget::params).sum::<usize>() as f64 * sparsity).round() as usize
}

/// Parameters that feed-forwards can give.
fn spare(blocks: &[Budget]) -> usize {
    blocks.iter().map(|b| b.n_pieces.saturating_sub(b.fewest) * b.piece_params).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> Vec<Budget> {
        let b = Budget {
            n_groups: 3,
            group_params: 884_736 / 3,
            n_pieces: 1536,
            piece_params: 3 * 576,
            fixed: 0,
            step: 32,
            fewest: 32,
        };
        vec![b; 30]
    }

    #[test]
    fn heads_at_half_are_the_papers() {
        assert_eq!(head_groups_paper(&smollm2(), 0.5), 24);
        assert_eq!(head_groups_paper(&smollm2(), 0.6), 33);
        assert_eq!(head_groups_paper(&smollm2(), 0.0), 0);
        assert_eq!(head_groups_paper(&[], 0.5), 0);
    }

    #[test]
    fn heads_stay_longer_than_the_papers_the_larger_feed_forwards_are() {
        // Three times as large as attention.
        let groups = [0.0, 0.25, 0.5, 0.6].map(|s| head_groups(&smollm2(), s));
        assert_eq!(groups, [0, 1, 11, 19]);
        let narrow: Vec<Budget> = smollm2().into_iter().map(|b| Budget { n_pieces: 512, ..b }).collect();
        assert_eq!(head_groups(&narrow, 0.3), 27);
        let none: Vec<Budget> = smollm2().into_iter().map(|b| Budget { n_groups: 0, ..b }).collect();
        assert_eq!((head_groups(&none, 0.5), head_groups_paper(&none, 0.5)), (0, 0));
    }

    #[test]
    fn heads_give_what_feed_forwards_cannot() {
        let blocks = smollm2();
        let group = smallest_group(&blocks);
        assert_eq!(fewest_head_groups(&blocks, 0.7), 0);
        for s in [0.74, 0.8, 0.9, 0.97] {
            let n = fewest_head_groups(&blocks, s);
            assert!(ffn_params_to_remove(&blocks, s, n * group).is_ok(), "{s}: {n}");
            assert!(ffn_params_to_remove(&blocks, s, (n - 1) * group).is_err(), "{s}: {n}");
        }
        assert_eq!(fewest_head_groups(&blocks, 0.999), 90);
        let none: Vec<Budget> = blocks.into_iter().map(|b| Budget { n_groups: 0, ..b }).collect();
        assert_eq!(fewest_head_groups(&none, 0.999), 0);
    }

    #[test]
    fn ffn_gives_the_rest() {
        let removed = ffn_params_to_remove(&smollm2(), 0.5, 24 * 884_736 / 3).unwrap();
        let width = 1536.0 - removed as f64 / (30.0 * 3.0 * 576.0);
        assert!((width - 648.6).abs() < 1.0, "{width}");
    }

    #[test]
    fn too_much_is_refused_with_what_can_be_had() {
        let e = ffn_params_to_remove(&smollm2(), 0.95, 0).unwrap_err();
        assert!(e.reachable > 0.7 && e.reachable < 0.75, "{}", e.reachable);
    }
}
