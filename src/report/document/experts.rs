//! Part of a report about the experts of a mixture.

use crate::ExpertsOutcome;
use serde::Serialize;

/// Choice of the experts of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Experts {
    /// Number of experts of a layer in the source.
    pub n_expert: usize,
    /// Number of experts of a layer in the result.
    pub n_kept: usize,
    /// Number of experts that a token passes through.
    pub n_used: usize,
    /// Criterion of the first choice.
    pub criterion: String,
    /// Steps of the choice, in order.
    pub steps: Vec<ExpertStep>,
    /// Quality on each text, the worst first.
    pub texts: Vec<ExpertText>,
    /// Layers with experts.
    pub layers: Vec<LayerExperts>,
}

/// Step of a choice of experts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertStep {
    /// `statistics`, `outputs`, `swaps` or `routers`.
    pub name: &'static str,
    /// Mean KL divergence on the held-out windows with it, in nats.
    pub kl_divergence: f64,
    /// Whether its result was kept.
    pub kept: bool,
}

/// Quality on the held-out windows of one text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExpertText {
    /// Name of the text.
    pub name: String,
    /// Perplexity of the source.
    pub ppl_before: f64,
    /// Perplexity of the result.
    pub ppl_after: f64,
    /// Mean KL divergence from the source's predictions, in nats.
    pub kl_divergence: f64,
    /// Share of positions with the same most likely token, 0 to 1.
    pub top1: f64,
}

/// Experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerExperts {
    /// Number of the layer.
    pub layer: usize,
    /// Kept experts of the source, ascending.
    pub kept: Vec<usize>,
    /// Tokens of the calibration that chose each expert of the source; empty if they were not observed.
    pub tokens: Vec<u64>,
}

impl From<&ExpertsOutcome> for Experts {
    fn from(o: &ExpertsOutcome) -> Experts {
        let observed = |layer: usize| -> Vec<u64> {
            let seen = o.usage.texts.iter().any(|t| t.layers.contains_key(&layer));
            if seen { o.usage.pooled(layer).n_tokens } else { Vec::new() }
        };
        let step = |s: &crate::pipeline::experts::Step| ExpertStep {
            name: s.name,
            kl_divergence: s.kl_divergence,
            kept: s.kept,
        };
        let text = |t: &crate::pipeline::experts::TextQuality| ExpertText {
            name: t.name.clone(),
            ppl_before: t.metrics.base_ppl,
            ppl_after: t.metrics.ppl,
            kl_divergence: t.metrics.kl.mean,
            top1: t.metrics.top1,
        };
        let layer = |(layer, kept): &(usize, Vec<usize>)| LayerExperts {
            layer: *layer,
            kept: kept.clone(),
            tokens: observed(*layer),
        };
        Experts {
            n_expert: o.n_expert,
            n_kept: o.n_keep,
            n_used: o.n_used,
            criterion: o.criterion.clone(),
            steps: o.steps.iter().map(step).collect(),
            texts: o.texts.iter().map(text).collect(),
            layers: o.kept.iter().map(layer).collect(),
        }
    }
}
