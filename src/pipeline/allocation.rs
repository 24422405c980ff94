//! Allocation: numbers of groups and neurons to remove for a sparsity, in steps and layers that the output
//! architecture supports.

use super::{
    BlockSettings, PruneError, SensitivitySettings, Settings, Target, TuneSettings, WidthSettings, file_size,
};
use crate::ggml::Type;
use crate::model::{BlockShape, Family, FfnUnit, Heads, Model};
use crate::prune::{self, Budget, BudgetError};

/// Checks that the sparsity can be reached with the types of `model`, and that heads can be removed as the
/// settings ask.
///
/// # Errors
/// [`PruneError::Budget`] with what can be reached, [`PruneError::HeadsPerBlock`], or
/// [`PruneError::Experts`].
pub fn check_budget(model: &Model, s: &Settings) -> Result<(), PruneError> {
    if s.heads == Heads::PerLayer && s.output_archs(model).of_heads().is_none() {
        return Err(PruneError::HeadsPerBlock(model.hparams.family.name()));
    }
    if model.hparams.experts.is_some() && !s.method.takes_experts() {
        return Err(PruneError::Experts);
    }
    let budgets = budgets(model, s);
    let s = &within_family(model, s);
    let attention = groups_to_remove(model, &budgets, s) * prune::smallest_group(&budgets);
    prune::ffn_params_to_remove(&budgets, s.sparsity, attention)?;
    Ok(())
}

/// Settings adapted to their method, and limited to what the output architecture of `model` supports.
pub(super) fn within_family(model: &Model, s: &Settings) -> Settings {
    let s = &s.method.settings(s.clone());
    let output_archs = s.output_archs(model);
    if model.hparams.experts.is_some() {
        // The other experts are unchanged when some are removed, and gradients are not implemented for
        // experts.
        return Settings {
            widths: WidthSettings { per_layer: false, ..s.widths.clone() },
            blocks: BlockSettings { biases: false, ..s.blocks.clone() },
            sensitivity: SensitivitySettings { tokens: 0 },
            tune: TuneSettings { passes: 0, ..s.tune.clone() },
            ..s.clone()
        };
    }
    let per_layer = s.widths.per_layer && s.sensitivity.tokens > 0 && output_archs.per_block.is_some();
    let biases = s.blocks.biases && output_archs.have_biases();
    Settings {
        widths: WidthSettings { per_layer, ..s.widths.clone() },
        blocks: BlockSettings { biases, ..s.blocks.clone() },
        ..s.clone()
    }
}

/// Number of groups to remove, limited by the budget and by what is removable.
/// The first block keeps one group. If all blocks must stay equal, every block keeps the same number, or all.
/// Too many groups are then preferred to too few, so that the FFNs can give up the rest.
pub(super) fn groups_to_remove(model: &Model, budgets: &[Budget], s: &Settings) -> usize {
    if s.heads == Heads::None {
        return 0;
    }
    let output_archs = s.output_archs(model);
    let total: usize = budgets.iter().map(Budget::params).sum();
    let largest = budgets.iter().map(|b| b.group_params).max().unwrap_or(0).max(1);
    let affordable = (total as f64 * s.sparsity) as usize / largest;
    let by_formula = || s.method.head_groups(budgets, s.sparsity);
    let (wanted, fewest) = s.head_search.groups.map_or_else(by_formula, |groups| (groups, 0));
    let wanted = wanted.max(fewest).min(affordable);
    let whole_blocks = s.method.removes_whole_attention();
    let Some(output_arch) = output_archs.of_heads() else {
        if whole_blocks || !output_archs.fewer_heads {
            return 0;
        }
        let n_blocks = budgets.len();
        let per_block = (wanted as f64 / n_blocks as f64).round() as usize;
        // Rounds `fewest` up: removing too many is better than a sparsity between two reachable ones.
        let per_block = per_block.min(affordable / n_blocks).max(fewest.div_ceil(n_blocks));
        return per_block.min(budgets[0].n_groups.saturating_sub(1)) * n_blocks;
    };
    let limits = removable_groups(output_arch, budgets);
    let counts = |(limit, b): &(usize, &Budget)| !whole_blocks || *limit == b.n_groups;
    let available: usize = limits.into_iter().zip(budgets).filter(counts).map(|(limit, _)| limit).sum();
    let wanted = wanted.min(available);
    if whole_blocks { wanted - wanted % budgets[0].n_groups.max(1) } else { wanted }
}

/// Number of groups that each block may lose if blocks may differ.
pub(super) fn removable_groups(output_arch: Family, budgets: &[Budget]) -> Vec<usize> {
    // deci reads head_dim only if the first block has heads.
    let keeps_one = |il: usize| il == 0 || !output_arch.traits().attention_free;
    let limit = |(il, b): (usize, &Budget)| b.n_groups.saturating_sub(usize::from(keeps_one(il)));
    budgets.iter().enumerate().map(limit).collect()
}

/// Number of neurons or experts to remove after the attention gave up `attention_removed` parameters.
pub(super) fn neurons_to_remove(
    budgets: &[Budget],
    s: &Settings,
    attention_removed: usize,
) -> Result<usize, BudgetError> {
    let params = prune::ffn_params_to_remove(budgets, s.sparsity, attention_removed)?;
    Ok(params.div_ceil(budgets[0].unit_params))
}

/// Widths that are the same for all blocks, or as equal as the steps allow if they may differ, with
/// `n_groups` of the smallest groups removed.
pub(super) fn equal_widths(
    model: &Model,
    budgets: &[Budget],
    s: &Settings,
    n_groups: usize,
) -> Result<Vec<usize>, BudgetError> {
    let attention_removed = n_groups * prune::smallest_group(budgets);
    Ok(equally_narrowed(model, budgets, s, neurons_to_remove(budgets, s, attention_removed)?))
}

/// The same widths for `n_remove` neurons.
pub(super) fn equally_narrowed(
    model: &Model,
    budgets: &[Budget],
    s: &Settings,
    n_remove: usize,
) -> Vec<usize> {
    let widths: Vec<_> = budgets.iter().map(prune::possible_widths).collect();
    let mut widths = prune::uniform(&widths, n_remove);
    if s.output_archs(model).per_block.is_none() {
        let narrowest = widths.iter().copied().min().unwrap_or(0);
        widths.fill(narrowest);
    }
    widths
}

/// Smallest number of neurons to remove for a model within the target of `s` whose blocks keep `groups`, with
/// the widths that `narrowed` returns.
/// It is the number of all removable neurons if they are not enough.
pub(super) fn neurons_for_target(
    model: &Model,
    budgets: &[Budget],
    s: &Settings,
    target: Target,
    groups: &[usize],
    narrowed: impl Fn(usize) -> Vec<usize>,
) -> usize {
    let fits = |n_remove: usize| {
        let blocks = model.hparams.blocks.iter().zip(groups).zip(narrowed(n_remove));
        let shapes = blocks.map(|((b, &n_head_kv), width)| {
            let n_head = n_head_kv * b.heads_per_group();
            BlockShape { n_head, n_head_kv, ..b.with_units(s.ffn_unit(model), width) }
        });
        file_size(model, s, &shapes.collect::<Vec<_>>()).is_within(target)
    };
    let (mut too_few, mut enough) = (0, budgets.iter().map(|b| b.n_units - b.fewest.min(b.n_units)).sum());
    while enough > too_few {
        let middle = (too_few + enough) / 2;
        if fits(middle) { enough = middle } else { too_few = middle + 1 }
    }
    enough
}

/// Budget of every block: the units that it can lose.
pub fn budgets(model: &Model, s: &Settings) -> Vec<Budget> {
    let (h, ffn_unit) = (&model.hparams, s.ffn_unit(model));
    let mut budgets: Vec<Budget> = h
        .blocks
        .iter()
        .zip(&model.blocks)
        .map(|(b, t)| {
            let step = match ffn_unit {
                FfnUnit::Neuron => ff_step(s.types.ffn_down.unwrap_or(model.tensor(&t.down()).ty)),
                FfnUnit::Expert => 1,
            };
            Budget {
                n_groups: b.n_head_kv,
                group_params: h.group_params(b),
                n_units: b.n_units(ffn_unit),
                unit_params: h.unit_params(b, ffn_unit),
                fixed: h.block_params(b).1 - b.n_units(ffn_unit) * h.unit_params(b, ffn_unit),
                step,
                fewest: h.fewest_units(ffn_unit).max(step).max(least_width(b.n_units(ffn_unit), s)),
            }
        })
        .collect();
    if s.output_archs(model).per_block.is_none() {
        // All blocks use the widest step, so that all can have the same widths.
        let widest = budgets.iter().map(|b| b.step).max().unwrap_or(1);
        for b in &mut budgets {
            b.step = widest;
            b.fewest = b.fewest.max(widest);
        }
    }
    budgets
}

/// Smallest number out of `n_units` that a block keeps, whatever its losses are.
fn least_width(n_units: usize, s: &Settings) -> usize {
    (n_units as f64 * (1.0 - s.sparsity) * s.widths.least) as usize
}

/// Step of the widths. It keeps `ffn_down` in its type, and rows long enough for vector kernels.
fn ff_step(ty: Type) -> usize {
    ty.block_size().max(32)
}
