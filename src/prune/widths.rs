//! Allocation: number of neurons that each block keeps.

use super::Budget;

/// Loss of a block at falling widths.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Possible widths of the block, falling, starting with the current one.
    pub widths: Vec<usize>,
    /// Loss at each width.
    pub losses: Vec<f64>,
    /// Unit that makes losses comparable between blocks; losses are divided by it.
    pub unit: f64,
}

/// Possible widths of an FFN of `n_units` units: the full width, then the multiples of the step below it.
pub fn possible_widths(b: &Budget) -> Vec<usize> {
    let below = (1..b.n_units.div_ceil(b.step)).rev().map(|i| i * b.step).filter(|n| *n >= b.fewest);
    std::iter::once(b.n_units).chain(below).collect()
}

/// Width per block after at least `n_remove` neurons are removed in all.
/// Each step takes neurons from the block where they cost least each.
///
/// # Panics
/// If the blocks cannot give that many.
pub fn allocate(curves: &[Curve], n_remove: usize) -> Vec<usize> {
    let mut at = vec![0; curves.len()];
    let mut removed = 0;
    let cost = |c: &Curve, i: usize| {
        let (width, loss) = (c.widths.get(i + 1)?, c.losses.get(i + 1)?);
        Some((loss - c.losses[i]).max(0.0) / c.unit / (c.widths[i] - width) as f64)
    };
    while removed < n_remove {
        let best = (0..curves.len())
            .filter_map(|b| cost(&curves[b], at[b]).map(|c| (c, b)))
            .min_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
        let (_, b) = best.expect("the budget was checked against the floor");
        removed += curves[b].widths[at[b]] - curves[b].widths[at[b] + 1];
        at[b] += 1;
    }
    curves.iter().zip(at).map(|(c, i)| c.widths[i]).collect()
}

/// Width per block after at least `n_remove` neurons are removed in all, as uniform as the steps allow.
/// Each step takes neurons from the widest block.
///
/// # Panics
/// If the blocks cannot give that many.
pub fn uniform(widths: &[Vec<usize>], n_remove: usize) -> Vec<usize> {
    let mut at = vec![0; widths.len()];
    let mut removed = 0;
    while removed < n_remove {
        let widest = (0..widths.len())
            .filter(|&b| at[b] + 1 < widths[b].len())
            .max_by_key(|&b| (widths[b][at[b]], widths.len() - b));
        let b = widest.expect("the budget was checked against the floor");
        removed += widths[b][at[b]] - widths[b][at[b] + 1];
        at[b] += 1;
    }
    widths.iter().zip(at).map(|(w, i)| w[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(n_units: usize, step: usize, fewest: usize) -> Budget {
        Budget { n_groups: 0, group_params: 0, n_units, unit_params: 1, fixed: 0, step, fewest }
    }

    #[test]
    fn cheap_blocks_give_first() {
        let steep = Curve { widths: vec![96, 64, 32], losses: vec![0.0, 10.0, 30.0], unit: 1.0 };
        let flat = Curve { widths: vec![128, 96, 64, 32], losses: vec![0.0, 1.0, 3.0, 20.0], unit: 1.0 };
        assert_eq!(allocate(&[steep.clone(), flat.clone()], 96), [64, 64]);
        let heavy = Curve { unit: 100.0, ..steep };
        assert_eq!(allocate(&[heavy, flat], 96), [32, 96]);
    }

    #[test]
    fn uniform_spreads() {
        let w = vec![possible_widths(&of(128, 32, 32)); 3];
        assert_eq!(uniform(&w, 4 * 32), [64, 96, 96]);
        assert_eq!(uniform(&w, 0), [128; 3]);
        assert_eq!(uniform(&w, 9 * 32), [32; 3]);
    }

    #[test]
    fn widths_are_multiples_below_the_first() {
        assert_eq!(possible_widths(&of(100, 32, 32)), [100, 96, 64, 32]);
        assert_eq!(possible_widths(&of(32, 32, 32)), [32]);
        assert_eq!(possible_widths(&of(20, 32, 32)), [20]);
        assert_eq!(possible_widths(&of(5, 1, 3)), [5, 4, 3]);
    }
}
