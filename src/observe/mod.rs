//! Statistics taken inside libllama's own graph, for models that [`crate::forward`] cannot compute.
//!
//! libllama decodes the source as any user would run it: quantised kernels, memory map, devices. A
//! [`Watcher`](crate::ggml::Watcher) looks at the nodes of the experts on the way, whose names and order
//! (`build_moe_ffn` of llama.cpp) all architectures share. It can also change them: a router that never
//! chooses some experts computes what the model without them would.

mod gating;
mod grams;
mod masked;
mod outputs;
mod refit;
mod routing;
mod usage;

pub use gating::Gating;
pub use grams::{ExpertGram, Grams, gram_bytes};
pub use masked::{LayerMask, Mask, Masked, Reference};
pub use outputs::{LayerOutputs, Outputs, can_observe_outputs, output_bytes};
pub use refit::{RouterGradient, RouterGradients};
pub use routing::Routing;
pub use usage::{LayerUse, PooledUse, TextUse, Usage, UsageError};

use crate::ggml::{GgmlError, Node};
use crate::model::{Mixture, block_and_role};
use std::collections::BTreeMap;

/// Error of an observation.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// libllama failed.
    #[error(transparent)]
    Llama(#[from] GgmlError),
    /// A layer's router was not seen, or not for all tokens.
    #[error(
        "layer {layer}: llama.cpp routed {found} tokens of a window of {expected} through experts; the statistics would be wrong"
    )]
    Unequal {
        /// Number of the layer.
        layer: usize,
        /// Tokens that were seen.
        found: usize,
        /// Tokens of the window.
        expected: usize,
    },
    /// A layer computed NaN or infinite values.
    #[error("layer {layer}: {what} is not finite; the file is damaged, or does not suit this llama.cpp")]
    NotFinite {
        /// Number of the layer.
        layer: usize,
        /// Name of the value.
        what: &'static str,
    },
    /// The observer asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Biases of the routers, which their logits do not hold yet, by the number of the layer; no numbers where
/// there are none.
fn router_biases(mixture: &Mixture) -> BTreeMap<usize, Vec<f32>> {
    let bias = |block: usize| {
        let t = mixture.file.find(&format!("blk.{block}.ffn_gate_inp.bias"))?;
        mixture.file.floats(t, 0..1).ok()
    };
    mixture.observed().map(|l| (l.block, bias(l.block).unwrap_or_default())).collect()
}

/// Adds `bias` to each row of `logits`.
fn add_bias(logits: &mut [f32], bias: &[f32]) {
    for row in logits.chunks_exact_mut(bias.len().max(1)) {
        row.iter_mut().zip(bias).for_each(|(z, b)| *z += b);
    }
}

/// Node of a layer's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spot {
    /// Product of the router: logits `[n_tokens, n_expert]`.
    Router,
    /// Scores that experts are chosen by, with the selection bias: `[n_tokens, n_expert]`.
    Biased,
    /// Numbers of the chosen experts, `[n_tokens, n_used]`.
    Chosen,
    /// Product of `ffn_down` of the chosen experts: `[n_tokens, n_used, n_embd]`.
    Down,
    /// Outputs of the chosen experts times their router weights, the source 1 of the node.
    Weighted,
    /// Sum of the weighted outputs, `[n_tokens, n_embd]`.
    Out,
}

/// Spot of a node, and its block.
fn spot(node: &Node) -> Option<(Spot, usize)> {
    if node.is_product() {
        return Some((Spot::Router, weight_block(node, "ffn_gate_inp.weight")?));
    }
    if node.is_product_by_expert() {
        return Some((Spot::Down, weight_block(node, "ffn_down_exps.weight")?));
    }
    let (name, block) = node.name().strip_prefix("ffn_moe_")?.rsplit_once('-')?;
    let spot = match name {
        "probs_biased" => Spot::Biased,
        "topk" => Spot::Chosen,
        "weighted" => Spot::Weighted,
        "out" => Spot::Out,
        _ => return None,
    };
    Some((spot, block.parse().ok()?))
}

/// Block of the weight called `role` that a product multiplies by, if it is one.
fn weight_block(product: &Node, role: &str) -> Option<usize> {
    let (block, found) = block_and_role(product.source(0)?.name())?;
    (found == role).then_some(block)
}
