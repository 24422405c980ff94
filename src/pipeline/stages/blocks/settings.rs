//! Settings of the sequential pass over the blocks and their defaults.

use crate::model::Matrix;
use crate::numeric::Moments;
use crate::prune;

/// Settings of the sequential pass over the blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSettings {
    /// Weight of the dense model's residual stream in the refit's target.
    pub dense_target_weight: f64,
    /// Exponent of the residual stream's size by which a token's error is divided, as the next norm does. At
    /// 0 all errors count equally, so that the few tokens with massive activations dominate. At 1 relative
    /// errors count.
    pub token_weight: f64,
    /// Ridge of a map's correction towards the dense model's residual stream, relative to the mean of its
    /// Gram matrix's diagonal.
    pub ridge_stream: f64,
    /// Ridge of the refit that compensates for removed neurons and for the rounding of `ffn_down`, if there
    /// are enough tokens.
    pub ridge_ffn: f64,
    /// Ridge of the refit that compensates for the rounding of `attn_output`.
    pub ridge_attn: f64,
    /// Whether columns that are not yet rounded compensate for the rounding of those before.
    pub error_feedback: bool,
    /// Whether biases take over the mean of the removed units.
    pub biases: bool,
}

impl Default for BlockSettings {
    fn default() -> BlockSettings {
        BlockSettings {
            dense_target_weight: 0.35,
            token_weight: 1.0,
            ridge_stream: 0.1,
            ridge_ffn: 1e-3,
            ridge_attn: 1e-2,
            error_feedback: true,
            biases: true,
        }
    }
}

impl BlockSettings {
    /// New bias of a map that changes from `old` to `new` on the inputs `keep`, fitted with
    /// `dense_target_weight`.
    /// It is the old one if biases do not change.
    pub(in crate::pipeline) fn adapted_bias(
        &self,
        bias: Option<Vec<f32>>,
        [old, new]: [&Matrix; 2],
        keep: &[usize],
        moments: &Moments,
        dense_target_weight: f64,
    ) -> Option<Vec<f32>> {
        if !self.biases {
            return bias;
        }
        let change = prune::bias_change(old, new, keep, moments, dense_target_weight);
        Some(match bias {
            Some(bias) => bias.iter().zip(change).map(|(b, c)| b + c).collect(),
            None => change,
        })
    }
}
