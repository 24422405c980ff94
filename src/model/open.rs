//! Open model.

use super::tensors::Finder;
use super::traits::{Norm, OutputHead, Parallel, Positions, RopeFactors, Traits};
use super::{
    BlockTensors, BlockWeights, ExpertTensors, ExpertWeights, Hparams, Matrix, ModelError, Segment,
    SharedTensors, SharedWeights, rope,
};
use crate::gguf::{GgufError, GgufFile, TensorInfo};

/// Open model: the file, its hyper-parameters and its tensors by role.
pub struct Model {
    /// GGUF container.
    pub file: GgufFile,
    /// Hyper-parameters.
    pub hparams: Hparams,
    /// Tensors per block.
    pub blocks: Vec<BlockTensors>,
    /// Token embedding, `ne` `[n_embd, n_vocab]`.
    pub token_embd: Segment,
    /// Position embedding, `ne` `[n_embd, n_ctx_train]`, if positions are learned.
    pub position_embd: Option<Segment>,
    /// Weight of the last norm.
    pub output_norm: Segment,
    /// Bias of the last norm.
    pub output_norm_bias: Option<Segment>,
    /// Output head, `ne` `[n_embd, n_vocab]`; the token embedding if the model is tied.
    pub output: Segment,
    rope_factors: [Option<Segment>; 2],
}

impl Model {
    /// Opens the model at `path` and checks every tensor's name, type and sizes.
    ///
    /// # Errors
    /// [`ModelError`] naming the fault.
    pub fn open(path: &std::path::Path) -> Result<Model, ModelError> {
        Model::new(GgufFile::open(path)?)
    }

    /// Reads the model in an open file.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn new(file: GgufFile) -> Result<Model, ModelError> {
        let hparams = Hparams::read(&file)?;
        let mut finder = Finder::new(&file);
        let (n_embd, n_vocab) = (hparams.n_embd, hparams.n_vocab);
        let token_embd = finder.required("token_embd.weight", &[n_embd, n_vocab])?;
        let traits = hparams.family.traits();
        let learned = traits.positions == Positions::Learned;
        let position_embd = finder.if_has(learned, "position_embd.weight", &[n_embd, hparams.n_ctx_train])?;
        let output_norm = finder.required("output_norm.weight", &[n_embd])?;
        let output_norm_bias =
            finder.if_has(traits.norm == Norm::LayerWithBias, "output_norm.bias", &[n_embd])?;
        let output = match traits.head {
            OutputHead::Either => finder.optional("output.weight", &[n_embd, n_vocab])?.unwrap_or(token_embd),
            OutputHead::Tied => token_embd,
        };
        let n_freqs = [hparams.rope.n_rot / 2];
        let rope_factors = if traits.rope_factors == RopeFactors::None {
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
        if let Some(t) = finder.unused() {
            return Err(ModelError::UnknownTensor(t.name.clone(), hparams.family.name()));
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
        Ok(Model {
            hparams,
            blocks,
            token_embd,
            position_embd,
            output_norm,
            output_norm_bias,
            output,
            rope_factors,
            file,
        })
    }

    /// First feature of this model that `output_arch`, which computes such blocks, cannot represent.
    pub fn no_room_in(&self, output_arch: &Traits) -> Option<&'static str> {
        let (h, own) = (&self.hparams, self.hparams.family.traits());
        let default_yarn = [h.rope.beta_fast, h.rope.beta_slow] == [rope::BETA_FAST, rope::BETA_SLOW];
        let log_multiplier = format!("{}.rope.scaling.yarn_log_multiplier", own.name);
        let yarn_keys = !default_yarn || self.file.get(&log_multiplier).is_some() || h.temperature.is_some();
        if output_arch.head == OutputHead::Tied && self.output != self.token_embd {
            Some("an output head of its own")
        } else if output_arch.one_qkv && self.blocks.iter().any(|b| b.qkv_bias.is_some()) {
            Some("biases of Q, K and V")
        } else if self.hparams.experts.is_some() && output_arch.experts.is_none() {
            Some("experts")
        } else if output_arch.output_only && (h.rope.freq_scale != 1.0 || h.rope.ext_factor != 0.0) {
            Some("a stretched rotary embedding")
        } else if !output_arch.positions.partial() && h.rope.n_rot < h.head_dim {
            Some("heads that are rotated in part")
        } else if !output_arch.yarn_keys && own.yarn_keys && yarn_keys {
            Some("a temperature of attention, or YaRN with bounds of its own")
        } else {
            None
        }
    }

    /// Whether the model has frequency factors.
    pub fn has_rope_factors(&self) -> bool {
        self.rope_factors.iter().any(Option::is_some)
    }

    /// Tensor that holds a segment.
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

    /// Decodes a segment to a matrix.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be decoded.
    pub fn matrix(&self, s: &Segment) -> Result<Matrix, GgufError> {
        let t = self.tensor(s);
        Ok(Matrix::new(t.ne[0], s.n, self.file.floats(t, s.start..s.start + s.n)?))
    }

    /// Decodes the rows `rows` of a segment, in that order, and no others.
    ///
    /// # Errors
    /// [`GgufError`] if a row cannot be decoded.
    ///
    /// # Panics
    /// If a row is not in the segment.
    pub fn rows(&self, s: &Segment, rows: &[usize]) -> Result<Matrix, GgufError> {
        let t = self.tensor(s);
        let mut data = Vec::with_capacity(rows.len() * t.ne[0]);
        for &row in rows {
            assert!(row < s.n, "a row that is there");
            data.extend(self.file.floats(t, s.start + row..s.start + row + 1)?);
        }
        Ok(Matrix::new(t.ne[0], rows.len(), data))
    }

    /// Decodes a segment of a one-dimensional tensor.
    ///
    /// # Errors
    /// [`GgufError`] if it cannot be decoded.
    pub fn vector(&self, s: &Segment) -> Result<Vec<f32>, GgufError> {
        let all = self.file.floats(self.tensor(s), 0..1)?;
        Ok(all[s.start..s.start + s.n].to_vec())
    }

    /// Decodes the weights of block `il` to floats.
    ///
    /// # Errors
    /// [`GgufError`] if a tensor cannot be decoded.
    pub fn block(&self, il: usize) -> Result<BlockWeights, GgufError> {
        let t = &self.blocks[il];
        let vector = |s: &Option<Segment>| s.as_ref().map(|s| self.vector(s)).transpose();
        let matrix = |s: Option<&Segment>| s.map_or(Ok(Matrix::default()), |s| self.matrix(s));
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
            parallel: match self.hparams.family.traits().parallel {
                Parallel::Never => false,
                Parallel::Always => true,
                Parallel::WithoutNorm => t.ffn_norm.is_none(),
            },
            attn_norm: vector(&t.attn_norm)?,
            attn_norm_bias: vector(&t.attn_norm_bias)?,
            qkv: [matrix(part(0))?, matrix(part(1))?, matrix(part(2))?],
            qkv_bias,
            qk_norm,
            attn_output: matrix(t.attn_output.as_ref())?,
            attn_output_bias: vector(&t.attn_output_bias)?,
            attn_post_norm: vector(&t.attn_post_norm)?,
            ffn_norm: vector(&t.ffn_norm)?,
            ffn_norm_bias: vector(&t.ffn_norm_bias)?,
            ffn_gate: t.ffn_gate.as_ref().map(|gate| self.matrix(gate)).transpose()?,
            ffn_up: matrix(t.ffn_up.as_ref())?,
            ffn_down: matrix(t.ffn_down.as_ref())?,
            ffn_gate_bias: vector(&t.ffn_gate_bias)?,
            ffn_up_bias: vector(&t.ffn_up_bias)?,
            ffn_down_bias: vector(&t.ffn_down_bias)?,
            ffn_post_norm: vector(&t.ffn_post_norm)?,
            experts: t.experts.as_ref().map(|e| self.experts(e)).transpose()?,
        })
    }

    fn experts(&self, t: &ExpertTensors) -> Result<ExpertWeights, GgufError> {
        let all =
            |segments: &[Segment]| segments.iter().map(|s| self.matrix(s)).collect::<Result<Vec<_>, _>>();
        let shared = |s: SharedTensors| {
            let scale = s.scale.as_ref().map(|s| self.vector(s)).transpose()?;
            let [gate, up, down] = [s.gate, s.up, s.down].map(|s| self.matrix(&s));
            Ok::<_, GgufError>(SharedWeights { gate: gate?, up: up?, down: down?, scale })
        };
        Ok(ExpertWeights {
            router: self.matrix(&t.router)?,
            gate: all(&t.gate)?,
            up: all(&t.up)?,
            down: all(&t.down)?,
            shared: t.shared.map(shared).transpose()?,
        })
    }
}
