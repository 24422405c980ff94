//! Tensors of a model by role.

use super::traits::{Norm, Parallel, QkNorm, SharedExpert, Traits};
use super::{BlockShape, Hparams};
use crate::gguf::{GgufError, GgufFile, TensorInfo};

/// Rows of a tensor that have one role; a tensor may hold several roles (a fused attn_qkv).
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
    pub attn_norm_bias: Option<Segment>,
    /// Q, K and V rows.
    pub qkv: Option<[Segment; 3]>,
    /// Q, K and V biases, all or none.
    pub qkv_bias: Option<[Segment; 3]>,
    /// Norms of queries and keys.
    pub qk_norm: Option<[Segment; 2]>,
    pub attn_output: Option<Segment>,
    pub attn_output_bias: Option<Segment>,
    /// Norm of the attention output.
    pub attn_post_norm: Option<Segment>,
    pub ffn_norm: Option<Segment>,
    pub ffn_norm_bias: Option<Segment>,
    pub ffn_gate: Option<Segment>,
    pub ffn_up: Option<Segment>,
    pub ffn_down: Option<Segment>,
    pub ffn_gate_bias: Option<Segment>,
    pub ffn_up_bias: Option<Segment>,
    pub ffn_down_bias: Option<Segment>,
    /// Norm of the FFN output.
    pub ffn_post_norm: Option<Segment>,
    /// Experts, in place of gate, up and down.
    pub experts: Option<ExpertTensors>,
}

/// Tensors of a block's experts.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ExpertTensors {
    /// Router, one row per expert.
    pub router: Segment,
    /// Gate of each expert.
    pub gate: Vec<Segment>,
    pub up: Vec<Segment>,
    pub down: Vec<Segment>,
    pub shared: Option<SharedTensors>,
}

/// Tensors of the shared expert, through which all tokens pass.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct SharedTensors {
    pub gate: Segment,
    pub up: Segment,
    pub down: Segment,
    /// Weight of the gate on its output.
    pub scale: Option<Segment>,
}

/// Vector of a block that tuning may change while the matrices keep their values.
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
    /// All vectors; each is at the index of its number.
    pub const ALL: [BlockVector; 6] = [
        BlockVector::AttnNorm,
        BlockVector::AttnOutputBias,
        BlockVector::AttnPostNorm,
        BlockVector::FfnNorm,
        BlockVector::FfnDownBias,
        BlockVector::FfnPostNorm,
    ];

    /// Whether it belongs to attention.
    pub fn of_attention(self) -> bool {
        use BlockVector::{AttnNorm, AttnOutputBias, AttnPostNorm};
        matches!(self, AttnNorm | AttnOutputBias | AttnPostNorm)
    }

    /// Whether it is a bias.
    pub fn is_bias(self) -> bool {
        matches!(self, BlockVector::AttnOutputBias | BlockVector::FfnDownBias)
    }
}

/// Matrix of a block that can get new values. Those of experts are stacked, one expert behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BlockMatrix {
    AttnQ,
    AttnK,
    AttnV,
    AttnOutput,
    FfnGate,
    FfnUp,
    FfnDown,
}

impl BlockMatrix {
    /// All matrices; each is at the index of its number.
    pub const ALL: [BlockMatrix; 7] = [
        BlockMatrix::AttnQ,
        BlockMatrix::AttnK,
        BlockMatrix::AttnV,
        BlockMatrix::AttnOutput,
        BlockMatrix::FfnGate,
        BlockMatrix::FfnUp,
        BlockMatrix::FfnDown,
    ];

    /// Name, as in the names of tensors (`blk.0.attn_q.weight`).
    pub fn name(self) -> &'static str {
        match self {
            BlockMatrix::AttnQ => "attn_q",
            BlockMatrix::AttnK => "attn_k",
            BlockMatrix::AttnV => "attn_v",
            BlockMatrix::AttnOutput => "attn_output",
            BlockMatrix::FfnGate => "ffn_gate",
            BlockMatrix::FfnUp => "ffn_up",
            BlockMatrix::FfnDown => "ffn_down",
        }
    }

    /// Whether it belongs to attention.
    pub fn of_attention(self) -> bool {
        use BlockMatrix::{AttnK, AttnOutput, AttnQ, AttnV};
        matches!(self, AttnQ | AttnK | AttnV | AttnOutput)
    }
}

impl BlockTensors {
    /// Rows of the matrix `m` in the file; of experts those of all, which share one tensor. Nothing if the block has no such
    /// matrix.
    pub fn matrix(&self, m: BlockMatrix) -> Option<Segment> {
        let stacked = |each: &[Segment]| {
            each.first().map(|first| Segment { n: each.iter().map(|s| s.n).sum(), ..*first })
        };
        let qkv = |i: usize| self.qkv.map(|qkv| qkv[i]);
        match (m, &self.experts) {
            (BlockMatrix::AttnQ, _) => qkv(0),
            (BlockMatrix::AttnK, _) => qkv(1),
            (BlockMatrix::AttnV, _) => qkv(2),
            (BlockMatrix::AttnOutput, _) => self.attn_output,
            (BlockMatrix::FfnGate, Some(e)) => stacked(&e.gate),
            (BlockMatrix::FfnUp, Some(e)) => stacked(&e.up),
            (BlockMatrix::FfnDown, Some(e)) => stacked(&e.down),
            (BlockMatrix::FfnGate, None) => self.ffn_gate,
            (BlockMatrix::FfnUp, None) => self.ffn_up,
            (BlockMatrix::FfnDown, None) => self.ffn_down,
        }
    }

    /// Segment of ffn_down, or of the first expert's, which shares one tensor with the others.
    ///
    /// # Panics
    /// If there is neither.
    pub fn down(&self) -> Segment {
        let experts = || self.experts.as_ref().and_then(|e| e.down.first().copied());
        self.ffn_down.or_else(experts).expect("a block has ffn_down, or experts that do")
    }

    /// Segment of the vector, if the block has it.
    pub fn vector(&self, v: BlockVector) -> Option<Segment> {
        match v {
            BlockVector::AttnNorm => self.attn_norm,
            BlockVector::AttnOutputBias => self.attn_output_bias,
            BlockVector::AttnPostNorm => self.attn_post_norm,
            BlockVector::FfnNorm => self.ffn_norm,
            BlockVector::FfnDownBias => self.ffn_down_bias,
            BlockVector::FfnPostNorm => self.ffn_post_norm,
        }
    }
}

/// Lookup of tensors by name that checks their sizes and remembers which are used.
pub(super) struct Finder<'a> {
    file: &'a GgufFile,
    used: Vec<bool>,
}

impl<'a> Finder<'a> {
    pub(super) fn new(file: &'a GgufFile) -> Finder<'a> {
        Finder { file, used: vec![false; file.tensors().len()] }
    }

    /// First tensor that is not looked up.
    pub(super) fn unused(&self) -> Option<&'a TensorInfo> {
        self.used.iter().position(|used| !used).map(|i| &self.file.tensors()[i])
    }

    pub(super) fn optional(&mut self, name: &str, ne: &[usize]) -> Result<Option<Segment>, GgufError> {
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

    pub(super) fn required(&mut self, name: &str, ne: &[usize]) -> Result<Segment, GgufError> {
        self.optional(name, ne)?.ok_or_else(|| GgufError::MissingTensor(name.into()))
    }

    /// Finds Q, K and V of the sizes `n`, in one fused tensor or in three; `row` is the shape of a row.
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

    /// Finds the tensors of block `il`.
    pub(super) fn block(
        &mut self,
        il: usize,
        h: &Hparams,
        b: &BlockShape,
    ) -> Result<BlockTensors, GgufError> {
        let traits = h.family.traits();
        let name = |role: &str| format!("blk.{il}.{role}");
        let (d, q_rows, kv_rows) = (h.n_embd, b.n_head * h.head_dim, b.n_head_kv * h.head_dim);
        let [attn_norm_name, ffn_norm_name] = self.pre_norms(il, traits);
        let (mut attn_norm, mut qkv, mut qkv_bias, mut attn_output) = ([None; 2], None, None, None);
        let (mut qk_norm, mut attn_post_norm) = (None, None);
        if b.n_head_kv > 0 {
            let rows = [q_rows, kv_rows, kv_rows];
            attn_norm = self.norm(il, attn_norm_name, d, traits.norm)?;
            qkv = self.qkv(il, "weight", &[d], rows)?;
            qkv_bias = self.qkv(il, "bias", &[], rows)?;
            attn_output = Some(self.required(&name("attn_output.weight"), &[q_rows, d])?);
            if qkv.is_none() {
                return Err(GgufError::MissingTensor(name("attn_q.weight")));
            }
            if let Some(kind) = traits.qk_norm {
                let [q, k] = ["attn_q_norm.weight", "attn_k_norm.weight"].map(name);
                let [q_width, k_width] = match kind {
                    QkNorm::Heads | QkNorm::RotatedHeads => [h.head_dim; 2],
                    QkNorm::Whole => [q_rows, kv_rows],
                };
                qk_norm = Some([self.required(&q, &[q_width])?, self.required(&k, &[k_width])?]);
            }
            attn_post_norm = self.if_has(traits.post_norms, &name("post_attention_norm.weight"), &[d])?;
        }
        let ffn_norm = self.norm(il, ffn_norm_name, d, traits.norm)?;
        let ffn_post_norm = self.if_has(traits.post_norms, &name("post_ffw_norm.weight"), &[d])?;
        let gated = traits.activation.gated();
        let experts = h.experts.map(|e| self.experts(il, d, b, e.n_ff_shared, traits)).transpose()?;
        let dense = experts.is_none();
        let (ffn_gate, ffn_up) = if traits.fused_gate_up {
            let both = self.required(&name("ffn_up.weight"), &[d, 2 * b.n_ff])?;
            let gate = Segment { n: b.n_ff, ..both };
            (Some(gate), Some(Segment { start: b.n_ff, ..gate }))
        } else {
            let gate = self.if_has(gated && dense, &name("ffn_gate.weight"), &[d, b.n_ff])?;
            (gate, self.if_has(dense, &name("ffn_up.weight"), &[d, b.n_ff])?)
        };
        let mut bias = |has: bool, role: &str, n: usize| {
            if has && traits.output_biases { self.optional(&name(role), &[n]) } else { Ok(None) }
        };
        Ok(BlockTensors {
            attn_norm: attn_norm[0],
            attn_norm_bias: attn_norm[1],
            qkv,
            qkv_bias,
            qk_norm,
            attn_output,
            attn_output_bias: bias(true, "attn_output.bias", d)?,
            attn_post_norm,
            ffn_norm: ffn_norm[0],
            ffn_norm_bias: ffn_norm[1],
            ffn_gate,
            ffn_up,
            ffn_gate_bias: bias(gated && dense, "ffn_gate.bias", b.n_ff)?,
            ffn_up_bias: bias(dense, "ffn_up.bias", b.n_ff)?,
            ffn_down_bias: bias(dense, "ffn_down.bias", d)?,
            ffn_down: self.if_has(dense, &name("ffn_down.weight"), &[b.n_ff, d])?,
            ffn_post_norm,
            experts,
        })
    }

    /// Finds the experts of block `il`; the shared one has `n_ff_shared` neurons.
    fn experts(
        &mut self,
        il: usize,
        d: usize,
        b: &BlockShape,
        n_ff_shared: usize,
        traits: &Traits,
    ) -> Result<ExpertTensors, GgufError> {
        let name = |role: &str| format!("blk.{il}.ffn_{role}.weight");
        let mut each = |role: &str, ne: [usize; 2]| {
            let all = self.required(&name(role), &[ne[0], ne[1], b.n_expert])?;
            let expert = |i: usize| Segment { start: i * ne[1], n: ne[1], ..all };
            Ok::<Vec<Segment>, GgufError>((0..b.n_expert).map(expert).collect())
        };
        let (gate, up) = (each("gate_exps", [d, b.n_ff])?, each("up_exps", [d, b.n_ff])?);
        let down = each("down_exps", [b.n_ff, d])?;
        let shared = match n_ff_shared {
            0 => None,
            n => Some(SharedTensors {
                gate: self.required(&name("gate_shexp"), &[d, n])?,
                up: self.required(&name("up_shexp"), &[d, n])?,
                down: self.required(&name("down_shexp"), &[n, d])?,
                scale: {
                    let gated = traits.experts.is_some_and(|e| e.shared == SharedExpert::Gated);
                    self.if_has(gated, &name("gate_inp_shexp"), &[d])?
                },
            }),
        };
        Ok(ExpertTensors {
            router: self.required(&name("gate_inp"), &[d, b.n_expert])?,
            gate,
            up,
            down,
            shared,
        })
    }

    /// Names of the norms before attention and FFN in block `il`, if there are any.
    fn pre_norms(&self, il: usize, traits: &Traits) -> [Option<&'static str>; 2] {
        let has = |role: &str| self.file.find(&format!("blk.{il}.{role}.weight")).is_some();
        match traits.parallel {
            _ if !traits.pre_norms => [None, None],
            // If there are two, Falcon's first is the FFN's (`src/models/falcon.cpp` of llama.cpp).
            Parallel::Always if has("attn_norm_2") => [Some("attn_norm_2"), Some("attn_norm")],
            Parallel::Always => [Some("attn_norm"), None],
            Parallel::WithoutNorm if !has(traits.ffn_norm) => [Some("attn_norm"), None],
            Parallel::Never | Parallel::WithoutNorm => [Some("attn_norm"), Some(traits.ffn_norm)],
        }
    }

    /// Finds weight and bias of a norm of the residual stream.
    fn norm(
        &mut self,
        il: usize,
        role: Option<&str>,
        d: usize,
        kind: Norm,
    ) -> Result<[Option<Segment>; 2], GgufError> {
        let Some(role) = role else {
            return Ok([None; 2]);
        };
        let weight = self.required(&format!("blk.{il}.{role}.weight"), &[d])?;
        let bias = self.if_has(kind == Norm::LayerWithBias, &format!("blk.{il}.{role}.bias"), &[d])?;
        Ok([Some(weight), bias])
    }

    /// Finds a tensor if the family has it.
    pub(super) fn if_has(
        &mut self,
        has: bool,
        name: &str,
        ne: &[usize],
    ) -> Result<Option<Segment>, GgufError> {
        if has { self.required(name, ne).map(Some) } else { Ok(None) }
    }
}
