//! What stays of a model.

use crate::gguf::GgufError;
use crate::model::{Arch, BlockShape, BlockVector, BlockWeights, Family, Heads, Model, OutputArchs};
use crate::prune::{Budget, GroupId};
use crate::requant::Quantised;

/// What stays of one block.
#[derive(Clone, Debug)]
pub struct BlockPlan {
    /// Attention groups of the source block, ascending.
    pub groups: Vec<usize>,
    /// Experts of the source block, if it has some, in the order in which they are written.
    pub experts: Vec<usize>,
    /// Neurons of the source block's feed-forward, in the order in which they are written; of a mixture those of all experts
    /// that stay, as [`BlockWeights::keep_units`] numbers them.
    pub neurons: Vec<usize>,
    /// New attn_output, if its values changed; its columns belong to `groups`.
    pub attn_output: Option<Quantised>,
    /// New ffn_down, if its values changed; its columns belong to `neurons`. Those of experts lie one behind the other.
    pub ffn_down: Option<Quantised>,
    /// New values of vectors, in the order of [`BlockVector::ALL`].
    pub vectors: [Option<Vec<f32>>; BlockVector::ALL.len()],
}

impl BlockPlan {
    /// The new values of a vector, if it has any.
    pub fn vector(&self, v: BlockVector) -> &Option<Vec<f32>> {
        &self.vectors[v as usize]
    }

    /// Gives a vector new values, or none.
    pub fn set_vector(&mut self, v: BlockVector, values: Option<Vec<f32>>) {
        self.vectors[v as usize] = values;
    }
}

/// What stays of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it may go.
    pub output_archs: OutputArchs,
    /// Per block.
    pub blocks: Vec<BlockPlan>,
}

impl Plan {
    /// Everything stays, and may go anywhere.
    pub fn whole(model: &Model) -> Plan {
        let whole = |b: &BlockShape| BlockPlan {
            groups: (0..b.n_head_kv).collect(),
            experts: (0..b.n_expert).collect(),
            neurons: (0..b.n_feed_forwards() * b.n_ff).collect(),
            attn_output: None,
            ffn_down: None,
            vectors: Default::default(),
        };
        let output_archs = model.output_archs(Heads::default(), Arch::default());
        Plan { output_archs, blocks: model.hparams.blocks.iter().map(whole).collect() }
    }

    /// The architecture that it is written in.
    pub fn output_arch(&self, model: &Model) -> Family {
        self.output_archs.of(&self.shapes(model))
    }

    /// Shapes of the pruned blocks.
    pub fn shapes(&self, model: &Model) -> Vec<BlockShape> {
        self.blocks
            .iter()
            .zip(&model.hparams.blocks)
            .map(|(p, b)| BlockShape {
                n_head: p.groups.len() * b.heads_per_group(),
                n_head_kv: p.groups.len(),
                ..b.with_kept(&p.experts, &p.neurons)
            })
            .collect()
    }

    /// Block `il` of `model` as the plan leaves it: with the values that the file will hold.
    ///
    /// # Errors
    /// [`GgufError`] if a tensor cannot be decoded.
    pub fn block(&self, model: &Model, il: usize) -> Result<BlockWeights, GgufError> {
        let plan = &self.blocks[il];
        let mut w = model.block(il)?;
        if plan.groups.len() < w.shape.n_head_kv {
            w.keep_groups(&plan.groups, model.hparams.head_dim);
        }
        w.keep_units(&plan.experts, &plan.neurons);
        let read = |q: &Quantised, name: &str| {
            q.to_matrix()
                .map_err(|source| GgufError::Tensor { name: format!("blk.{il}.{name}.weight"), source })
        };
        if let Some(q) = &plan.attn_output {
            w.attn_output = read(q, "attn_output")?;
        }
        if let Some(q) = &plan.ffn_down {
            w.set_ffn_down(read(q, "ffn_down")?);
        }
        for (v, new) in BlockVector::ALL.into_iter().zip(&plan.vectors) {
            if let Some(new) = new {
                w.set_vector(v, new.clone());
            }
        }
        Ok(w)
    }

    /// Removes an attention group.
    ///
    /// # Panics
    /// If the block has a new attn_output, whose columns belong to the groups as they were.
    pub fn remove_group(&mut self, id: GroupId) {
        assert!(self.blocks[id.block].attn_output.is_none(), "heads go before attn_output is refitted");
        self.blocks[id.block].groups.retain(|&g| g != id.group);
    }

    /// Parameters that the attention has given up.
    pub fn attention_params_removed(&self, budgets: &[Budget]) -> usize {
        self.blocks.iter().zip(budgets).map(|(p, b)| (b.n_groups - p.groups.len()) * b.group_params).sum()
    }

    /// Share of the parameters of `model`'s blocks that is gone.
    pub fn sparsity(&self, model: &Model) -> f64 {
        let h = &model.hparams;
        let [before, after] = [&h.blocks, &self.shapes(model)].map(|blocks| h.blocks_params(blocks));
        (before - after) as f64 / before as f64
    }
}
