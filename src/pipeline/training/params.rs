//! Parameters of one block that move.

use super::Rates;
use crate::forward::{BlockGradient, MatrixGradient};
use crate::gguf::GgufError;
use crate::model::{BlockMatrix, BlockVector, BlockWeights, Matrix, Model};
use crate::pipeline::{BlockPlan, Plan};
use crate::spill::SpillStore;
use crate::train::{Adam, AdamState, Adapter};
use std::sync::Arc;

/// How matrices move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moves {
    /// Every value by itself.
    Full(AdamState),
    /// By low-rank adapters of this rank.
    LowRank(usize),
}

/// A matrix that moves.
enum Moving {
    Full(Adam),
    LowRank(Adapter),
}

/// Vectors and matrices of one block that move, each at the index of its number.
pub(in crate::pipeline) struct BlockParams {
    vectors: [Option<Adam>; BlockVector::ALL.len()],
    matrices: [Option<Moving>; BlockMatrix::ALL.len()],
    /// The rest of a block whose matrices have values of their own.
    rest: Option<BlockWeights>,
}

impl BlockParams {
    /// Vectors of the block `w`, with biases only if `biases` says so.
    pub(in crate::pipeline) fn vectors(w: &BlockWeights, biases: bool) -> BlockParams {
        // Stock llama.cpp adds no bias in a block without heads.
        let moves = |v: BlockVector| (!v.of_attention() || w.shape.n_head_kv > 0) && (!v.is_bias() || biases);
        let adam = |v: BlockVector| {
            let values = w.vector(v).filter(|_| moves(v))?;
            // A bias is a weight with a constant input of 1.
            let size = match v {
                BlockVector::AttnOutputBias => rms(&w.attn_output.data),
                BlockVector::FfnDownBias => rms(&w.ffn_down.data),
                _ => median(values),
            };
            Some(Adam::of_vector(values.to_vec(), size))
        };
        BlockParams { vectors: BlockVector::ALL.map(adam), matrices: Default::default(), rest: None }
    }

    /// Vectors and matrices of the block `w`, which is the `il`-th.
    pub(in crate::pipeline) fn all(
        mut w: BlockWeights,
        il: usize,
        biases: bool,
        moves: Moves,
        spill: &SpillStore,
    ) -> std::io::Result<BlockParams> {
        let mut params = BlockParams::vectors(&w, biases);
        for (place, m) in params.matrices.iter_mut().zip(BlockMatrix::ALL) {
            let Some(matrix) = w.take_matrix(m) else { continue };
            let size = rms(&matrix.data);
            *place = Some(match moves {
                Moves::Full(state) => {
                    let values = Arc::unwrap_or_clone(matrix.data);
                    Moving::Full(Adam::new(values, matrix.n_in, size, state, spill)?)
                }
                Moves::LowRank(rank) => {
                    let rank = rank.min(matrix.n_in).min(matrix.n_out);
                    let seed = (il * BlockMatrix::ALL.len() + m as usize) as u64;
                    let shape = [matrix.n_out, matrix.n_in];
                    Moving::LowRank(Adapter::new(shape, rank, size, seed, spill)?)
                }
            });
        }
        params.rest = matches!(moves, Moves::Full(_)).then_some(w);
        Ok(params)
    }

    /// Whether matrices move.
    pub(in crate::pipeline) fn moves_matrices(&self) -> bool {
        self.matrices.iter().any(Option::is_some)
    }

    /// Block `il` of `model` under the plan, with what moves as it is now.
    ///
    /// # Errors
    /// [`GgufError`] if a tensor cannot be decoded.
    pub(in crate::pipeline) fn weights(
        &self,
        model: &Model,
        plan: &Plan,
        il: usize,
    ) -> Result<BlockWeights, GgufError> {
        let mut w = match &self.rest {
            Some(rest) => rest.clone(),
            None => plan.block(model, il)?,
        };
        for (m, moving) in BlockMatrix::ALL.into_iter().zip(&self.matrices) {
            match moving {
                None => {}
                Some(Moving::Full(adam)) => {
                    let n_in = adam.n_in();
                    w.set_matrix(m, Matrix::new(n_in, adam.values.len() / n_in, adam.values.to_vec()));
                }
                Some(Moving::LowRank(adapter)) => {
                    let mut matrix = w.take_matrix(m).expect("an adapter changes a matrix");
                    adapter.add_to(&mut Arc::make_mut(&mut matrix.data)[..]);
                    w.set_matrix(m, matrix);
                }
            }
        }
        for (v, adam) in BlockVector::ALL.into_iter().zip(&self.vectors) {
            if let Some(adam) = adam {
                w.set_vector(v, adam.values.to_vec());
            }
        }
        Ok(w)
    }

    /// Takes the `n`-th step, counted from 1.
    pub(in crate::pipeline) fn step(
        &mut self,
        vectors: &BlockGradient,
        matrices: &MatrixGradient,
        rates: Rates,
        n: i32,
    ) {
        for (adam, gradient) in self.vectors.iter_mut().zip(vectors) {
            if let Some(adam) = adam {
                adam.step(gradient, rates.vectors, n);
            }
        }
        for (moving, gradient) in self.matrices.iter_mut().zip(matrices) {
            match moving {
                None => {}
                Some(Moving::Full(adam)) => adam.step(gradient, rates.matrices, n),
                Some(Moving::LowRank(adapter)) => adapter.step(gradient, rates.matrices, n),
            }
        }
    }

    /// Writes the vectors to the plan.
    pub(in crate::pipeline) fn write_vectors(&self, plan: &mut BlockPlan) {
        for (v, adam) in BlockVector::ALL.into_iter().zip(&self.vectors) {
            if let Some(adam) = adam {
                plan.set_vector(v, Some(adam.values.to_vec()));
            }
        }
    }

    /// All that moves.
    pub(in crate::pipeline) fn each(&self) -> impl Iterator<Item = &Adam> {
        let matrices = self.matrices.iter().flatten().flat_map(|moving| match moving {
            Moving::Full(adam) => vec![adam],
            Moving::LowRank(adapter) => adapter.adams().to_vec(),
        });
        self.vectors.iter().flatten().chain(matrices)
    }

    /// All that moves, to be set.
    pub(in crate::pipeline) fn each_mut(&mut self) -> impl Iterator<Item = &mut Adam> {
        let matrices = self.matrices.iter_mut().flatten().flat_map(|moving| match moving {
            Moving::Full(adam) => vec![adam],
            Moving::LowRank(adapter) => adapter.adams_mut().into(),
        });
        self.vectors.iter_mut().flatten().chain(matrices)
    }
}

fn rms(x: &[f32]) -> f32 {
    (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len().max(1) as f64).sqrt() as f32
}

/// Median of the absolute values.
/// A few weights of a norm can be a hundred times as large as all others (Gemma 3). A mean would make the
/// steps of the others far too long.
fn median(x: &[f32]) -> f32 {
    let mut sizes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
    let middle = sizes.len() / 2;
    if sizes.is_empty() { 0.0 } else { *sizes.select_nth_unstable_by(middle, f32::total_cmp).1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_large_weights_do_not_make_the_others_large() {
        for n in [1usize, 8, 641] {
            let mut norm: Vec<f32> = (0..n).map(|i| if i % 2 == 0 { -2.0 } else { 2.0 }).collect();
            (0..n / 8).for_each(|i| norm[i * 7] = 300.0);
            assert_eq!(median(&norm), 2.0);
        }
        assert_eq!(median(&[]), 0.0);
    }
}
