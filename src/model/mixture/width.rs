//! Width of the experts: which keys hold it in which architecture, and what else depends on it.

use super::Mixture;
use crate::gguf::Value;
use crate::model::ModelError;

/// Architectures whose experts have the width of `feed_forward_length`, as a dense feed-forward has.
const BY_FEED_FORWARD: [&str; 17] = [
    "llama",
    "mistral3",
    "granite",
    "granitemoe",
    "granitehybrid",
    "granite_swa",
    "minicpm",
    "minimax-m2",
    "minimax-01",
    "hunyuan-moe",
    "dbrx",
    "arctic",
    "phimoe",
    "olmoe",
    "jamba",
    "grok",
    "nomic-bert-moe",
];

/// Architectures whose shared expert has the width of `expert_shared_count` experts.
const SHARED_BY_COUNT: [&str; 19] = [
    "glm4moe",
    "deepseek",
    "deepseek2",
    "deepseek2-ocr",
    "deepseek32",
    "deepseek4",
    "mistral4",
    "glm-dsa",
    "glm5-next",
    "kimi-linear",
    "kimi-k3",
    "minimax-m3",
    "bailingmoe",
    "hy_v4",
    "dots1",
    "dots3note",
    "afmoe",
    "bailingmoe2",
    "cohere2moe",
];

/// Architectures whose shared expert has a width key of its own, which defaults to the experts' width.
const SHARED_BY_KEY: [&str; 7] =
    ["hy_v3", "exaone-moe", "laguna", "hunyuan-moe", "bailingmoe3", "bailingmoe2", "cohere2moe"];

/// Key of the width of shared experts.
const SHARED_KEY: &str = "expert_shared_feed_forward_length";

/// Reason why the experts of an architecture cannot be narrowed, if there is one.
fn refusal(arch: &str) -> Option<&'static str> {
    match arch {
        "llama4" => Some("its shared expert always has the width of the others"),
        "jamba" => Some("its dense layers have the same width key"),
        _ => None,
    }
}

impl Mixture {
    /// Width of the experts that is left if a share `share` of their neurons goes, rounded to the nearest that
    /// llama.cpp loads and that consists of whole quantisation blocks.
    ///
    /// # Errors
    /// [`ModelError`] if the architecture takes no other width, or the share rounds to nothing or to all.
    pub fn narrowed(&self, share: f64) -> Result<usize, ModelError> {
        let unusable = |problem: String| Err(ModelError::Unusable(problem));
        if let Some(why) = refusal(&self.arch) {
            return unusable(format!("architecture {}: experts cannot be narrowed: {why}", self.arch));
        }
        let width = self.layers[0].width;
        if self.layers.iter().any(|l| l.width != width) {
            return unusable("experts of different widths in different layers cannot be narrowed".into());
        }
        let possible = self.possible_widths();
        let wanted = (1.0 - share) * width as f64;
        let nearest = possible.iter().copied().min_by_key(|w| (*w as f64 - wanted).abs() as usize);
        let named = || possible.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        match nearest {
            None => unusable(format!(
                "experts of width {width} cannot be narrowed: no smaller width consists of whole blocks{}",
                if self.shared_by_count() { " and divides that of the shared expert" } else { "" }
            )),
            Some(w)
                if wanted < possible[0] as f64 / 2.0
                    || (width as f64 - wanted) * 2.0 < (width - w) as f64 =>
            {
                unusable(format!(
                    "{} % of {width} neurons rounds to none or all; possible widths are {}",
                    share * 100.0,
                    named()
                ))
            }
            Some(w) => Ok(w),
        }
    }

    /// Widths below the source's that llama.cpp loads, ascending.
    pub fn possible_widths(&self) -> Vec<usize> {
        let Some(layer) = self.layers.first() else { return Vec::new() };
        let down = self.file.find(&format!("blk.{}.ffn_down_exps.weight", layer.block));
        let block = down.map_or(1, |t| t.ty.block_size()).max(ROW);
        let shared = if self.shared_by_count() { Some(layer.width * self.n_shared()) } else { None };
        (block..layer.width)
            .step_by(block)
            .filter(|w| shared.is_none_or(|shared| shared.is_multiple_of(*w)))
            .collect()
    }

    fn n_shared(&self) -> usize {
        self.file.get_u32(&format!("{}.expert_shared_count", self.arch)).ok().flatten().unwrap_or(0)
    }

    /// Whether the shared expert's width is a number of experts, so that it would shrink with them.
    fn shared_by_count(&self) -> bool {
        let key = self.file.get(&format!("{}.{SHARED_KEY}", self.arch));
        SHARED_BY_COUNT.contains(&self.arch.as_str())
            && self.n_shared() > 0
            && !(SHARED_BY_KEY.contains(&self.arch.as_str()) && key.is_some())
    }

    /// Keys, without the architecture, and values that give the experts `width` neurons and leave all else as
    /// it is.
    pub fn width_keys(&self, width: usize) -> Vec<(&'static str, Value)> {
        let old = self.layers[0].width;
        let arch = self.arch.as_str();
        let new = |suffix: &'static str| {
            let value = match self.file.get(&format!("{arch}.{suffix}")) {
                // Some architectures have an entry per layer, 0 where there are no experts.
                Some(array @ Value::Array { .. }) => {
                    let all = array.as_unsigned_array().unwrap_or_default();
                    let all: Vec<i32> =
                        all.iter().map(|&w| if w == old as u64 { width as i32 } else { w as i32 }).collect();
                    Value::i32_array(&all)
                }
                _ => Value::U32(width as u32),
            };
            (suffix, value)
        };
        let mut keys = Vec::new();
        let by_feed_forward = BY_FEED_FORWARD.contains(&arch);
        let own = self.file.get(&format!("{arch}.expert_feed_forward_length")).is_some();
        // Grok reads either; the key of experts comes first.
        if by_feed_forward && !(arch == "grok" && own) {
            keys.push(new("feed_forward_length"));
        }
        if !by_feed_forward || own {
            keys.push(new("expert_feed_forward_length"));
        }
        let shared = format!("blk.{}.ffn_down_shexp.weight", self.layers[0].block);
        let shared = self.file.find(&shared).map(|t| t.ne[0]);
        if self.shared_by_count() {
            let count = old * self.n_shared() / width;
            keys.push(("expert_shared_count", Value::U32(count as u32)));
        } else if SHARED_BY_KEY.contains(&arch)
            && self.file.get(&format!("{arch}.{SHARED_KEY}")).is_none()
            && let Some(shared) = shared
        {
            keys.push((SHARED_KEY, Value::U32(shared as u32)));
        }
        keys
    }
}

/// Smallest step of widths in neurons: that of the block types, so that `ffn_down` may be quantised later.
const ROW: usize = 32;
