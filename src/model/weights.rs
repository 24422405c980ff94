//! Tensors by role, and a block's weights as floats.

use super::{BlockShape, Family, Hparams, ModelError};
use crate::gguf::{GgufError, GgufFile, TensorInfo};

/// A dense matrix of floats in ggml's layout: `n_out` rows of `n_in` numbers, y = M x.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// ne\[0\]: length of a row.
    pub n_in: usize,
    /// ne\[1\]: number of rows.
    pub n_out: usize,
    /// Row-major values.
    pub data: Vec<f32>,
}

impl Matrix {
    /// A matrix from its rows.
    ///
    /// # Panics
    /// If the length of `data` is not `n_in · n_out`.
    pub fn new(n_in: usize, n_out: usize, data: Vec<f32>) -> Matrix {
        assert_eq!(data.len(), n_in * n_out);
        Matrix { n_in, n_out, data }
    }

    /// The rows `rows`, in that order.
    pub fn select_rows(&self, rows: &[usize]) -> Matrix {
        let data = rows.iter().flat_map(|&r| &self.data[r * self.n_in..][..self.n_in]).copied().collect();
        Matrix { n_in: self.n_in, n_out: rows.len(), data }
    }

    /// The columns `cols`, in that order.
    pub fn select_cols(&self, cols: &[usize]) -> Matrix {
        let data = self.data.chunks_exact(self.n_in).flat_map(|row| cols.iter().map(|&c| row[c])).collect();
        Matrix { n_in: cols.len(), n_out: self.n_out, data }
    }
}

/// Some rows of a tensor: one role inside a tensor that may be shared (a fused attn_qkv).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index into [`GgufFile::tensors`].
    pub tensor: usize,
    /// First row.
    pub start: usize,
    /// Number of rows (elements for a vector).
    pub n: usize,
}

/// Tensors of one block by role. Attention roles are absent in attention-free blocks.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BlockTensors {
    pub attn_norm: Option<Segment>,
    /// Q, K and V rows.
    pub qkv: Option<[Segment; 3]>,
    /// Q, K and V biases, all or none.
    pub qkv_bias: Option<[Segment; 3]>,
    /// Norms of queries and keys per head.
    pub qk_norm: Option<[Segment; 2]>,
    pub attn_output: Option<Segment>,
    pub attn_output_bias: Option<Segment>,
    /// Norm of what attention puts out.
    pub attn_post_norm: Option<Segment>,
    pub ffn_norm: Segment,
    pub ffn_gate: Segment,
    pub ffn_up: Segment,
    pub ffn_down: Segment,
    pub ffn_gate_bias: Option<Segment>,
    pub ffn_up_bias: Option<Segment>,
    pub ffn_down_bias: Option<Segment>,
    /// Norm of what the feed-forward puts out.
    pub ffn_post_norm: Option<Segment>,
}

/// A vector of a block that may get new values while the matrices stay what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BlockVector {
    AttnNorm,
    AttnOutputBias,
    AttnPostNorm,
    FfnNorm,
    FfnDownBias,
    FfnPostNorm,
}

impl BlockVector {
    /// All of them, each at the index that it is as a number.
    pub const ALL: [BlockVector; 6] = [
        BlockVector::AttnNorm,
        BlockVector::AttnOutputBias,
        BlockVector::AttnPostNorm,
        BlockVector::FfnNorm,
        BlockVector::FfnDownBias,
        BlockVector::FfnPostNorm,
    ];

    /// Whether it belongs to the attention.
    pub fn of_attention(self) -> bool {
        use BlockVector::{AttnNorm, AttnOutputBias, AttnPostNorm};
        matches!(self, AttnNorm | AttnOutputBias | AttnPostNorm)
    }

    /// Whether it is a bias.
    pub fn is_bias(self) -> bool {
        matches!(self, BlockVector::AttnOutputBias | BlockVector::FfnDownBias)
    }
}

impl BlockTensors {
    /// Where the vector lies, if there is one.
    pub fn vector(&self, v: BlockVector) -> Option<Segment> {
        match v {
            BlockVector::AttnNorm => self.attn_norm,
            BlockVector::AttnOutputBias => self.attn_output_bias,
            BlockVector::AttnPostNorm => self.attn_post_norm,
            BlockVector::FfnNorm => Some(self.ffn_norm),
            BlockVector::FfnDownBias => self.ffn_down_bias,
            BlockVector::FfnPostNorm => self.ffn_post_norm,
        }
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
    pub attn_norm: Vec<f32>,
    /// `[n_embd, n_head·head_dim]`, `[n_embd, n_head_kv·head_dim]` twice.
    pub qkv: [Matrix; 3],
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// `[head_dim]` twice: of queries and of keys.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// `[n_head·head_dim, n_embd]`.
    pub attn_output: Matrix,
    pub attn_output_bias: Option<Vec<f32>>,
    pub attn_post_norm: Option<Vec<f32>>,
    pub ffn_norm: Vec<f32>,
    /// `[n_embd, n_ff]`.
    pub ffn_gate: Matrix,
    /// `[n_embd, n_ff]`.
    pub ffn_up: Matrix,
    /// `[n_ff, n_embd]`.
    pub ffn_down: Matrix,
    pub ffn_gate_bias: Option<Vec<f32>>,
    pub ffn_up_bias: Option<Vec<f32>>,
    pub ffn_down_bias: Option<Vec<f32>>,
    pub ffn_post_norm: Option<Vec<f32>>,
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
            BlockVector::AttnNorm => Some(&self.attn_norm),
            BlockVector::AttnOutputBias => self.attn_output_bias.as_ref(),
            BlockVector::AttnPostNorm => self.attn_post_norm.as_ref(),
            BlockVector::FfnNorm => Some(&self.ffn_norm),
            BlockVector::FfnDownBias => self.ffn_down_bias.as_ref(),
            BlockVector::FfnPostNorm => self.ffn_post_norm.as_ref(),
        };
        vector.map(Vec::as_slice).filter(|v| !v.is_empty())
    }

    /// Gives the vector new values.
    pub fn set_vector(&mut self, v: BlockVector, values: Vec<f32>) {
        match v {
            BlockVector::AttnNorm => self.attn_norm = values,
            BlockVector::AttnOutputBias => self.attn_output_bias = Some(values),
            BlockVector::AttnPostNorm => self.attn_post_norm = Some(values),
            BlockVector::FfnNorm => self.ffn_norm = values,
            BlockVector::FfnDownBias => self.ffn_down_bias = Some(values),
            BlockVector::FfnPostNorm => self.ffn_post_norm = Some(values),
        }
    }

    /// Keeps the feed-forward neurons `neurons`, in that order.
    pub fn keep_neurons(&mut self, neurons: &[usize]) {
        self.ffn_gate = self.ffn_gate.select_rows(neurons);
        self.ffn_up = self.ffn_up.select_rows(neurons);
        self.ffn_down = self.ffn_down.select_cols(neurons);
        for bias in [&mut self.ffn_gate_bias, &mut self.ffn_up_bias].into_iter().flatten() {
            *bias = neurons.iter().map(|&n| bias[n]).collect();
        }
        self.shape.n_ff = neurons.len();
    }
}

/// Row numbers of `groups` where each group has `per_group` rows.
pub(crate) fn group_rows(groups: &[usize], per_group: usize) -> Vec<usize> {
    groups.iter().flat_map(|&g| g * per_group..(g + 1) * per_group).collect()
}

/// An open model: the file, its hyper-parameters and its tensors by role.
pub struct Model {
    /// The container.
    pub file: GgufFile,
    /// Hyper-parameters.
    pub hparams: Hparams,
    /// Tensors per block.
    pub blocks: Vec<BlockTensors>,
    /// Token embedding `[n_embd, n_vocab]`.
    pub token_embd: Segment,
    /// Weight of the last norm.
    pub output_norm: Segment,
    /// Output head `[n_embd, n_vocab]`; the token embedding where the model is tied.
    pub output: Segment,
    rope_factors: [Option<Segment>; 2],
}

impl Model {
    /// Opens the model at `path` and checks every tensor's name, type and sizes.
    ///
    /// # Errors
    /// [`ModelError`] naming what is wrong.
    pub fn open(path: &std::path::Path) -> Result<Model, ModelError> {
        Model::new(GgufFile::open(path)?)
    }

    /// The model in an open file.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn new(file: GgufFile) -> Result<Model, ModelError> {
        let hparams = Hparams::read(&file)?;
        let mut finder = Finder { file: &file, used: vec![false; file.tensors().len()] };
        let (n_embd, n_vocab) = (hparams.n_embd, hparams.n_vocab);
        let token_embd = finder.required("token_embd.weight", &[n_embd, n_vocab])?;
        let output_norm = finder.required("output_norm.weight", &[n_embd])?;
        let output = match hparams.family.traits().untied {
            true => finder.optional("output.weight", &[n_embd, n_vocab])?.unwrap_or(token_embd),
            false => token_embd,
        };
        let n_freqs = [hparams.rope.n_rot / 2];
        let rope_factors = if !hparams.family.traits().rope_factors {
            [Ok(None), Ok(None)]
        } else if hparams.longrope {
            ["rope_factors_long.weight", "rope_factors_short.weight"].map(|n| finder.optional(n, &n_freqs))
        } else {
            [finder.optional("rope_freqs.weight", &n_freqs), Ok(None)]
        };
        let [long, short] = rope_factors;
        let rope_factors = [long?, short?];
        let blocks = (0..hparams.n_layer())
            .map(|i| finder.block(i, &hparams, &hparams.blocks[i]))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(i) = finder.used.iter().position(|used| !used) {
            return Err(ModelError::UnknownTensor(file.tensors()[i].name.clone(), hparams.family.name()));
        }
        for t in file.tensors() {
            if !t.ty.can_dequantize() {
                let problem =
                    format!("tensor {} has type {}, which ggml cannot turn into floats", t.name, t.ty);
                return Err(ModelError::Unusable(problem));
            }
            if t.ne.len() == 1 && t.ty.block_size() > 1 {
                let problem =
                    format!("tensor {} is a vector of type {}; vectors are never quantised", t.name, t.ty);
                return Err(ModelError::Unusable(problem));
            }
        }
        Ok(Model { hparams, blocks, token_embd, output_norm, output, rope_factors, file })
    }

    /// The stock architecture that can carry this model with blocks of different sizes, if there is one.
    pub fn uneven(&self) -> Option<Family> {
        let fits = |f: &Family| {
            let t = f.traits();
            let tied = self.output == self.token_embd;
            (t.untied || tied) && !(t.one_qkv && self.blocks.iter().any(|b| b.qkv_bias.is_some()))
        };
        self.hparams.family.traits().uneven.filter(fits)
    }

    /// The tensor that a segment lies in.
    pub fn tensor(&self, s: &Segment) -> &TensorInfo {
        &self.file.tensors()[s.tensor]
    }

    /// Frequency factors for windows of `n_ctx` tokens (`llama_model::get_rope_factors`).
    ///
    /// # Errors
    /// [`GgufError`] if they cannot be decoded.
    pub fn rope_factors(&self, n_ctx: usize) -> Result<Option<Vec<f32>>, GgufError> {
        let [long, short] = &self.rope_factors;
        let chosen =
            if !self.hparams.longrope || n_ctx > self.hparams.rope.n_ctx_orig { long } else { short };
        chosen.as_ref().map(|s| self.vector(s)).transpose()
    }

    /// A segment as a matrix.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be decoded.
    pub fn matrix(&self, s: &Segment) -> Result<Matrix, GgufError> {
        let t = self.tensor(s);
        Ok(Matrix::new(t.ne[0], s.n, self.file.floats(t, s.start..s.start + s.n)?))
    }

    /// A segment of a one-dimensional tensor.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be decoded.
    pub fn vector(&self, s: &Segment) -> Result<Vec<f32>, GgufError> {
        let all = self.file.floats(self.tensor(s), 0..1)?;
        Ok(all[s.start..s.start + s.n].to_vec())
    }

    /// Block `il` as floats.
    ///
    /// # Errors
    /// [`GgufError`] if a tensor cannot be decoded.
    pub fn block(&self, il: usize) -> Result<BlockWeights, GgufError> {
        let t = &self.blocks[il];
        let vector = |s: &Option<Segment>| s.as_ref().map(|s| self.vector(s)).transpose();
        let matrix = |s: Option<&Segment>| s.map_or(Ok(Matrix::new(0, 0, Vec::new())), |s| self.matrix(s));
        let part = |i: usize| t.qkv.as_ref().map(|s| &s[i]);
        let qkv_bias = match &t.qkv_bias {
            Some([q, k, v]) => Some([self.vector(q)?, self.vector(k)?, self.vector(v)?]),
            None => None,
        };
        let qk_norm = match &t.qk_norm {
            Some([q, k]) => Some([self.vector(q)?, self.vector(k)?]),
            None => None,
        };
        Ok(BlockWeights {
            shape: self.hparams.blocks[il],
            sliding: self.hparams.slides(il),
            rotated: self.hparams.rotates(il),
            attn_norm: vector(&t.attn_norm)?.unwrap_or_default(),
            qkv: [matrix(part(0))?, matrix(part(1))?, matrix(part(2))?],
            qkv_bias,
            qk_norm,
            attn_output: matrix(t.attn_output.as_ref())?,
            attn_output_bias: vector(&t.attn_output_bias)?,
            attn_post_norm: vector(&t.attn_post_norm)?,
            ffn_norm: self.vector(&t.ffn_norm)?,
            ffn_gate: self.matrix(&t.ffn_gate)?,
            ffn_up: self.matrix(&t.ffn_up)?,
            ffn_down: self.matrix(&t.ffn_down)?,
            ffn_gate_bias: vector(&t.ffn_gate_bias)?,
            ffn_up_bias: vector(&t.ffn_up_bias)?,
            ffn_down_bias: vector(&t.ffn_down_bias)?,
            ffn_post_norm: vector(&t.ffn_post_norm)?,
        })
    }
}

/// Looks tensors up by name, checks their sizes and remembers which were used.
struct Finder<'a> {
    file: &'a GgufFile,
    used: Vec<bool>,
}

impl Finder<'_> {
    fn optional(&mut self, name: &str, ne: &[usize]) -> Result<Option<Segment>, GgufError> {
        let Some(index) = self.file.tensors().iter().position(|t| t.name == name) else {
            return Ok(None);
        };
        let t = &self.file.tensors()[index];
        let mut expected = ne.to_vec();
        while expected.len() > 1 && expected.last() == Some(&1) {
            expected.pop();
        }
        if t.ne != expected {
            return Err(GgufError::Shape { name: name.into(), found: t.ne.clone(), expected: ne.to_vec() });
        }
        self.used[index] = true;
        Ok(Some(Segment { tensor: index, start: 0, n: *ne.last().unwrap_or(&1) }))
    }

    fn required(&mut self, name: &str, ne: &[usize]) -> Result<Segment, GgufError> {
        self.optional(name, ne)?.ok_or_else(|| GgufError::MissingTensor(name.into()))
    }

    /// Q, K and V of sizes `n`, from one fused tensor or from three; `row` is the shape of a row.
    fn qkv(
        &mut self,
        il: usize,
        kind: &str,
        row: &[usize],
        n: [usize; 3],
    ) -> Result<Option<[Segment; 3]>, GgufError> {
        let shape = |n: usize| row.iter().copied().chain([n]).collect::<Vec<_>>();
        if let Some(fused) = self.optional(&format!("blk.{il}.attn_qkv.{kind}"), &shape(n.iter().sum()))? {
            let starts = [0, n[0], n[0] + n[1]];
            return Ok(Some(std::array::from_fn(|i| Segment { start: starts[i], n: n[i], ..fused })));
        }
        let [q, k, v] = ["q", "k", "v"].map(|r| format!("blk.{il}.attn_{r}.{kind}"));
        let found = [
            self.optional(&q, &shape(n[0]))?,
            self.optional(&k, &shape(n[1]))?,
            self.optional(&v, &shape(n[2]))?,
        ];
        match found {
            [Some(q), Some(k), Some(v)] => Ok(Some([q, k, v])),
            [None, None, None] => Ok(None),
            _ => Err(GgufError::MissingTensor(format!(
                "blk.{il}.attn_q/k/v.{kind} (only some of the three are there)"
            ))),
        }
    }

    fn block(&mut self, il: usize, h: &Hparams, b: &BlockShape) -> Result<BlockTensors, GgufError> {
        let traits = h.family.traits();
        let name = |role: &str| format!("blk.{il}.{role}");
        let (d, q_rows, kv_rows) = (h.n_embd, b.n_head * h.head_dim, b.n_head_kv * h.head_dim);
        let (mut attn_norm, mut qkv, mut qkv_bias, mut attn_output) = (None, None, None, None);
        let (mut qk_norm, mut attn_post_norm) = (None, None);
        if b.n_head_kv > 0 {
            let rows = [q_rows, kv_rows, kv_rows];
            attn_norm = Some(self.required(&name("attn_norm.weight"), &[d])?);
            qkv = self.qkv(il, "weight", &[d], rows)?;
            qkv_bias = self.qkv(il, "bias", &[], rows)?;
            attn_output = Some(self.required(&name("attn_output.weight"), &[q_rows, d])?);
            if qkv.is_none() {
                return Err(GgufError::MissingTensor(name("attn_q.weight")));
            }
            if traits.qk_norm {
                let [q, k] = ["attn_q_norm.weight", "attn_k_norm.weight"].map(name);
                qk_norm = Some([self.required(&q, &[h.head_dim])?, self.required(&k, &[h.head_dim])?]);
            }
            attn_post_norm = self.vector_if(traits.post_norms, &name("post_attention_norm.weight"), d)?;
        }
        let ffn_post_norm = self.vector_if(traits.post_norms, &name("post_ffw_norm.weight"), d)?;
        let mut bias = |role: &str, n: usize| {
            if traits.output_biases { self.optional(&name(role), &[n]) } else { Ok(None) }
        };
        let attn_output_bias = bias("attn_output.bias", d)?;
        let ffn_gate_bias = bias("ffn_gate.bias", b.n_ff)?;
        let ffn_up_bias = bias("ffn_up.bias", b.n_ff)?;
        let ffn_down_bias = bias("ffn_down.bias", d)?;
        Ok(BlockTensors {
            attn_norm,
            qkv,
            qkv_bias,
            qk_norm,
            attn_output,
            attn_output_bias,
            attn_post_norm,
            ffn_norm: self.required(&name(&format!("{}.weight", traits.ffn_norm)), &[d])?,
            ffn_gate: self.required(&name("ffn_gate.weight"), &[d, b.n_ff])?,
            ffn_up: self.required(&name("ffn_up.weight"), &[d, b.n_ff])?,
            ffn_down: self.required(&name("ffn_down.weight"), &[b.n_ff, d])?,
            ffn_gate_bias,
            ffn_up_bias,
            ffn_down_bias,
            ffn_post_norm,
        })
    }

    /// A vector that the family has, or has not.
    fn vector_if(&mut self, has: bool, name: &str, n: usize) -> Result<Option<Segment>, GgufError> {
        if has { self.required(name, &[n]).map(Some) } else { Ok(None) }
    }
}
