//! How many groups and neurons a sparsity costs (section 3.3 of the paper).

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

/// Groups that attention gives up at `sparsity`: `L · n_head_kv · s^((|F|/|A|)/1.5)`, rounded to whole
/// blocks' worth as the authors' code does. Blocks of different shapes are taken by their totals.
pub fn head_groups_paper(blocks: &[Budget], sparsity: f64) -> usize {
    let attention: usize = blocks.iter().map(Budget::attention).sum();
    let ffn: usize = blocks.iter().map(Budget::ffn).sum();
    let groups: usize = blocks.iter().map(|b| b.n_groups).sum();
    if attention == 0 {
        return 0;
    }
    let share = sparsity.powf(ffn as f64 / attention as f64 / 1.5);
    let n_blocks = blocks.len() as f64;
    let whole_blocks = (n_blocks * share).round();
    (whole_blocks * groups as f64 / n_blocks).round() as usize
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
    let total: usize = blocks.iter().map(Budget::params).sum();
    let wanted = (total as f64 * sparsity).round() as usize;
    let from_ffn = wanted.saturating_sub(attention_removed);
    let spare: usize = blocks.iter().map(|b| b.n_pieces.saturating_sub(b.fewest) * b.piece_params).sum();
    if from_ffn > spare {
        let reachable = (attention_removed + spare) as f64 / total as f64;
        return Err(BudgetError { asked: sparsity, reachable });
    }
    Ok(from_ffn)
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
