//! Size of a pruned model, from shapes alone, and the sparsity that reaches a requested size.

use super::allocation::{equal_widths, groups_to_remove, within_family};
use super::{Settings, budgets};
use crate::ggml::Type;
use crate::model::{BlockMatrix, BlockShape, BlockTensors, FfnUnit, KvCache, Model, Segment};
use crate::prune::BudgetError;
use crate::requant::output_type;

/// Alignment of tensors in a file, in bytes.
const ALIGNMENT: usize = 32;

/// Largest number of bytes that the header of a file gains: its provenance, its check on a few tokens, and
/// keys that had defaults.
const HEADER_BYTES: usize = 5120;

/// Approximate number of bytes of a tensor's entry in the header.
const ENTRY_BYTES: usize = 96;

/// Upper limit of the result's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Bytes of the file.
    Bytes(u64),
    /// Number of all parameters.
    Params(u64),
    /// Bytes of the file, of the KV cache that llama.cpp keeps with it, and of its compute buffers.
    WithCache {
        /// Sum of the three in bytes.
        bytes: u64,
        /// Number of tokens of context.
        n_ctx: usize,
        /// Bytes of the compute buffers.
        compute: u64,
    },
}

/// Sizes of a pruned file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSize {
    /// Upper bound of the bytes.
    pub bytes: u64,
    /// Number of parameters.
    pub params: u64,
    /// KV cache of the model.
    pub kv_cache: KvCache,
}

impl FileSize {
    /// Returns whether the size is within `target`.
    pub fn is_within(&self, target: Target) -> bool {
        match target {
            Target::Bytes(n) => self.bytes <= n,
            Target::Params(n) => self.params <= n,
            Target::WithCache { bytes, n_ctx, compute } => {
                self.bytes + self.kv_cache.bytes(n_ctx) + compute <= bytes
            }
        }
    }

    /// Text on the other memory that `target` counts; empty if it counts only the file.
    fn cache_of(&self, target: Target) -> String {
        match target {
            Target::WithCache { n_ctx, compute, .. } => {
                let cache = mib(self.kv_cache.bytes(n_ctx));
                format!(
                    ", {cache:.2} MiB of keys and values for {n_ctx} tokens, {:.2} MiB to compute in",
                    mib(compute)
                )
            }
            _ => String::new(),
        }
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Error of a size that cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The source is already within the target.
    #[error("the source is no larger than that, so nothing has to be removed")]
    Already,
    /// The target is below the size of the smallest possible model.
    #[error(
        "too small: what must be kept is {:.2} MiB{} and {:.2} million parameters, at sparsity {sparsity}",
        mib(least.bytes), least.cache_of(*target), least.params as f64 / 1e6
    )]
    OutOfReach {
        /// Requested size.
        target: Target,
        /// Smallest reachable size.
        least: FileSize,
        /// Sparsity of the smallest reachable size.
        sparsity: f64,
    },
}

/// Smallest sparsity, in steps of a thousandth, at which `model` is within `target`.
/// It is an estimate: the removed groups and the width of each block are not known before the run.
///
/// # Errors
/// [`TargetError`] if no sparsity is enough, or none is needed.
pub fn sparsity_for(model: &Model, s: &Settings, target: Target) -> Result<f64, TargetError> {
    let own = FileSize {
        bytes: model.file.n_bytes(),
        params: model.file.tensors().iter().map(|t| t.n_elements() as u64).sum(),
        kv_cache: KvCache::new(&model.hparams, &model.hparams.blocks),
    };
    if own.is_within(target) {
        return Err(TargetError::Already);
    }
    let at = |thousandths: u32| {
        let s = Settings { sparsity: f64::from(thousandths) / 1000.0, target: None, ..s.clone() };
        even_shapes(model, &s).map(|shapes| file_size(model, &s, &shapes))
    };
    let (mut too_large, mut within) = (0, 1000);
    let mut least = (0, own);
    while within - too_large > 1 {
        let middle = (too_large + within) / 2;
        match at(middle) {
            // The sparsity is out of reach; a lower one was not enough or has not been tried.
            Err(_) => within = middle,
            Ok(size) if size.is_within(target) => (within, least) = (middle, (middle, size)),
            Ok(size) => (too_large, least) = (middle, (middle, size)),
        }
    }
    let sparsity = f64::from(within) / 1000.0;
    match at(within) {
        Ok(size) if size.is_within(target) => Ok(sparsity),
        _ => Err(TargetError::OutOfReach { target, least: least.1, sparsity: f64::from(least.0) / 1000.0 }),
    }
}

/// Shapes with the removed groups spread over all blocks, and with equal widths.
///
/// # Errors
/// [`BudgetError`] if the sparsity is out of reach.
pub(super) fn even_shapes(model: &Model, s: &Settings) -> Result<Vec<BlockShape>, BudgetError> {
    let budgets = budgets(model, s);
    let s = &within_family(model, s);
    let n_groups = groups_to_remove(model, &budgets, s);
    let widths = equal_widths(model, &budgets, s, n_groups)?;
    let all: usize = budgets.iter().map(|b| b.n_groups).sum();
    let (mut before, mut gone) = (0, 0);
    let shapes = model.hparams.blocks.iter().zip(widths).map(|(b, width)| {
        before += b.n_head_kv;
        let until_here = (n_groups * before).checked_div(all).unwrap_or(0);
        let n_head_kv = b.n_head_kv - (until_here - gone).min(b.n_head_kv);
        gone = until_here;
        BlockShape {
            n_head: n_head_kv * b.heads_per_group(),
            n_head_kv,
            ..b.with_units(s.ffn_unit(model), width)
        }
    });
    Ok(shapes.collect())
}

/// Group of matrices with new values that get the same type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewMatrices {
    /// Name of the matrix, as in the names of tensors.
    pub role: &'static str,
    /// Type of the source, or the requested type.
    pub wanted: Type,
    /// Type in which they are written. It differs from `wanted` if their rows are not whole quantisation
    /// blocks of that type.
    pub written: Type,
    /// Number of such blocks.
    pub n_blocks: usize,
}

/// Types of the matrices that get new values: those that lose inputs, and all if recovery moves them.
pub(super) fn new_matrices(model: &Model, s: &Settings, shapes: &[BlockShape]) -> Vec<NewMatrices> {
    let mut all: Vec<NewMatrices> = Vec::new();
    for (t, shape) in model.blocks.iter().zip(shapes) {
        for m in BlockMatrix::ALL {
            let (segment, wanted, n_in) = match m {
                BlockMatrix::AttnOutput => {
                    (t.attn_output, s.types.attn_output, shape.n_head * model.hparams.head_dim)
                }
                BlockMatrix::FfnDown => (new_ffn_down(model, s, t), s.types.ffn_down, shape.n_ff),
                _ => (t.matrix(m).filter(|_| s.recover.budget.is_some()), None, model.hparams.n_embd),
            };
            let Some(segment) = segment.filter(|_| !m.of_attention() || shape.n_head > 0) else { continue };
            let role = m.name();
            let wanted = wanted.unwrap_or(model.tensor(&segment).ty);
            let written = output_type(wanted, n_in);
            match all.iter_mut().find(|n| (n.role, n.wanted, n.written) == (role, wanted, written)) {
                Some(n) => n.n_blocks += 1,
                None => all.push(NewMatrices { role, wanted, written, n_blocks: 1 }),
            }
        }
    }
    all
}

/// `ffn_down`, if it gets new values; that of experts gets new values only if they lose neurons.
fn new_ffn_down(model: &Model, s: &Settings, t: &BlockTensors) -> Option<Segment> {
    (s.ffn_unit(model) == FfnUnit::Neuron).then(|| t.down())
}

/// Size of the file that holds `model` in blocks of the sizes `shapes`.
pub(super) fn file_size(model: &Model, s: &Settings, shapes: &[BlockShape]) -> FileSize {
    let s = &within_family(model, s);
    let output_arch = s.output_archs(model).of(shapes);
    let h = &model.hparams;
    let mut sizes: Vec<(usize, usize)> =
        model.file.tensors().iter().map(|t| (t.n_bytes(), t.n_elements())).collect();
    let data: usize = sizes.iter().map(|(bytes, _)| bytes.next_multiple_of(ALIGNMENT)).sum();
    let header = (model.file.n_bytes() as usize).saturating_sub(data) + HEADER_BYTES;
    let mut more = Vec::new();
    let matrix = |ty: Type, n_in: usize, n_out: usize| (ty.row_bytes(n_in) * n_out, n_in * n_out);
    for ((t, old), new) in model.blocks.iter().zip(&h.blocks).zip(shapes) {
        let rows = |sizes: &mut Vec<(usize, usize)>, segment: &Segment, n: usize| {
            // Segments of one tensor add up.
            let info = model.tensor(segment);
            let (bytes, elements) = matrix(info.ty, info.ne[0], n);
            sizes[segment.tensor].0 += bytes;
            sizes[segment.tensor].1 += elements;
        };
        let qkv = t.qkv.iter().flatten();
        let (gate, up) = (t.ffn_gate.iter(), t.ffn_up.iter());
        let experts = t.experts.iter().flat_map(|e| {
            [&e.gate, &e.up, &e.down].into_iter().flatten().chain([&e.router]).collect::<Vec<_>>()
        });
        let biases = t.qkv_bias.iter().flatten();
        let touched = qkv.clone().chain(gate.clone()).chain(up.clone()).chain(experts).chain(biases.clone());
        touched.for_each(|segment| sizes[segment.tensor] = (0, 0));

        let group = old.heads_per_group() * h.head_dim;
        let kept = [new.n_head_kv * group, new.n_head_kv * h.head_dim, new.n_head_kv * h.head_dim];
        let widest = qkv.clone().map(|q| model.tensor(q).ty).max_by_key(|ty| ty.row_bytes(h.n_embd));
        for (segment, n) in qkv.zip(kept) {
            match widest.filter(|_| output_arch.traits().one_qkv) {
                Some(ty) => {
                    let (bytes, elements) = matrix(ty, h.n_embd, n);
                    sizes[segment.tensor].0 += bytes;
                    sizes[segment.tensor].1 += elements;
                }
                None => rows(&mut sizes, segment, n),
            }
        }
        for (segment, n) in biases.zip(kept) {
            sizes[segment.tensor].0 += 4 * n;
            sizes[segment.tensor].1 += n;
        }
        gate.chain(up).for_each(|segment| rows(&mut sizes, segment, new.n_ff));
        if let Some(e) = &t.experts {
            for i in 0..new.n_expert {
                [e.gate[i], e.up[i]].iter().for_each(|segment| rows(&mut sizes, segment, new.n_ff));
                rows(&mut sizes, &e.down[i], e.down[i].n);
            }
            rows(&mut sizes, &e.router, new.n_expert);
        }
        let encoded = |wanted: Option<Type>, segment: &Segment, n_in: usize, n: usize| {
            let ty = output_type(wanted.unwrap_or(model.tensor(segment).ty), n_in);
            matrix(ty, n_in, n * h.n_embd)
        };
        if let Some(segment) = &t.attn_output {
            sizes[segment.tensor] = encoded(s.types.attn_output, segment, new.n_head_kv * group, 1);
        }
        // Experts that lose no neurons are not requantised.
        if let Some(segment) = new_ffn_down(model, s, t).filter(|_| new.n_expert == 0 || new.n_ff < old.n_ff)
        {
            sizes[segment.tensor] = encoded(s.types.ffn_down, &segment, new.n_ff, new.n_feed_forwards());
        }
        if new.n_head_kv == 0 {
            let of_attention = [t.attn_norm, t.attn_norm_bias, t.attn_output_bias, t.attn_post_norm];
            let norms = t.qk_norm.iter().flatten().copied();
            of_attention.into_iter().flatten().chain(norms).for_each(|gone| sizes[gone.tensor] = (0, 0));
        }
        if s.blocks.biases {
            let missing = [t.attn_output_bias.is_none() && new.n_head_kv > 0, t.ffn_down_bias.is_none()];
            more.extend(missing.into_iter().filter(|m| *m).map(|_| (4 * h.n_embd + ENTRY_BYTES, h.n_embd)));
        }
    }
    let all = || sizes.iter().chain(&more);
    FileSize {
        bytes: all().map(|(bytes, _)| bytes.next_multiple_of(ALIGNMENT) as u64).sum::<u64>() + header as u64,
        params: all().map(|(_, elements)| *elements as u64).sum(),
        kv_cache: KvCache::new(h, shapes),
    }
}
