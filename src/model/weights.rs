//! A block's weights as floats.

use super::{BlockShape, BlockVector};
use std::sync::Arc;

/// A dense matrix of floats in ggml's layout: `n_out` rows of `n_in` numbers, y = M x.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// ne\[0\]: length of a row.
    pub n_in: usize,
    /// ne\[1\]: number of rows.
    pub n_out: usize,
    /// Row-major values; shared with the graphs that compute with them where they are.
    pub data: Arc<Vec<f32>>,
}

impl Matrix {
    /// A matrix from its rows.
    ///
    /// # Panics
    /// If the length of `data` is not `n_in · n_out`.
    pub fn new(n_in: usize, n_out: usize, data: Vec<f32>) -> Matrix {
        assert_eq!(data.len(), n_in * n_out);
        Matrix { n_in, n_out, data: Arc::new(data) }
    }

    /// The rows `rows`, in that order.
    pub fn select_rows(&self, rows: &[usize]) -> Matrix {
        let data = rows.iter().flat_map(|&r| &self.data[r * self.n_in..][..self.n_in]).copied().collect();
        Matrix::new(self.n_in, rows.len(), data)
    }

    /// The columns `cols`, in that order.
    pub fn select_cols(&self, cols: &[usize]) -> Matrix {
        let data = self.data.chunks_exact(self.n_in).flat_map(|row| cols.iter().map(|&c| row[c])).collect();
        Matrix::new(cols.len(), self.n_out, data)
    }
}

/// A block's weights as floats.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BlockWeights {
    pub shape: BlockShape,
    /// Attention sees a sliding window only.
    pub sliding: bool,
    /// Queries and keys are rotated.
    pub rotated: bool,
    /// The feed-forward sees the stream as it is before attention; without a norm of its own, through that of
    /// attention.
    pub parallel: bool,
    pub attn_norm: Option<Vec<f32>>,
    pub attn_norm_bias: Option<Vec<f32>>,
    /// `[n_embd, n_head·head_dim]`, `[n_embd, n_head_kv·head_dim]` twice.
    pub qkv: [Matrix; 3],
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// `[head_dim]` twice, or a number per row of `qkv`: of queries and of keys.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// `[n_head·head_dim, n_embd]`.
    pub attn_output: Matrix,
    pub attn_output_bias: Option<Vec<f32>>,
    pub attn_post_norm: Option<Vec<f32>>,
    pub ffn_norm: Option<Vec<f32>>,
    pub ffn_norm_bias: Option<Vec<f32>>,
    /// `[n_embd, n_ff]`.
    pub ffn_gate: Option<Matrix>,
    /// `[n_embd, n_ff]`.
    pub ffn_up: Matrix,
    /// `[n_ff, n_embd]`.
    pub ffn_down: Matrix,
    pub ffn_gate_bias: Option<Vec<f32>>,
    pub ffn_up_bias: Option<Vec<f32>>,
    pub ffn_down_bias: Option<Vec<f32>>,
    pub ffn_post_norm: Option<Vec<f32>>,
    /// In place of gate, up and down, which are empty then.
    pub experts: Option<ExpertWeights>,
}

/// The weights of a block's experts.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ExpertWeights {
    /// `[n_embd, n_expert]`.
    pub router: Matrix,
    /// Per expert `[n_embd, n_ff]`.
    pub gate: Vec<Matrix>,
    pub up: Vec<Matrix>,
    /// Per expert `[n_ff, n_embd]`.
    pub down: Vec<Matrix>,
    pub shared: Option<SharedWeights>,
}

/// Those of the expert that all tokens pass through.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct SharedWeights {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    /// `[n_embd]`: what its output is gated by.
    pub scale: Option<Vec<f32>>,
}

impl BlockWeights {
    /// Keeps the attention groups `groups`, in that order.
    pub fn keep_groups(&mut self, groups: &[usize], head_dim: usize) {
        let per_group = self.shape.heads_per_group();
        let q_rows = group_rows(groups, per_group * head_dim);
        let kv_rows = group_rows(groups, head_dim);
        for (m, rows) in self.qkv.iter_mut().zip([&q_rows, &kv_rows, &kv_rows]) {
            *m = m.select_rows(rows);
        }
        if let Some(bias) = &mut self.qkv_bias {
            for (b, rows) in bias.iter_mut().zip([&q_rows, &kv_rows, &kv_rows]) {
                *b = rows.iter().map(|&r| b[r]).collect();
            }
        }
        self.attn_output = self.attn_output.select_cols(&q_rows);
        self.shape.n_head = groups.len() * per_group;
        self.shape.n_head_kv = groups.len();
    }

    /// The vector's values, if there are any.
    pub fn vector(&self, v: BlockVector) -> Option<&[f32]> {
        let vector = match v {
            BlockVector::AttnNorm => self.attn_norm.as_ref(),
            BlockVector::AttnOutputBias => self.attn_output_bias.as_ref(),
            BlockVector::AttnPostNorm => self.attn_post_norm.as_ref(),
            BlockVector::FfnNorm => self.ffn_norm.as_ref(),
            BlockVector::FfnDownBias => self.ffn_down_bias.as_ref(),
            BlockVector::FfnPostNorm => self.ffn_post_norm.as_ref(),
        };
        vector.map(Vec::as_slice)
    }

    /// Gives the vector new values.
    pub fn set_vector(&mut self, v: BlockVector, values: Vec<f32>) {
        let vector = match v {
            BlockVector::AttnNorm => &mut self.attn_norm,
            BlockVector::AttnOutputBias => &mut self.attn_output_bias,
            BlockVector::AttnPostNorm => &mut self.attn_post_norm,
            BlockVector::FfnNorm => &mut self.ffn_norm,
            BlockVector::FfnDownBias => &mut self.ffn_down_bias,
            BlockVector::FfnPostNorm => &mut self.ffn_post_norm,
        };
        *vector = Some(values);
    }

    /// Gives ffn_down new values; `[n_ff, n_embd]` of each expert lie one behind the other.
    pub fn set_ffn_down(&mut self, new: Matrix) {
        match &mut self.experts {
            None => self.ffn_down = new,
            Some(e) => {
                let n = new.data.len() / e.down.len();
                let parts = new.data.chunks_exact(n).map(<[f32]>::to_vec);
                e.down = parts.map(|part| Matrix::new(new.n_in, n / new.n_in, part)).collect();
            }
        }
    }

    /// Keeps the experts `experts`, of which there may be none, and of all neurons those numbered `neurons`, in that order:
    /// neuron j of expert e is number e · n_ff + j, and the experts that stay have as many each.
    ///
    /// # Panics
    /// If one is not there, or is not one of the expert's whose turn it is.
    pub fn keep_pieces(&mut self, experts: &[usize], neurons: &[usize]) {
        let n_ff = self.shape.n_ff;
        self.shape = self.shape.with_kept(experts, neurons);
        if let Some(e) = &mut self.experts {
            e.router = e.router.select_rows(experts);
            for matrices in [&mut e.gate, &mut e.up, &mut e.down] {
                *matrices = experts.iter().map(|&i| std::mem::take(&mut matrices[i])).collect();
            }
            for (i, (&expert, neurons)) in
                experts.iter().zip(neurons.chunks_exact(self.shape.n_ff)).enumerate()
            {
                let own: Vec<usize> = neurons.iter().map(|n| n - expert * n_ff).collect();
                if own.iter().copied().ne(0..n_ff) {
                    e.gate[i] = e.gate[i].select_rows(&own);
                    e.up[i] = e.up[i].select_rows(&own);
                    e.down[i] = e.down[i].select_cols(&own);
                }
            }
            return;
        }
        if neurons.iter().copied().eq(0..n_ff) {
            return;
        }
        self.ffn_gate = self.ffn_gate.as_ref().map(|gate| gate.select_rows(neurons));
        self.ffn_up = self.ffn_up.select_rows(neurons);
        self.ffn_down = self.ffn_down.select_cols(neurons);
        for bias in [&mut self.ffn_gate_bias, &mut self.ffn_up_bias].into_iter().flatten() {
            *bias = neurons.iter().map(|&n| bias[n]).collect();
        }
    }
}

/// Row numbers of `groups` where each group has `per_group` rows.
pub(crate) fn group_rows(groups: &[usize], per_group: usize) -> Vec<usize> {
    groups.iter().flat_map(|&g| g * per_group..(g + 1) * per_group).collect()
}
