//! Usage of the experts: what a router did with the tokens of some texts.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the layout of the statistics file.
const SCHEMA: u32 = 1;

/// Usage of the experts of one layer. All lists have one entry per expert.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerUse {
    /// Tokens that chose the expert.
    pub tokens: Vec<u64>,
    /// Tokens for which the expert was the first that was not chosen.
    pub near_misses: Vec<u64>,
    /// Sum of its router weights over its tokens, as the layer applies them.
    pub weight: Vec<f64>,
    /// The same with the weights of each token divided by their sum.
    pub weight_normalised: Vec<f64>,
    /// Sum over its tokens of the length of its output times its router weight.
    pub energy: Vec<f64>,
    /// The same with the weights of each token divided by their sum.
    pub energy_normalised: Vec<f64>,
}

impl LayerUse {
    /// Zero usage of `n` experts.
    pub fn new(n: usize) -> LayerUse {
        let zeros = vec![0.0; n];
        LayerUse {
            tokens: vec![0; n],
            near_misses: vec![0; n],
            weight: zeros.clone(),
            weight_normalised: zeros.clone(),
            energy: zeros.clone(),
            energy_normalised: zeros,
        }
    }

    /// Adds another usage of the same experts.
    pub fn add(&mut self, other: &LayerUse) {
        let count = |a: &mut [u64], b: &[u64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        let sum = |a: &mut [f64], b: &[f64]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        count(&mut self.tokens, &other.tokens);
        count(&mut self.near_misses, &other.near_misses);
        sum(&mut self.weight, &other.weight);
        sum(&mut self.weight_normalised, &other.weight_normalised);
        sum(&mut self.energy, &other.energy);
        sum(&mut self.energy_normalised, &other.energy_normalised);
    }

    fn has_length(&self, n: usize) -> bool {
        let sums = [&self.weight, &self.weight_normalised, &self.energy, &self.energy_normalised];
        self.tokens.len() == n && self.near_misses.len() == n && sums.iter().all(|s| s.len() == n)
    }
}

/// Usage of the experts of all layers on one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextUse {
    /// Name of the text.
    pub name: String,
    /// Weight of the text among the others; its number of tokens does not add to it.
    pub weight: f64,
    /// Number of tokens that were decoded.
    pub tokens: u64,
    /// Usage of each layer that has experts, by the number of the layer.
    pub layers: BTreeMap<usize, LayerUse>,
}

/// Usage of the experts of a model: a file of its own, from which any share of the experts can be chosen
/// without decoding again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Version of the layout.
    pub schema: u32,
    /// Architecture of the model; may be left out of a ranking from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// SHA-256 of the model in hex; may be left out likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<String>,
    /// Number of experts of a layer.
    pub n_expert: usize,
    /// Statistics by text; empty if there is only a ranking.
    #[serde(default)]
    pub texts: Vec<TextUse>,
    /// Name of the criterion of `scores`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criterion: Option<String>,
    /// Score of each expert by the number of its layer; higher ones are kept. Scores beside statistics only
    /// inform.
    #[serde(default)]
    pub scores: BTreeMap<usize, Vec<f64>>,
}

/// Fault of a statistics file.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The file is not JSON of this layout.
    #[error("is no statistics file: {0}")]
    Json(#[from] serde_json::Error),
    /// The file does not fit the model.
    #[error("{0}")]
    Mismatch(String),
}

impl Usage {
    /// No usage of `n_expert` experts.
    pub fn new(n_expert: usize) -> Usage {
        Usage {
            schema: SCHEMA,
            architecture: None,
            source_sha256: None,
            n_expert,
            texts: Vec::new(),
            criterion: None,
            scores: BTreeMap::new(),
        }
    }

    /// Parses a statistics file and checks that it fits a model: its architecture, its number of experts and
    /// the layers `blocks`, whose routers can be observed.
    ///
    /// # Errors
    /// [`UsageError`] with the first problem.
    pub fn parse(text: &str, arch: &str, n_expert: usize, blocks: &[usize]) -> Result<Usage, UsageError> {
        let usage: Usage = serde_json::from_str(text)?;
        let mismatch = |problem: String| Err(UsageError::Mismatch(problem));
        if usage.schema != SCHEMA {
            return mismatch(format!("has schema {}; this version reads {SCHEMA}", usage.schema));
        }
        if let Some(other) = usage.architecture.as_ref().filter(|other| *other != arch) {
            return mismatch(format!("is about a model of architecture {other}; the model's is {arch}"));
        }
        if usage.n_expert != n_expert {
            return mismatch(format!("is about {} experts; the model has {n_expert}", usage.n_expert));
        }
        if usage.texts.is_empty() && usage.scores.is_empty() {
            return mismatch("has neither texts nor scores".into());
        }
        for text in &usage.texts {
            let layers: Vec<usize> = text.layers.keys().copied().collect();
            if layers != blocks {
                return mismatch(format!(
                    "text {} has layers {layers:?}; the model has {blocks:?}",
                    text.name
                ));
            }
            if let Some((layer, _)) = text.layers.iter().find(|(_, use_)| !use_.has_length(n_expert)) {
                return mismatch(format!(
                    "text {}, layer {layer}: there are not {n_expert} numbers of each kind",
                    text.name
                ));
            }
        }
        if !usage.scores.is_empty() {
            let layers: Vec<usize> = usage.scores.keys().copied().collect();
            if layers != blocks {
                return mismatch(format!("scores are for layers {layers:?}; the model has {blocks:?}"));
            }
            let sound = |s: &Vec<f64>| s.len() == n_expert && s.iter().all(|v| v.is_finite());
            if let Some((layer, _)) = usage.scores.iter().find(|(_, s)| !sound(s)) {
                return mismatch(format!("layer {layer}: there are not {n_expert} finite scores"));
            }
        }
        Ok(usage)
    }

    /// JSON text with a line end.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string(self).expect("keys are strings and numbers");
        text.push('\n');
        text
    }

    /// Usage of a layer over all texts.
    /// Each text counts by its weight, and as if all texts had one token: numbers are per token.
    pub fn pooled(&self, layer: usize) -> PooledUse {
        let total: f64 = self.texts.iter().map(|t| t.weight).sum();
        let mut all = PooledUse::new(self.n_expert);
        for text in &self.texts {
            let Some(used) = text.layers.get(&layer) else { continue };
            all.add(used, text.weight / total / text.tokens.max(1) as f64);
        }
        all
    }
}

/// Usage of the experts of a layer per token.
#[derive(Clone, Debug, PartialEq)]
pub struct PooledUse {
    /// Number of tokens of each expert, from all texts.
    pub n_tokens: Vec<u64>,
    /// Share of the tokens that choose it.
    pub tokens: Vec<f64>,
    /// As in [`LayerUse`], per token.
    pub weight: Vec<f64>,
    /// As in [`LayerUse`], per token.
    pub weight_normalised: Vec<f64>,
    /// As in [`LayerUse`], per token.
    pub energy: Vec<f64>,
    /// As in [`LayerUse`], per token.
    pub energy_normalised: Vec<f64>,
}

impl PooledUse {
    fn new(n: usize) -> PooledUse {
        let zeros = vec![0.0; n];
        PooledUse {
            n_tokens: vec![0; n],
            tokens: zeros.clone(),
            weight: zeros.clone(),
            weight_normalised: zeros.clone(),
            energy: zeros.clone(),
            energy_normalised: zeros,
        }
    }

    fn add(&mut self, used: &LayerUse, factor: f64) {
        for e in 0..self.n_tokens.len() {
            self.n_tokens[e] += used.tokens[e];
            self.tokens[e] += factor * used.tokens[e] as f64;
            self.weight[e] += factor * used.weight[e];
            self.weight_normalised[e] += factor * used.weight_normalised[e];
            self.energy[e] += factor * used.energy[e];
            self.energy_normalised[e] += factor * used.energy_normalised[e];
        }
    }
}

impl TextUse {
    /// Usage of a layer on this text alone, per token.
    pub fn pooled(&self, layer: usize) -> Option<PooledUse> {
        let used = self.layers.get(&layer)?;
        let mut all = PooledUse::new(used.tokens.len());
        all.add(used, 1.0 / self.tokens.max(1) as f64);
        Some(all)
    }
}
