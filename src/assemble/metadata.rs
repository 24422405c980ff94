//! Metadata of the output: the source's, in its order and with its types, adapted to the pruned model.

use super::types::file_type;
use crate::ggml::Token;
use crate::gguf::{OutTensor, Value};
use crate::model::{BlockShape, Family, Model, RopeFactors};
use crate::pipeline::Plan;

/// Provenance of a pruned model, which is written into `putri.*` keys.
#[derive(Clone, Debug)]
pub struct Provenance {
    /// SHA-256 of the source file, in hex.
    pub source_sha256: String,
    /// Requested sparsity.
    pub sparsity: f64,
    /// Share of the blocks' parameters that is removed.
    pub sparsity_reached: f64,
    /// Name of the method.
    pub method: String,
    /// Description of the calibration text.
    pub calibration: String,
    /// Seed of the calibration.
    pub seed: u64,
    /// Keys and values that the stages of the method add.
    pub stages: Vec<(&'static str, Value)>,
    /// First tokens of a held-out window.
    pub check_tokens: Vec<Token>,
    /// Negative log-likelihood, in nats, of each of these tokens but the first, by our own forward pass of
    /// the pruned model; empty if unknown.
    pub check_nll: Vec<f32>,
    /// Whether the file holds exactly the values that were measured.
    pub check_exact: bool,
}

impl Provenance {
    /// The value that a stage added under `key`.
    pub fn of_stage(&self, key: &str) -> Option<&Value> {
        self.stages.iter().find(|(k, _)| *k == key).map(|(_, value)| value)
    }
}

/// Metadata of the pruned model with the tensors `tensors`.
pub(super) fn metadata(
    model: &Model,
    plan: &Plan,
    output_arch: Family,
    tensors: &[OutTensor],
    p: &Provenance,
) -> Vec<(String, Value)> {
    let n_params = tensors.iter().map(|t| t.ne.iter().product::<usize>()).sum();
    let (old, new) = (model.hparams.family.name(), output_arch.name());
    let mut shapes = ShapeKeys::new(model, plan, output_arch);
    let mut out: Vec<(String, Value)> = Vec::new();
    for (key, value) in model.file.metadata() {
        if !is_carried(key) {
            continue;
        }
        // A stray key of the output architecture would override the one that is written for it.
        if old != new && key.strip_prefix(new).is_some_and(|k| k.starts_with('.')) {
            continue;
        }
        // Phi-3 has the key, but llama.cpp slides no window there.
        if model.hparams.sliding.is_none() && old != new && key.ends_with(".attention.sliding_window") {
            continue;
        }
        let value = match (key.as_str(), value) {
            ("general.architecture", _) => Value::Str(new.into()),
            ("general.name", Value::Str(name)) => Value::Str(renamed(name, p.sparsity_reached)),
            ("general.size_label", Value::Str(_)) => Value::Str(size_label(n_params).into()),
            ("general.parameter_count", Value::U64(_)) => Value::U64(n_params as u64),
            ("general.file_type", Value::U32(said)) => Value::U32(file_type(*said, tensors)),
            _ => value.clone(),
        };
        match key.strip_prefix(old).and_then(|k| k.strip_prefix('.')) {
            Some(suffix) => {
                let value = shapes.take(suffix).unwrap_or(value);
                out.push((format!("{new}.{suffix}"), value));
            }
            None => out.push((key.clone(), value)),
        }
    }
    // Keys whose defaults follow from the head count, which has changed.
    let at = out.iter().rposition(|(k, _)| k.starts_with(&format!("{new}."))).map_or(out.len(), |i| i + 1);
    let missing = shapes.left.into_iter().map(|(suffix, v)| (format!("{new}.{suffix}"), v));
    out.splice(at..at, missing);
    out.extend(provenance(p));
    let names = plan.new_matrices().into_iter().map(|m| m.name().into()).collect();
    out.push((NEW_MATRICES.into(), Value::StrArray(names)));
    out
}

/// Returns whether the source's key `key` may be true of the result.
/// Others describe the importance matrix of another quantisation, an earlier pruning, and how the source is
/// split into files, which a single part may say, too.
pub(super) fn is_carried(key: &str) -> bool {
    !["quantize.imatrix.", "putri.", "split."].iter().any(|prefix| key.starts_with(prefix))
}

/// Key of the names of the matrices with new values. All others are copies of the source's rows.
pub(crate) const NEW_MATRICES: &str = "putri.new_matrices";

/// Window of `step35` in tokens: a million, which llama.cpp can still multiply by its number of sequences.
const STEP35_WINDOW: u32 = 1 << 20;

/// Keys of block sizes, and of values that the output architecture has no default for, until they are
/// written.
struct ShapeKeys {
    left: Vec<(&'static str, Value)>,
}

impl ShapeKeys {
    fn new(model: &Model, plan: &Plan, output_arch: Family) -> ShapeKeys {
        let shapes = plan.shapes(model);
        let per_block = |f: fn(&BlockShape) -> usize| {
            let v: Vec<i32> = shapes.iter().map(|s| f(s) as i32).collect();
            // All readers take a single number as uint32. In arrays llama.cpp took int32 only until May
            // 2025 (b5353) and takes both since; Ollama takes both.
            if v.iter().all(|n| *n == v[0]) { Value::U32(v[0] as u32) } else { Value::i32_array(&v) }
        };
        let head_dim = Value::U32(model.hparams.head_dim as u32);
        let own_width = model.hparams.family.traits().experts.is_some_and(|e| e.own_width);
        let width = match model.hparams.experts {
            Some(_) if own_width => "expert_feed_forward_length",
            _ => "feed_forward_length",
        };
        let mut left = vec![
            (width, per_block(|s| s.n_ff)),
            ("attention.head_count", per_block(|s| s.n_head)),
            ("attention.head_count_kv", per_block(|s| s.n_head_kv)),
            ("attention.key_length", head_dim.clone()),
            ("attention.value_length", head_dim),
            ("rope.dimension_count", Value::U32(model.hparams.rope.n_rot as u32)),
        ];
        if model.hparams.experts.is_some() {
            left.push(("expert_count", per_block(|s| s.n_expert)));
        }
        let [old, new] = [model.hparams.family, output_arch].map(|f| f.traits().rope_factors);
        if old == RopeFactors::Long && new == RopeFactors::ByType && model.has_rope_factors() {
            left.push(("rope.scaling.type", Value::Str("longrope".into())));
        }
        if output_arch == Family::Step35 {
            let h = &model.hparams;
            // All blocks slide, over more than any context, for models that do not rotate half of the head.
            let slides = Value::bool_array(&vec![true; h.n_layer()]);
            left.extend([
                ("attention.sliding_window", Value::U32(STEP35_WINDOW)),
                ("attention.sliding_window_pattern", slides),
                ("rope.freq_base_swa", Value::F32(h.rope.freq_base)),
                ("expert_feed_forward_length", Value::U32(0)),
            ]);
        }
        ShapeKeys { left }
    }

    fn take(&mut self, suffix: &str) -> Option<Value> {
        let i = self.left.iter().position(|(k, _)| *k == suffix)?;
        Some(self.left.remove(i).1)
    }
}

/// Suffix of a pruned model's name, before and after the percentage that is removed.
const PRUNED: &str = " (pruned ";
const CLOSED: &str = "%)";

pub(super) fn renamed(name: &[u8], sparsity: f64) -> Vec<u8> {
    let name = original_name(name);
    let end = format!("{PRUNED}{:.0}{CLOSED}", sparsity * 100.0);
    // An empty name stays empty.
    if name.is_empty() { Vec::new() } else { [name, end.as_bytes()].concat() }
}

/// Name of the source model of a pruned model with the name `name`.
pub(crate) fn original_name(name: &[u8]) -> &[u8] {
    let Some(open) = name.strip_suffix(CLOSED.as_bytes()) else { return name };
    let n_digits = open.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let (before, _) = open.split_at(open.len() - n_digits);
    before.strip_suffix(PRUNED.as_bytes()).filter(|_| n_digits > 0).unwrap_or(name)
}

/// Size label such as `135M` or `1.2B`, as llama.cpp's converter writes it.
pub(crate) fn size_label(n_params: usize) -> String {
    let n = n_params as f64;
    let (scaled, unit) = match n {
        _ if n > 1e12 => (n / 1e12, "T"),
        _ if n > 1e9 => (n / 1e9, "B"),
        _ if n > 1e6 => (n / 1e6, "M"),
        _ => (n / 1e3, "K"),
    };
    if scaled < 9.5 { format!("{scaled:.1}{unit}") } else { format!("{scaled:.0}{unit}") }
}

pub(super) fn provenance(p: &Provenance) -> Vec<(String, Value)> {
    let text = |s: &str| Value::Str(s.into());
    let check = [
        ("check.tokens", Value::i32_array(&p.check_tokens)),
        ("check.nll", Value::f32_array(&p.check_nll)),
        ("check.exact", Value::Bool(p.check_exact)),
    ];
    [
        ("version", text(env!("CARGO_PKG_VERSION"))),
        ("source.sha256", text(&p.source_sha256)),
        ("sparsity", Value::F32(p.sparsity as f32)),
        ("sparsity_reached", Value::F32(p.sparsity_reached as f32)),
        ("method", text(&p.method)),
        ("calibration", text(&p.calibration)),
        ("seed", Value::U64(p.seed)),
    ]
    .into_iter()
    .chain(p.stages.iter().cloned())
    .chain(check.into_iter().filter(|_| !p.check_nll.is_empty()))
    .map(|(k, v)| (format!("putri.{k}"), v))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_the_converters() {
        assert_eq!(size_label(134_515_008), "135M");
        assert_eq!(size_label(81_400_000), "81M");
        assert_eq!(size_label(1_235_814_432), "1.2B");
        assert_eq!(size_label(70_553_706_496), "71B");
        assert_eq!(size_label(5_000), "5.0K");
    }

    #[test]
    fn names_do_not_pile_up() {
        assert_eq!(renamed(b"SmolLM2", 0.25), b"SmolLM2 (pruned 25%)");
        assert_eq!(renamed(b"SmolLM2 (pruned 25%)", 0.5), b"SmolLM2 (pruned 50%)");
        assert_eq!(renamed(b"Tiny (pruned by Jane)", 0.5), b"Tiny (pruned by Jane) (pruned 50%)");
        assert_eq!(renamed(b"x (pruned %)", 0.5), b"x (pruned %) (pruned 50%)");
        assert_eq!(renamed(b"", 0.5), b"");
        assert_eq!(renamed(b"caf\xe9", 0.1), b"caf\xe9 (pruned 10%)");
    }
}
