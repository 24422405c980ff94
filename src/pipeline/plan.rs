//! Plan of a pruned model: the kept parts and their new values.

use crate::gguf::GgufError;
use crate::model::{
    Arch, BlockMatrix, BlockShape, BlockVector, BlockWeights, Family, Heads, Model, OutputArchs,
};
use crate::prune::{Budget, GroupId};
use crate::requant::Quantised;

/// Kept parts of one block.
#[derive(Clone, Debug)]
pub struct BlockPlan {
    /// Attention groups of the source block, ascending.
    pub groups: Vec<usize>,
    /// Experts of the source block, if it has some, in the order in which they are written.
    pub experts: Vec<usize>,
    /// Neurons of the source block's FFN, in the order in which they are written.
    /// In a mixture they are those of all kept experts, numbered as in [`BlockWeights::keep_units`].
    pub neurons: Vec<usize>,
    /// New values of matrices, in the order of [`BlockMatrix::ALL`].
    /// They hold the kept rows and columns in the order in which these are written. Those of experts are
    /// stacked.
    pub matrices: [Option<Quantised>; BlockMatrix::ALL.len()],
    /// New values of vectors, in the order of [`BlockVector::ALL`].
    pub vectors: [Option<Vec<f32>>; BlockVector::ALL.len()],
}

impl BlockPlan {
    /// New values of the matrix `m`, if it has any.
    pub fn matrix(&self, m: BlockMatrix) -> Option<&Quantised> {
        self.matrices[m as usize].as_ref()
    }

    /// Sets new values of the matrix `m`.
    pub fn set_matrix(&mut self, m: BlockMatrix, values: Quantised) {
        self.matrices[m as usize] = Some(values);
    }

    /// New values of the vector `v`, if it has any.
    pub fn vector(&self, v: BlockVector) -> &Option<Vec<f32>> {
        &self.vectors[v as usize]
    }

    /// Sets or clears the new values of the vector `v`.
    pub fn set_vector(&mut self, v: BlockVector, values: Option<Vec<f32>>) {
        self.vectors[v as usize] = values;
    }
}

/// Kept parts of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Output architectures that the model may be written in.
    pub output_archs: OutputArchs,
    /// Plan of each block.
    pub blocks: Vec<BlockPlan>,
}

impl Plan {
    /// Plan that keeps everything and allows every output architecture.
    pub fn whole(model: &Model) -> Plan {
        let whole = |b: &BlockShape| BlockPlan {
            groups: (0..b.n_head_kv).collect(),
            experts: (0..b.n_expert).collect(),
            neurons: (0..b.n_feed_forwards() * b.n_ff).collect(),
            matrices: Default::default(),
            vectors: Default::default(),
        };
        let output_archs = model.output_archs(Heads::default(), Arch::default());
        Plan { output_archs, blocks: model.hparams.blocks.iter().map(whole).collect() }
    }

    /// Output architecture that the plan is written in.
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

    /// Block `il` of `model` under the plan, with the values that the file will hold.
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
        for m in BlockMatrix::ALL {
            let Some(q) = plan.matrix(m) else { continue };
            let name = || format!("blk.{il}.{}.weight", m.name());
            w.set_matrix(m, q.to_matrix().map_err(|source| GgufError::Tensor { name: name(), source })?);
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
    /// If a matrix of the block's attention has new values, which belong to the groups as they were.
    pub fn remove_group(&mut self, id: GroupId) {
        let of_attention = |m: &BlockMatrix| m.of_attention() && self.blocks[id.block].matrix(*m).is_some();
        assert!(
            !BlockMatrix::ALL.iter().any(of_attention),
            "heads are removed before attention gets new values"
        );
        self.blocks[id.block].groups.retain(|&g| g != id.group);
    }

    /// Matrices that have new values in some block.
    pub fn new_matrices(&self) -> Vec<BlockMatrix> {
        let is_new = |m: &BlockMatrix| self.blocks.iter().any(|b| b.matrix(*m).is_some());
        BlockMatrix::ALL.into_iter().filter(is_new).collect()
    }

    /// Number of parameters that were removed from attention.
    pub fn attention_params_removed(&self, budgets: &[Budget]) -> usize {
        self.blocks.iter().zip(budgets).map(|(p, b)| (b.n_groups - p.groups.len()) * b.group_params).sum()
    }

    /// Share of the parameters of `model`'s blocks that is removed.
    pub fn sparsity(&self, model: &Model) -> f64 {
        let h = &model.hparams;
        let [before, after] = [&h.blocks, &self.shapes(model)].map(|blocks| h.blocks_params(blocks));
        (before - after) as f64 / before as f64
    }
}
