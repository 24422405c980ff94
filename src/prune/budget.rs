//! Number of attention groups and neurons that a sparsity removes (section 3.3 of the paper, and our own
//! method).

/// Parameters of one block that can be removed, and in what units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Number of attention groups.
    pub n_groups: usize,
    /// Parameters per group.
    pub group_params: usize,
    /// Number of FFN units: neurons, or experts.
    pub n_units: usize,
    /// Parameters per FFN unit.
    pub unit_params: usize,
    /// Parameters that are counted but never removed: the router, if all experts are kept.
    pub fixed: usize,
    /// Step in which the number of FFN units may change.
    pub step: usize,
    /// Fewest FFN units that the block may keep.
    pub fewest: usize,
}

/// Error: the sparsity is out of reach.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("sparsity {asked} cannot be reached: at most {reachable:.3} of this model's blocks can be removed")]
pub struct BudgetError {
    /// Requested sparsity.
    pub asked: f64,
    /// Largest reachable sparsity.
    pub reachable: f64,
}

impl Budget {
    fn attention(&self) -> usize {
        self.n_groups * self.group_params
    }

    fn ffn(&self) -> usize {
        self.n_units * self.unit_params + self.fixed
    }

    /// Number of counted parameters of the block.
    pub fn params(&self) -> usize {
        self.attention() + self.ffn()
    }
}

/// Number of attention groups that our method removes at `sparsity`: the share `s^(|F|/|A|)` of all groups.
/// If FFNs are as large as attention, both lose the same share. The larger FFNs are, the fewer groups are
/// removed.
pub fn head_groups(blocks: &[Budget], sparsity: f64) -> usize {
    (n_groups(blocks) as f64 * group_share(blocks, sparsity, 1.0)).round() as usize
}

/// Fewest attention groups that `sparsity` removes, because FFNs can only give what they have.
/// Returns the number of all groups if even that is not enough.
pub fn fewest_head_groups(blocks: &[Budget], sparsity: f64) -> usize {
    let short = wanted(blocks, sparsity).saturating_sub(spare(blocks));
    short.div_ceil(smallest_group(blocks).max(1)).min(n_groups(blocks))
}

/// Number of attention groups that the paper removes: the share `s^((|F|/|A|)/1.5)`.
/// The number is rounded to whole blocks, as in the authors' code. Blocks of different shapes count by
/// their totals.
pub fn head_groups_paper(blocks: &[Budget], sparsity: f64) -> usize {
    let n_blocks = blocks.len() as f64;
    let whole_blocks = (n_blocks * group_share(blocks, sparsity, 1.5)).round();
    (whole_blocks * n_groups(blocks) as f64 / n_blocks).round() as usize
}

fn n_groups(blocks: &[Budget]) -> usize {
    blocks.iter().map(|b| b.n_groups).sum()
}

/// Share `s^((|F|/|A|)/d)` of the attention groups.
fn group_share(blocks: &[Budget], sparsity: f64, d: f64) -> f64 {
    let attention: usize = blocks.iter().map(Budget::attention).sum();
    let ffn: usize = blocks.iter().map(Budget::ffn).sum();
    if attention == 0 { 0.0 } else { sparsity.powf(ffn as f64 / attention as f64 / d) }
}

/// FFN parameters left to remove at `sparsity` after attention lost `attention_removed` parameters.
///
/// # Errors
/// [`BudgetError`] if the FFNs cannot give that much.
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

/// Parameters of the smallest group: the assumed gain per group before the search picks one.
pub fn smallest_group(blocks: &[Budget]) -> usize {
    blocks.iter().filter(|b| b.n_groups > 0).map(|b| b.group_params).min().unwrap_or(0)
}

/// Number of parameters to remove at `sparsity`.
fn wanted(blocks: &[Budget], sparsity: f64) -> usize {
    (blocks.iter().map(Budget::params).sum::<usize>() as f64 * sparsity).round() as usize
}

/// Number of parameters that the FFNs can lose.
fn spare(blocks: &[Budget]) -> usize {
    blocks.iter().map(|b| b.n_units.saturating_sub(b.fewest) * b.unit_params).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> Vec<Budget> {
        let b = Budget {
            n_groups: 3,
            group_params: 884_736 / 3,
            n_units: 1536,
            unit_params: 3 * 576,
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
        // FFNs are three times as large as attention.
        let groups = [0.0, 0.25, 0.5, 0.6].map(|s| head_groups(&smollm2(), s));
        assert_eq!(groups, [0, 1, 11, 19]);
        let narrow: Vec<Budget> = smollm2().into_iter().map(|b| Budget { n_units: 512, ..b }).collect();
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
