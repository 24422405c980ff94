//! Weights of a block as floats.

use super::{BlockMatrix, BlockShape, BlockVector};
use std::sync::Arc;

/// Dense matrix of floats, `[n_out, n_in]` row-major: y = M x.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// Row length, ne\[0\].
    pub n_in: usize,
    /// Number of rows, ne\[1\].
    pub n_out: usize,
    /// Row-major values, shared with the graphs that use them in place.
    pub data: Arc<Vec<f32>>,
}

impl Matrix {
    /// Creates a matrix from its rows.
    ///
    /// # Panics
    /// If the length of `data` is not `n_in · n_out`.
    pub fn new(n_in: usize, n_out: usize, data: Vec<f32>) -> Matrix {
        assert_eq!(data.len(), n_in * n_out);
        Matrix { n_in, n_out, data: Arc::new(data) }
    }

    /// Selects the rows `rows`, in that order.
    pub fn select_rows(&self, rows: &[usize]) -> Matrix {
        let data = rows.iter().flat_map(|&r| &self.data[r * self.n_in..][..self.n_in]).copied().collect();
        Matrix::new(self.n_in, rows.len(), data)
    }

    /// Selects the columns `cols`, in that order.
    pub fn select_cols(&self, cols: &[usize]) -> Matrix {
        let data = self.data.chunks_exact(self.n_in).flat_map(|row| cols.iter().map(|&c| row[c])).collect();
        Matrix::new(cols.len(), self.n_out, data)
    }
}

/// Weights of a block as floats; matrices are row-major.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BlockWeights {
    pub shape: BlockShape,
    /// Whether attention sees a sliding window only.
    pub sliding: bool,
    /// Whether queries and keys are rotated.
    pub rotated: bool,
    /// Whether the FFN reads the residual stream before attention; without its own norm, through that of
    /// attention.
    pub parallel: bool,
    pub attn_norm: Option<Vec<f32>>,
    pub attn_norm_bias: Option<Vec<f32>>,
    /// Q, K and V: `[n_head·head_dim, n_embd]`, and twice `[n_head_kv·head_dim, n_embd]`.
    pub qkv: [Matrix; 3],
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// Norms of queries and keys: `[head_dim]` each, or one number per row of `qkv`.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// Output matrix of attention, `[n_embd, n_head·head_dim]`.
    pub attn_output: Matrix,
    pub attn_output_bias: Option<Vec<f32>>,
    pub attn_post_norm: Option<Vec<f32>>,
    pub ffn_norm: Option<Vec<f32>>,
    pub ffn_norm_bias: Option<Vec<f32>>,
    /// Gate matrix, `[n_ff, n_embd]`.
    pub ffn_gate: Option<Matrix>,
    /// Up matrix, `[n_ff, n_embd]`.
    pub ffn_up: Matrix,
    /// Down matrix, `[n_embd, n_ff]`.
    pub ffn_down: Matrix,
    pub ffn_gate_bias: Option<Vec<f32>>,
    pub ffn_up_bias: Option<Vec<f32>>,
    pub ffn_down_bias: Option<Vec<f32>>,
    pub ffn_post_norm: Option<Vec<f32>>,
    /// Experts, in place of gate, up and down, which are then empty.
    pub experts: Option<ExpertWeights>,
}

/// Weights of a block's experts; matrices are row-major.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ExpertWeights {
    /// Router, `[n_expert, n_embd]`.
    pub router: Matrix,
    /// Gate of each expert, `[n_ff, n_embd]`.
    pub gate: Vec<Matrix>,
    pub up: Vec<Matrix>,
    /// Down matrix of each expert, `[n_embd, n_ff]`.
    pub down: Vec<Matrix>,
    pub shared: Option<SharedWeights>,
}

/// Weights of the shared expert, through which all tokens pass.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct SharedWeights {
    pub gate: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    /// Weight of the gate on its output, `[n_embd]`.
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

    /// Values of the vector, if the block has it.
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

    /// Sets new values of the vector.
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

    /// Sets new values of the matrix `m`; of experts those of all, stacked.
    pub fn set_matrix(&mut self, m: BlockMatrix, new: Matrix) {
        let stacked = |each: &mut Vec<Matrix>, new: Matrix| {
            let n = new.data.len() / each.len();
            let parts = new.data.chunks_exact(n).map(<[f32]>::to_vec);
            *each = parts.map(|part| Matrix::new(new.n_in, n / new.n_in, part)).collect();
        };
        match (m, &mut self.experts) {
            (BlockMatrix::AttnQ, _) => self.qkv[0] = new,
            (BlockMatrix::AttnK, _) => self.qkv[1] = new,
            (BlockMatrix::AttnV, _) => self.qkv[2] = new,
            (BlockMatrix::AttnOutput, _) => self.attn_output = new,
            (BlockMatrix::FfnGate, None) => self.ffn_gate = Some(new),
            (BlockMatrix::FfnUp, None) => self.ffn_up = new,
            (BlockMatrix::FfnDown, None) => self.ffn_down = new,
            (BlockMatrix::FfnGate, Some(e)) => stacked(&mut e.gate, new),
            (BlockMatrix::FfnUp, Some(e)) => stacked(&mut e.up, new),
            (BlockMatrix::FfnDown, Some(e)) => stacked(&mut e.down, new),
        }
    }

    /// Takes the values of the matrix `m` out, if the block has it and no experts; it is empty then.
    pub fn take_matrix(&mut self, m: BlockMatrix) -> Option<Matrix> {
        let matrix = match m {
            BlockMatrix::AttnQ => &mut self.qkv[0],
            BlockMatrix::AttnK => &mut self.qkv[1],
            BlockMatrix::AttnV => &mut self.qkv[2],
            BlockMatrix::AttnOutput => &mut self.attn_output,
            BlockMatrix::FfnGate => self.ffn_gate.as_mut()?,
            BlockMatrix::FfnUp => &mut self.ffn_up,
            BlockMatrix::FfnDown => &mut self.ffn_down,
        };
        Some(std::mem::take(matrix)).filter(|m| !m.data.is_empty())
    }

    /// Keeps the experts `experts` (there may be none) and the neurons `neurons`, in that order.
    /// Neuron j of expert e has the number e · n_ff + j. All kept experts keep the same number of neurons.
    ///
    /// # Panics
    /// If an expert or neuron does not exist, or a neuron does not belong to the expert at its place.
    pub fn keep_units(&mut self, experts: &[usize], neurons: &[usize]) {
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

/// Row indices of `groups` where each group has `per_group` rows.
pub(crate) fn group_rows(groups: &[usize], per_group: usize) -> Vec<usize> {
    groups.iter().flat_map(|&g| g * per_group..(g + 1) * per_group).collect()
}
